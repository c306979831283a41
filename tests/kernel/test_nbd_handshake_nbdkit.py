# SPDX-License-Identifier: LGPL-2.1-or-later
"""The NBD handshake against a real nbdkit with its memory plugin."""

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nbdnfs.errors import UnavailableError
from nbdnfs.kernel import nbd_handshake

pytestmark = pytest.mark.skipif(shutil.which("nbdkit") is None, reason="nbdkit is not installed")


@contextmanager
def nbdkit(*arguments: str) -> Iterator[socket.socket]:
    """A client socket to `nbdkit ARGUMENTS`, which finds its own end as its standard input and output
    (-s)."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        process = subprocess.Popen(["nbdkit", "-s", *arguments], stdin=theirs, stdout=theirs)
        theirs.close()
        try:
            yield ours
        finally:
            ours.close()
            process.wait(timeout=10)


def test_memory_plugin() -> None:
    """Size, flags and block sizes as nbdkit 1.32 and 1.42 give them."""
    with nbdkit("memory", "64M") as sock:
        export = nbd_handshake.negotiate(sock)
    assert export.size_bytes == 64 << 20
    assert nbd_handshake.TransmissionFlags.HAS_FLAGS in export.flags
    assert export.can_flush
    assert export.can_fua
    assert export.can_trim
    assert export.can_multi_conn
    assert not export.read_only
    assert export.min_block_bytes == 1


def test_read_only_and_a_block_size_policy() -> None:
    """What options and filters change comes through."""
    with nbdkit(
        "-r",
        "--filter=blocksize-policy",
        "memory",
        "1M",
        "blocksize-minimum=4096",
        "blocksize-preferred=65536",
        "blocksize-maximum=1M",
    ) as sock:
        export = nbd_handshake.negotiate(sock)
    assert export.read_only
    blocks = (export.min_block_bytes, export.preferred_block_bytes, export.max_block_bytes)
    assert blocks == (4096, 65536, 1 << 20)


def test_the_socket_is_ready_for_requests() -> None:
    """After the handshake a read request, as the kernel would send it, is answered with the data."""
    with nbdkit("pattern", "1M") as sock:
        nbd_handshake.negotiate(sock)
        # magic, flags and type (read), cookie, offset 4096, length 16
        sock.sendall(bytes.fromhex("25609513 0000 0000 0123456789abcdef 0000000000001000 00000010"))
        answer = sock.recv(16 + 16, socket.MSG_WAITALL)
    assert answer.hex(" ", 4) == "67446698 00000000 01234567 89abcdef 00000000 00001000 00000000 00001008"


def test_oldstyle() -> None:
    """nbdkit -o speaks the protocol of before 2011."""
    with nbdkit("-o", "memory", "1M") as sock, pytest.raises(UnavailableError, match="oldstyle"):
        nbd_handshake.negotiate(sock)


def test_a_plugin_that_cannot_open() -> None:
    """When its plugin's open fails nbdkit answers "unknown export", or (1.42) hangs up; the reason is in its log."""
    with (
        nbdkit("eval", "open=echo EIO it is broken >&2; exit 1") as sock,
        pytest.raises(UnavailableError, match=r"cannot open it|closed the connection") as caught,
    ):
        nbd_handshake.negotiate(sock)
    assert "log" in caught.value.hint


def test_a_tls_only_server(tmp_path: Path) -> None:
    """`--tls=require` has a message of its own."""
    config = subprocess.run(["nbdkit", "--dump-config"], capture_output=True, text=True, check=True).stdout
    if "tls=yes" not in config:
        pytest.skip("this nbdkit has no TLS")
    keys = tmp_path / "keys.psk"
    keys.write_text("user:" + "00" * 32 + "\n")
    with (
        nbdkit("--tls=require", f"--tls-psk={keys}", "memory", "1M") as sock,
        pytest.raises(UnavailableError, match="requires TLS"),
    ):
        nbd_handshake.negotiate(sock)


def test_over_a_unix_socket(tmp_path: Path) -> None:
    """As it is used: a path in the file system. nbdkit goes into the background once it listens there."""
    path, pid_file = tmp_path / "s", tmp_path / "pid"
    subprocess.run(["nbdkit", "-U", path, "-P", pid_file, "memory", "64M"], check=True, timeout=30)
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(path))
            assert nbd_handshake.negotiate(sock).size_bytes == 64 << 20
    finally:
        os.kill(int(pid_file.read_text()), signal.SIGTERM)
