# SPDX-License-Identifier: LGPL-2.1-or-later
"""The configuration of a device that is attached, when its file is wrong."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from nbdnfs import config
from nbdnfs.config import Config
from nbdnfs.errors import ConfigError, NbdnfsError, NoInputError, PermissionDeniedError, UnavailableError
from nbdnfs.keeper import last_good
from nbdnfs.keeper.records import Records

URL = "nfs://nas/export/%C3%A4=b.swap?version=3"
SETTINGS = Config("swap0", URL, priority=7, discard=True, lock="wanted", io_timeout_ms=500, owner=False)


@pytest.fixture
def records(tmp_path: Path) -> Records:
    made = Records("swap0", run=tmp_path)
    made.reserve()
    return made


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, root: Path) -> Config:
        raise ConfigError("/etc/nbdnfs/swap0.toml:1: unknown key 'siez'", "did you mean 'size'?")

    monkeypatch.setattr(config, "load", load)


@pytest.mark.parametrize("settings", [SETTINGS, Config("swap0", URL), dataclasses.replace(SETTINGS, priority=None)])
def test_there_and_back(settings: Config) -> None:
    """Every field survives the record."""
    assert last_good.from_text(last_good.to_text(settings)) == settings


def test_another_versions_fields() -> None:
    """One that this version does not have is ignored; one that the record has not takes its default."""
    text = "\n".join(line for line in last_good.to_text(SETTINGS).split("\n") if not line.startswith("threads="))
    assert last_good.from_text(text + "\nnew_field=x") == SETTINGS


@pytest.mark.parametrize(
    "text", ["", "=", "name=swap0", "name=swap0\nurl=x\npriority=", "name=a\nurl=b\nowner=maybe", "x"]
)
def test_damaged(text: str) -> None:
    """It is as good as none."""
    assert last_good.from_text(text) is None


@pytest.mark.parametrize(
    "error", [UnavailableError("a.toml cannot be read: EIO"), PermissionDeniedError("no"), OSError("no")]
)
def test_a_file_that_cannot_be_read(records: Records, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """It is not said to be wrong."""

    def load(name: str, root: Path) -> Config:
        raise error

    monkeypatch.setattr(config, "load", load)
    with pytest.raises(
        UnavailableError,
        match="the configuration could not be used, and the settings that the device runs with are not recorded",
    ) as caught:
        last_good.load(records, is_attached=True)
    assert caught.value.hint.startswith("see nbdnfs check swap0; the device and its worker go on")
    records.write(Records.CONFIG, last_good.to_text(SETTINGS))
    kept, problem = last_good.load(records, is_attached=True)
    assert kept == SETTINGS
    assert problem.startswith("the configuration could not be used: ")


@pytest.mark.usefixtures("broken")
def test_a_wrong_file(records: Records) -> None:
    """Without a device it is an error; with one, the last good one, and what is wrong."""
    records.write(Records.CONFIG, last_good.to_text(SETTINGS))
    with pytest.raises(ConfigError, match="siez"):
        last_good.load(records, is_attached=False)
    found, problem = last_good.load(records, is_attached=True)
    assert found == SETTINGS
    assert problem == (
        "the configuration file is wrong: /etc/nbdnfs/swap0.toml:1: unknown key 'siez';"
        " the device runs with the last good one"
    )


@pytest.mark.usefixtures("broken")
@pytest.mark.parametrize("owner", ["yes", "no"])
def test_records_of_an_earlier_version(records: Records, owner: str) -> None:
    """They have the URL and the owner: the rest takes its default, and no measure that is missing is an error."""
    records.write(Records.ADDRESS, f"{URL}\n192.0.2.1")
    records.write(Records.OWNER, owner)
    found, _ = last_good.load(records, is_attached=True)
    assert found == Config("swap0", URL, lock="wanted", owner=owner == "yes")


@pytest.mark.usefixtures("broken")
@pytest.mark.parametrize("address", [b"", b"\xff\xfe", b"nonsense\n"])
def test_nothing_is_known(records: Records, address: bytes) -> None:
    """An error that another try may mend: the unit starts the next keeper."""
    (records.path / Records.ADDRESS).write_bytes(address)
    with pytest.raises(UnavailableError) as caught:
        last_good.load(records, is_attached=True)
    assert "siez" in caught.value.message


@pytest.mark.parametrize("error", [NoInputError("there is none"), NbdnfsError("x"), OSError(5, "Input/output error")])
def test_any_error(records: Records, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Missing, unreadable, or on a disk that fails."""

    def load(name: str, root: Path) -> Config:
        raise error

    monkeypatch.setattr(config, "load", load)
    records.write(Records.CONFIG, last_good.to_text(SETTINGS))
    assert last_good.load(records, is_attached=True)[0] == SETTINGS
