# SPDX-License-Identifier: LGPL-2.1-or-later
"""The NFS server of the tests starts, stops, dies, hangs and returns on command, and leaves nothing behind."""

from __future__ import annotations

import errno
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdnfs.engine import NfsFile
from support.nfs_server import LOOPBACK, FileOnServer, Ganesha, ServerError, rpc_null_answers
from support.small_filesystem import small_filesystem

DEADLINE_S = 15.0
NFS, MOUNT = 100003, 100005


def read_first_bytes(url: str) -> bytes:
    file = NfsFile(url, LOOPBACK, read_only=True)
    buffer = bytearray(5)
    file.pread(buffer, 0)
    file.close()
    return bytes(buffer)


def errno_of(action: Callable[[], object]) -> int | None:
    """The errno of the OSError that the action raises; None when it raises none."""
    try:
        action()
    except OSError as error:
        return error.errno
    return None


def wait_for_end(pid: int) -> None:
    """Return when a process that need not be our child has ended."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([descriptor], [], [], DEADLINE_S)[0], f"process {pid} lives on"
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("version", [3, 4])
def test_both_versions_serve_one_path(ganesha: Ganesha, version: int) -> None:
    """The URL of either version finds the same file."""
    (ganesha.export_path / "both").write_bytes(b"hello")
    file = NfsFile(ganesha.url("both", version), LOOPBACK, read_only=True)
    assert file.size_bytes == 5
    file.close()


def test_sees_what_a_test_does_behind_its_back(ganesha: Ganesha) -> None:
    """A name that was looked up in vain, made, replaced and removed on the server's disk is seen so at once."""
    (ganesha.export_path / "anchor").write_bytes(b"hello")
    behind = ganesha.export_path / "behind"
    file = NfsFile(ganesha.url("anchor"), LOOPBACK)
    for _ in range(2):
        assert errno_of(lambda: file.lookup("/behind")) == errno.ENOENT
        behind.write_bytes(b"one")
        assert file.lookup("/behind")["size"] == 3
        behind.unlink()
        behind.write_bytes(b"other")
        assert file.lookup("/behind")["size"] == 5
        behind.unlink()
    file.close()


def test_kill_and_restart(own_ganesha: Ganesha) -> None:
    """After SIGKILL there is no answer; after a start the same URL works again."""
    (own_ganesha.export_path / "file").write_bytes(b"hello")
    url = own_ganesha.url("file")
    own_ganesha.kill()
    assert not own_ganesha.is_running
    assert not rpc_null_answers(own_ganesha.nfs_port, NFS, 3)
    assert not rpc_null_answers(own_ganesha.mount_port, MOUNT, 3)
    own_ganesha.start()
    assert own_ganesha.url("file") == url
    assert read_first_bytes(url) == b"hello"
    own_ganesha.restart()
    assert read_first_bytes(url) == b"hello"


def test_pause_and_resume(own_ganesha: Ganesha) -> None:
    """A paused server accepts connections and does not answer; resumed, it does. A paused one can be stopped."""
    own_ganesha.pause()
    assert not rpc_null_answers(own_ganesha.nfs_port, NFS, 3, timeout_s=0.2)
    own_ganesha.resume()
    assert rpc_null_answers(own_ganesha.nfs_port, NFS, 3, timeout_s=DEADLINE_S)
    own_ganesha.pause()
    pid = own_ganesha.pid
    own_ganesha.stop()
    wait_for_end(pid)


def test_outlives_the_thread_that_started_it(tmp_path: Path) -> None:
    """A server started by a short-lived thread runs on: only the process's end ends it."""
    with Ganesha(tmp_path) as server:
        server.stop()
        starter = threading.Thread(target=server.start)
        starter.start()
        starter.join(DEADLINE_S)
        assert rpc_null_answers(server.nfs_port, NFS, 3, timeout_s=DEADLINE_S)
        assert server.is_running


@pytest.mark.server
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_dies_with_its_process(tmp_path: Path, number: signal.Signals) -> None:
    """However the process that started it ends, no server is left."""
    script = (
        "import pathlib, sys, time; from nfs_server import Ganesha\n"
        "with Ganesha(pathlib.Path(sys.argv[1])) as server:\n"
        "    print(server.pid, flush=True); time.sleep(600)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as owner:
        assert owner.stdout is not None
        server_pid = int(owner.stdout.readline())
        os.kill(server_pid, 0)
        owner.send_signal(number)
        owner.wait(DEADLINE_S)
    wait_for_end(server_pid)


def test_end_by_itself_is_reported(tmp_path: Path) -> None:
    """Stopping a server that has ended by itself is an error that has its log."""
    server = Ganesha(tmp_path)
    server.start()
    os.kill(server.pid, signal.SIGKILL)
    wait_for_end(server.pid)
    with pytest.raises(ServerError, match=r"ended by itself with status -9\n.*ganesha\.nfsd-\d+"):
        server.stop()


def test_impossible_export_is_reported(tmp_path: Path) -> None:
    """An export on a file system that has no handles is an error that has the server's message."""
    with pytest.raises(ServerError, match="cannot export /proc/sys\n"):
        Ganesha(tmp_path, export=Path("/proc/sys")).start()


def test_squash(tmp_path: Path) -> None:
    """With squash="root" root becomes uid 65534, and may not write where that uid may not."""
    with Ganesha(tmp_path, squash="root") as server:
        server.export_path.chmod(0o777)
        NfsFile(server.url("made"), LOOPBACK, create=True).close()
        assert (server.export_path / "made").stat().st_uid == 65534
        server.export_path.chmod(0o755)
        assert errno_of(lambda: NfsFile(server.url("other"), LOOPBACK, create=True)) == errno.EACCES


def test_read_only_export(tmp_path: Path) -> None:
    """With access="RO" nothing can be made."""
    with Ganesha(tmp_path, access="RO") as server:
        assert errno_of(lambda: NfsFile(server.url("made"), LOOPBACK, create=True)) == errno.EROFS


def test_small_file_system_fills_up(tmp_path: Path) -> None:
    """An export on a small file system gives ENOSPC when it is full."""
    with small_filesystem(tmp_path, 4 << 20) as folder, Ganesha(tmp_path / "server", export=folder) as server:
        file = NfsFile(server.url("big"), LOOPBACK, create=True)
        assert errno_of(lambda: [file.pwrite(bytes(1 << 20), part << 20) for part in range(8)]) == errno.ENOSPC
        file.close()
    assert not os.path.ismount(folder)


def test_a_fresh_file_is_what_it_says(backing_file: FileOnServer) -> None:
    """The fixture's file has its size on the server and through it."""
    file = NfsFile(backing_file.url(), LOOPBACK, read_only=True)
    assert file.size_bytes == backing_file.size_bytes == backing_file.path.stat().st_size
    file.close()
