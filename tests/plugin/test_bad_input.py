# SPDX-License-Identifier: LGPL-2.1-or-later
"""Every bad input gets its two lines, what is wrong and what to do, and its exit status; none a traceback."""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.nfs_server import LOOPBACK, FileOnServer, Ganesha, free_ports, program
from support.waiting import DEADLINE_S

import nbdnfs
from nbdnfs import engine, nfs_url
from nbdnfs.errors import ConfigError, UnavailableError
from nbdnfs.nas import explain
from nbdnfs.worker import nbdkit

SOMEBODY = 1234
PAGE = 4096
URL_HINT = "write it like nfs://nas/export/swap/%H.swap?version=3"
SERVER_HINT = "check that the NFS server is running, and that no firewall blocks the port"
PERMISSION_HINT = (
    "check the file's owner and mode, and that the export is not read-only and does not squash root; or give"
    " uid= and gid= in the URL"
)
PAGES_HINT = "create a file of whole 4096-byte pages: nbdnfs create URL --size SIZE"


@pytest.fixture
def socket_path(tmp_path: Path) -> Path:
    return tmp_path / "s"


@pytest.fixture
def serve_fails(socket_path: Path) -> Iterator[Callable[..., list[str]]]:
    """`serve_fails(status, url, *options, env=...)`: run `nbdnfs serve` to its end; its last two lines.

    AssertionError when it has another status, says anything on stdout or anything that is not ours on stderr,
    or leaves a socket.
    """

    def run(status: int, text: str, *options: str, **how: Any) -> list[str]:
        command = [sys.executable, "-m", "nbdnfs", "serve", text, "--socket", str(socket_path), *options]
        return last_lines(status, command, **how)

    yield run
    assert not socket_path.exists()


