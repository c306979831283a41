# SPDX-License-Identifier: LGPL-2.1-or-later
"""NFS URLs: nfs://HOST/EXPORT/PATH/FILE?version=3&nfsport=N&mountport=N&uid=N&gid=N

HOST is a name, an IPv4 address or an IPv6 address in brackets. Link-local addresses (fe80::1) are refused: no version
of libnfs up to 7.0 hands their zone on to connect().

A percent sign begins one of these, and nothing else:

    %XX   with two hexadecimal digits: this byte of the path (RFC 3986, 2.1): %20 is a space, %3F a question mark,
          %23 a number sign, %25 a percent sign
    %H    the host name, so that one configuration serves many clients
    %m    the machine id, machine-id(5), hashed
    %M    the MAC address of the boot interface, for machines that keep nothing
    %u    the product UUID of the firmware
    %%    a percent sign

specifiers.py has the rules. No two look alike, because none of H, m, M and u is a hexadecimal digit. A path is bytes;
as text it is UTF-8, and surrogates stand for the bytes that are not (PEP 383).
"""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nbdnfs.errors import NoHostError, UsageError

# libnfs has more options; what they set is either fixed here or has a setting of its own.
_OPTIONS = {
    "version": range(3, 5),
    "nfsport": range(1, 65536),
    "mountport": range(1, 65536),
    "uid": range(2**32),
    "gid": range(2**32),
    "tcp-syncnt": range(1, 128),
}
_NFS_PORT = 2049
# RFC 1833: where an NFSv3 client without a port in its URL asks first
_PORTMAPPER_PORT = 111
# How long to wait for a connection to any of a name's addresses, and for one before the next is tried beside it
# (RFC 8305, 5).
_PROBE_TIMEOUT_S = 2.0
_NEXT_PROBE_S = 0.25
# RFC 1813: MNTPATHLEN. NAME_MAX is 255 bytes nearly everywhere.
_DIRECTORY_BYTES_MAX = 1024
_NAME_BYTES_MAX = 255

# The functions of specifiers.py.
_SPECIFIERS = {"H": "host_name", "m": "machine_id", "M": "boot_mac", "u": "product_uuid"}

_EXAMPLE = "write it like nfs://nas/export/swap/%H.swap?version=3"
_ESCAPES = "in a path, write a space as %20, ? as %3F, # as %23 and % as %25 or %%"
_ESCAPE = re.compile(r"%([0-9A-Fa-f]{2}|.?)", re.DOTALL)
_HOST = r"\[[^\]/?#@\s]+\]|[^/?#:@\[\]\s]+"
_IPV6 = re.compile(r"\[([0-9A-Fa-f:.]+)(%[^\]]*)?\]")
_LINK_LOCAL = re.compile(r"fe[89ab][0-9a-f]:", re.IGNORECASE)  # fe80::/10, RFC 4291
_NO_LINK_LOCAL = "give the server a global or a unique local address (fd00::/8), and use that"
# What stands for itself in the canonical form: RFC 3986's pchar.
_PLAIN = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~!$&'()*+,;=:@")


