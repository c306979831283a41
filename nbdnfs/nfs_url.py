# SPDX-License-Identifier: LGPL-2.1-or-later
"""NFS URLs, as libnfs spells them: nfs://HOST/EXPORT/PATH/FILE?version=3&nfsport=N&mountport=N&uid=N&gid=N

HOST is a name, an IPv4 address or an IPv6 address in brackets. `%H` stands for the host name and `%m` for the
machine id (machine-id(5)), so that one configuration serves many clients; `%%` is a percent sign.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nbdnfs.errors import NoHostError, UsageError

# libnfs has more options; what they set is either fixed here or has a setting of its own.
_OPTIONS = {
    "version": range(3, 5),
    "nfsport": range(1, 65536),
    "mountport": range(1, 65536),
    "uid": range(2**31),
    "gid": range(2**31),
    "tcp-syncnt": range(1, 128),
}
_NFS_PORT = 2049
_PROBE_TIMEOUT_S = 2.0
_EXAMPLE = "write it like nfs://nas/export/swap/%H.swap?version=3"


@dataclass(frozen=True)
class NfsUrl:
    """A parsed URL. `text` is the one for libnfs, with the specifiers replaced. `directory` includes the export."""

    text: str
    host: str
    directory: str
    name: str
    options: dict[str, int]

    @property
    def path(self) -> str:
        """The file's path on the server, export included."""
        return f"{self.directory.rstrip('/')}/{self.name}"

    @property
    def version(self) -> int:
        """The NFS version, 3 unless the URL says otherwise."""
        return self.options.get("version", 3)

    def resolve(self) -> str:
        """The numeric address of the server; of several, the first that accepts connections. Raises NoHostError.

        Called once, before memory is scarce: name resolution opens files and sockets and allocates.
        """
        try:
            found = socket.getaddrinfo(self.host, None, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:  # UnicodeError: a label is empty or too long
            raise NoHostError(
                f"the NFS server '{self.host}' is unknown: {getattr(error, 'strerror', None) or error}",
                "check the name, or write its address in the URL",
            ) from None
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        if len(addresses) > 1:
            return next((address for address in addresses if self.answers(address)), addresses[0])
        return addresses[0]

    def answers(self, address: str) -> bool:
        """Whether the address accepts connections on the NFS port. Waits for two seconds at most."""
        try:
            port = self.options.get("nfsport", _NFS_PORT)
            socket.create_connection((address, port), timeout=_PROBE_TIMEOUT_S).close()
        except OSError:
            return False
        return True


def machine_id(root: Path = Path("/")) -> str:
    """The machine id, machine-id(5). Raises UsageError where the system has none yet."""
    try:
        text = (root / "etc/machine-id").read_text().strip()
    except OSError:
        text = ""
    if not re.fullmatch(r"[0-9a-f]{32}", text):
        raise UsageError("%m in the URL: this machine has no id in /etc/machine-id", "run systemd-machine-id-setup")
    return text


def expand(text: str, root: Path = Path("/")) -> str:
    """Replace %H, %m and %%. Raises UsageError on any other specifier."""
    values: dict[str, Callable[[], str]] = {
        "H": socket.gethostname,
        "m": lambda: machine_id(root),
        "%": lambda: "%",
    }

    def value(match: re.Match[str]) -> str:
        if match[1] not in values:
            raise UsageError(f"'%{match[1]}' in the URL is not a specifier", "use %H, %m, or %% for a percent sign")
        return values[match[1]]()

    return re.sub(r"%(.?)", value, text)


def parse(text: str, root: Path = Path("/")) -> NfsUrl:
    """Check and split a URL; `root` is where /etc/machine-id is looked up. Raises UsageError."""
    text = expand(text, root)
    match = re.fullmatch(r"nfs://(\[[0-9a-fA-F:.%]+\]|[^/?#:@\[\]\s]+)(/[^?#]*)(?:\?([^?#]*))?", text)
    if match is None or any(ord(character) <= 32 for character in text):
        raise UsageError(f"'{text}' is not an NFS URL", _EXAMPLE)
    host, path, query = match[1].strip("[]"), match[2], match[3]
    directory, _, name = path.rpartition("/")
    if not name or name in (".", ".."):
        raise UsageError(f"the URL '{text}' does not name a file", _EXAMPLE)
    if ".." in directory.split("/"):
        raise UsageError(f"the URL '{text}' has '..' in its path", "write the path as the server exports it")
    options: dict[str, int] = {}
    for word in query.split("&") if query else ():
        key, value = _parse_option(word)
        if key in options:
            raise UsageError(f"'{key}' appears twice in the URL", "give it once")
        options[key] = value
    return NfsUrl(text=text, host=host, directory=directory or "/", name=name, options=options)


def _parse_option(word: str) -> tuple[str, int]:
    key, _, value = word.partition("=")
    if key not in _OPTIONS:
        import difflib  # only here: the keeper is resident

        near = difflib.get_close_matches(key, _OPTIONS, n=1)
        hint = f"did you mean '{near[0]}'?" if near else "the options are " + ", ".join(_OPTIONS)
        raise UsageError(f"'{key}' is not an option of an NFS URL", hint)
    allowed = _OPTIONS[key]
    if not re.fullmatch(r"[0-9]{1,10}", value) or int(value) not in allowed:
        raise UsageError(
            f"'{key}={value}' in the URL is not valid", f"{key} must be from {allowed[0]} to {allowed[-1]}"
        )
    return key, int(value)
