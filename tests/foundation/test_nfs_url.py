# SPDX-License-Identifier: LGPL-2.1-or-later
"""NFS URLs: what is taken, what is refused with which words, and the specifiers."""

from __future__ import annotations

import contextlib
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdnfs import nfs_url
from nbdnfs.errors import NoHostError, UsageError

REAL = socket.getaddrinfo
MACHINE_ID = "0123456789abcdef0123456789abcdef"
# systemd-id128 makes it of that id: sd_id128_get_machine_app_specific(3)
FILE_ID = "a88094e54e19421489d85ef6441afd86"


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
        ("nfs://nas/Gr%C3%B6%C3%9Fe/%C3%A4", "nas", "/Größe", "ä", 3),
        ("nfs://nas/my%20share/50%25%3F%23/a+b&c=d.swap", "nas", "/my share/50%?#", "a+b&c=d.swap", 3),
    ],
)
def test_parts(text: str, host: str, directory: str, name: str, version: int) -> None:
    """Host without brackets, directory, file name, version 3 unless it is said. These are in the canonical form."""
    parsed = nfs_url.parse(text)
    assert (parsed.host, parsed.directory, parsed.name, parsed.version) == (host, directory, name, version)
    assert parsed.text == text.removesuffix("?")


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("nfs://nas/Größe/ä", "nfs://nas/Gr%C3%B6%C3%9Fe/%C3%A4"),
        ("nfs://nas/a%%20b/%%", "nfs://nas/a%2520b/%25"),
        ("nfs://nas/%41%7e/%c3%a4", "nfs://nas/A~/%C3%A4"),
        ("nfs://nas//export//./swap?", "nfs://nas/export/swap"),
        ("nfs://nas/%2E/%2Eswap", "nfs://nas/.swap"),
        ("nfs://nas/\udcff\udc80", "nfs://nas/%FF%80"),
    ],
)
def test_one_canonical_form(text: str, canonical: str) -> None:
    """Bytes are escaped where that is necessary, whether they were before; components that mean nothing are left out;
    the canonical form stays as it is."""
    assert nfs_url.parse(text).text == canonical
    assert nfs_url.parse(canonical) == nfs_url.parse(text)


def test_a_sibling_has_the_same_directory_and_options() -> None:
    """Any name beside the file, whatever is in it."""
    parsed = nfs_url.parse("nfs://nas/a%20b/c.swap?version=3&uid=7")
    assert parsed.sibling(".c?.part").text == "nfs://nas/a%20b/.c%3F.part?version=3&uid=7"


@pytest.mark.parametrize("text", ["nfs://nas/100%.swap?uid=5", "nfs://nas/100%25.swap?uid=5"])
def test_records_of_earlier_versions(text: str) -> None:
    """They had a percent sign as it is."""
    assert nfs_url.parse_recorded(text).name == "100%.swap"


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
        "nfs://nas/export/sw\ud800ap",
        "nfs://nas/a?b?c",
    ],
)
def test_what_is_no_url(text: str) -> None:
    """The URL is quoted and an example given, or how to write what is in the path."""
    with pytest.raises(UsageError, match=r"is not an NFS URL$") as caught:
        nfs_url.parse(text)
    has_path = text.startswith("nfs://nas/")
    assert ("%20" if has_path else "nfs://nas/export") in caught.value.hint


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nfs://nas/a%2Fb", "has a slash in a name"),
        ("nfs://nas/a%00b", "has a NUL"),
        ("nfs://nas/%2E%2e", "does not name a file"),
        ("nfs://nas/a/%2e%2E/b", "has '..' in its path"),
        (f"nfs://nas/{256 * 'x'}", "is too long"),
        (f"nfs://nas/{205 * 'abcd/'}/x", "is too long"),
        ("nfs://na%20s/swap", "is not the name of a host"),
        ("nfs://[nas]/swap", "is not an IPv6 address"),
        ("nfs://[fe80::1]/swap", "is a link-local address"),
        ("nfs://[FEBF::1%25eth0]/swap", "is a link-local address"),
        ("nfs://[fe80::1%eth0]/swap", "is a link-local address"),
    ],
)
def test_what_no_server_can_have(text: str, message: str) -> None:
    """Names that are none once they are decoded, and addresses that are none."""
    with pytest.raises(UsageError) as caught:
        nfs_url.parse(text)
    assert message in caught.value.message


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
        ("uid=-1", "'uid=-1' in the URL is not valid", "uid must be from 0 to 4294967295"),
        ("gid=99999999999", "'gid=99999999999' in the URL is not valid", "gid must be from 0 to 4294967295"),
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
    assert parsed.text == f"nfs://nas-client7/export/client7/{FILE_ID}-100%25.swap?version=3"
    assert (parsed.host, parsed.path) == ("nas-client7", f"/export/client7/{FILE_ID}-100%.swap")


