# SPDX-License-Identifier: LGPL-2.1-or-later
"""NFS URLs: what is taken, what is refused with which words, and the specifiers."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdnfs import nfs_url
from nbdnfs.errors import NoHostError, UsageError

REAL = socket.getaddrinfo
MACHINE_ID = "0123456789abcdef0123456789abcdef"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The root folder of a machine that has an id."""
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/machine-id").write_text(f"{MACHINE_ID}\n")
    return tmp_path


@pytest.mark.parametrize(
    ("text", "host", "directory", "name", "version"),
    [
        ("nfs://nas/export/swap", "nas", "/export", "swap", 3),
        ("nfs://nas.example.org/a/b/c.swap?version=4", "nas.example.org", "/a/b", "c.swap", 4),
        ("nfs://192.0.2.7/export/swap?version=3&nfsport=2049", "192.0.2.7", "/export", "swap", 3),
        ("nfs://[2001:db8::1]/export/swap", "2001:db8::1", "/export", "swap", 3),
        ("nfs://nas/swap", "nas", "/", "swap", 3),
        ("nfs://nas/export/swap?", "nas", "/export", "swap", 3),
        ("nfs://nas/Größe/ä", "nas", "/Größe", "ä", 3),
    ],
)
def test_parts(text: str, host: str, directory: str, name: str, version: int) -> None:
    """Host without brackets, directory, file name, version 3 unless it is said."""
    parsed = nfs_url.parse(text)
    assert (parsed.host, parsed.directory, parsed.name, parsed.version) == (host, directory, name, version)
    assert parsed.text == text


def test_path_and_options() -> None:
    """The path on the server, and every option as a number."""
    parsed = nfs_url.parse("nfs://nas/a/b?version=4&nfsport=1&mountport=65535&uid=0&gid=100&tcp-syncnt=3")
    assert parsed.path == "/a/b"
    assert nfs_url.parse("nfs://nas/b").path == "/b"
    assert parsed.options == {"version": 4, "nfsport": 1, "mountport": 65535, "uid": 0, "gid": 100, "tcp-syncnt": 3}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nas:/export/swap",
        "nfs:/nas/export/swap",
        "nfs//nas/export/swap",
        "NFS://nas/export/swap",
        "nfs://nas",
        "nfs://user@nas/export/swap",
        "nfs://nas:2049/export/swap",
        "nfs://[nas/export/swap",
        "nfs://2001:db8::1/export/swap",
        "nfs://nas/export/swap#part",
        "nfs://nas/export/my swap",
        "nfs://nas/export/swap\n",
        " nfs://nas/export/swap",
        "nfs://nas/export/sw\0ap",
        "nfs://nas/a?b?c",
    ],
)
def test_what_is_no_url(text: str) -> None:
    """The URL is quoted and an example given."""
    with pytest.raises(UsageError, match=r"is not an NFS URL$") as caught:
        nfs_url.parse(text)
    assert "nfs://nas/export" in caught.value.hint


@pytest.mark.parametrize("path", ["/", "/export/", "/export/.", "/export/..", "/.."])
def test_what_names_no_file(path: str) -> None:
    """A directory, or a name that is one."""
    with pytest.raises(UsageError, match=r"does not name a file$"):
        nfs_url.parse(f"nfs://nas{path}")


@pytest.mark.parametrize("path", ["/../swap", "/a/../swap", "/a/../../b/swap"])
def test_no_dots_in_the_path(path: str) -> None:
    """What a server would make of them is unknown."""
    with pytest.raises(UsageError, match=r"has '\.\.' in its path$"):
        nfs_url.parse(f"nfs://nas{path}")


@pytest.mark.parametrize(
    ("query", "message", "hint"),
    [
        ("versoin=3", "'versoin' is not an option of an NFS URL", "did you mean 'version'?"),
        ("port=2049", "'port' is not an option of an NFS URL", "did you mean 'nfsport'?"),
        (
            "quux=1",
            "'quux' is not an option of an NFS URL",
            "the options are version, nfsport, mountport, uid, gid, tcp-syncnt",
        ),
        ("version", "'version=' in the URL is not valid", "version must be from 3 to 4"),
        ("version=4.1", "'version=4.1' in the URL is not valid", "version must be from 3 to 4"),
        ("nfsport=0", "'nfsport=0' in the URL is not valid", "nfsport must be from 1 to 65535"),
        ("uid=-1", "'uid=-1' in the URL is not valid", "uid must be from 0 to 2147483647"),
        ("gid=99999999999", "'gid=99999999999' in the URL is not valid", "gid must be from 0 to 2147483647"),
        ("version=\uff13", "'version=\uff13' in the URL is not valid", "version must be from 3 to 4"),
        ("version=3&", "'' is not an option of an NFS URL", ""),
        ("version=4&version=3", "'version' appears twice in the URL", "give it once"),
    ],
)
def test_options_that_are_refused(query: str, message: str, hint: str) -> None:
    """Unknown ones, with the nearest or all names; values out of range; digits that libnfs does not read; doubles."""
    with pytest.raises(UsageError) as caught:
        nfs_url.parse(f"nfs://nas/export/swap?{query}")
    assert caught.value.message == message
    assert caught.value.hint == hint or not hint