def last_lines(status: int, command: Sequence[str], **how: Any) -> list[str]:
    """Run a command to its end; the last two lines that it says, without their prefix."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False, **how)
    lines = done.stderr.splitlines()
    assert done.returncode == status, done.stderr
    assert done.stdout == ""
    assert all(line.startswith("nbdnfs: ") for line in lines), done.stderr
    return [line.removeprefix("nbdnfs: ") for line in lines[-2:]]


# The URL


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("http://nas/export/file", "'http://nas/export/file' is not an NFS URL", URL_HINT),
        ("nfs:///export/file", "'nfs:///export/file' is not an NFS URL", URL_HINT),
        ("nfs://nas/export/", "the URL 'nfs://nas/export/' does not name a file", URL_HINT),
        (
            "nfs://nas/export/../file",
            "the URL 'nfs://nas/export/../file' has '..' in its path",
            "write the path as the server exports it",
        ),
        (
            "nfs://nas/export/%x",
            "'%x' in the URL is not a specifier",
            "use %H, %m, %M, %u, %20 and the like for a byte, or %% for a percent sign",
        ),
        ("nfs://nas/export/file?versoin=3", "'versoin' is not an option of an NFS URL", "did you mean 'version'?"),
        ("nfs://nas/export/file?version=2", "'version=2' in the URL is not valid", "version must be from 3 to 4"),
    ],
)
def test_bad_url(serve_fails: Callable[..., list[str]], text: str, message: str, hint: str) -> None:
    """What is no URL of a file on an NFS server: EX_USAGE."""
    assert serve_fails(os.EX_USAGE, text) == [message, hint]


def test_unknown_host(serve_fails: Callable[..., list[str]]) -> None:
    """A name that does not resolve (RFC 6761: none in .invalid does): EX_NOHOST."""
    message, hint = serve_fails(os.EX_NOHOST, "nfs://nas.invalid/export/file")
    assert re.fullmatch(r"the NFS server 'nas\.invalid' is unknown: .+", message)
    assert hint == "check the name, or write its address in the URL"


@pytest.mark.parametrize(("option", "service"), [("nfsport", "NFS"), ("mountport", "mount")])
def test_refused_port(
    backing_file: FileOnServer, serve_fails: Callable[..., list[str]], option: str, service: str
) -> None:
    """Nobody listens on one of the two ports: the line says on which. EX_UNAVAILABLE."""
    port = free_ports(1)[0]
    assert serve_fails(os.EX_UNAVAILABLE, backing_file.url(**{option: port})) == [
        f"no answer from {LOOPBACK} ({LOOPBACK}) on port {port} ({service}): connection refused",
        SERVER_HINT,
    ]


@pytest.mark.skipif(int(engine.libnfs_version.split(".")[0]) >= 5, reason="this libnfs can write over NFSv4")
def test_version_4_with_an_old_libnfs(backing_file: FileOnServer, serve_fails: Callable[..., list[str]]) -> None:
    """Refused before it loses a page: EX_CONFIG."""
    assert serve_fails(os.EX_CONFIG, backing_file.url(version=4)) == [
        f"NFSv4 needs libnfs 5.0 or newer: {engine.libnfs_version} cannot write a page over it (sahlberg/libnfs#319)",
        "use version=3, or a system with a newer libnfs (Debian 13)",
    ]


@pytest.mark.skipif(int(engine.libnfs_version.split(".")[0]) >= 5, reason="this libnfs can write over NFSv4")
def test_a_keepers_worker_with_an_old_libnfs(socket_path: Path) -> None:
    """The keeper has no libnfs: its worker says the same, with the same status."""
    command = run_plugin(socket_path, f"url=nfs://{LOOPBACK}/export/x?version=4", f"address={LOOPBACK}")
    assert last_lines(os.EX_CONFIG, command, env=nbdkit.worker_environment()) == [
        f"NFSv4 needs libnfs 5.0 or newer: {engine.libnfs_version} cannot write a page over it (sahlberg/libnfs#319)",
        "use version=3, or a system with a newer libnfs (Debian 13)",
    ]


@pytest.mark.parametrize(
    ("libnfs", "version", "is_refused"), [("4.0.0", 4, True), ("4.0.0", 3, False), ("5.0.2", 4, False)]
)
def test_which_versions_are_refused(libnfs: str, version: int, is_refused: bool) -> None:
    """NFSv4 with libnfs 4, nothing else."""
    parsed = nfs_url.parse(f"nfs://nas/export/file?version={version}")
    if is_refused:
        with pytest.raises(ConfigError, match=r"NFSv4 needs libnfs 5\.0"):
            explain.refuse_unsupported(parsed, libnfs)
    else:
        explain.refuse_unsupported(parsed, libnfs)


# The file


def test_missing_export(ganesha: Ganesha, serve_fails: Callable[..., list[str]]) -> None:
    """The server exports nothing of the kind. Ganesha answers EACCES, others ENOENT."""
    text = f"nfs://{LOOPBACK}/no/such/file?nfsport={ganesha.nfs_port}&mountport={ganesha.mount_port}"
    assert serve_fails(os.EX_NOPERM, text) == [
        f"{LOOPBACK} does not let this machine mount /no/such",
        f"check the path and the export's list of clients: showmount -e {LOOPBACK}",
    ]


@pytest.mark.parametrize("name", ["nowhere", "no/directory/here"])
def test_missing_file(ganesha: Ganesha, serve_fails: Callable[..., list[str]], name: str) -> None:
    """The export is there, the file is not: EX_NOINPUT, and how to make one."""
    assert serve_fails(os.EX_NOINPUT, ganesha.url(name)) == [
        f"there is no file {ganesha.export_path}/{name} on {LOOPBACK}",
        "create it: nbdnfs create URL --size SIZE; or check the path",
    ]


def test_directory(ganesha: Ganesha, serve_fails: Callable[..., list[str]]) -> None:
    """EX_NOINPUT."""
    (ganesha.export_path / "directory").mkdir()
    try:
        assert serve_fails(os.EX_NOINPUT, ganesha.url("directory")) == [
            f"{ganesha.export_path}/directory on {LOOPBACK} is a directory",
            "name a file in it, for example .../%H.swap",
        ]
    finally:
        (ganesha.export_path / "directory").rmdir()


def test_no_regular_file(ganesha: Ganesha, serve_fails: Callable[..., list[str]]) -> None:
    """A fifo: EX_CONFIG."""
    os.mkfifo(ganesha.export_path / "fifo")
    try:
        assert serve_fails(os.EX_CONFIG, ganesha.url("fifo")) == [
            f"{ganesha.export_path}/fifo on {LOOPBACK} cannot be a device: it is not a regular file",
            PAGES_HINT,
        ]
    finally:
        (ganesha.export_path / "fifo").unlink()


@pytest.mark.parametrize("size", [0, 1, PAGE - 1, PAGE + 512, 5 * PAGE + 1])
def test_size_is_no_multiple_of_a_page(
    new_file: Callable[..., FileOnServer], serve_fails: Callable[..., list[str]], size: int
) -> None:
    """EX_CONFIG, with the size."""
    file = new_file(size)
    assert serve_fails(os.EX_CONFIG, file.url()) == [
        f"{file.path} on {LOOPBACK} cannot be a device: its size, {size} bytes, is not a positive multiple of 4096",
        PAGES_HINT,
    ]


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o622], ids=oct)
def test_no_permission(new_file: Callable[..., FileOnServer], serve_fails: Callable[..., list[str]], mode: int) -> None:
    """A file that the URL's uid may not read, or not write: EX_NOPERM, with that uid."""
    file = new_file(PAGE)
    file.path.chmod(mode)
    assert serve_fails(os.EX_NOPERM, file.url(uid=SOMEBODY, gid=SOMEBODY)) == [
        f"{LOOPBACK} does not let uid {SOMEBODY} read and write {file.path}",
        PERMISSION_HINT,
    ]


