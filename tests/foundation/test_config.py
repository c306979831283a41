# SPDX-License-Identifier: LGPL-2.1-or-later
"""The configuration file: its values, and that every error is reported with file, line and remedy."""

from __future__ import annotations

import dataclasses
import errno
import os
import socket
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support.waiting import DEADLINE_S, in_background

from nbdnfs import config, config_keys
from nbdnfs.config import Config
from nbdnfs.errors import (
    ConfigError,
    NbdnfsError,
    NoInputError,
    PermissionDeniedError,
    UnavailableError,
    UsageError,
)

URL = 'url = "nfs://nas/export/a.swap"\n'
MACHINE_ID = "0123456789abcdef0123456789abcdef"
# systemd-id128 makes it of that id: sd_id128_get_machine_app_specific(3)
FILE_ID = "a88094e54e19421489d85ef6441afd86"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root folder with a machine id and an empty /etc/nbdnfs."""
    (tmp_path / "etc/nbdnfs").mkdir(parents=True)
    (tmp_path / "etc/machine-id").write_text(MACHINE_ID + "\n")
    return tmp_path


def write(root: Path, text: str | bytes, path: str = "etc/nbdnfs/swap0.toml") -> Path:
    """Write a file below the root."""
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def error_of(root: Path, text: str | bytes) -> NbdnfsError:
    """What loading the text comes to."""
    write(root, text)
    with pytest.raises(NbdnfsError) as caught:
        config.load("swap0", root)
    return caught.value


def test_one_line_suffices(root: Path) -> None:
    """A url alone gives the defaults, encryption among them."""
    write(root, 'url = "nfs://nas/export/swap/%H.swap"')
    loaded = config.load("swap0", root)
    assert loaded == Config(name="swap0", url=f"nfs://nas/export/swap/{socket.gethostname()}.swap")
    assert loaded.encrypt
    assert loaded.region_bytes == 16 << 20


def test_every_key(root: Path) -> None:
    """Each key arrives in its field, in the field's unit."""
    write(
        root,
        """
        url = "nfs://nas/export/%m.swap?version=3&uid=0"   # a comment
        size = "1.5G"
        priority = 100
        discard = true
        region = "32M"
        connections = 2
        stable_writes = true
        read_ahead = "0"
        threads = 2
        device = "/dev/nbd3"
        lock = 'wanted'
        realtime = false
        io_timeout = "500ms"
        max_sectors = "1M"
        recovery = "soft"
        soft_limit = "90s"
        gone_limit = "10min"
        reclaim_check = false
        owner = false
        encrypt = false
        """,
    )
    assert config.load("swap0", root) == Config(
        name="swap0",
        url=f"nfs://nas/export/{FILE_ID}.swap?version=3&uid=0",
        size_bytes=3 << 29,
        priority=100,
        discard=True,
        region_pages=8192,
        connections=2,
        stable_writes=True,
        read_ahead_pages=0,
        threads=2,
        device="/dev/nbd3",
        lock="wanted",
        realtime=False,
        io_timeout_ms=500,
        max_sectors_kb=1024,
        recovery="soft",
        soft_limit_ms=90_000,
        gone_limit_ms=600_000,
        reclaim_check=False,
        owner=False,
        encrypt=False,
    )


def test_example_is_valid_and_complete(root: Path) -> None:
    """The example parses as it is and with every default uncommented, to the same; and it names every key."""
    text = config_keys.render_example()
    write(root, text)
    as_is = config.load("swap0", root)
    uncommented = "\n".join(
        line[1:] if line.startswith("#") and not line.startswith("# ") else line for line in text.split("\n")
    )
    write(root, uncommented)
    assert config.load("swap0", root) == as_is == dataclasses.replace(Config("swap0", ""), url=as_is.url)
    for key in config_keys.KEYS:
        assert f"\n{key} = " in uncommented
    assert len(config_keys.KEYS) == len(dataclasses.fields(Config)) - 1  # less the name
    assert max(len(line) for line in text.splitlines()) <= 110


