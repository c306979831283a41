# SPDX-License-Identifier: LGPL-2.1-or-later
"""`nbdnfs serve` as a user runs it: real nbdkit, real clients, a real NFS server."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support import second_reader
from support.nbd_client import READ, TRIM, WRITE, NbdClient, Request
from support.nfs_server import FileOnServer, Ganesha, program
from support.proxy import TcpProxy
from support.waiting import DEADLINE_S, in_background, wait_until
from support.worker_process import serving

from nbdnfs import engine, proc_stat

PAGE = 4096
MIB = 1 << 20
IMAGE_BYTES = 256 * MIB
NOBODY = 65534

# libnfs 4.0 cannot write over NFSv4; that it is refused is a test of the messages
VERSIONS = (3, 4) if int(engine.libnfs_version.split(".")[0]) >= 5 else (3,)


def uri(socket_path: Path) -> str:
    return f"nbd+unix:///?socket={socket_path}"


def run_client(*argv: str | Path, package: str = "libnbd-bin") -> str:
    """Run an NBD client to its end; its stdout. AssertionError with its stderr when it fails."""
    done = subprocess.run(
        [program(str(argv[0]), package), *argv[1:]], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def children(process: subprocess.Popen[bytes]) -> list[int]:
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(word) for word in path.read_text().split()]


def is_served(path: Path) -> bool:
    """Whether a process listens there."""
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(path)) == 0


def is_alive(pid: int) -> bool:
    """False for a zombie too."""
    return proc_stat.start_time_ticks(pid) is not None


Start = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def start(directory: Path) -> Iterator[Start]:
    """`start(url, socket_path, *options)`: `nbdnfs serve`, waiting for nothing; its stderr goes to `directory`/err.

    What a failed test leaves running is killed.
    """
    processes: list[subprocess.Popen[bytes]] = []

    def start_it(
        url: str, socket_path: Path, *options: str, stderr: str = "err", wrapper: Sequence[str] = (), **how: Any
    ) -> subprocess.Popen[bytes]:
        with (directory / stderr).open("wb") as file:
            processes.append(
                subprocess.Popen(
                    [*wrapper, sys.executable, "-m", "nbdnfs", "serve", url, "--socket", str(socket_path), *options],
                    stdin=subprocess.DEVNULL,
                    stderr=file,
                    **how,
                )
            )
        return processes[-1]

    yield start_it
    for process in processes:
        process.kill()
        process.wait(DEADLINE_S)


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory for sockets that every user may enter; pytest's own are the starter's alone."""
    path = Path(tempfile.mkdtemp(prefix="nbdnfs-test-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


# What goes through


@pytest.mark.parametrize("version", VERSIONS)
def test_an_image_goes_in_and_comes_back(ganesha: Ganesha, directory: Path, version: int) -> None:
    """nbdcopy writes 256 MiB and reads them back equal, several connections and requests at once; the file behind
    the server's back has the same bytes.
    """
    image, back, swap = directory / "image", directory / "back", ganesha.export_path / "image"
    with image.open("wb") as file:
        for _ in range(IMAGE_BYTES // MIB):
            file.write(os.urandom(MIB))
    with swap.open("wb") as file:
        file.truncate(IMAGE_BYTES)
    with serving(ganesha.url("image", version), directory) as worker:
        run_client("nbdcopy", "--flush", image, uri(worker.socket))
        run_client("cmp", image, swap, package="diffutils")
        run_client("nbdcopy", uri(worker.socket), back)
        run_client("cmp", image, back, package="diffutils")
    swap.unlink()


@pytest.mark.skipif(not second_reader.IS_POSSIBLE, reason=second_reader.WHY_NOT)
def test_another_client_reads_the_same(backing_file: FileOnServer, directory: Path) -> None:
    """What nbdcopy has written, libnfs-python reads from the server."""
    image = directory / "image"
    image.write_bytes(os.urandom(backing_file.size_bytes))
    with serving(backing_file.url(), directory) as worker:
        run_client("nbdcopy", "--flush", image, uri(worker.socket))
    assert second_reader.read(backing_file.url(), 0, backing_file.size_bytes) == image.read_bytes()


def test_the_reference_engine_serves_too(backing_file: FileOnServer, directory: Path, start: Start) -> None:
    """engine=libnfs-python behind the same plugin, where nbdkit's Python can run it."""
    said = dict(
        line.split("=", 1)
        for line in run_client("nbdkit", "python", "--dump-plugin", package="nbdkit").splitlines()
        if "=" in line
    )
    if int(said["python_version"].split(".")[1]) >= 12:
        process = start(backing_file.url(), directory / "s", "--engine=libnfs-python")
        assert process.wait(DEADLINE_S) == os.EX_CONFIG
        assert "the reference engine needs Python 3.11" in (directory / "err").read_text()
        return
    data = os.urandom(4 * PAGE)
    with (
        serving(backing_file.url(), directory, "--engine=libnfs-python") as worker,
        NbdClient(worker.socket, DEADLINE_S) as client,
    ):
        client.write(PAGE, data)
        assert client.read(0, 6 * PAGE) == bytes(PAGE) + data + bytes(PAGE)
    assert backing_file.path.read_bytes()[PAGE : 5 * PAGE] == data


def test_what_it_offers(backing_file: FileOnServer, directory: Path) -> None:
    """Size, block sizes and flags, as libnbd sees them."""
    with serving(backing_file.url(), directory) as worker:
        (export,) = json.loads(run_client("nbdinfo", "--no-content", "--json", uri(worker.socket)))["exports"]
    expected = {
        "export-size": backing_file.size_bytes,
        "block_size_minimum": PAGE,
        "block_size_preferred": PAGE,
        "block_size_maximum": 32 * MIB,
        "can_flush": True,
        "can_fua": True,
        "can_trim": True,
        "can_multi_conn": True,
        "is_read_only": False,
        "is_rotational": False,
    }
    assert {key: export[key] for key in expected} == expected


def test_every_request(backing_file: FileOnServer, directory: Path) -> None:
    """Write, FUA, flush, trim, read; after FUA and after a flush the file has the bytes."""
    first, second = os.urandom(2 * PAGE), os.urandom(PAGE)
    with serving(backing_file.url(), directory) as worker, NbdClient(worker.socket, DEADLINE_S) as client:
        client.write(0, first, fua=True)
        assert backing_file.path.read_bytes()[: 2 * PAGE] == first
        client.write(5 * PAGE, second)
        client.flush()
        assert backing_file.path.read_bytes()[5 * PAGE : 6 * PAGE] == second
        client.trim(8 * PAGE, 8 * PAGE)
        assert client.read(0, 2 * PAGE) == first
        assert client.read(5 * PAGE, PAGE) == second


def test_unaligned_requests_are_einval(backing_file: FileOnServer, directory: Path) -> None:
    """EINVAL on the wire for each, nothing is written, and the connection goes on."""
    requests = [
        Request(op, offset, length, b"x" * length if op == WRITE else b"")
        for op in (READ, WRITE, TRIM)
        for offset, length in ((512, PAGE), (0, 512), (PAGE - 1, 2), (0, 3 * PAGE + 1))
    ]
    with serving(backing_file.url(), directory) as worker, NbdClient(worker.socket, DEADLINE_S) as client:
        for request in requests:
            (reply,) = client.run([request])
            assert reply.error == errno.EINVAL, request
        assert client.read(0, 4 * PAGE) == bytes(4 * PAGE)
    assert not any(backing_file.path.read_bytes())


def test_four_requests_of_one_connection_are_in_flight_together(
    backing_file: FileOnServer, proxy: TcpProxy, directory: Path
) -> None:
    """A server 200 ms away answers four reads, sent at once through nbdkit, in the time of one."""
    with (
        serving(backing_file.url(nfsport=proxy.port), directory) as worker,
        NbdClient(worker.socket, DEADLINE_S) as client,
    ):
        client.read(0, PAGE)
        proxy.delay_s = 0.2
        begin = time.monotonic()
        client.read(0, PAGE)
        one_s = time.monotonic() - begin
        begin = time.monotonic()
        replies = list(client.run([Request(READ, number * MIB, PAGE) for number in range(4)], depth=4))
        four_s = time.monotonic() - begin
        proxy.delay_s = 0.0
    assert [reply.error for reply in replies] == [0] * 4
    assert one_s >= 0.2
    assert 0.2 <= four_s < 2 * one_s + 0.1


def test_an_error_of_the_server_is_the_clients_errno(backing_file: FileOnServer, directory: Path) -> None:
    """The file is truncated: EIO on the wire for what is missing, the rest goes on, no traceback of ours."""
    with serving(backing_file.url(), directory) as worker, NbdClient(worker.socket, DEADLINE_S) as client:
        os.truncate(backing_file.path, MIB)
        with pytest.raises(OSError, match="rejected") as caught:
            client.read(2 * MIB, PAGE)
        assert caught.value.errno == errno.EIO
        assert client.read(0, PAGE) == bytes(PAGE)


# Beginning and end


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_cleanly(
    backing_file: FileOnServer, directory: Path, start: Start, number: signal.Signals
) -> None:
    """Status 0; the socket is removed and nbdkit has ended; no traceback; the data is on the server."""
    path = directory / "s"
    process = start(backing_file.url(), path)
    wait_until(lambda: is_served(path), "it is served")
    with NbdClient(path, DEADLINE_S) as client:
        client.write(0, b"x" * PAGE)
        (worker,) = children(process)
    process.send_signal(number)
    assert process.wait(DEADLINE_S) == 0
    assert not path.exists()
    assert not is_alive(worker)
    assert "Traceback" not in (directory / "err").read_text()
    assert backing_file.path.read_bytes()[:PAGE] == b"x" * PAGE


def test_a_connected_client_is_waited_for(backing_file: FileOnServer, directory: Path, start: Start) -> None:
    """It is served as before, as swap must be that is being taken off, and serve says that it waits for its end."""
    path = directory / "s"
    process = start(backing_file.url(), path)
    wait_until(lambda: is_served(path), "it is served")
    pages = [bytes([number]) * PAGE for number in range(1, 101)]
    with NbdClient(path, DEADLINE_S) as client:
        client.write(0, pages[0])
        process.terminate()
        wait_until(lambda: b"waiting for the clients" in (directory / "err").read_bytes(), "a line that it waits")
        for number, data in enumerate(pages):
            client.write(number * PAGE, data)
        requests = [Request(READ, number * PAGE, PAGE) for number in range(len(pages))]
        replies = {reply.request.offset: reply.data for reply in client.run(requests, 16)}
        assert [replies[number * PAGE] for number in range(len(pages))] == pages
        assert process.poll() is None
    assert process.wait(DEADLINE_S) == 0
    assert not path.exists()
    assert backing_file.path.read_bytes()[: len(pages) * PAGE] == b"".join(pages)


def test_all_clients_are_waited_for(backing_file: FileOnServer, directory: Path, start: Start) -> None:
    """The last one that goes ends it, also where it came after the signal."""
    path = directory / "s"
    process = start(backing_file.url(), path)
    wait_until(lambda: is_served(path), "it is served")
    first = NbdClient(path, DEADLINE_S)
    process.terminate()
    wait_until(lambda: b"waiting for the clients" in (directory / "err").read_bytes(), "a line that it waits")
    with NbdClient(path, DEADLINE_S) as second:
        second.read(0, PAGE)
        first.close()
        for number in range(32):
            second.write(number * PAGE, b"x" * PAGE)
        assert process.poll() is None
    assert process.wait(DEADLINE_S) == 0
    assert backing_file.path.read_bytes()[: 32 * PAGE] == b"x" * 32 * PAGE


def test_what_the_server_takes_slowly_is_waited_for(
    backing_file: FileOnServer, proxy: TcpProxy, directory: Path, start: Start
) -> None:
    """The clients have gone, and the server does not answer: lines say that it is waited for, and for how many pages,
    which it gets. Those that repeat one word count as others do."""
    path = directory / "s"
    data = b"".join(bytes([number]) * PAGE for number in range(1, 101)) + os.urandom(PAGE)
    process = start(backing_file.url(nfsport=proxy.port), path)
    wait_until(lambda: is_served(path), "it is served")
    with NbdClient(path, DEADLINE_S) as client:
        proxy.black_hole = True
        client.write(0, data)
    process.terminate()
    lines = (
        b"waiting for the server; a second signal ends at once, and what was not flushed may be lost",
        b"the end waits for the server: 101 pages are still to be written (0 MiB)",
    )
    wait_until(lambda: all(line in (directory / "err").read_bytes() for line in lines), "lines that it waits")
    assert process.poll() is None
    assert b"clients" not in (directory / "err").read_bytes()
    proxy.black_hole = False
    assert process.wait(2 * DEADLINE_S) == 0
    assert backing_file.path.read_bytes()[: len(data)] == data


def test_what_nobody_can_read_is_not_waited_for(
    backing_file: FileOnServer, proxy: TcpProxy, directory: Path, start: Start
) -> None:
    """The keys end with serve, so that pages encrypted with them are not written at its end: it ends although the
    server says nothing. What was flushed is there."""
    path = directory / "s"
    process = start(backing_file.url(nfsport=proxy.port), path, "--encrypt", "--no-owner")
    wait_until(lambda: is_served(path), "it is served")
    header = os.urandom(PAGE)
    with NbdClient(path, DEADLINE_S) as client:
        client.write(0, header)
        client.flush()
        proxy.black_hole = True
        client.write(PAGE, b"".join(bytes([number]) * PAGE for number in range(1, 256)))
    process.terminate()
    assert process.wait(DEADLINE_S) == 0
    assert backing_file.path.read_bytes() == header + bytes(backing_file.size_bytes - PAGE)


def test_a_second_signal_does_not_wait(backing_file: FileOnServer, directory: Path, start: Start) -> None:
    """With a client connected that does not go."""
    path = directory / "s"
    process = start(backing_file.url(), path)
    wait_until(lambda: is_served(path), "it is served")
    with NbdClient(path, DEADLINE_S) as client:
        client.read(0, PAGE)
        process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.3)
        process.send_signal(signal.SIGINT)
        assert process.wait(DEADLINE_S) == 128 + signal.SIGKILL
    assert not path.exists()
    last = (directory / "err").read_text().splitlines()[-1]
    assert last == "nbdnfs: ended at once, and what was not flushed may be lost"


def test_ctrl_c_in_a_terminal(backing_file: FileOnServer, directory: Path, start: Start) -> None:
    """The whole process group gets SIGINT, and nbdkit is not in it: a client is waited for. Status 0 and no socket."""
    path = directory / "s"
    process = start(backing_file.url(), path, start_new_session=True)
    wait_until(lambda: is_served(path), "it is served")
    with NbdClient(path, DEADLINE_S) as client:
        client.read(0, PAGE)
        os.killpg(process.pid, signal.SIGINT)
        wait_until(lambda: b"waiting for the clients" in (directory / "err").read_bytes(), "a line that it waits")
        assert [client.read(0, PAGE) for _ in range(32)] == [bytes(PAGE)] * 32
    assert process.wait(DEADLINE_S) == 0
    assert not path.exists()
    assert "Traceback" not in (directory / "err").read_text()


def test_a_signal_at_any_moment_leaves_no_socket(
    new_file: Callable[..., FileOnServer], directory: Path, start: Start
) -> None:
    """SIGTERM while it starts, at once after the socket appeared and a little later: it ends, nothing stays."""
    files = [new_file(content=bytes(16 * PAGE)) for _ in range(12)]  # one for each: they run two at a time

    def strike(index: int) -> tuple[int, bool]:
        path = directory / f"s{index}"
        process = start(files[index].url(), path, stderr=f"err{index}")
        deadline = time.monotonic() + DEADLINE_S
        while not path.exists() and time.monotonic() < deadline:
            pass  # as soon as can be: it is the moment after that matters
        time.sleep(index * 0.004)
        process.send_signal(signal.SIGTERM)
        return process.wait(DEADLINE_S), path.exists()

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(strike, range(12))) == [(0, False)] * 12


def test_the_worker_dies_with_serve(backing_file: FileOnServer, directory: Path, start: Start) -> None:
    """SIGKILL to serve: nbdkit does not stay behind. What stays is the socket file, which the next one replaces."""
    path = directory / "s"
    process = start(backing_file.url(), path)
    wait_until(lambda: is_served(path), "it is served")
    with NbdClient(path, DEADLINE_S) as client:
        client.read(0, PAGE)
    (worker,) = children(process)
    process.kill()
    process.wait(DEADLINE_S)
    wait_until(lambda: not is_alive(worker), "nbdkit has ended")
    assert path.exists()
    again = start(backing_file.url(), path)
    wait_until(lambda: is_served(path), "it is served again")
    with NbdClient(path, DEADLINE_S) as client:
        assert client.read(0, PAGE) == bytes(PAGE)
    again.terminate()
    assert again.wait(DEADLINE_S) == 0


def test_the_oom_killer_spares_serve(backing_file: FileOnServer, directory: Path, start: Start) -> None:
    """As its worker, which would die with it, and swap with that. A container may forbid it: then it is served all the
    same. The guests, where it is not forbidden, look as well (vm-tests/test_memory.py)."""
    probe = subprocess.run(
        ["sh", "-c", "echo -1000 > /proc/self/oom_score_adj"], stderr=subprocess.DEVNULL, check=False
    )
    expected = "-1000\n" if probe.returncode == 0 else Path("/proc/self/oom_score_adj").read_text()
    path = directory / "s"
    process = start(backing_file.url(), path)
    wait_until(lambda: is_served(path), "it is served")
    for pid in (process.pid, *children(process)):
        assert Path(f"/proc/{pid}/oom_score_adj").read_text() == expected
    process.terminate()
    assert process.wait(DEADLINE_S) == 0


def test_the_death_of_the_worker_is_told(backing_file: FileOnServer, directory: Path, start: Start) -> None:
    """nbdkit is killed: serve ends too, with the status that a shell gives, and takes the socket along."""
    path = directory / "s"
    process = start(backing_file.url(), path)
    wait_until(lambda: is_served(path), "it is served")
    with NbdClient(path, DEADLINE_S) as client:
        client.read(0, PAGE)
    (worker,) = children(process)
    os.kill(worker, signal.SIGKILL)
    assert process.wait(DEADLINE_S) == 128 + signal.SIGKILL
    assert not path.exists()


def test_a_second_signal_ends_a_worker_that_waits_for_its_server(
    backing_file: FileOnServer, proxy: TcpProxy, directory: Path, start: Start
) -> None:
    """The server says nothing and a read waits: the first SIGTERM waits with it, the second does not."""
    path = directory / "s"
    process = start(backing_file.url(nfsport=proxy.port), path)
    wait_until(lambda: is_served(path), "it is served")
    with NbdClient(path, DEADLINE_S) as client:
        client.read(0, PAGE)
        proxy.black_hole = True
        before = proxy.passed_bytes
        request = in_background(client.read, 0, PAGE)
        with pytest.raises(TimeoutError):
            request.result(0.2)
        process.terminate()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        assert proxy.passed_bytes == before
        process.terminate()
        assert process.wait(DEADLINE_S) == 128 + signal.SIGKILL
        with pytest.raises(ConnectionError):
            request.result(DEADLINE_S)
    assert not path.exists()


# The socket


def test_the_socket_is_its_owners(backing_file: FileOnServer, directory: Path, start: Start) -> None:
    """Mode 0600, whatever the umask: who may connect may read and write what the machine has swapped out."""
    path = directory / "s"
    process = start(backing_file.url(), path, umask=0)
    wait_until(lambda: is_served(path), "it is served")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    process.terminate()
    assert process.wait(DEADLINE_S) == 0


def test_a_second_serve_on_one_socket_is_refused(backing_file: FileOnServer, directory: Path, start: Start) -> None:
    """It says so and exits; the first one goes on serving."""
    with serving(backing_file.url(), directory) as worker:
        second = start(backing_file.url(), worker.socket, stderr="err2")
        assert second.wait(DEADLINE_S) == os.EX_TEMPFAIL
        assert (directory / "err2").read_text().splitlines() == [
            f"nbdnfs: {worker.socket} is already being served",
            "nbdnfs: end that worker first, or choose another path for --socket",
        ]
        with NbdClient(worker.socket, DEADLINE_S) as client:
            assert client.read(0, PAGE) == bytes(PAGE)


def test_a_stale_socket_is_replaced(backing_file: FileOnServer, directory: Path, start: Start) -> None:
    """A socket file that no process listens on is replaced."""
    path = directory / "worker.sock"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    process = start(backing_file.url(), path)
    wait_until(lambda: is_served(path), "it is served")
    with NbdClient(path, DEADLINE_S) as client:
        assert client.read(0, PAGE) == bytes(PAGE)
    process.terminate()
    assert process.wait(DEADLINE_S) == 0


@pytest.mark.parametrize("kind", ["file", "directory", "link to a file", "dangling link"])
def test_what_is_no_socket_is_not_touched(backing_file: FileOnServer, directory: Path, start: Start, kind: str) -> None:
    """A path where something else lies is refused, and it lies there afterwards."""
    path = directory / "precious"
    {
        "file": lambda: path.write_text("data"),
        "directory": path.mkdir,
        "link to a file": lambda: path.symlink_to("/etc/passwd"),
        "dangling link": lambda: path.symlink_to(directory / "nowhere"),
    }[kind]()
    before = path.lstat()
    process = start(backing_file.url(), path)
    assert process.wait(DEADLINE_S) == os.EX_CANTCREAT
    assert (directory / "err").read_text().splitlines() == [
        f"nbdnfs: {path} exists and is not a socket",
        "nbdnfs: choose another path for --socket",
    ]
    assert (path.lstat().st_ino, path.lstat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize(
    ("name", "status", "lines"),
    [
        (
            "x" * 120,
            os.EX_USAGE,
            ["the socket path {path} is longer than 107 bytes", "choose a shorter one, in /run"],
        ),
        (
            "nowhere/s",
            os.EX_CANTCREAT,
            ["cannot make the socket {path}: No such file or directory", "choose a directory that exists and is yours"],
        ),
    ],
)
def test_where_no_socket_can_be(
    backing_file: FileOnServer, directory: Path, start: Start, name: str, status: int, lines: list[str]
) -> None:
    """A path that is too long, or in a directory that is not there."""
    path = directory / name
    process = start(backing_file.url(), path)
    assert process.wait(DEADLINE_S) == status
    assert (directory / "err").read_text().splitlines() == [f"nbdnfs: {line.format(path=path)}" for line in lines]


# Without root


def is_open_to_all(path: Path) -> bool:
    return all(folder.stat().st_mode & stat.S_IXOTH for folder in path.resolve().parents)


def unprivileged() -> tuple[int, list[str]]:
    """A uid, and what to put before a command to run it so: as nobody.

    Where only root may enter this checkout: as uid 0, which owns it, but with no capability at all.
    """
    setpriv = program("setpriv", "util-linux")
    if all(map(is_open_to_all, (Path(engine.__file__), Path(sys.prefix, "bin/python"), Path(sys.executable)))):
        return NOBODY, [setpriv, f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    return 0, [setpriv, "--bounding-set=-all", "--inh-caps=-all"]


def test_it_needs_no_root(ganesha: Ganesha, directory: Path, start: Start) -> None:
    """Without a capability, and so without a reserved port, on a file and in a directory of one's own. The worker has
    none either."""
    uid, wrapper = unprivileged()
    file = FileOnServer(ganesha, "own/file", 4 * MIB)
    file.path.parent.mkdir()
    file.path.write_bytes(bytes(4 * MIB))
    file.path.chmod(0o600)
    for path in (file.path.parent, file.path, directory):
        os.chown(path, uid, uid)
    path = directory / "s"
    process = start(file.url(), path, wrapper=wrapper)
    wait_until(lambda: is_served(path) or process.poll() is not None, "it is served")
    assert process.poll() is None, (directory / "err").read_text()
    with NbdClient(path, DEADLINE_S) as client:
        (worker,) = children(process)
        status = Path(f"/proc/{worker}/status").read_text()
        assert f"Uid:\t{uid}\t" in status
        assert "CapEff:\t0000000000000000\n" in status
        data = os.urandom(PAGE)
        client.write(PAGE, data)
        client.flush()
        assert client.read(PAGE, PAGE) == data
    process.terminate()
    assert process.wait(DEADLINE_S) == 0
    assert file.path.read_bytes()[PAGE : 2 * PAGE] == data
    assert not path.exists()