@pytest.mark.parametrize("export", [{"squash": "root"}, {"access": "RO"}], ids=["root squash", "read-only"])
def test_exports_that_do_not_let_root_write(
    tmp_path: Path, serve_fails: Callable[..., list[str]], export: dict[str, str]
) -> None:
    """Root is squashed there, or the export is read-only: EX_NOPERM, and both are named."""
    with Ganesha(tmp_path / "server", **export) as server:
        file = server.export_path / "file"
        file.write_bytes(bytes(PAGE))
        file.chmod(0o600)
        assert serve_fails(os.EX_NOPERM, server.url("file")) == [
            f"{LOOPBACK} does not let uid {os.geteuid()} read and write {file}",
            PERMISSION_HINT,
        ]


# Settings and options


def run_plugin(socket_path: Path, *settings: str) -> list[str]:
    """nbdkit with the plugin, by hand."""
    return [program("nbdkit", "nbdkit"), "-f", "-U", str(socket_path), "python", str(nbdkit.plugin_path()), *settings]


@pytest.mark.parametrize(
    ("settings", "message", "hint"),
    [
        (["urll=nfs://nas/e/f"], "'urll' is not a setting of the nbdnfs plugin", "did you mean 'url'?"),
        ([], "the nbdnfs plugin needs url=", "for example url=nfs://nas/export/swap/box.swap"),
        (
            ["url=nfs://nas/e/f", "engine=rust"],
            "engine cannot be 'rust'",
            "it is one of: c, libnfs-python",
        ),
        (["url=nfs://nas/e/f", "lock=perhaps"], "lock cannot be 'perhaps'", "it is one of: wanted, required, off"),
    ],
)
def test_bad_settings_of_the_plugin(socket_path: Path, settings: list[str], message: str, hint: str) -> None:
    """Unknown keys and values, and none at all, on nbdkit's command line: EX_CONFIG."""
    lines = last_lines(os.EX_CONFIG, run_plugin(socket_path, *settings), env=nbdkit.worker_environment())
    assert lines == [message, hint]


def test_a_setting_that_resembles_none(socket_path: Path) -> None:
    """Where nothing is near, all are named."""
    command = run_plugin(socket_path, "quux=1")
    message, hint = last_lines(os.EX_CONFIG, command, env=nbdkit.worker_environment())
    assert message == "'quux' is not a setting of the nbdnfs plugin"
    assert re.fullmatch(r"the keys are url, address, engine(, \w+)*", hint)


def test_a_bad_url_given_to_the_plugin(socket_path: Path) -> None:
    """The plugin checks a URL that has not been checked before: the same lines as from serve."""
    command = run_plugin(socket_path, "url=nfs://nas/export/")
    lines = last_lines(os.EX_USAGE, command, env=nbdkit.worker_environment())
    assert lines == ["the URL 'nfs://nas/export/' does not name a file", URL_HINT]


def test_unknown_engine(backing_file: FileOnServer, serve_fails: Callable[..., list[str]]) -> None:
    """EX_CONFIG, from the worker."""
    assert serve_fails(os.EX_CONFIG, backing_file.url(), "--engine=rust") == [
        "engine cannot be 'rust'",
        "it is one of: c, libnfs-python",
    ]


@pytest.mark.parametrize("threads", [0, 65, -1])
def test_impossible_threads(serve_fails: Callable[..., list[str]], threads: int) -> None:
    """EX_USAGE."""
    assert serve_fails(os.EX_USAGE, "nfs://nas/export/file", f"--threads={threads}") == [
        f"--threads {threads} is out of range",
        "give 1 to 64; more than 16 are hardly faster",
    ]