@pytest.mark.parametrize("text", ["nfs://nas/export/%h.swap", "nfs://nas/export/100%", "nfs://nas/export/%2"])
def test_other_specifiers_are_refused(root: Path, text: str) -> None:
    """Also half an escape, and a percent sign alone."""
    with pytest.raises(UsageError, match=r"in the URL is not a specifier$") as caught:
        nfs_url.parse(text, root)
    assert caught.value.hint == "use %H, %m, %M, %u, %20 and the like for a byte, or %% for a percent sign"


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

file_names = (
    st.binary(min_size=1, max_size=255)
    .filter(lambda name: not set(name) & set(b"/\0") and name not in (b".", b".."))
    .map(lambda name: name.decode(errors="surrogateescape"))
)
hosts = st.from_regex(r"[a-z0-9.-]{1,30}|[0-9a-f]{1,4}::[0-9a-f]{1,4}", fullmatch=True)


@given(
    host=hosts.filter(lambda host: not re.match(r"fe[89ab].:", host)),
    directories=st.lists(file_names, max_size=3),
    name=file_names,
    options=st.fixed_dictionaries(
        {},
        optional={
            "version": st.sampled_from([3, 4]),
            "nfsport": st.integers(1, 65535),
            "uid": st.integers(0, 2**32 - 1),
        },
    ),
)
def test_what_is_put_together_comes_apart(
    host: str, directories: list[str], name: str, options: dict[str, int]
) -> None:
    """Any host, path and options come back as they went in: any bytes but NUL and "/" may be in a name."""
    directory = "/" + "/".join(directories)
    built = nfs_url.build(host, directory, name, options)
    parsed = nfs_url.parse(built.text)
    assert parsed == built
    assert (parsed.host, parsed.directory, parsed.name) == (host, directory, name)
    assert parsed.options == options
    assert parsed.text.isascii()
    assert parsed.text.isprintable()


@given(
    st.text()
    | st.lists(
        st.sampled_from(
            ["nfs://", "nas", "/", "..", "%H", "%", "%m", "2", "F", "?", "version", "=", "3", "&", "[", "::1", "]"]
        )
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
    assert not any(ord(character) <= 32 for character in parsed.text)
    assert nfs_url.parse(parsed.text) == parsed


def resolving_to(monkeypatch: pytest.MonkeyPatch, addresses: list[str]) -> None:
    """Have every name resolve to these."""
    answer = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in addresses]
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda *args, **options: answer if args[1] is None else REAL(*args, **options)
    )


def test_a_name_of_two_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one that accepts connections: a name may have an address on which no server listens."""
    resolving_to(monkeypatch, ["127.0.0.3", "127.0.0.1"])
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert nfs_url.parse(f"nfs://nas/export/swap?nfsport={port}").resolve() == "127.0.0.1"


@contextlib.contextmanager
def silent_at(addresses: list[str], port: int) -> Iterator[None]:
    """No answer to a SYN there: the listener's queue is full, listen(2)."""
    with contextlib.ExitStack() as sockets:
        for address in addresses:
            listener = sockets.enter_context(socket.create_server((address, port), backlog=0))
            for _ in range(3):
                filler = sockets.enter_context(socket.socket())
                filler.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    filler.connect(listener.getsockname())
        yield


def test_dead_addresses_cost_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """An address that never answers holds the next one up for a moment, and all of them two seconds."""
    silent = ["127.0.0.7", "127.0.0.8", "127.0.0.9"]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        url = nfs_url.parse(f"nfs://nas/export/swap?nfsport={port}")
        with silent_at(silent, port):
            resolving_to(monkeypatch, [*silent, "127.0.0.1"])
            began_s = time.monotonic()
            assert url.resolve() == "127.0.0.1"
            assert time.monotonic() - began_s < 1.9
            resolving_to(monkeypatch, silent)
            began_s = time.monotonic()
            assert url.resolve() == silent[0]
            assert 1.9 < time.monotonic() - began_s < 10


def test_without_a_port_the_portmapper_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ports that a client uses first: 2049 says nothing about a server that has NFS elsewhere."""
    tried: list[int] = []
    monkeypatch.setattr(nfs_url, "_begin_to_connect", lambda address, port: tried.append(port))
    for query in ("", "?version=4", "?nfsport=7&mountport=8", "?mountport=8"):
        assert not nfs_url.parse(f"nfs://nas/export/swap{query}").answers("127.0.0.1")
    assert tried == [111, 2049, 7, 8]


def test_link_local_addresses_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """libnfs cannot connect to one: where a name has no other, that is said."""
    url = nfs_url.parse("nfs://nas.local/export/swap")
    resolving_to(monkeypatch, ["fe80::1%eth0", "192.0.2.7"])
    assert url.resolve() == "192.0.2.7"
    resolving_to(monkeypatch, ["fe80::1"])
    with pytest.raises(NoHostError, match="link-local address only"):
        url.resolve()
