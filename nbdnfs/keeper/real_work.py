# SPDX-License-Identifier: LGPL-2.1-or-later
"""interfaces.Work on a real machine: nbdkit, and helpers as programs of their own.

The keeper has its memory locked and must not wait for its own device. So mkswap and swapon, the resolver and libnfs run
elsewhere.
"""

from __future__ import annotations

import os

from nbdnfs import programs
from nbdnfs import region as shared_region
from nbdnfs.keeper.helper_process import HelperProcess
from nbdnfs.keeper.worker_handle import WorkerHandle, recipe
from nbdnfs.kernel import swap_area
from nbdnfs.nas import owner_record
from nbdnfs.worker import nbdkit

TYPE_CHECKING = False  # typing's own, without typing
if TYPE_CHECKING:
    import mmap

    from nbdnfs.config import Config
    from nbdnfs.kernel.nbd_device import Attached

_ADDRESS_BYTES_MAX = 128
_PROGRESS_BYTES_MAX = 4096
# The largest request that the loop takes: REQUEST_BYTES_MAX of nbdnfs/engine/nbd/internal.h.
_LOOP_REQUEST_KIB = 1024


def plugin_settings(settings: Config, text: str, address: str) -> dict[str, str]:
    """The plugin's key=value settings. `text` is the canonical URL, `address` the server's."""
    return {
        "url": text,
        "address": address,
        "engine": "c",
        "lock": settings.lock,
        "realtime": "yes" if settings.realtime else "no",
        "region_pages": str(settings.region_pages),
        "connections": str(settings.connections),
        "stable_writes": str(int(settings.stable_writes)),
        "encrypt": str(int(settings.encrypt)),
        "read_ahead_pages": str(settings.read_ahead_pages),
        "soft_limit_ms": str(settings.soft_limit_ms if settings.recovery == "soft" else 0),
        "gone_limit_ms": str(settings.gone_limit_ms),
        **(nbdkit.owner_settings(text) if settings.owner else {}),
        **({"loop": "1"} if settings.loop else {}),
    }


def has_loop(settings: Config, *, processors: int, attached_kib: int | None) -> bool:
    """Whether workers serve the kernel in a loop: as configured, or where there is one processor.

    attached_kib  the largest request of the device, None where it is not attached. One that was attached for larger
                  requests than the loop takes keeps them, and nbdkit's threads with them.
    """
    wanted = processors == 1 if settings.loop is None else settings.loop
    return wanted and (attached_kib is None or attached_kib <= _LOOP_REQUEST_KIB)


def swap_on_command(settings: Config, path: str) -> list[str]:
    """helpers/swap_on.py: mkswap where the file has no swap area for this kernel, and swapon."""
    priority = "-" if settings.priority is None else str(settings.priority)
    flags = [*(["--discard"] if settings.discard else []), *(["--owned"] if settings.owner else [])]
    return programs.python("nbdnfs.keeper.helpers.swap_on", path, priority, settings.name, settings.url, *flags)


class RealWork:
    """The processes of one device."""

    def __init__(
        self, settings: Config, text: str, address: str, *, steal: bool = False, new_file_after_s: float = 0.0
    ) -> None:
        """Find the program and build its arguments now. ConfigError or UnavailableError when something is missing.

        text              the URL in its canonical form
        address           the server's
        steal             take the file from another machine that has it
        new_file_after_s  how long the file must have been missing before a new one is created
        """
        self._settings = settings
        self._text, self._address = text, address
        self._answer = -1
        self._steal = steal
        self._new_file_after_s = new_file_after_s
        self._program, self._argv = nbdkit.standby_command(
            plugin_settings(settings, text, address), threads=1 if settings.loop else settings.threads
        )
        # less $NOTIFY_SOCKET and the like: only the keeper notifies systemd
        self._environment = {
            key: value
            for key, value in nbdkit.worker_environment().items()
            if not key.startswith(("NOTIFY_", "WATCHDOG_", "LISTEN_"))
        }

    def start_worker(self, region_fd: int) -> WorkerHandle:
        return WorkerHandle.start(self._program, self._argv, self._environment, region_fd)

    def take_worker(self, parked: int) -> WorkerHandle | None:
        return WorkerHandle.take(parked, recipe(self._argv))

    def provision(self) -> HelperProcess:
        """`nbdnfs claim`: the file is created where it is missing and the configuration has a size, and claimed. It
        goes on while the server has no such file, or none that this machine may use, and says so: see `progress`."""
        settings = self._settings
        options = ["--wait"]
        if settings.size_bytes:
            options += [f"--size={settings.size_bytes}", f"--new-file-after={self._new_file_after_s:g}s"]
        if settings.owner:
            options += [f"--holder={owner_record.keeper_holder(settings.name)}", *(["--steal"] if self._steal else [])]
        return self._answering("nbdnfs", "claim", settings.url, *options, status="creating the backing file")

    def progress(self) -> str:
        """The last line that the helper of `provision` has printed since the last call; "" without one."""
        try:
            lines = os.read(self._answer, _PROGRESS_BYTES_MAX).decode(errors="replace").splitlines()
        except OSError:
            return ""
        return lines[-1] if lines else ""

    def swap_on(self, attached: Attached) -> HelperProcess:
        return HelperProcess(swap_on_command(self._settings, attached.path), self._environment)

    def is_swapped_on(self, attached: Attached) -> bool:
        return swap_area.find(attached.path) is not None

    def is_server_away(self, region: mmap.mmap) -> bool:
        return shared_region.is_disconnected(region)

    def server_times(self, region: mmap.mmap) -> tuple[int, int]:
        return shared_region.server_times(region)

    def resolve(self) -> HelperProcess:
        """resolve_server: look the server's name up again. It answers on a pipe: a file in /run may be swapped out."""
        return self._answering("nbdnfs.keeper.helpers.resolve_server", self._settings.name, self._text, self._address)

    def resolved(self) -> str:
        """The server's new address, once the helper has ended; "" when it has none, or none that answers."""
        try:
            address = os.read(self._answer, _ADDRESS_BYTES_MAX).decode(errors="replace").strip()
        except OSError:
            address = ""
        self._close_answer()
        self._address = address or self._address
        return address

    def _close_answer(self) -> None:
        if self._answer >= 0:
            os.close(self._answer)
        self._answer = -1

    def _answering(self, module: str, *arguments: str, status: str = "") -> HelperProcess:
        """A helper whose stdout is read through `_answer`; the one before has ended. `status`: what it does."""
        self._close_answer()
        self._answer, theirs = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            environment = {**self._environment, **({programs.STATUS_VARIABLE: status} if status else {})}
            return HelperProcess(programs.python(module, *arguments), environment, stdout=theirs)
        finally:
            os.close(theirs)