# The installation


@pytest.fixture
def fake_nbdkit(tmp_path: Path) -> Callable[[str], dict[str, str]]:
    """Fake: `fake_nbdkit(script)` is an environment in which the first nbdkit in PATH is that shell script."""

    def make(script: str) -> dict[str, str]:
        path = tmp_path / "bin" / "nbdkit"
        path.parent.mkdir()
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return {**os.environ, "PATH": f"{path.parent}:{os.environ['PATH']}"}

    return make


def test_nbdkit_is_missing(tmp_path: Path, serve_fails: Callable[..., list[str]]) -> None:
    """No such program in PATH: EX_UNAVAILABLE, with the package to install."""
    if any(shutil.which("nbdkit", path=folder) for folder in ("/usr/sbin", "/sbin", "/usr/local/sbin")):
        pytest.fail("nbdkit lies in a directory that is searched without PATH: change this test")
    assert serve_fails(os.EX_UNAVAILABLE, "nfs://nas/export/file", env={**os.environ, "PATH": str(tmp_path)}) == [
        "the program 'nbdkit' is not installed",
        "install it (Debian: apt install nbdkit)",
    ]


def test_nbdkit_has_no_python_plugin(
    fake_nbdkit: Callable[[str], dict[str, str]], serve_fails: Callable[..., list[str]]
) -> None:
    """It says so in its own way, and fails: EX_UNAVAILABLE, with the package to install."""
    env = fake_nbdkit("echo \"nbdkit: error: cannot open plugin 'python'\" >&2; exit 1")
    assert serve_fails(os.EX_UNAVAILABLE, "nfs://nas/export/file", env=env) == [
        "nbdkit has no Python plugin",
        "install it (Debian: apt install nbdkit-plugin-python)",
    ]


@pytest.mark.parametrize(
    ("dump", "said"),
    [
        ("python_version=3.9.18", "3.9.18"),
        ("python_version=2.7.18", "2.7.18"),
        ("python_version=", "of unknown version"),
        ("name=python", "of unknown version"),
    ],
)
def test_nbdkits_python_is_too_old(
    fake_nbdkit: Callable[[str], dict[str, str]], serve_fails: Callable[..., list[str]], dump: str, said: str
) -> None:
    """Older than the extension's ABI, or of an unknown version: EX_CONFIG."""
    assert serve_fails(os.EX_CONFIG, "nfs://nas/export/file", env=fake_nbdkit(f"echo {dump}")) == [
        f"nbdkit embeds Python {said}; nbdnfs needs 3.11 or newer",
        "use nbdkit of Debian 12 or newer",
    ]


@pytest.mark.server
def test_another_python_than_nbdkits_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """It works, so it is a warning: in one line, with both versions and the remedy. The same one: no word."""
    with caplog.at_level(logging.INFO):
        nbdkit.check_nbdkit(version_info=(3, 99))
    (record,) = caplog.records
    assert re.fullmatch(
        r"nbdkit embeds Python 3\.\d+\.\d+, this is Python 3\.99: make the venv with /usr/bin/python3 -m venv",
        record.getMessage(),
    )
    assert record.levelno == logging.WARNING
    minor = re.search(r"Python 3\.(\d+)", record.getMessage())
    assert minor is not None
    caplog.clear()
    with caplog.at_level(logging.INFO):
        nbdkit.check_nbdkit(version_info=(3, int(minor[1])))
    assert caplog.records == []


def test_check_nbdkit_raises_what_serve_prints(
    fake_nbdkit: Callable[[str], dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For other callers (doctor, up): the same errors as exceptions."""
    monkeypatch.setenv("PATH", fake_nbdkit("exit 1")["PATH"])
    with pytest.raises(UnavailableError, match="has no Python plugin"):
        nbdkit.check_nbdkit()


def test_the_plugin_is_missing(tmp_path: Path, serve_fails: Callable[..., list[str]]) -> None:
    """An installation without its plugin file: EX_CONFIG."""
    package = tmp_path / "incomplete" / "nbdnfs"
    shutil.copytree(Path(nbdnfs.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__", "plugin"))
    env = {**os.environ, "PYTHONPATH": str(package.parent)}
    assert serve_fails(os.EX_CONFIG, f"nfs://{LOOPBACK}/export/file", env=env, cwd=package.parent) == [
        "nbdnfs_plugin.py is missing from this installation",
        "install the package nbdnfs again",
    ]