def test_percent_sign_survives_a_second_parse(root: Path) -> None:
    """`%%` stays a percent sign for libnfs, however often the configured URL is parsed."""
    from nbdnfs import nfs_url

    write(root, 'url = "nfs://nas/export/100%%.swap"')
    assert nfs_url.parse(config.load("swap0", root).url).name == "100%.swap"


def test_drop_ins(root: Path) -> None:
    """Later names win, /etc hides /run of the same name, a link to /dev/null hides, other endings do not count."""
    write(root, URL + "priority = 1\nthreads = 1")
    write(root, "priority = 2\ndiscard = true", "run/nbdnfs-config/swap0.toml.d/10-a.toml")
    write(root, "priority = 3", "etc/nbdnfs/swap0.toml.d/20-b.toml")
    write(root, "priority = 4", "run/nbdnfs-config/swap0.toml.d/20-b.toml")
    write(root, "priority = 5", "run/nbdnfs-config/swap0.toml.d/30-c.toml")
    (root / "etc/nbdnfs/swap0.toml.d/30-c.toml").symlink_to("/dev/null")
    write(root, "priority = 6", "etc/nbdnfs/swap0.toml.d/40-d.toml.bak")
    loaded = config.load("swap0", root)
    assert (loaded.priority, loaded.discard, loaded.threads) == (3, True, 1)


def test_run_is_looked_up_after_etc(root: Path) -> None:
    """What the kernel command line asked for counts where /etc says nothing."""
    write(root, URL + "priority = 2", "run/nbdnfs-config/cmdline.toml")
    assert config.load("cmdline", root).priority == 2
    write(root, "# Made by nbdnfs-generator from …\n" + URL + 'size = "2X"', "run/nbdnfs-config/cmdline.toml")
    with pytest.raises(ConfigError) as caught:
        config.load("cmdline", root)
    assert caught.value.message.startswith("nbdnfs.size on the kernel command line: ")
    write(root, URL + "priority = 1", "etc/nbdnfs/cmdline.toml")
    assert config.load("cmdline", root).priority == 1
    assert config.names(root) == ["cmdline"]


