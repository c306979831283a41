# SPDX-License-Identifier: LGPL-2.1-or-later
"""The configuration of a device that is attached: the file's where that is valid, else the last good one.

A keeper leaves what its device runs with in the record CONFIG: a line "field=value" for each field of Config. A later
keeper whose configuration file is wrong, missing or unreadable goes on with it. docs/decisions/0023.
"""

from __future__ import annotations

import dataclasses

from nbdnfs import config, nfs_url
from nbdnfs.config import Config
from nbdnfs.errors import NbdnfsError, PermissionDeniedError, UnavailableError, UsageError
from nbdnfs.keeper import failures
from nbdnfs.keeper.records import Records

_NONE = "-"
_WORDS = {True: "yes", False: "no"}


def to_text(settings: Config) -> str:
    """For the record CONFIG."""
    return "\n".join(f"{field.name}={_shown(getattr(settings, field.name))}" for field in dataclasses.fields(settings))


def from_text(text: str) -> Config | None:
    """The settings in the record CONFIG. Another version may have left it: a field that this one does not have is
    ignored, one that it has and the record has not takes its default. None for what is damaged."""
    kinds = {field.name: field.type for field in dataclasses.fields(Config)}
    values: dict[str, object] = {}
    for line in text.split("\n"):
        key, separator, value = line.partition("=")
        if not separator:
            return None
        if key in kinds:
            try:
                values[key] = _parsed(str(kinds[key]), value)
            except ValueError:
                return None
    try:
        return Config(**values)  # type: ignore[arg-type]
    except TypeError:  # without a name or a URL
        return None


def load(records: Records, *, is_attached: bool) -> tuple[Config, str]:
    """The settings, and what is wrong with the configuration file; "" where they are the file's.

    Errors as `config.load`, but not while the device is attached. UnavailableError: then, without a good file, nothing
    says what the device runs with.
    """
    try:
        return config.load(records.name, records.root), ""
    except (NbdnfsError, OSError) as error:
        if not is_attached:
            raise
        problem = error.message if isinstance(error, NbdnfsError) else str(error)
        if isinstance(error, (OSError, PermissionDeniedError, UnavailableError)):
            what, advice = "the configuration could not be used", f"see nbdnfs check {records.name}"
        else:
            what, advice = "the configuration file is wrong", "correct it"
    kept = from_text(failures.read_patiently(records, Records.CONFIG) or "=") or _of_other_records(records)
    if kept is None:
        raise UnavailableError(
            f"{what}, and the settings that the device runs with are not recorded: {problem}",
            f"{advice}; the device and its worker go on meanwhile, and a next keeper takes them over",
        )
    return kept, f"{what}: {problem}; the device runs with the last good one"


def _of_other_records(records: Records) -> Config | None:
    """What a keeper of an earlier version has left: the URL, and whether there is an owner. The rest takes its default,
    except that a measure against deadlock that this machine does not have is no reason to end."""
    text, _, _ = (failures.read_patiently(records, Records.ADDRESS) or "").partition("\n")
    try:
        url = nfs_url.parse_recorded(text).text
    except UsageError:
        return None
    return Config(
        name=records.name, url=url, lock="wanted", owner=failures.read_patiently(records, Records.OWNER) == "yes"
    )


def _shown(value: object) -> str:
    if value is None:
        return _NONE
    return _WORDS[value] if isinstance(value, bool) else str(value)


def _parsed(kind: str, text: str) -> object:
    """ValueError: `text` is not a value of that kind."""
    if kind.endswith("| None") and text == _NONE:
        return None
    kind = kind.partition(" ")[0]
    if kind == "bool":
        if text not in _WORDS.values():
            raise ValueError(text)
        return text == _WORDS[True]
    return int(text) if kind == "int" else text
