# SPDX-License-Identifier: LGPL-2.1-or-later
"""Two workers of two machines on one file, as real processes; and `serve`, which claims what it serves."""

from __future__ import annotations

import errno
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.nbd_client import FLUSH, READ, WRITE, NbdClient, Request
from support.nfs_server import FileOnServer
from support.waiting import DEADLINE_S, in_background, wait_until
from support.worker_process import serving

from nbdnfs.nas import owner_record, ownership
from nbdnfs.nas.owner_record import Identity, Timing

PAGE = 4096
PAGES = 512
# Not one 32-bit word again and again: such a page would not travel before a flush.
ONE, TWO = (bytes([byte]) * (PAGE - 1) + b"!" for byte in (1, 2))
QUICK = Timing(refresh_ms=400, in_flight_ms=400)
HOLDER = "keeper:swap0"


def machine(host: str) -> Identity:
    return Identity(secrets.token_hex(16), secrets.token_hex(16), secrets.token_hex(16), host)


def record_path(file: FileOnServer) -> Path:
    return file.path.with_name(owner_record.name_of(file.name))


@pytest.fixture
def folders(tmp_path: Path, backing_file: FileOnServer) -> Iterator[tuple[Path, Path]]:
    """A folder for each of two workers; the record is removed at the end."""
    one, two = tmp_path / "1", tmp_path / "2"
    one.mkdir()
    two.mkdir()
    yield one, two
    record_path(backing_file).unlink(missing_ok=True)


def claim(file: FileOnServer, me: Identity, *, steal: bool = False) -> None:
    ownership.claim(file.url(), HOLDER, me, steal=steal, timing=QUICK, report=lambda _: None)


def as_machine(file: FileOnServer, me: Identity) -> list[str]:
    """Options of `serve` for a worker that `me` starts after it has claimed the file."""
    settings = owner_record.plugin_settings(file.name, me.boot, QUICK)
    return ["--no-owner", *(f"--plugin-setting={key}={value}" for key, value in settings.items())]


def write_until_it_fails(client: NbdClient, page: bytes) -> int:
    """All pages again and again, with flushes; the error of the end."""
    while True:
        for number in range(PAGES):
            requests = [Request(WRITE, number * PAGE, PAGE, page)] + [Request(FLUSH, 0, 0)] * (number % 31 == 0)
            for reply in client.run(requests):
                if reply.error:
                    return reply.error


@pytest.mark.parametrize("stopped", [False, True])
def test_two_workers(backing_file: FileOnServer, folders: tuple[Path, Path], stopped: bool) -> None:
    """The second machine steals under write load. The first one's worker answers with errors from then on, also when
    it was stopped in the middle and wakes up later; the file is what the second one writes, and stays so."""
    box1, box2 = machine("box1"), machine("box2")
    claim(backing_file, box1)
    with (
        serving(backing_file.url(), folders[0], *as_machine(backing_file, box1)) as first,
        NbdClient(first.socket, DEADLINE_S) as client,
    ):
        ended = in_background(write_until_it_fails, client, ONE)
        wait_until(lambda: ONE in backing_file.path.read_bytes(), "the first writes")
        if stopped:
            os.kill(first.pid, signal.SIGSTOP)
        claim(backing_file, box2, steal=True)
        assert ended.done() != stopped
        with (
            serving(backing_file.url(), folders[1], *as_machine(backing_file, box2)) as second,
            NbdClient(second.socket, DEADLINE_S) as other,
        ):
            all_pages = [Request(WRITE, number * PAGE, PAGE, TWO) for number in range(PAGES)]
            assert not any(reply.error for reply in other.run([*all_pages, Request(FLUSH, 0, 0)]))
            if stopped:
                os.kill(first.pid, signal.SIGCONT)
            assert ended.result(DEADLINE_S) == errno.EIO
            for request in (Request(READ, 0, PAGE), Request(FLUSH, 0, 0)):
                (reply,) = client.run([request])
                assert reply.error == errno.EIO
            (reply,) = other.run([Request(READ, 0, PAGE)])
            assert (reply.error, reply.data) == (0, TWO)
    assert backing_file.path.read_bytes()[: PAGES * PAGE] == TWO * PAGES
    assert "has been taken over by box2" in first.stderr.read_text()
    assert "box" not in second.stderr.read_text()


def test_serve_claims_and_releases(backing_file: FileOnServer, folders: tuple[Path, Path]) -> None:
    """The file is this machine's while it is served, and is released afterwards."""
    with serving(backing_file.url(), folders[0]) as worker, NbdClient(worker.socket, DEADLINE_S):
        record = owner_record.parse(record_path(backing_file).read_bytes())
        assert record is not None
        assert record.boot == owner_record.boot_id()
        assert record.holder.startswith(f"serve:{worker.serve.pid}:")
        status = refused(backing_file, folders[1])
        assert f"is in use on this machine, by process {worker.serve.pid}" in status
    assert not record_path(backing_file).exists()


def test_serve_refuses_what_another_machine_has(backing_file: FileOnServer, folders: tuple[Path, Path]) -> None:
    """By which machine and since when; and not with --no-owner, nor with the engine for comparison, where it runs."""
    ownership.claim(backing_file.url(), HOLDER, machine("box2"))
    assert "is in use as swap by box2 (since 20" in refused(backing_file, folders[0])
    for option in ("--no-owner", "--engine=libnfs-python")[: 2 if sys.version_info[:2] == (3, 11) else 1]:
        with serving(backing_file.url(), folders[0], option):
            pass
    assert record_path(backing_file).exists()


def test_serve_in_another_container(backing_file: FileOnServer, folders: tuple[Path, Path]) -> None:
    """Of the same machine, in a PID namespace of its own: it does not see the owner, which lives and keeps the file."""
    container = ("unshare", "--pid", "--fork", "--mount-proc")
    with serving(backing_file.url(), folders[0]) as worker:
        before = record_path(backing_file).read_bytes()
        said = refused(backing_file, folders[1], *container)
        assert "the owner record is of this machine" in said
        assert "is in use as swap by" in said
        found, expected = (owner_record.parse(data) for data in (record_path(backing_file).read_bytes(), before))
        assert found is not None
        assert expected is not None
        assert found.claim == expected.claim
        assert worker.serve.poll() is None
    assert not record_path(backing_file).exists()


def refused(file: FileOnServer, folder: Path, *within: str) -> str:
    """What `serve` says when it does not get the file. `within`: the command that starts it."""
    command = [*within, sys.executable, "-m", "nbdnfs", "serve", file.url(), "--socket", str(folder / "s")]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == os.EX_NOPERM, done.stderr
    return done.stderr