# Specifiers


def test_specifiers(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """%H is the host name, %m the machine id, %% a percent sign; anywhere in the URL."""
    monkeypatch.setattr(socket, "gethostname", lambda: "client7")
    parsed = nfs_url.parse("nfs://nas-%H/export/%H/%m-100%%.swap?version=3", root)
    assert parsed.text == f"nfs://nas-client7/export/client7/{MACHINE_ID}-100%.swap?version=3"
    assert (parsed.host, parsed.path) == ("nas-client7", f"/export/client7/{MACHINE_ID}-100%.swap")


@pytest.mark.parametrize("text", ["nfs://nas/export/%h.swap", "nfs://nas/export/100%", "nfs://nas/export/%20.swap"])
def test_other_specifiers_are_refused(root: Path, text: str) -> None:
    """Also the escapes of other URLs, and a percent sign alone."""
    with pytest.raises(UsageError, match=r"in the URL is not a specifier$") as caught:
        nfs_url.parse(text, root)
    assert caught.value.hint == "use %H, %m, or %% for a percent sign"


@pytest.mark.parametrize("content", [None, "", "uninitialized\n", MACHINE_ID[:-1], MACHINE_ID.upper(), "../../x\n"])
def test_no_machine_id(tmp_path: Path, content: str | None) -> None:
    """Missing, empty or not an id (machine-id(5)): only a URL that wants it is refused."""
    if content is not None:
        (tmp_path / "etc").mkdir()
        (tmp_path / "etc/machine-id").write_text(content)
    with pytest.raises(UsageError, match="this machine has no id"):
        nfs_url.parse("nfs://nas/export/%m", tmp_path)
    assert nfs_url.parse("nfs://nas/export/swap", tmp_path).name == "swap"


# Addresses


@pytest.mark.parametrize(("host", "address"), [("127.0.0.1", "127.0.0.1"), ("[::1]", "::1")])
def test_an_address_is_its_own(host: str, address: str) -> None:
    """Numeric addresses resolve to themselves."""
    assert nfs_url.parse(f"nfs://{host}/export/swap").resolve() == address


@pytest.mark.parametrize("host", ["nas.invalid", "a..b", "x" * 70, "\u2603.invalid"])
def test_hosts_that_do_not_resolve(host: str) -> None:
    """Unknown ones, and names that can be none: NoHostError, with the name."""
    with pytest.raises(NoHostError, match=r"is unknown: .+") as caught:
        nfs_url.parse(f"nfs://{host}/export/swap").resolve()
    assert f"'{host}'" in caught.value.message


# Properties

names = st.text(st.characters(codec="utf-8", exclude_characters="/?#%", exclude_categories=["C", "Z"]), min_size=1)
file_names = names.filter(lambda name: name not in (".", ".."))


@given(
    host=st.from_regex(r"[a-z0-9.-]{1,30}", fullmatch=True),
    directories=st.lists(file_names, max_size=4),
    name=file_names,
    options=st.fixed_dictionaries(
        {},
        optional={
            "version": st.sampled_from([3, 4]),
            "nfsport": st.integers(1, 65535),
            "uid": st.integers(0, 2**31 - 1),
        },
    ),
)
def test_what_is_put_together_comes_apart(
    host: str, directories: list[str], name: str, options: dict[str, int]
) -> None:
    """Any host, path and options come back as they went in."""
    directory = "/" + "/".join(directories)
    query = "&".join(f"{key}={value}" for key, value in options.items())
    path = f"{directory.rstrip('/')}/{name}"
    parsed = nfs_url.parse(f"nfs://{host}{path}{'?' if query else ''}{query}")
    assert (parsed.host, parsed.directory, parsed.name, parsed.path) == (host, directory, name, path)
    assert parsed.options == options


@given(
    st.text()
    | st.lists(
        st.sampled_from(["nfs://", "nas", "/", "..", "%H", "%", "%m", "?", "version", "=", "3", "&", "[", "::1", "]"])
    ).map("".join)
)
def test_any_text_is_a_url_or_a_usage_error(text: str) -> None:
    """No other exception; what is taken names a file and has no character that ends a line."""
    try:
        parsed = nfs_url.parse(text, Path("/nonexistent"))
    except UsageError:
        return
    assert parsed.name
    assert parsed.path.startswith("/")
    assert parsed.text.isprintable() or not any(ord(character) <= 32 for character in parsed.text)


def test_a_name_of_two_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one that accepts connections: a name may have an address on which no server listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        answer = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in ("127.0.0.3", "127.0.0.1")]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: answer if args[1] is None else REAL(*args))
        port = listener.getsockname()[1]
        assert nfs_url.parse(f"nfs://nas/export/swap?nfsport={port}").resolve() == "127.0.0.1"