@pytest.mark.parametrize(
    ("text", "line", "message", "hint"),
    [
        ("prioritty = 3", 1, "unknown key 'prioritty'", "did you mean 'priority'?"),
        ("Read-Ahead = 3", 1, "unknown key 'Read-Ahead'", "did you mean 'read_ahead'?"),
        ("# a\n\n\n  'sise'='2G'", 4, "unknown key 'sise'", "did you mean 'size'?"),
        ("[swap]\nsize = '2G'", 1, "unknown table [swap]", "the keys are url, "),
        ('x = """\na\n"""', 1, "unknown key 'x'", "the keys are url, "),
        ('lock = """\nrequired"""\ny = 1', 3, "unknown key 'y'", "the keys are url, "),
        (
            'device = """\n""" # y = 1\n#y = 1\nsize = "y = 1"\ny.z = 2',
            5,
            "unknown table [y]",
            "the keys are url, ",
        ),
        ("priority = 1\r\ndiscart = true\r\n", 2, "unknown key 'discart'", "did you mean 'discard'?"),
        ("priority = 40000", 1, "priority cannot be 40000", "it must be from -1 to 32767"),
        ("priority = 0x" + "f" * 5000, 1, "priority cannot be that large", "it must be from -1 to 32767"),
        ('\npriority = "5"', 2, "priority must be a whole number", "for example: priority = 32767"),
        ("connections = true", 1, "connections must be a whole number", "for example: connections = 1"),
        ("threads = 1.0", 1, "threads must be a whole number", "for example: threads = 1"),
        ("discard = 1", 1, "discard must be true or false", "for example: discard = true"),
        ("discard = 'yes'", 1, "discard must be true or false", "for example: discard = true"),
        ("size = 2048", 1, "size must be a string in quotes", 'for example: size = "2G"'),
        ('size = "2X"', 1, "size: '2X' is not a size", "write a number and a unit, for example 512M or 2G"),
        (
            'size = "5000"',
            1,
            "size: '5000' is too small: 5000 bytes, and a swap area has at least",
            "ask for example for 2G",
        ),
        ('size = "1048577"', 1, "size: '1048577' is not a multiple of 4096 bytes", "ask for 1052672 bytes"),
        ('size = "200T"', 1, "size: '200T' is too large: a swap area has at most 16 TiB", "ask for example for 2G"),
        ('size = "ram / 0"', 1, "size: 'ram / 0' is not a size", "write a number greater than 0"),
        ('region = "512K"', 1, "region cannot be '512K'", 'it must be from 1 MiB to 1 GiB, for example "16M"'),
        ('read_ahead = "17M"', 1, "read_ahead cannot be '17M'", "it must be from 0 B to 16 MiB"),
        ('io_timeout = "0s"', 1, "io_timeout cannot be '0s'", "it must be from 0.5 to 300 seconds"),
        ('io_timeout = "2 weeks"', 1, "io_timeout: '2 weeks' is not a duration", "write a number and a unit"),
        ('device = "/dev/sda"', 1, "device cannot be '/dev/sda'", 'use "/dev/nbd0" or the like'),
        ('lock = "require"', 1, "lock cannot be 'require'", "did you mean 'required'?"),
        ("[lock]\na = 1", 1, "lock must be a string in quotes", 'for example: lock = "required"'),
        ("lock.a = 1", 1, "lock must be a string in quotes", 'for example: lock = "required"'),
        ("priority = 1\npriority = 2", 2, "priority is set twice", "keep one of the two"),
        ("size = 1\nsize = [\n 1,\n]", 2, "size is set twice", "keep one of the two"),
        ("lock = 1\n[lock]\na = 1", 2, "lock is set twice", "keep one of the two"),
        ("a = 1\na = 2", 2, "not valid TOML: Cannot overwrite a value", "write lines like"),
        ("size = \n", 1, "not valid TOML: Invalid value", "write lines like"),
        ("# a\nsize", 2, "not valid TOML: Expected '='", "write lines like"),
        ("priority = " + "9" * 5000, 1, "not valid TOML: ", "write lines like"),
        ("# a\nsize = " + "[" * 3000, 2, "not valid TOML: nested too deeply", "write lines like"),
        ("size = '\x01'", 1, "not valid TOML: Found invalid character", "write lines like"),
    ],
)
def test_errors_name_line_and_remedy(root: Path, text: str, line: int, message: str, hint: str) -> None:
    """Each kind of mistake, on its line; the url stands at the end so that it is not what is missed."""
    error = error_of(root, URL + text if text.startswith("[") else text + "\n" + URL)
    shift = 1 if text.startswith("[") else 0
    assert error.message.startswith(f"{root}/etc/nbdnfs/swap0.toml:{line + shift}: {message}"), error.message
    assert error.hint.startswith(hint)
    assert error.exit_code == os.EX_CONFIG


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "swap0.toml:1: url is missing"),
        ("priority = 1", "swap0.toml:1: url is missing"),
        ("url = 5", "swap0.toml:1: url must be a string in quotes"),
        ('\nurl = "http://nas/x"', "swap0.toml:2: url: 'http://nas/x' is not an NFS URL"),
        ('url = "nfs://nas/a/%q"', "swap0.toml:1: url: '%q' in the URL is not a specifier"),
        ('url = "nfs://nas/a/b?uuid=1"', "swap0.toml:1: url: 'uuid' is not an option of an NFS URL"),
        ('url = "nfs://nas/a/b\\nb"', r"swap0.toml:1: url: 'nfs://nas/a/b\nb' is not an NFS URL"),
        (b"# \xc3\xa4\n# \xe4\n", "swap0.toml:2: byte 0xe4 is not UTF-8"),
        ("#" * 20000, "swap0.toml is larger than 16 KiB"),
    ],
)
def test_errors_of_url_and_file(root: Path, text: str | bytes, message: str) -> None:
    """A url that is missing or wrong, a file that is not text: one line each."""
    error = error_of(root, text)
    assert message in error.message
    assert len(error.lines()) == 2
    assert not any("\n" in line for line in error.lines())


