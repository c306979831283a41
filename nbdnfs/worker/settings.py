# SPDX-License-Identifier: LGPL-2.1-or-later
"""The plugin's key=value settings, checked once. Pure: reads and opens nothing.

The locked worker keeps this module in memory (see memlock.py), so it imports nothing heavy at the top.
"""

from __future__ import annotations

from nbdnfs import defaults, memlock
from nbdnfs.errors import ConfigError

TYPE_CHECKING = False  # typing's own, without typing
if TYPE_CHECKING:
    from collections.abc import Mapping

ENGINES = ("c", "libnfs-python")
DESCRIPTORS = range(1 << 20)
# settings of the C engine that are whole numbers, with what nbdnfs.engine.Engine takes
ENGINE_NUMBERS = {
    "region_fd": DESCRIPTORS,
    "region_pages": range(256, 1 << 24),
    "connections": range(1, 17),
    "stable_writes": range(2),
    "encrypt": range(2),
    "read_ahead_pages": range(4097),
    "soft_limit_ms": range(1 << 32),
    "gone_limit_ms": range(1 << 32),
    "silence_ms": range(1 << 31),
}
# How the C engine moves pages over NFSv3: on its own, or through libnfs as NFSv4 always does.
TRANSPORTS = ("wire", "libnfs")
LOCKS = ("wanted", "required", "off")
KEYS = (
    "url",
    "address",
    "engine",
    "lock",
    "realtime",
    "without",
    "owner",
    "owner_record",
    "control_fd",
    "clients_fd",
    "loop",
    "transport",
    *ENGINE_NUMBERS,
)


class WorkerSettings:
    """What the plugin was given. Read-only once initialized.

    url         in its canonical form (nfs_url)
    address     the server's numeric address; None where the plugin is to resolve the URL itself
    engine      one of ENGINES
    lock        one of LOCKS
    without     names of measures (memlock.NAMES) to skip
    numbers     nbdnfs.engine.Engine's numeric arguments
    control_fd  the control socket of a keeper's worker; None without a keeper
    clients_fd  the pipe on which `serve` is told of clients; None where nobody is
    loop        whether the engine serves the one client of nbdkit -s, in nbdkit's place
    transport   one of TRANSPORTS, for NFSv3
    owner       nbdnfs.engine.Engine's arguments about the owner record; empty where none is kept
    """

    __slots__ = (
        "address",
        "clients_fd",
        "control_fd",
        "engine",
        "lock",
        "loop",
        "numbers",
        "owner",
        "transport",
        "url",
        "without",
    )

    def __init__(
        self,
        url: str,
        address: str | None,
        engine: str,
        lock: str,
        without: tuple[str, ...],
        numbers: dict[str, int],
        control_fd: int | None,
        clients_fd: int | None,
        owner: dict[str, str | int],
        transport: str,
        loop: bool,
    ) -> None:
        self.url = url
        self.address = address
        self.engine = engine
        self.lock = lock
        self.without = without
        self.numbers = numbers
        self.control_fd = control_fd
        self.clients_fd = clients_fd
        self.owner = owner
        self.transport = transport
        self.loop = loop

    @property
    def is_nfs4(self) -> bool:
        return "version=4" in self.url.partition("?")[2].split("&")

    @property
    def is_through_libnfs(self) -> bool:
        """Whether transfers go through libnfs, not through the engine's own NFSv3."""
        return self.is_nfs4 or self.transport == "libnfs"


def parse(settings: Mapping[str, str]) -> WorkerSettings:
    """Check the plugin's settings. Raises ConfigError.

    With `address`, the URL has been checked and its specifiers replaced.
    """
    for key in settings:
        if key not in KEYS:
            raise ConfigError(f"'{key}' is not a setting of the nbdnfs plugin", _nearest(key))
    if "url" not in settings:
        raise ConfigError("the nbdnfs plugin needs url=", "for example url=nfs://nas/export/swap/box.swap")
    engine = _one_of("engine", settings.get("engine", ENGINES[0]), ENGINES)
    lock = _one_of("lock", settings.get("lock", LOCKS[0]), LOCKS)
    without = tuple(word for word in settings.get("without", "").split(",") if word)
    for word in without:
        _one_of("without", word, memlock.NAMES)
    if _one_of("realtime", settings.get("realtime", "yes"), ("yes", "no")) == "no":
        without += ("realtime",)
    numbers = {key: _number(key, settings[key], ENGINE_NUMBERS[key]) for key in ENGINE_NUMBERS if key in settings}
    numbers.setdefault("connections", defaults.CONNECTIONS)
    loop = bool(_number("loop", settings.get("loop", "0"), range(2)))
    if engine != "c" and loop:
        raise ConfigError(f"the engine '{engine}' has no loop", "leave loop out, or use the standard engine")
    if engine != "c" and numbers.get("encrypt"):
        raise ConfigError(f"the engine '{engine}' cannot encrypt", "leave encrypt out, or use the standard engine")
    control_fd, clients_fd = (
        _number(key, settings[key], DESCRIPTORS) if key in settings else None for key in ("control_fd", "clients_fd")
    )
    owner = _owner(settings.get("owner", "off"), settings.get("owner_record", ""))
    transport = _one_of("transport", settings.get("transport", TRANSPORTS[0]), TRANSPORTS)
    return WorkerSettings(
        settings["url"],
        settings.get("address"),
        engine,
        lock,
        without,
        numbers,
        control_fd,
        clients_fd,
        owner,
        transport,
        loop,
    )


def _owner(text: str, record: str) -> dict[str, str | int]:
    """What owner_record.plugin_settings writes: "BOOT-ID/REFRESH-MS", or "off". The file has been claimed before."""
    if text == "off":
        return {}
    boot, _, refresh_ms = text.partition("/")
    if len(boot) != 32 or any(digit not in "0123456789abcdef" for digit in boot) or not record:
        raise ConfigError(f"owner cannot be '{text}', with the record '{record}'", "leave it out, or set owner=off")
    return {
        "owner_path": f"/{record}",
        "owner_identity": f"\nboot {boot}\n",
        "owner_refresh_ms": _number("owner", refresh_ms, range(1, 1 << 24)),
    }


def _nearest(key: str) -> str:
    import difflib

    near = difflib.get_close_matches(key, KEYS, n=1)
    return f"did you mean '{near[0]}'?" if near else "the keys are " + ", ".join(KEYS)


def _number(key: str, text: str, allowed: range) -> int:
    if not text.isascii() or not text.isdigit() or int(text) not in allowed:
        raise ConfigError(f"{key} cannot be '{text}'", f"it is a number from {allowed[0]} to {allowed[-1]}")
    return int(text)


def _one_of(key: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise ConfigError(f"{key} cannot be '{value}'", "it is one of: " + ", ".join(allowed))
    return value
