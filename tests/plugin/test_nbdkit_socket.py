# SPDX-License-Identifier: LGPL-2.1-or-later
"""read(2) and send(2) as the worker preloads them: the same to their caller, and nobody woken for nothing.

The library lies between a program and libc, so that each test runs in a process of its own that has it preloaded.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from nfs_server import Ganesha
from worker_process import serving

from nbdnfs import worker

PRELUDE = """
import ctypes, errno, fcntl, os, random, socket, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
libc.read.restype = libc.send.restype = ctypes.c_ssize_t
libc.read.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
libc.send.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
ours, theirs = socket.socketpair()

def read(fd, count):
    buffer = ctypes.create_string_buffer(max(count, 1))
    got = libc.read(fd, buffer, count)
    return buffer.raw[:got] if got >= 0 else errno.errorcode[ctypes.get_errno()]

def send(fd, data, more=False):
    sent = libc.send(fd, data, len(data), socket.MSG_MORE if more else 0)
    return sent if sent >= 0 else errno.errorcode[ctypes.get_errno()]

def waiting(sock):
    try:
        return sock.recv(1 << 20, socket.MSG_DONTWAIT)
    except BlockingIOError:
        return None
"""


def run(script: str, *, preloaded: bool = True, stdin: bytes = b"") -> str:
    """What a Python program says that begins with PRELUDE; AssertionError when it fails."""
    environment = dict(os.environ)
    if preloaded:
        environment["LD_PRELOAD"] = worker.worker_environment()["LD_PRELOAD"]
        assert "_nbdkit_socket" in environment["LD_PRELOAD"]
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(script)],
        env=environment,
        input=stdin,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode().strip()


WAKE_UPS = """
def switches(thread):
    with open(f"/proc/self/task/{thread.native_id}/status") as file:
        return int(file.read().partition("\\nvoluntary_ctxt_switches:")[2].split()[0])

def wait_asleep(thread):
    deadline = time.monotonic() + 10
    while open(f"/proc/self/task/{thread.native_id}/stat").read().rpartition(")")[2].split()[0] != "S":
        assert time.monotonic() < deadline

for _ in range(50):
    theirs.send(b"reply")  # far less than a quarter of the buffer: with more in it nobody is woken
reader = threading.Thread(target=read, args=(theirs.fileno(), 28), daemon=True)
reader.start()
time.sleep(0.2)
wait_asleep(reader)
before = switches(reader)
for _ in range(50):
    ours.recv(5)
    wait_asleep(reader)
print(switches(reader) - before)
ours.send(b"request")
reader.join(10)
assert not reader.is_alive()
"""


def test_a_reader_sleeps_while_the_peer_reads() -> None:
    """Kernels wake it for each message otherwise, which is what the library is there for."""
    if int(run(WAKE_UPS, preloaded=False)) < 40:
        pytest.skip("this kernel wakes nobody who need not be")
    assert int(run(WAKE_UPS)) <= 2


def test_the_head_of_a_reply_waits_for_its_data() -> None:
    found = run(
        """
        print(send(ours.fileno(), b"head", more=True), waiting(theirs))
        print(send(ours.fileno(), b"data"), waiting(theirs))
        print(send(ours.fileno(), b"alone"), waiting(theirs))
        """
    )
    assert found.splitlines() == ["4 None", "4 b'headdata'", "5 b'alone'"]


def test_a_head_is_of_one_socket_and_one_thread() -> None:
    found = run(
        """
        third, fourth = socket.socketpair()
        send(ours.fileno(), b"head", more=True)
        send(third.fileno(), b"other")
        thread = threading.Thread(target=send, args=(ours.fileno(), b"thread"))
        thread.start()
        thread.join(10)
        print(waiting(fourth), waiting(theirs))
        send(ours.fileno(), b"data")
        print(waiting(theirs))
        """
    )
    assert found.splitlines() == ["b'other' b'thread'", "b'headdata'"]


def test_nothing_is_left_of_a_connection_that_broke() -> None:
    found = run(
        """
        import signal
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        number = ours.fileno()
        send(number, b"head", more=True)
        theirs.close()
        print(send(number, b"data"))
        ours.close()
        third, fourth = socket.socketpair()
        os.dup2(third.fileno(), number)
        print(send(number, b"new"), waiting(fourth))
        """
    )
    assert found.splitlines() == ["EPIPE", "3 b'new'"]


@pytest.mark.parametrize("seed", range(4))
def test_the_stream_is_the_same(seed: int) -> None:
    """Heads and data of all sizes, through a socket that takes little at a time, as nbdkit sends and reads them."""
    run(
        f"""
        draw = random.Random({seed})
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2048)
        ours.setblocking(False)
        parts = []
        for _ in range(400):
            parts.append((draw.randbytes(draw.choice((1, 16, 28, 64, 65))), True))
            parts.append((draw.randbytes(draw.choice((1, 3, 63, 64, 512, 4096, 30000))), draw.random() < 0.1))
        parts.append((b"end", False))
        wanted = b"".join(data for data, _ in parts)
        found = bytearray()

        def take():
            while len(found) < len(wanted):
                found.extend(read(theirs.fileno(), draw.choice((1, 28, 64, 4096))))

        taker = threading.Thread(target=take, daemon=True)
        taker.start()
        for data, more in parts:
            while data:
                sent = send(ours.fileno(), data, more)
                data = data if sent == "EAGAIN" else data[sent:]
        taker.join(30)
        assert bytes(found) == wanted
        """
    )


def test_reading_anything_else_is_as_ever() -> None:
    found = run(
        """
        print(read(0, 5), read(0, 64), read(0, 64))
        print(read(99, 5), read(theirs.fileno(), 0))
        theirs.setblocking(False)
        print(read(theirs.fileno(), 28))
        ours.send(b"request")
        print(read(theirs.fileno(), 28))
        ours.close()
        print(read(theirs.fileno(), 28))
        inlet, outlet = os.pipe()
        os.write(outlet, b"pipe")
        print(read(inlet, 64))
        """,
        stdin=b"standard input",
    )
    assert found.splitlines() == [
        "b'stand' b'ard input' b''",
        "EBADF b''",
        "EAGAIN",
        "b'request'",
        "b''",
        "b'pipe'",
    ]


def test_a_signal_ends_a_read() -> None:
    assert (
        run(
            """
            import signal
            signal.signal(signal.SIGALRM, lambda *_: None)
            signal.siginterrupt(signal.SIGALRM, True)
            signal.setitimer(signal.ITIMER_REAL, 0.3, 0.3)
            print(read(theirs.fileno(), 28))
            """
        )
        == "EINTR"
    )


def test_the_worker_has_it(tmp_path: Path, ganesha: Ganesha) -> None:
    (ganesha.export_path / "preloaded.img").write_bytes(bytes(1 << 20))
    with serving(ganesha.url("preloaded.img"), tmp_path) as process:
        assert "_nbdkit_socket" in Path(f"/proc/{process.pid}/maps").read_text()


def test_a_path_that_cannot_be_preloaded_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a folder"
    folder.mkdir()
    (folder / "_nbdkit_socket.abi3.so").touch()
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    monkeypatch.setattr(worker.nbdnfs, "__file__", str(folder / "__init__.py"))
    assert worker.worker_environment()["LD_PRELOAD"] == ""
