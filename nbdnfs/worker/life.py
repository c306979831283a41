# SPDX-License-Identifier: LGPL-2.1-or-later
"""A worker's life inside nbdkit: prepare, lock memory, wait as a standby, open the engine, settle.

The plugin calls these in this order. What this module imports stays in the locked worker (see memlock.py): the rest is
imported where it is needed, when nbdkit is run by hand without an address, or to explain an error.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
import time

from nbdnfs import memlock, region
from nbdnfs.engine import Engine, forget_services, keep_thread_states, libnfs_version, warm_cipher
from nbdnfs.errors import ConfigError
from nbdnfs.sizes import KERNEL_PAGE_BYTES, SLOT_BYTES
from nbdnfs.worker import protocol

TYPE_CHECKING = False  # typing's own, without typing
if TYPE_CHECKING:
    from nbdnfs.errors import NbdnfsError
    from nbdnfs.nfs_url import NfsUrl
    from nbdnfs.own_root import Outside
    from nbdnfs.worker.reference_engine import Engine as ReferenceEngine
    from nbdnfs.worker.settings import WorkerSettings

# What the engine allocates when it opens, on top of what is free then: a standby touches it beforehand.
ENGINE_HEAP_BYTES = 5 * 1024 * 1024 // 2

# What the loop takes (nbdnfs/engine/nbd/loop.c), and what libnfs takes to connect again. nbdkit has no threads then.
LOOP_HEAP_BYTES = 5 * 1024 * 1024 // 2

_RETRY_PAUSES_S = (0.2, 0.5, 1)
# How long an attempt to connect may take: each that was too short makes the next one longer.
_CONNECT_TIMEOUT_S, _CONNECT_TIMEOUT_MAX_S = 15, 600

# How long a worker without a keeper goes on with what the server puts off (NFS3ERR_JUKEBOX, NFS4ERR_DELAY).
PUT_OFF_LIMIT_S = 120.0

# How the names of the files begin whose code a worker runs. nbdkit's TLS libraries are not among them: they are
# most of what it maps, and a Unix socket needs none.
CODE = ("nbdkit", "libpython3", "libc.so", "ld-linux", "libnfs.so", "_engine.", "_memlock.", "_own_root.")
# Of these a worker runs a few pages, and only to encrypt: warm_cipher() touches these, and no others are locked.
_CIPHERS = ("libsodium.so", "libnettle.so")


def check_url(text: str) -> tuple[str, str]:
    """The URL in its canonical form, and the server's address. Raises NbdnfsError, also where libnfs is too old."""
    from nbdnfs import nfs_url
    from nbdnfs.nas import explain

    parsed = nfs_url.parse(text)
    explain.refuse_unsupported(parsed, libnfs_version)
    return parsed.text, parsed.resolve()


