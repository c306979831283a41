# SPDX-License-Identifier: LGPL-2.1-or-later
"""The commands and their options as nbdnfs/cli.py has them: what the manual and the completions are rendered from."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from nbdnfs import parser as command_parser


@dataclass(frozen=True)
class Argument:
    """An option, or with no flags a positional argument.

    flags     for example ("-v", "--verbose")
    value     what stands for its value in a synopsis, for example "SIZE"; "" for an option without one
    help      one or more clauses, without a full stop
    required  whether the command line needs it
    repeated  whether it may be given several times
    """

    flags: tuple[str, ...]
    value: str
    help: str
    required: bool
    repeated: bool

    @property
    def kind(self) -> str:
        """What the value is, for a completion: "device" (the NAME of a configuration), "block device", "file" or
        "folder"; "" for anything else."""
        if self.flags and self.value == "NAME":
            return ""  # a name of something else
        kinds = {"NAME": "device", "DEVICE": "block device", "DIR": "folder", "PATH": "file", "SOCKET": "file"}
        return kinds.get(self.value, "")


@dataclass(frozen=True)
class Command:
    """A command that is for users, or with the name "" what stands before any command.

    summary      as in the list of commands, without a full stop
    description  one or more sentences
    """

    name: str
    summary: str
    description: str
    arguments: tuple[Argument, ...]

    @property
    def options(self) -> list[Argument]:
        return [argument for argument in self.arguments if argument.flags]

    @property
    def positionals(self) -> list[Argument]:
        return [argument for argument in self.arguments if not argument.flags]


def program() -> Command:
    """The options that stand before the command."""
    parser = command_parser.make()
    return Command("", "", parser.description or "", _arguments(parser))


def commands() -> list[Command]:
    """The commands in the order of the help. One without a summary is not for users, and left out."""
    (action,) = (action for action in command_parser.make()._actions if isinstance(action, argparse._SubParsersAction))
    found = []
    for entry in action._get_subactions():
        parser = action.choices[entry.dest]
        found.append(Command(entry.dest, entry.help or "", parser.description or "", _arguments(parser)))
    return found


def _arguments(parser: argparse.ArgumentParser) -> tuple[Argument, ...]:
    shown = (action for action in parser._actions if action.help != argparse.SUPPRESS)
    return tuple(
        Argument(
            flags=tuple(action.option_strings),
            value=_value(action),
            help=parser._get_formatter()._expand_help(action) if action.help else "",
            required=action.required,
            repeated=isinstance(action, argparse._AppendAction) or action.nargs in ("*", "+"),
        )
        for action in shown
        if not isinstance(action, argparse._SubParsersAction)
    )


def _value(action: argparse.Action) -> str:
    if action.nargs == 0:
        return ""
    if action.choices is not None:
        return "{" + ",".join(str(choice) for choice in action.choices) + "}"
    return action.metavar if isinstance(action.metavar, str) else action.dest.upper()
