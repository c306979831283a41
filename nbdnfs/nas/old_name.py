# SPDX-License-Identifier: LGPL-2.1-or-later
"""Files that earlier versions named with the machine id itself: %m stands for a hash of it now. They are renamed.

Only while nothing uses them: the record of the old name is taken first.
"""

from __future__ import annotations

import functools
import logging
import threading
from pathlib import Path

from nbdnfs import nfs_url, specifiers
from nbdnfs.errors import ConfigError, UsageError
from nbdnfs.nas import backing_file, ownership, remote_file
from nbdnfs.nfs_url import NfsUrl

log = logging.getLogger(__name__)


def adopt(url: str, holder: str, *, stop: threading.Event | None = None, root: Path = Path("/")) -> None:
    """Where the file that the URL names has %m in its name, and only exists under its old name: rename it.

    ConfigError: it is the directory that has the old name. OwnedError: the file is in use under its old name. Others as
    `ownership.claim`.
    """
    target = nfs_url.parse(url)
    try:
        now, before = specifiers.machine_id(root), specifiers.raw_machine_id(root)
    except UsageError:
        return
    if now not in target.path:
        return
    old = nfs_url.build(
        target.host, target.directory.replace(now, before), target.name.replace(now, before), target.options
    )
    if backing_file.exists(target.text) or not backing_file.exists(old.text):
        return
    if old.directory != target.directory:
        raise ConfigError(
            f"{target.host} has {old.path}, and no {target.path}: %m stands for a hash of the machine id now",
            f"rename the directory there: mv {old.directory} {target.directory}",
        )
    _rename(old, target, holder, stop)
    log.warning("%s on %s is called %s now: %%m stands for a hash of the machine id", old.path, old.host, target.name)


def _rename(old: NfsUrl, target: NfsUrl, holder: str, stop: threading.Event | None) -> None:
    with (
        ownership.owned_meanwhile(old.text, holder, stop=stop),
        remote_file.directory(target, target.resolve()) as names,
    ):
        file_id = remote_file.file_id(names, f"/{old.name}")
        try:
            remote_file.retry(functools.partial(names.rename, f"/{old.name}", f"/{target.name}"))
        except OSError:  # a repeated one fails where the first was done
            if remote_file.file_id(names, f"/{target.name}") != file_id:
                raise
