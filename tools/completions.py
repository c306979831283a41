# SPDX-License-Identifier: LGPL-2.1-or-later
"""Completions for bash, zsh and fish, rendered from the parser.

    PYTHONPATH=. python3 tools/completions.py FOLDER     # writes nbdnfs.bash, _nbdnfs, nbdnfs.fish

Names of devices come from /etc/nbdnfs, /run/nbdnfs-config and /run/nbdnfs, at the moment of the completion, without
starting Python.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import command_line
from command_line import Argument, Command

_HEADER = "# Completion of nbdnfs(8), rendered from its parser."

# bash

_BASH_START = r"""
# _nbdnfs_root stands for "/" in tests.
_nbdnfs_devices() {
    local path
    for path in "${_nbdnfs_root-}"/etc/nbdnfs/*.toml "${_nbdnfs_root-}"/run/nbdnfs-config/*.toml; do
        [ -f "$path" ] && path=${path##*/} && printf '%s\n' "${path%.toml}"
    done
    for path in "${_nbdnfs_root-}"/run/nbdnfs/*/; do
        [ -d "$path" ] && path=${path%/} && printf '%s\n' "${path##*/}"
    done
}

# _nbdnfs_value KIND CURRENT
_nbdnfs_value() {
    case $1 in
        device) mapfile -t COMPREPLY < <(compgen -W "$(_nbdnfs_devices | sort -u)" -- "$2") ;;
        block) mapfile -t COMPREPLY < <(compgen -W "$(printf '%s\n' /dev/nbd* | grep -x '/dev/nbd[0-9]*')" -- "$2") ;;
        folder) compopt -o filenames; mapfile -t COMPREPLY < <(compgen -d -- "$2") ;;
        file) compopt -o filenames; mapfile -t COMPREPLY < <(compgen -f -- "$2") ;;
        words:*) mapfile -t COMPREPLY < <(compgen -W "${1#words:}" -- "$2") ;;
    esac
}

_nbdnfs() {
    local current=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD-1]}
    local command= options= valued= positionals= position=0 index=1 word kind
    # --option=value is three words
    [ "$current" = = ] && current=
    [ "$previous" = = ] && [ "$COMP_CWORD" -ge 2 ] && previous=${COMP_WORDS[COMP_CWORD-2]}
    COMPREPLY=()
    while [ "$index" -lt "$COMP_CWORD" ] && [ -z "$command" ]; do
        case ${COMP_WORDS[index]} in -*) ;; *) command=${COMP_WORDS[index]} ;; esac
        index=$((index + 1))
    done
    case $command in
