# SPDX-License-Identifier: LGPL-2.1-or-later
"""`nbdnfs doctor`: whether this machine, and the workers on it, are set up to swap over the network.

Changes nothing, and works without root, though it sees less then.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

from nbdnfs import config, nfs_url
from nbdnfs.commands import (
    file_checks,
    file_in_use,
    installation_checks,
    json_output,
    machine_checks,
    process_checks,
    status,
)
from nbdnfs.commands.findings import Finding, judge
from nbdnfs.commands.health import Problem
from nbdnfs.config import Config
from nbdnfs.errors import NbdnfsError, NoInputError, UsageError
from nbdnfs.keeper import last_good
from nbdnfs.keeper.records import ProcessRecord, Records
from nbdnfs.kernel import state as kernel_state

_SAID_BY_CONFIGURATION = (status.CONFIGURATION, status.CONFIGURATION_IN_USE)


def run(args: argparse.Namespace) -> int:
    """Print the findings. The exit status is 0 when all are good, else EX_CONFIG. Errors as `examine`."""
    findings = examine(args.name)
    if args.json:
        json_output.print_list([finding.to_json() for finding in findings])
    else:
        print("\n".join(finding.text() for finding in findings))
    return exit_status(findings)


def examine(name: str | None = None, root: Path = kernel_state.ROOT) -> list[Finding]:
    """The findings for the machine and for the device `name`, or without a name for all devices and workers.

    `root` is the directory that stands for "/". UsageError: no device can have this name.
    """
    findings = [*machine_checks.machine(root), *installation_checks.installation(root)]
    if name is not None:
        config.check_name(name)
        findings += _device(name, root)
    else:
        names = status.names(root) if machine_checks.has_sys(root) else []  # without it, the machine's findings say so
        for one in names:
            findings += _device(one, root)
        recorded = {record.pid for one in names for record in _records(one, root).values()}
        for pid in process_checks.workers_by_hand(root):
            if pid not in recorded:
                findings += process_checks.process(f"worker {pid}", pid, root, realtime=True)
    return findings


def exit_status(findings: list[Finding]) -> int:
    """EX_OK when all findings are good, else EX_CONFIG."""
    return os.EX_OK if all(finding.good for finding in findings) else os.EX_CONFIG


def _device(name: str, root: Path) -> Iterator[Finding]:
    """All that is known of one device. What `status` calls a problem is bad here, too: its verdict is taken over."""
    try:
        found = status.read(name, root)
    except NoInputError as error:
        yield Finding(f"{name}: device", False, error.message, error.hint)
        return
    except (NbdnfsError, OSError, ValueError) as error:  # as `status` shows it among others
        hint = error.hint if isinstance(error, NbdnfsError) else f"see: nbdnfs status {name}"
        yield Finding(f"{name}: device", False, f"its state is unknown: {error}", hint)
        return
    settings, configuration = _configuration(Records(name, root), is_attached=found.device is not None)
    yield configuration
    for problem in found.problems:
        if configuration.good or problem.subject not in _SAID_BY_CONFIGURATION:  # else it has been said
            yield _of_status(name, problem)
    if settings is not None:
        yield from _backing_file(settings, found, root)
    records = _records(name, root)
    if not records:
        yield Finding(f"{name}: processes", True, "none to check")
    realtime = settings is None or settings.realtime
    for role, record in records.items():
        yield from process_checks.process(f"{name}: {role}", record.pid, root, realtime=realtime)
    if settings is not None and found.encrypted is not None:
        yield _pages(settings, is_encrypted=found.encrypted)


def _configuration(records: Records, *, is_attached: bool) -> tuple[Config | None, Finding]:
    """The settings by which the device is judged, and whether they are the configuration's. One that is attached stays
    on the file that it was started with, whatever its configuration says since."""
    name = records.name
    subject = f"{name}: configuration"
    try:
        settings, problem = last_good.load(records, is_attached=is_attached)
    except NbdnfsError as error:
        return None, Finding(subject, False, error.message, error.hint)
    if problem:
        return settings, Finding(subject, False, problem, f"nbdnfs check {name} says what to do")
    if is_attached and (owned := records.read(Records.OWNER)) is not None:
        settings = dataclasses.replace(settings, owner=owned != "no")  # until the next start
    used = _url_in_use(records) if is_attached else None
    if used is None or used == settings.url:
        return settings, Finding(subject, True, "valid")
    # its size is that of the file that it names
    in_use = dataclasses.replace(settings, url=used, size_bytes=0)
    return in_use, Finding(
        subject,
        False,
        f"it names {settings.url}, and the device uses {used} until nbdnfs down",
        f"if that is a mistake, correct url; if it is meant: nbdnfs down {name}; nbdnfs up {name}",
    )


def _url_in_use(records: Records) -> str | None:
    """Of a device that is attached, in the canonical form. None where no keeper has recorded it."""
    try:
        return nfs_url.parse_recorded((records.read(Records.ADDRESS) or "").partition("\n")[0]).text
    except UsageError:
        return None


def _of_status(name: str, problem: Problem) -> Finding:
    """The command at the end of a sentence of systemd's is not said twice."""
    found = problem.text.removesuffix(f": {problem.advice}")
    return Finding(f"{name}: {problem.subject}", False, found, problem.advice)


def _pages(settings: Config, *, is_encrypted: bool) -> Finding:
    """What the device was started with may be no longer what its configuration says."""
    return judge(
        f"{settings.name}: pages",
        is_encrypted or not settings.encrypt,
        f"{'' if is_encrypted else 'not '}encrypted on the NAS",
        "the device was started without encryption, and the configuration asks for it: boot, or nbdnfs down"
        f" {settings.name} and nbdnfs up {settings.name}; or set encrypt = false, where network and server are trusted",
    )


def _backing_file(settings: Config, found: status.Status, root: Path) -> Iterator[Finding]:
    """Asks the server, so that it is not done for another root. Servers may refuse who is not root (exports(5))."""
    if root != kernel_state.ROOT:
        return
    if os.geteuid() != 0:
        yield Finding(f"{settings.name}: server", True, "not asked: only root can")
        return
    used_file_id = file_in_use.file_id(found.worker_pid, root) if found.worker_pid is not None else None
    yield from file_checks.backing_file(settings, found.device_bytes, used_file_id=used_file_id)


def _records(name: str, root: Path) -> dict[str, ProcessRecord]:
    """Role ▸ record, of the device's processes that are running. A standby has a record where systemd keeps it for the
    next keeper; that stays when it becomes the worker."""
    records = Records(name, root)
    found: dict[str, ProcessRecord] = {}
    for role in (Records.KEEPER, Records.WORKER, Records.STANDBY):
        record = records.living(role)
        if record is not None and all(record.pid != other.pid for other in found.values()):
            found[role] = record
    return found
