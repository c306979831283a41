# SPDX-License-Identifier: LGPL-2.1-or-later
"""The plugin's settings: checked once, then used to lock memory and to open the engine.

What this module imports stays in the locked worker (see memlock.py): the rest is imported where it is needed,
when somebody runs nbdkit by hand without an address, or when there is something to explain.
"""

from __future__ import annotations

import os
import sys
import time

from nbdnfs import memlock
from nbdnfs.engine import Engine, forget_services, keep_thread_states, libnfs_version, region_version
from nbdnfs.errors import ConfigError

TYPE_CHECKING = False  # typing's own, without typing
if TYPE_CHECKING:
    from collections.abc import Mapping

    from nbdnfs.reference import Engine as ReferenceEngine

ENGINES = ("c", "libnfs-python")
DESCRIPTORS = range(1 << 20)
# settings of the C engine that are whole numbers, with what nbdnfs.engine.Engine takes
ENGINE_NUMBERS = {
    "region_fd": DESCRIPTORS,
    "region_pages": range(256, 1 << 24),
    "connections": range(1, 17),
    "stable_writes": range(2),
    "read_ahead_pages": range(4097),
    "soft_limit_ms": range(1 << 32),
    "gone_limit_ms": range(1 << 32),
    "silence_ms": range(1 << 31),
}
# See docs/decisions/0013.
CONNECTIONS = 4
LOCKS = ("wanted", "required", "off")
# How the C engine moves pages over NFSv3: on its own, or through libnfs as NFSv4 always does.
TRANSPORTS = ("wire", "libnfs")
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
    "transport",
    *ENGINE_NUMBERS,
)

# What a standby and its keeper say to each other over the control socket; see wait_for_turn. After GO may follow the
# server's address, where that has changed.
READY, GO = b"r", b"g"
_WORD_BYTES = 128
# How a worker of a keeper's ends when another machine has taken its file; no status of sysexits(3). The keeper then
# lets the kernel's requests fail.
LOST_STATUS = 80

# What the engine allocates when it opens, on top of memlock.HEAP_BYTES: a standby has it touched before.
ENGINE_HEAP_BYTES = 5 * 1024 * 1024 // 2
_RETRY_PAUSES_S = (0.2, 0.5, 1)
# How long an attempt may take: each that was too short makes the next one longer.
_CONNECT_TIMEOUT_S, _CONNECT_TIMEOUT_MAX_S = 15, 600

# The kernel's requests are far smaller; nbdkit itself allows 64 MiB (docs/nbdkit-protocol.pod).
MAX_REQUEST_BYTES = 32 * 1024 * 1024

# How the names of the files begin whose code a worker runs. nbdkit's TLS libraries are not among them: they are
# most of what it maps, and a Unix socket needs none.
CODE = ("nbdkit", "libpython3", "libc.so", "ld-linux", "libnfs.so", "_engine.", "_memlock.")


class WorkerConfig:
    """What the plugin was told. `address` is the server's, resolved before anything is locked or short."""

    __slots__ = ("address", "control_fd", "engine", "lock", "numbers", "owner", "transport", "url", "without")

    def __init__(
        self,
        url: str,
        address: str,
        engine: str,
        lock: str,
        without: tuple[str, ...],
        numbers: dict[str, int],
        control_fd: int | None = None,
        owner: dict[str, str | int] | None = None,
        transport: str = TRANSPORTS[0],
    ) -> None:
        """owner  what nbdnfs.engine.Engine is to know of the owner record; nothing when none is kept"""
        self.control_fd = control_fd
        self.owner = owner or {}
        self.transport = transport
        self.url = url
        self.address = address
        self.engine = engine
        self.numbers = numbers
        self.lock = lock
        self.without = without

    def prepare_memory(self) -> None:
        """Before there are threads. Raises ConfigError where a measure is required and cannot be had."""
        if self.lock != "off":
            self._heed(memlock.prepare(self.without))

    def lock_memory(self) -> None:
        """In the process that serves, before its threads start: they inherit some of it. Raises as above."""
        if self.lock != "off":
            self._heed(memlock.lock(CODE, skip=self.without, one_cpu=True))

    def settle_memory(self) -> None:
        """When the engine is open. Raises as above."""
        if self.lock != "off":
            self._heed(memlock.settle(CODE, heap_bytes=self._heap_bytes(), skip=self.without))

    def wait_for_turn(self) -> None:
        """A worker with a control socket is a standby: ready but for the server and the region. It says so, and
        waits for the word of its keeper or of the next one, which finds it parked; or it ends, when nobody has the
        other end of the control socket any more. Taking over then needs next to no memory.
        """
        if self.control_fd is None:
            return
        _refuse_region(self.numbers.get("region_fd", -1))
        if self.lock != "off":
            heap_bytes = self._heap_bytes() + ENGINE_HEAP_BYTES
            self._heed(memlock.settle(CODE, heap_bytes=heap_bytes, skip=self.without))
        # nbdkit -s asks for a SIGTERM when its parent ends; ours ends by the control socket, or goes on
        memlock.outlive_parent()
        try:
            os.write(self.control_fd, READY)
            word = os.read(self.control_fd, _WORD_BYTES)
        except OSError:
            word = b""
        if word[:1] != GO:
            os._exit(0)
        self.address = word[1:].decode() or self.address

    def _heap_bytes(self) -> int:
        """What libnfs takes for calls and answers, where those go through it, is on top of what nbdkit takes."""
        through_libnfs = "version=4" in self.url.partition("?")[2] or self.transport == "libnfs"
        return memlock.HEAP_BYTES + (memlock.LIBNFS_HEAP_BYTES if through_libnfs else 0)

    def _heed(self, measures: list[memlock.Measure]) -> None:
        if self.lock == "required":
            memlock.require(measure for measure in measures if measure.name not in self.without)
        else:
            memlock.report(measures)

    def open_engine(self) -> Engine | ReferenceEngine:
        """Connect to the server and open the file. Raises NbdnfsError.

        A worker of a keeper's has the kernel's requests waiting: it tries for as long as nobody answers, and its
        keeper lives, without whom the kernel never gets to know it.
        """
        failures = 0
        while True:
            try:
                engine = self._open_engine(min(_CONNECT_TIMEOUT_S << failures, _CONNECT_TIMEOUT_MAX_S))
            except OSError as error:
                if self.control_fd is None or getattr(error, "phase", "") != "connect":
                    from nbdnfs import diagnose, url

                    raise diagnose.explain(error, url.parse(self.url), self.address) from None
            else:
                if self.control_fd is not None:
                    os.close(self.control_fd)  # from here on its connection tells
                return engine
            if self.control_fd is not None and _is_closed(self.control_fd):
                os._exit(0)
            if failures == 0:
                print("nbdnfs: the server does not answer; trying again until it does", file=sys.stderr, flush=True)
            time.sleep(_RETRY_PAUSES_S[min(failures, len(_RETRY_PAUSES_S) - 1)])
            failures += 1

    def _open_engine(self, connect_timeout_s: int) -> Engine | ReferenceEngine:
        if self.engine == "libnfs-python":
            from nbdnfs.reference import Engine as Reference

            return Reference(self.url, self.address)
        keep_thread_states()
        forget_services()
        numbers = {"connections": CONNECTIONS, **self.numbers}
        status = LOST_STATUS if self.control_fd is not None else 0
        return Engine(
            self.url,
            self.address,
            connect_timeout_s=connect_timeout_s,
            exit_status_when_stolen=status,
            transport=self.transport,  # type: ignore[arg-type]
            **numbers,  # type: ignore[arg-type]
            **self.owner,  # type: ignore[arg-type]
        )