"""

_BASH_END = r"""    esac
    # "--size=other --socket=file": what follows each of these options
    for word in $valued; do
        [ "${word%%=*}" = "$previous" ] && kind=${word#*=} && { _nbdnfs_value "${kind//+/ }" "$current"; return; }
    done
    case $current in
        -*) mapfile -t COMPREPLY < <(compgen -W "$options" -- "$current"); return ;;
    esac
    # how many positional arguments stand before this one
    while [ "$index" -lt "$COMP_CWORD" ]; do
        word=${COMP_WORDS[index]}
        case " $valued" in
            *" $word="*) index=$((index + 1)); [ "${COMP_WORDS[index]}" = = ] && index=$((index + 1)) ;;
            *) case $word in -*) ;; *) position=$((position + 1)) ;; esac ;;
        esac
        index=$((index + 1))
    done
    set -- $positionals
    [ "$position" -lt "$#" ] || return
    shift "$position"
    _nbdnfs_value "${1//+/ }" "$current"
}
complete -F _nbdnfs nbdnfs
"""


def _bash_kind(argument: Argument) -> str:
    """The first word that _nbdnfs_value takes; a plus sign stands for a space."""
    if argument.value.startswith("{"):
        return "words:" + argument.value.strip("{}").replace(",", "+")
    return {"block device": "block", "": "other"}.get(argument.kind, argument.kind)


def _bash_case(command: Command, positionals: str) -> Iterator[str]:
    flags = " ".join(flag for option in command.options for flag in option.flags)
    valued = " ".join(
        f"{flag}={_bash_kind(option)}" for option in command.options if option.value for flag in option.flags
    )
    yield f"        {shlex.quote(command.name)})"
    yield f"            options={shlex.quote(flags)}"
    yield f"            valued={shlex.quote(valued)}"
    yield f"            positionals={shlex.quote(positionals)}"
    yield "            ;;"


def bash() -> str:
    """The file for bash-completion; plain bash can source it."""
    commands = command_line.commands()
    names = "+".join(command.name for command in commands)
    lines = [*_bash_case(command_line.program(), f"words:{names}")]
    for command in commands:
        lines += _bash_case(command, " ".join(_bash_kind(argument) for argument in command.positionals))
    return f"# bash\n{_HEADER}" + _BASH_START + "\n".join(lines) + "\n" + _BASH_END


# zsh

_ZSH_START = r"""
_nbdnfs_devices() {
    local -aU names
    local root=${_nbdnfs_root-}
    names=( $root/etc/nbdnfs/*.toml(N:t:r) $root/run/nbdnfs-config/*.toml(N:t:r) $root/run/nbdnfs/*(N/:t) )
    _describe -t devices 'device' names
}

_nbdnfs() {
    local curcontext=$curcontext state line
    local -A opt_args
    local -a commands
"""


def _zsh_word(text: str) -> str:
    """Text as a part of a specification of _arguments or _describe."""
    return text.replace("\\", "\\\\").replace(":", "\\:").replace("[", "\\[").replace("]", "\\]")


def _zsh_value(argument: Argument) -> str:
    if argument.value.startswith("{"):
        return f":{_zsh_word(argument.value)}:({argument.value.strip('{}').replace(',', ' ')})"
    actions = {
        "device": "_nbdnfs_devices",
        "block device": "_files -g '/dev/nbd<->'",
        "file": "_files",
        "folder": "_files -/",
    }
    return f":{_zsh_word(argument.value)}:{actions.get(argument.kind, '')}"


def _zsh_specifications(command: Command) -> Iterator[str]:
    for option in command.options:
        others = "*" if option.repeated else f"({' '.join(option.flags)})"
        for flag in option.flags:
            yield shlex.quote(
                f"{others}{flag}{'=' if option.value and flag.startswith('--') else ''}"
                f"[{_zsh_word(option.help)}]{_zsh_value(option) if option.value else ''}"
            )
    for number, argument in enumerate(command.positionals, 1):
        place = "*" if argument.repeated else f"{number}" if argument.required else f"{number}:"
        yield shlex.quote(f"{place}{_zsh_value(argument)}")


def zsh() -> str:
    """The file _nbdnfs for a folder of $fpath."""
    commands = command_line.commands()
    lines = ["    _arguments -C \\"]
    lines += [f"        {text} \\" for text in _zsh_specifications(command_line.program())]
    lines += ["        '1:command:->command' '*::argument:->argument' && return", "    case $state in", "    command)"]
    lines += ["        commands=("]
    lines += [f"            {shlex.quote(_zsh_word(one.name) + ':' + _zsh_word(one.summary))}" for one in commands]
    lines += ["        )", "        _describe -t commands 'command' commands", "        ;;", "    argument)"]
    lines += ["        case $words[1] in"]
    for command in commands:
        specifications = " \\\n                ".join(_zsh_specifications(command))
        lines += [
            f"        {command.name})",
            f"            _arguments \\\n                {specifications}",
            "            ;;",
        ]
    lines += ["        esac", "        ;;", "    esac", "}", "", '_nbdnfs "$@"']
    return f"#compdef nbdnfs\n{_HEADER}" + _ZSH_START + "\n".join(lines) + "\n"


# fish

_FISH_START = r"""
function __nbdnfs_devices
    for path in $_nbdnfs_root/etc/nbdnfs/*.toml $_nbdnfs_root/run/nbdnfs-config/*.toml
        string replace -r '.*/(.*)\.toml$' '$1' $path
    end
    for path in $_nbdnfs_root/run/nbdnfs/*/
        string replace -r '.*/(.*)/$' '$1' $path
    end
end

complete -c nbdnfs -f
"""


def _fish_words(text: str) -> str:
    """Text in single quotes: fish knows two escapes there."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _fish_value(argument: Argument) -> str:
    if argument.value.startswith("{"):
        return " -a " + _fish_words(argument.value.strip("{}").replace(",", " "))
    sources = {
        "device": " -a '(__nbdnfs_devices)'",
        "block device": " -a '(path filter -t block /dev/nbd* 2>/dev/null)'",
        "file": " -F",
        "folder": " -a '(__fish_complete_directories (commandline -ct))'",
    }
    return sources.get(argument.kind, "")


def _fish_lines(command: Command, condition: str) -> Iterator[str]:
    head = f"complete -c nbdnfs -n {_fish_words(condition)}"
    for option in command.options:
        flags = "".join(f" -l {flag[2:]}" if flag.startswith("--") else f" -s {flag[1:]}" for flag in option.flags)
        value = f" -x{_fish_value(option)}" if option.value else ""
        if value.endswith(" -F"):
            value = " -r -F"
        yield f"{head}{flags}{value} -d {_fish_words(option.help)}"
    for argument in command.positionals:
        if _fish_value(argument):
            yield f"{head}{_fish_value(argument)}"


def fish() -> str:
    """The file for fish's vendor_completions.d."""
    commands = command_line.commands()
    lines = [*_fish_lines(command_line.program(), "__fish_use_subcommand")]
    for command in commands:
        name, summary = _fish_words(command.name), _fish_words(command.summary)
        lines.append(f"complete -c nbdnfs -n __fish_use_subcommand -a {name} -d {summary}")
    for command in commands:
        lines += _fish_lines(command, f"__fish_seen_subcommand_from {command.name}")
    return _HEADER + _FISH_START + "\n".join(lines) + "\n"


def files() -> dict[str, str]:
    """Name of a file ▸ its text."""
    return {"nbdnfs.bash": bash(), "_nbdnfs": zsh(), "nbdnfs.fish": fish()}


def main() -> None:
    folder = Path(sys.argv[1])
    if sys.argv[1].startswith("-"):
        sys.exit(f"{Path(__file__).name}: give a folder, which is made")
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files().items():
        (folder / name).write_text(text)


if __name__ == "__main__":
    main()