def test_error_in_drop_in_names_the_drop_in(root: Path) -> None:
    """The file at fault is named, also for a value that a later file overrides."""
    write(root, URL)
    write(root, "\npriority = 'x'", "etc/nbdnfs/swap0.toml.d/10-a.toml")
    write(root, "priority = 1", "etc/nbdnfs/swap0.toml.d/20-b.toml")
    with pytest.raises(ConfigError, match=r"swap0\.toml\.d/10-a\.toml:2: priority must be a whole number"):
        config.load("swap0", root)


def test_missing_file_names_the_nearest(root: Path) -> None:
    """No file of that name: the one that was probably meant, or what to write."""
    with pytest.raises(NoInputError) as caught:
        config.load("swap0", root)
    assert "one line is enough" in caught.value.hint
    write(root, URL, "etc/nbdnfs/swap1.toml")
    with pytest.raises(NoInputError) as caught:
        config.load("swap0", root)
    assert caught.value.message == f"{root}/etc/nbdnfs/swap0.toml does not exist"
    assert caught.value.hint == "did you mean 'swap1'?"


@pytest.mark.parametrize("name", ["", ".a", "a/b", "../a", "a b", "a\n", "ä", "a" * 65, "swap0.toml", "a.toml.d"])
def test_impossible_names(root: Path, name: str) -> None:
    """A name that cannot be a file name, unit instance and socket path is refused before any file is looked for."""
    with pytest.raises(UsageError):
        config.load(name, root)
    write(root, URL, "etc/nbdnfs/.hidden.toml")
    assert config.names(root) == []


def test_link_that_leads_nowhere(root: Path) -> None:
    """It is a device whose configuration is not valid, and hides the file of that name in a later folder."""
    (root / "etc/nbdnfs/swap0.toml").symlink_to("/nowhere")
    write(root, URL, "run/nbdnfs-config/swap0.toml")
    assert config.names(root) == ["swap0"]
    with pytest.raises(ConfigError, match=r"swap0\.toml is a link that leads nowhere: /nowhere"):
        config.load("swap0", root)


def test_hidden_drop_ins(root: Path) -> None:
    """What an editor leaves beside a file is not read: Emacs locks it with a link that leads nowhere."""
    write(root, URL)
    write(root, "x", "etc/nbdnfs/swap0.toml.d/.10-a.toml")
    (root / "etc/nbdnfs/swap0.toml.d/.#10-a.toml").symlink_to("me@here.1")
    assert config.load("swap0", root).url.endswith("a.swap")
    (root / "etc/nbdnfs/swap0.toml.d/10-a.toml").symlink_to("nowhere")
    with pytest.raises(ConfigError, match=r"10-a\.toml is a link that leads nowhere: nowhere"):
        config.load("swap0", root)


@pytest.mark.parametrize("folder", ["etc/nbdnfs", "etc/nbdnfs/swap0.toml.d"])
@pytest.mark.parametrize("error", [errno.EIO, errno.ENOMEM])
def test_folder_that_cannot_be_read_now(root: Path, monkeypatch: pytest.MonkeyPatch, folder: str, error: int) -> None:
    """Such an error is temporary: systemd must restart the unit."""
    write(root, URL)
    real = os.listdir

    def listdir(path: Path) -> list[str]:
        if path == root / folder:
            raise OSError(error, os.strerror(error), str(path))
        return real(path)

    monkeypatch.setattr(os, "listdir", listdir)
    with pytest.raises(UnavailableError, match=f"cannot be read: {os.strerror(error)}"):
        config.names(root) if folder == "etc/nbdnfs" else config.load("swap0", root)