def parse(settings: Mapping[str, str]) -> WorkerConfig:
    """Check the plugin's key=value settings. Raises NbdnfsError.

    `address` comes from whoever starts the worker, who has checked the URL; without it this asks the resolver.
    """
    for key in settings:
        if key not in KEYS:
            raise ConfigError(f"'{key}' is no setting of the nbdnfs plugin", _nearest(key))
    if "url" not in settings:
        raise ConfigError("the nbdnfs plugin needs url=", "for example url=nfs://nas/export/swap/box.swap")
    kind = _one_of("engine", settings.get("engine", ENGINES[0]), ENGINES)
    lock = _one_of("lock", settings.get("lock", LOCKS[0]), LOCKS)
    without = tuple(word for word in settings.get("without", "").split(",") if word)
    for word in without:
        _one_of("without", word, memlock.NAMES)
    if _one_of("realtime", settings.get("realtime", "yes"), ("yes", "no")) == "no":
        without += ("realtime",)
    url, address = settings["url"], settings.get("address")
    if address is None:
        url, address = check_url(url)
    numbers = {key: _number(key, settings[key], ENGINE_NUMBERS[key]) for key in ENGINE_NUMBERS if key in settings}
    control_fd = _number("control_fd", settings["control_fd"], DESCRIPTORS) if "control_fd" in settings else None
    owner = _owner(settings.get("owner", "off"), settings.get("owner_record", ""))
    transport = _one_of("transport", settings.get("transport", TRANSPORTS[0]), TRANSPORTS)
    return WorkerConfig(url, address, kind, lock, without, numbers, control_fd, owner, transport)


def check_url(text: str) -> tuple[str, str]:
    """The URL as libnfs is to get it, and the server's address. Raises NbdnfsError."""
    from nbdnfs import diagnose, url

    parsed = url.parse(text)
    diagnose.refuse_unsupported(parsed, libnfs_version)
    return parsed.text, parsed.resolve()


def _is_closed(control_fd: int) -> bool:
    """Whether nobody has the other end any more. The keeper says nothing after the word."""
    os.set_blocking(control_fd, False)
    try:
        return os.read(control_fd, 1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def _refuse_region(descriptor: int) -> None:
    """ConfigError when the region is another version's: said before the worker that knows it makes way.

    nbdnfs/engine/region.h: struct region_header begins with eight bytes of magic and the version.
    """
    header = os.pread(descriptor, 12, 0) if descriptor >= 0 else b""
    found = int.from_bytes(header[8:12], sys.byteorder)
    if header[:6] == b"nbdnfs" and found != region_version:
        raise ConfigError(
            f"the region that is in use has version {found}, this nbdnfs has version {region_version}",
            "nbdnfs down and up again, or install the version that was there before",
        )


def _owner(text: str, record: str) -> dict[str, str | int]:
    """owner_record.plugin_settings, or off. Whoever starts us has claimed the file."""
    if text == "off":
        return {}
    boot, _, refresh_ms = text.partition("/")
    if len(boot) != 32 or any(digit not in "0123456789abcdef" for digit in boot) or not record:
        raise ConfigError(f"owner cannot be '{text}', with the record '{record}'", "by hand it is off")
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