@dataclass(frozen=True)
class NfsUrl:
    """A parsed URL.

    text       the canonical form, for the engine and for `parse`: ASCII, specifiers replaced, bytes escaped
    host       a name or an address, without brackets
    directory  the export and what is below it, up to the file
    name       the file's
    """

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

    def sibling(self, name: str) -> NfsUrl:
        """The URL of another name in the same directory."""
        return build(self.host, self.directory, name, self.options)

    def resolve(self) -> str:
        """The numeric address of the server; of several, one that accepts connections. Raises NoHostError.

        Called once, before memory is scarce: name resolution opens files and sockets and allocates. Several addresses
        are tried one beside the other, for two seconds in all; where none accepts a connection, it is the first.
        """
        try:
            found = socket.getaddrinfo(self.host, None, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:  # UnicodeError: a label is empty or too long
            raise NoHostError(
                f"the NFS server '{self.host}' is unknown: {getattr(error, 'strerror', None) or error}",
                "check the name, or write its address in the URL",
            ) from None
        known = dict.fromkeys(str(entry[4][0]) for entry in found)
        addresses = [address for address in known if not _LINK_LOCAL.match(address)]
        if not addresses:
            raise NoHostError(f"the NFS server '{self.host}' has a link-local address only", _NO_LINK_LOCAL)
        if len(addresses) > 1:
            return _first_to_accept(addresses, self._first_port) or addresses[0]
        return addresses[0]

    def answers(self, address: str) -> bool:
        """Whether the address accepts connections on the first port that a client uses. Waits for two seconds."""
        return _first_to_accept([address], self._first_port) is not None

    @property
    def _first_port(self) -> int:
        if self.version == 4:
            return self.options.get("nfsport", _NFS_PORT)
        return self.options.get("nfsport", self.options.get("mountport", _PORTMAPPER_PORT))


def _first_to_accept(addresses: Sequence[str], port: int) -> str | None:
    """The first address that accepts a connection to `port`; None when none does in time."""
    import select  # only here: the keeper is resident

    poll = select.poll()
    waiting: dict[int, tuple[socket.socket, str]] = {}
    left, ends_s = list(addresses), time.monotonic() + _PROBE_TIMEOUT_S
    try:
        while (left or waiting) and time.monotonic() < ends_s:
            if left and (attempt := _begin_to_connect(address := left.pop(0), port)) is not None:
                waiting[attempt.fileno()] = (attempt, address)
                poll.register(attempt, select.POLLOUT)
            pause_s = min(_NEXT_PROBE_S if left else _PROBE_TIMEOUT_S, ends_s - time.monotonic())
            for descriptor, _ in poll.poll(max(0, pause_s * 1000)) if waiting else ():
                attempt, address = waiting.pop(descriptor)
                poll.unregister(descriptor)
                with attempt:
                    if attempt.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0:
                        return address
        return None
    finally:
        for attempt, _ in waiting.values():
            attempt.close()


def _begin_to_connect(address: str, port: int) -> socket.socket | None:
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(
            address, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST
        )[0]
        attempt = socket.socket(family, kind, protocol)
    except OSError:  # this machine may have no IPv6
        return None
    attempt.setblocking(False)
    try:
        attempt.connect(target)
    except BlockingIOError:
        pass
    except OSError:
        attempt.close()
        return None
    return attempt


def _expand(text: str, root: Path) -> str:
    """Replace the specifiers and decode the escapes. Raises UsageError on any other percent sign."""

    def value(match: re.Match[str]) -> bytes:
        word = match[1]
        if len(word) == 2:
            return bytes.fromhex(word)
        if word == "%":
            return b"%"
        if word not in _SPECIFIERS:
            raise UsageError(
                f"'%{word}' in the URL is not a specifier",
                "use %H, %m, %M, %u, %20 and the like for a byte, or %% for a percent sign",
            )
        from nbdnfs import specifiers  # only here: the keeper is resident

        text: str = getattr(specifiers, _SPECIFIERS[word])(root)
        return text.encode(errors="surrogateescape")

    pieces, at = [], 0
    for match in _ESCAPE.finditer(text):
        pieces += [text[at : match.start()].encode(errors="surrogateescape"), value(match)]
        at = match.end()
    pieces.append(text[at:].encode(errors="surrogateescape"))
    return b"".join(pieces).decode(errors="surrogateescape")


def quote(name: str) -> str:
    """The canonical form of one component of a path."""
    data = name.encode(errors="surrogateescape")
    return "".join(chr(byte) if byte in _PLAIN else f"%{byte:02X}" for byte in data)


def build(host: str, directory: str, name: str, options: Mapping[str, int]) -> NfsUrl:
    """The URL of these parts; `parse` of its text is the same URL. UsageError: no server can have such a path."""
    parts = [part for part in directory.split("/") if part not in ("", ".")]
    directory = "/" + "/".join(parts)
    place = f"[{host}]" if ":" in host else host.replace("%", "%25")
    query = "&".join(f"{key}={value}" for key, value in options.items())
    text = f"nfs://{place}{'/'.join(['', *map(quote, parts), quote(name)])}{'?' if query else ''}{query}"
    if name in ("", ".", ".."):
        raise UsageError(f"the URL '{text}' does not name a file", _EXAMPLE)
    if ".." in parts:
        raise UsageError(f"the URL '{text}' has '..' in its path", "write the path as the server exports it")
    if "\0" in directory + name or "/" in name:
        raise UsageError(f"the URL '{text}' has a NUL or a slash in a name", "no server can have such a file")
    for what, value, most in (("directory", directory, _DIRECTORY_BYTES_MAX), ("name", name, _NAME_BYTES_MAX)):
        if len(value.encode(errors="surrogateescape")) > most:
            raise UsageError(f"the URL '{text}' is too long", f"a {what} has {most} bytes at most")
    return NfsUrl(text=text, host=host, directory=directory, name=name, options=dict(options))


def parse(text: str, root: Path = Path("/")) -> NfsUrl:
    """Check and split a URL; `root` is where specifiers are looked up: /etc, /proc, /sys, /run.

    UsageError. UnavailableError: %M or %H, and no network or no host name yet."""
    match = re.fullmatch(rf"nfs://({_HOST})(/[^?#]*)(?:\?([^?#]*))?", text)
    if match is None or not all(map(_is_allowed, text)):
        hint = _EXAMPLE if match is None and not re.match(rf"nfs://({_HOST})/", text) else _ESCAPES
        raise UsageError(f"'{text}' is not an NFS URL", hint)
    components = [_expand(component, root) for component in match[2].split("/")[1:]]
    if any("/" in component for component in components):
        raise UsageError(f"the URL '{text}' has a slash in a name (%2F)", "write the path as the server exports it")
    options: dict[str, int] = {}
    for word in match[3].split("&") if match[3] else ():
        key, value = _parse_option(word)
        if key in options:
            raise UsageError(f"'{key}' appears twice in the URL", "give it once")
        options[key] = value
    return build(_parse_host(match[1], root), "/" + "/".join(components[:-1]), components[-1], options)


def _is_allowed(character: str) -> bool:
    """No blanks, and no surrogates but those that stand for a byte (PEP 383)."""
    return ord(character) > 32 and not ("\ud800" <= character < "\udc80" or "\udd00" <= character < "\ue000")


def parse_recorded(text: str) -> NfsUrl:
    """The URL of a keeper's record. Earlier versions left a percent sign in it as it was. Raises UsageError."""
    try:
        return parse(text)
    except UsageError:
        return parse(re.sub(r"%(?![0-9A-Fa-f]{2})", "%%", text))


def _parse_host(text: str, root: Path) -> str:
    if not text.startswith("["):
        host = _expand(text, root)
        if not re.fullmatch(_HOST, host) or not host.isprintable():
            raise UsageError(f"'{text}' in the URL is not the name of a host", _EXAMPLE)
        return host
    address = _IPV6.fullmatch(text)
    if address is None:
        raise UsageError(f"'{text}' in the URL is not an IPv6 address", "write it like nfs://[2001:db8::1]/export/file")
    if address[2] is not None or _LINK_LOCAL.match(address[1]):
        raise UsageError(f"'{text}' in the URL is a link-local address, which cannot be connected to", _NO_LINK_LOCAL)
    return address[1]


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