@pytest.mark.parametrize("folder", ["etc/nbdnfs", "etc/nbdnfs/swap0.toml.d"])
def test_folder_that_cannot_be_read(root: Path, monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    """That is not the same as one without files."""
    write(root, URL)
    real = os.listdir

    def listdir(path: Path) -> list[str]:
        if path == root / folder:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "listdir", listdir)
    with pytest.raises(PermissionDeniedError, match="cannot be read: Permission denied"):
        config.names(root) if folder == "etc/nbdnfs" else config.load("swap0", root)


def test_folder_instead_of_a_file(root: Path) -> None:
    """A file that cannot be read is reported with the reason of the system."""
    (root / "etc/nbdnfs/swap0.toml").mkdir()
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        config.load("swap0", root)


@pytest.mark.parametrize("kind", ["fifo", "socket", "device"])
@pytest.mark.parametrize("file", ["swap0.toml", "swap0.toml.d/10-a.toml"])
def test_what_is_no_file(root: Path, file: str, kind: str) -> None:
    """It is named at once, without waiting for a writer, and without an effect on a device; `list` shows it, too."""
    write(root, URL)
    path = root / "etc/nbdnfs" / file
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(ConfigError, match="is a FIFO, a socket or a device, not a file") as caught:
        in_background(config.load, "swap0", root).result(DEADLINE_S)
    assert caught.value.message.startswith(str(path))
    assert "remove it" in caught.value.hint
    assert config.names(root) == ["swap0"]


@pytest.mark.parametrize(
    ("number", "error"),
    [(errno.EIO, UnavailableError), (errno.ENOMEM, UnavailableError), (errno.EACCES, PermissionDeniedError)],
)
@pytest.mark.parametrize("file", ["swap0.toml", "swap0.toml.d/10-a.toml"])
def test_file_that_cannot_be_read_now(
    root: Path, monkeypatch: pytest.MonkeyPatch, file: str, number: int, error: type[NbdnfsError]
) -> None:
    """The configuration is not to blame: the unit has to be started again."""
    write(root, URL)
    write(root, "priority = 1", "etc/nbdnfs/swap0.toml.d/10-a.toml")
    real = open

    def refuse(path: Path, *rest: object, **options: object) -> object:
        if path == root / "etc/nbdnfs" / file:
            raise OSError(number, os.strerror(number), str(path))
        return real(path, *rest, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(config, "open", refuse, raising=False)
    with pytest.raises(error, match=f"{file} cannot be read: {os.strerror(number)}"):
        config.load("swap0", root)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOMEM])