class Worker:
    """One worker. Its methods are called once each, in the order in which they stand, by the main thread."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        self._url = settings.url
        self._address = settings.address or ""
        self._outside: Outside | None = None
        self._client_fd = -1

    def prepare(self) -> None:
        """Before there are threads: check the URL, tune malloc and stacks. Raises NbdnfsError.

        ConfigError: a measure is required and cannot be had.
        """
        if self._settings.control_fd is not None:
            memlock.hold_end_signals()  # nbdkit's handler must never see one: it would not be forgotten
        if self._settings.loop:
            self._client_fd = _client_of_nbdkit()
        if self._settings.address is None:
            self._url, self._address = check_url(self._url)
        elif self._settings.is_nfs4:
            from nbdnfs.nas import explain

            explain.refuse_unsupported(self._parsed_url(), libnfs_version)
        if self._settings.lock != "off":
            self._apply(memlock.prepare(self._settings.without))

    def lock_memory(self) -> None:
        """In the process that serves, before its threads start: they inherit some of it. Raises ConfigError.

        Also the last time that glibc reads nsswitch.conf: a standby that takes over opens no file, since the root may
        be on a server that does not answer.
        """
        if self._settings.control_fd is not None:
            memlock.end_at_once()  # nothing is lost by that: the region stays, and the keeper has another worker
        if self._settings.engine == "c":
            forget_services()
        if self._settings.lock != "off":
            memlock.use_locale_c()
            self._apply(memlock.lock(CODE, skip=self._settings.without, one_cpu=True))
        try:
            if self._settings.control_fd is not None:
                from nbdnfs.own_root import Outside, OwnRoot  # not for a worker without a keeper

                self._outside = Outside()
                OwnRoot(lambda reason: None).enter()  # the threads to come inherit it; the keeper says where it cannot
            memlock.drop_privileges()
        except OSError as error:
            raise ConfigError(
                f"capabilities cannot be given up: {error.strerror}", "run it without a sandbox"
            ) from None

    def wait_until_activated(self) -> None:
        """As a standby: say READY, and wait for the keeper's ACTIVATE. Without a control socket, return at once.

        All memory is in place by then, so that taking over needs next to none. No path that is looked up from then on
        leads to the root, which may be on a server that is away: glibc looks for nscd(8), for one. The keeper that
        activates may be the next one, which finds the standby parked. The process exits when no process has the other
        end of the control socket. Raises ConfigError.
        """
        control_fd = self._settings.control_fd
        if control_fd is None:
            return
        region_fd = self._settings.numbers.get("region_fd", -1)
        _refuse_region(region_fd)
        version = region.version_of(region_fd) if region_fd >= 0 else None
        if version is None and self._settings.numbers.get("encrypt"):
            warm_cipher(0)  # the worker that lays it out may be of an earlier version
        elif version in region.ENCRYPTED:
            warm_cipher(version)
        if self._settings.lock != "off":
            heap_bytes = self._heap_bytes() + ENGINE_HEAP_BYTES
            self._settle(heap_bytes)
        # nbdkit -s asks for a SIGTERM when its parent ends; a standby ends by the control socket, or goes on
        memlock.outlive_parent()
        try:
            os.write(control_fd, protocol.READY)
            message = os.read(control_fd, protocol.MESSAGE_BYTES_MAX)
        except OSError:
            message = b""
        if not protocol.is_activation(message):
            os._exit(0)
        self._address = protocol.address_in(message) or self._address

    def open_engine(self) -> Engine | ReferenceEngine:
        """Connect to the server and open the file. Raises NbdnfsError.

        A keeper's worker has the kernel's requests waiting: it retries for as long as the server does not answer, or
        asks to try again later. It exits when its keeper ends meanwhile, because the kernel never gets its socket then.
        Without a keeper, only what is to be tried again later is retried, for two minutes.
        """
        control_fd = self._settings.control_fd
        failures, gives_up_at_s = 0, time.monotonic() + PUT_OFF_LIMIT_S
        while True:
            try:
                engine = self._open_engine(min(_CONNECT_TIMEOUT_S << failures, _CONNECT_TIMEOUT_MAX_S))
            except OSError as error:
                is_put_off = error.errno == errno.EAGAIN and (
                    control_fd is not None or time.monotonic() < gives_up_at_s
                )
                if not is_put_off and (control_fd is None or getattr(error, "phase", "") != "connect"):
                    raise self._explained(error) from None
            else:
                if self._outside is not None:
                    self._outside.end()
                if control_fd is not None:
                    os.close(control_fd)  # from here on the NBD connection says whether this worker lives
                return engine
            if control_fd is not None and _is_closed(control_fd):
                os._exit(0)
            if failures == 0:
                does = "asks to try again later" if is_put_off else "does not answer"
                print(f"nbdnfs: the server {does}; trying again until it does", file=sys.stderr, flush=True)
            time.sleep(_RETRY_PAUSES_S[min(failures, len(_RETRY_PAUSES_S) - 1)])
            failures += 1

    def settle_memory(self) -> None:
        """When the engine is open. Raises ConfigError."""
        if self._settings.lock != "off":
            self._settle(self._heap_bytes())

    def note_client(self, change: bytes) -> None:
        """Tell `serve` of a client: CLIENT_CAME or CLIENT_WENT. In any thread."""
        if self._settings.clients_fd is None:
            return
        try:
            os.write(self._settings.clients_fd, change)
        except OSError:
            return  # it has ended, and nbdkit is about to

    def serve(self, engine: Engine | ReferenceEngine) -> None:
        """With `loop`: serve the client of `nbdkit -s` here, until it disconnects, and end the process.

        nbdkit would begin to serve where this returns. It does not count on that: this process serves one client.
        """
        if not self._settings.loop:
            return
        assert isinstance(engine, Engine)
        status = 0
        try:
            engine.serve(self._client_fd)
        except OSError as error:
            print(f"nbdnfs: serving ended: {error.strerror}", file=sys.stderr, flush=True)
            status = 1
        engine.close()
        os._exit(status)

    def _explained(self, error: OSError) -> NbdnfsError:
        def explain_it() -> NbdnfsError:
            from nbdnfs.nas import explain

            return explain.open_error(error, self._parsed_url(), self._address)

        return explain_it() if self._outside is None else self._outside.run(explain_it)

    def _parsed_url(self) -> NfsUrl:
        from nbdnfs import nfs_url

        return nfs_url.parse_recorded(self._url)  # its keeper may be of an earlier version

    def _heap_bytes(self) -> int:
        """The loop's or nbdkit's own, and what libnfs takes for calls and answers where transfers go through it."""
        more = memlock.LIBNFS_HEAP_BYTES if self._settings.is_through_libnfs else 0
        return more + (LOOP_HEAP_BYTES if self._settings.loop else memlock.HEAP_BYTES)

    def _settle(self, heap_bytes: int) -> None:
        self._apply(memlock.settle(CODE, heap_bytes=heap_bytes, touched=_CIPHERS, skip=self._settings.without))

    def _apply(self, measures: list[memlock.Measure]) -> None:
        """Raise or report what does not hold, as the setting `lock` says."""
        if self._settings.lock == "required":
            memlock.require(measure for measure in measures if measure.name not in self._settings.without)
        else:
            memlock.report(measures)

    def _open_engine(self, connect_timeout_s: int) -> Engine | ReferenceEngine:
        if self._settings.engine == "libnfs-python":
            from nbdnfs.worker.reference_engine import Engine as Reference

            return Reference(self._url, self._address)
        keep_thread_states()
        return Engine(
            self._url,
            self._address,
            connect_timeout_s=connect_timeout_s,
            exit_status_when_stolen=protocol.STOLEN_STATUS if self._settings.control_fd is not None else 0,
            transport=self._settings.transport,  # type: ignore[arg-type]
            clear_bytes=max(SLOT_BYTES, KERNEL_PAGE_BYTES),
            **self._settings.numbers,  # type: ignore[arg-type]
            **self._settings.owner,  # type: ignore[arg-type]
        )


def _client_of_nbdkit() -> int:
    """A copy of the socket that `nbdkit -s` has on its stdin; before it puts it elsewhere. Raises ConfigError."""
    if not stat.S_ISSOCK(os.fstat(0).st_mode):
        raise ConfigError("loop=1 serves the one client of nbdkit -s, and stdin is no socket", "leave loop out")
    return os.dup(0)


def _is_closed(control_fd: int) -> bool:
    """Whether no process has the other end any more. The keeper sends nothing after ACTIVATE."""
    os.set_blocking(control_fd, False)
    try:
        return os.read(control_fd, 1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def _refuse_region(descriptor: int) -> None:
    """ConfigError when the region has another version's layout, before the worker that knows it is replaced."""
    found = region.version_of(descriptor) if descriptor >= 0 else None
    if found is not None and found not in region.VERSIONS:
        raise ConfigError(
            f"the region that is in use has version {found},"
            f" this nbdnfs knows {region.VERSIONS[0]} to {region.VERSIONS[-1]}",
            "nbdnfs down and up again, or install the version that was there before",
        )
