# SPDX-License-Identifier: LGPL-2.1-or-later
"""`nbdnfs up --steal`: takes the file from another machine, which loses its swap by that, alive or not.

So everything that can be known beforehand is looked at first: a machine that cannot use the file does not take it.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from nbdnfs import backing_size, programs
from nbdnfs.commands import claiming, systemd_unit
from nbdnfs.config import Config
from nbdnfs.errors import ConfigError, EndedBySignal, NbdnfsError
from nbdnfs.keeper import only_keeper
from nbdnfs.keeper.records import Records
from nbdnfs.kernel import nbd_driver
from nbdnfs.kernel import state as kernel_state
from nbdnfs.worker import nbdkit


@contextlib.contextmanager
def taken(settings: Config, records: Records) -> Iterator[None]:
    """This machine owns the file meanwhile, and after that unless the start has failed for good. The device must not be
    attached, nor have a keeper but one that waits.

    Errors as `check`, `backing_file.inspect` and `ownership.claim`.
    """
    from nbdnfs.nas import backing_file, owner_record, ownership  # only here: it loads libnfs

    check(settings)
    holder, me = owner_record.keeper_holder(settings.name), owner_record.identity()
    size_bytes = claiming.run_until_signal(lambda stop: backing_file.inspect(settings.url).size_bytes)
    backing_size.refuse_unless_lockable(size_bytes, Path("/"))
    try:
        claiming.run_until_signal(lambda stop: ownership.claim(settings.url, holder, me, steal=True, stop=stop))
    except EndedBySignal:
        if only_keeper.keeper_of(records) is None:  # it may just have been claimed, and nothing uses it
            ownership.release_or_log(settings.url, holder, me)
        raise
    try:
        yield
    except NbdnfsError:
        if not _is_up(records):
            ownership.release_or_log(settings.url, holder, me)
        raise


def check(settings: Config) -> None:
    """What a keeper needs of this machine, before anything is taken from another one.

    UnavailableError: the kernel's files, its nbd driver or nbdkit are missing. ConfigError: the memory of a keeper or
    worker could not be locked, and the configuration requires that; or nbdkit's Python is too old.
    """
    kernel_state.require_proc()
    kernel_state.require_sys()
    nbd_driver.load()
    nbdkit.check_nbdkit()
    if settings.lock != "required":
        return
    # in a process of its own: what is locked stays locked
    command = programs.python("nbdnfs.commands.lock_check", *([] if settings.realtime else ["realtime"]))
    environment = {**programs.python_environment(), "PYTHONMALLOC": "malloc"}
    if programs.start(command, environment).wait() != 0:
        raise ConfigError(
            f"{settings.name} could not swap safely on this machine, see above: the file was not taken",
            'mend that, or set lock = "wanted"',
        )


def _is_up(records: Records) -> bool:
    """Whether the device is up or may come up: its keeper goes on, or systemd starts another one."""
    try:
        return only_keeper.is_up(records) or systemd_unit.is_active(records.name)
    except NbdnfsError as error:
        print(f"nbdnfs: {records.name}: the owner record stays: {error.message}", file=sys.stderr)
        return True