def test_file_that_cannot_be_looked_at(root: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """It is not a missing one: the file of that name in the next folder may be another device's."""
    write(root, URL)
    write(root, 'url = "nfs://nas/export/other.swap"', "run/nbdnfs-config/swap0.toml")
    real = os.lstat

    def lstat(path: Path) -> os.stat_result:
        if path == root / "etc/nbdnfs/swap0.toml":
            raise OSError(number, os.strerror(number), str(path))
        return real(path)

    monkeypatch.setattr(os, "lstat", lstat)
    with pytest.raises(UnavailableError, match=f"swap0.toml cannot be read: {os.strerror(number)}"):
        config.load("swap0", root)


def test_names_of_files_that_cannot_be_looked_at(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are devices, of which load() says what is wrong: else a device would be said to have no file."""
    write(root, URL)
    write(root, "x", "etc/nbdnfs/other.txt")
    (root / "etc/nbdnfs/folder.toml").mkdir()
    real = os.stat

    def stat(path: Path, **options: bool) -> os.stat_result:
        if path == root / "etc/nbdnfs/swap0.toml":
            raise OSError(errno.EIO, "Input/output error", str(path))
        return real(path, **options)

    monkeypatch.setattr(os, "stat", stat)
    assert config.names(root) == ["swap0"]


def test_a_folder_that_is_a_link_to_itself(root: Path) -> None:
    """It stays so: that is a configuration that is not valid."""
    (root / "etc/nbdnfs/swap0.toml.d").symlink_to("swap0.toml.d")
    write(root, URL)
    with pytest.raises(ConfigError, match="Too many levels of symbolic links"):
        config.load("swap0", root)


toml_values = st.one_of(
    st.integers().map(str),
    st.booleans().map(lambda value: str(value).lower()),
    st.text(max_size=20).map(lambda text: "'" + text.replace("'", "") + "'"),
    st.text(max_size=20).map(lambda text: "'''" + text.replace("'", "") + "'''"),
    st.sampled_from(
        ['"2G"', '"4K"', '"2s"', '""', "[]", "[\n1,\n2]", "{a=1}", "1979-05-27", "nan", "inf", "1e5", '"nfs']
    ),
)
toml_lines = st.one_of(
    st.tuples(st.sampled_from([*config_keys.KEYS, "x", '"a b"', "size.x", '"\\n"']), toml_values).map(" = ".join),
    st.sampled_from(["", "# url = 1", "[t]", "[[t]]", "[url]", "\t", "\r", "url", 'url = "nfs://h/%m/b"']),
    st.text(max_size=20),
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=st.lists(toml_lines, max_size=8))
@example(lines=["size = '''", "a = 1"])
@example(lines=["a\u2028b = 1"])
def test_random_files_never_trace_back(root: Path, lines: list[str]) -> None:
    """Whatever the file holds: a Config, or two lines of text, with a line number that the file has."""
    text = "\n".join(lines)
    write(root, text.encode("utf-8", "replace"))
    found: ConfigError | None = None
    try:
        config.load("swap0", root)
    except ConfigError as error:
        found = error
    if found is not None:
        assert all(line.isprintable() for line in found.lines())
        assert found.hint
        where = found.message.removeprefix(f"{root}/etc/nbdnfs/swap0.toml:").partition(":")[0]
        assert 1 <= int(where) <= text.count("\n") + 1


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=200))
def test_random_bytes_never_trace_back(root: Path, data: bytes) -> None:
    """The same for files that are not text."""
    error = error_of(root, data)
    assert isinstance(error, ConfigError)
    assert all(line.isprintable() for line in error.lines())


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(before=st.lists(toml_lines, max_size=6))
def test_line_of_an_unknown_key(root: Path, before: list[str]) -> None:
    """In a valid file the line named is the one that has the unknown key, whatever stands before it."""
    import tomllib

    text = "\n".join([*before, "zzz_unknown = 1"])
    try:
        values = tomllib.loads(text)
    except (ValueError, RecursionError):
        return
    if set(values) - {"zzz_unknown"} - set(config_keys.KEYS) or "zzz_unknown" not in values:
        return
    error = error_of(root, text)
    assert error.message.startswith(f"{root}/etc/nbdnfs/swap0.toml:{text.count(chr(10)) + 1}: ")


def test_a_long_message_about_a_url_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is ours, and ends with what matters; a value of the file's is shortened."""
    message = "%M in the URL: " + "a" * 200 + " which other machines may have, too"

    def refuse(text: str, root: Path) -> None:
        raise UsageError(message, "hint")

    monkeypatch.setattr(config_keys.nfs_url, "parse", refuse)
    with pytest.raises(UsageError) as caught:
        config_keys.KEYS["url"].value("url", "nfs://nas/export/%M.swap", Path("/"))
    assert caught.value.message == f"url: {message}"
    assert len(config_keys.shown("b" * 200)) == 80
