# SPDX-License-Identifier: LGPL-2.1-or-later
"""The manual pages: prose from docs/man/, the rest from the parser, the configuration's keys and the errors.

    PYTHONPATH=. python3 tools/manual.py FOLDER     # writes nbdnfs.8, nbdnfs-generator.8, nbdnfs.toml.5, nbdnfs.7

A line `@word@` of a page stands for what `_PARTS` renders; @version@ and @date@ for themselves anywhere. The date is
that of SOURCE_DATE_EPOCH, or today's. Macros are those of man(7).
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import command_line
from command_line import Argument, Command

from nbdnfs import __version__, config_keys, errors
from nbdnfs.keeper import failures

PROSE = Path(__file__).resolve().parents[1] / "docs" / "man"


def escape(text: str) -> str:
    """Text as a line of roff that shows exactly that, in ASCII where it matters for copying."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-").replace("~", "\\(ti").replace("^", "\\(ha")
    escaped = escaped.replace("'", "\\(aq").replace("`", "\\(ga")
    return f"\\&{escaped}" if escaped.startswith(".") else escaped


def bold(text: str) -> str:
    return f"\\fB{escape(text)}\\fR"


def italic(text: str) -> str:
    return f"\\fI{escape(text)}\\fR"


def _sentence(text: str) -> str:
    """A help text, with a full stop."""
    return escape(text if text.endswith(".") else f"{text}.")


def _shown(argument: Argument) -> str:
    """An argument as it stands at the head of its paragraph: all its flags, and its value."""
    value = italic(argument.value) if argument.value else ""
    return " ".join(part for part in (", ".join(bold(flag) for flag in argument.flags), value) if part)


def _synopsis(argument: Argument) -> str:
    """An argument as it stands in a synopsis: its longest flag, in brackets where it may be left out."""
    value = [italic(argument.value)] if argument.value else []
    text = "\\ ".join([*(bold(flag) for flag in argument.flags[-1:]), *value])
    return (text if argument.required else f"[{text}]") + (" ..." if argument.repeated else "")


def _paragraphs(arguments: list[Argument]) -> Iterator[str]:
    for argument in arguments:
        yield from (".TP", _shown(argument), _sentence(argument.help))


def _without_help(command: Command) -> list[Argument]:
    """Each command has --help: it is explained once."""
    return [option for option in command.options if "--help" not in option.flags]


def _commands() -> Iterator[str]:
    for command in command_line.commands():
        shown = [*command.positionals, *_without_help(command)]
        yield f".SS {escape(command.name)}"
        yield " ".join([bold(f"nbdnfs {command.name}"), *(_synopsis(argument) for argument in shown)])
        yield from (".PP", escape(command.description))
        yield from _paragraphs(shown)


def _options() -> Iterator[str]:
    yield from _paragraphs(command_line.program().options)


def _keys() -> Iterator[str]:
    for name, key in config_keys.KEYS.items():
        yield from (".TP", bold(name))
        yield escape(key.about)
        if key.default:
            yield f"Default: {bold(key.default)}."


def _exit_statuses() -> Iterator[str]:
    yield from (".TP", bold("0"), "Success; for a command that checks something, all is well.")
    meanings = {error.exit_code: error.__doc__ or "" for error in errors.NbdnfsError.__subclasses__()}
    for status, text in sorted(meanings.items()):
        yield from (".TP", bold(str(status)), escape(text))
    yield from (".TP", bold(str(errors.NbdnfsError.exit_code)), "Any other error that is understood.")
    yield from (".TP", bold("130"), "The command was interrupted with Ctrl\\-C.")


def _final_statuses() -> Iterator[str]:
    yield ", ".join(bold(str(status)) for status in sorted(failures.FINAL_STATUSES)) + "."


_PARTS: dict[str, Callable[[], Iterator[str]]] = {
    "commands": _commands,
    "options": _options,
    "keys": _keys,
    "exit_statuses": _exit_statuses,
    "final_statuses": _final_statuses,
}


def pages() -> dict[str, str]:
    """Name of a page ▸ its text in roff."""
    return {path.name.removesuffix(".in"): _render(path.read_text()) for path in sorted(PROSE.glob("*.in"))}


def _render(prose: str) -> str:
    seconds = int(os.environ.get("SOURCE_DATE_EPOCH") or time.time())
    date = time.strftime("%Y-%m-%d", time.gmtime(seconds))
    text = prose.replace("@version@", __version__).replace("@date@", date)
    return re.sub(r"^@(\w+)@$", lambda match: "\n".join(_PARTS[match[1]]()), text, flags=re.MULTILINE)


def main() -> None:
    folder = Path(sys.argv[1])
    if sys.argv[1].startswith("-"):
        sys.exit(f"{Path(__file__).name}: give a folder, which is made")
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (folder / name).write_text(text)


if __name__ == "__main__":
    main()
