# SPDX-License-Identifier: LGPL-2.1-or-later
"""The manual and the completions say what the parser, the configuration and the generator know, and nothing else."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import command_line
import completions
import manual
import pytest

from nbdnfs import __version__, config_keys, errors

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = {command.name: command for command in command_line.commands()}
FLAGS = [(name, flag) for name, command in COMMANDS.items() for option in command.options for flag in option.flags]
PAGES = manual.pages()


def plain(roff: str) -> str:
    """A page as its reader sees it, less its layout: without macros and fonts, minus signs as they are typed."""
    text = re.sub(r"^\.(?:SH|SS|TP|TH|BR?|IR?|BI|PP|in|EX|EE|br|\\\").?", "", roff, flags=re.MULTILINE)
    text = re.sub(r"\\f[BIRP]|\\&", "", text).replace("\\ ", " ")
    return text.replace("\\-", "-").replace("\\(aq", "'").replace("\\(ti", "~").replace("\\e", "\\")


def section(page: str, name: str) -> str:
    """One command's part of the manual."""
    found = re.search(rf"^\.SS {re.escape(manual.escape(name))}$(.*?)(?=^\.S[SH] )", page, re.MULTILINE | re.DOTALL)
    assert found is not None, name
    return plain(found[1])


def test_the_pages() -> None:
    """The four, each with its name, its section and the version."""
    assert sorted(PAGES) == ["nbdnfs-generator.8", "nbdnfs.7", "nbdnfs.8", "nbdnfs.toml.5"]
    for name, text in PAGES.items():
        title, number = name.rsplit(".", 1)
        head = re.search(r"^\.TH (\S+) (\d) ", text, re.MULTILINE)
        assert head is not None
        assert (plain(head[1]).lower(), head[2]) == (title, number)
        assert f'"nbdnfs {__version__}"' in text
        assert re.findall(r"@\w+@", text) == []


def test_the_date_is_that_of_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two builds of one source give the same pages."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    assert all(" 1970-01-02 " in text for text in manual.pages().values())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_described(name: str) -> None:
    """With its description, and each argument but --help with its help."""
    text = section(PAGES["nbdnfs.8"], name)
    assert COMMANDS[name].description in text
    for argument in COMMANDS[name].arguments:
        if "--help" not in argument.flags:
            assert all(flag in text for flag in argument.flags)
            assert argument.value in text
            assert argument.help in text


def test_what_is_not_for_users_is_left_out() -> None:
    """`claim`, which keepers start, and options without a help text."""
    assert "claim" not in COMMANDS
    assert "plugin-setting" not in plain(PAGES["nbdnfs.8"])


@pytest.mark.parametrize("key", config_keys.KEYS)
def test_every_key_is_described(key: str) -> None:
    """With its description and its default."""
    text = plain(PAGES["nbdnfs.toml.5"])
    entry = config_keys.KEYS[key]
    assert f"\n{key}\n{entry.about}\n" in text
    assert entry.default == "" or f"Default: {entry.default}." in text


def test_every_exit_status_is_described() -> None:
    """Those of the exception tree."""
    text = plain(PAGES["nbdnfs.8"])
    for error in errors.NbdnfsError.__subclasses__():
        assert f"\n{error.exit_code}\n{error.__doc__}\n" in text


def test_words_of_the_kernel_command_line() -> None:
    """The page of the generator has the words that the generator knows."""
    script = (ROOT / "systemd/nbdnfs-generator").read_text()
    known = set(re.findall(r"nbdnfs\.\w+(?==\*)", script))
    assert known == {"nbdnfs.url", "nbdnfs.size", "nbdnfs.priority", "nbdnfs.encrypt"}
    assert set(re.findall(r"^\.BI (nbdnfs\.\w+)=", PAGES["nbdnfs-generator.8"], re.MULTILINE)) == known


def test_pages_are_clean(tmp_path: Path) -> None:
    """mandoc(1), which knows the macros and their order, has nothing to warn of."""
    mandoc = shutil.which("mandoc")
    assert mandoc is not None, "mandoc is missing (Debian: apt install mandoc)"
    for name, text in PAGES.items():
        (tmp_path / name).write_text(text)
    done = subprocess.run(
        [mandoc, "-Tlint", "-Wwarning", *sorted(PAGES)], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_text_cannot_become_a_macro() -> None:
    """What roff would interpret is escaped."""
    assert manual.escape(".TH \\n -x 'y'") == "\\&.TH \\en \\-x \\(aqy\\(aq"


# completions


@pytest.mark.parametrize(("name", "flag"), FLAGS)
def test_every_option_is_completed(name: str, flag: str) -> None:
    """In all three shells."""
    assert re.search(rf"^ +{name}\)\n +options=.*[' ]{flag}[' \n]", completions.bash(), re.MULTILINE)
    zsh_case = completions.zsh().split(f"\n        {name})\n")[1].split(";;")[0]
    assert f"){flag}" in zsh_case or f"*{flag}" in zsh_case
    fish_flag = f" -l {flag[2:]}" if flag.startswith("--") else f" -s {flag[1:]}"
    assert re.search(rf"from {name}'.*{fish_flag} ", completions.fish())


def completed(root: Path, *words: str) -> set[str]:
    """What bash offers for the last of the words."""
    script = f"""
        compopt() {{ :; }}  # it works in a completion only
        source {shlex.quote(str(root / "nbdnfs.bash"))}
        _nbdnfs_root={shlex.quote(str(root))}
        COMP_WORDS=(nbdnfs {shlex.join(words)}); COMP_CWORD={len(words)}
        _nbdnfs
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=10, cwd=root)
    assert done.stderr == ""
    return set(done.stdout.split())


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A machine with a configured device, one of the kernel command line, and one that runs without a configuration."""
    folder = tmp_path_factory.mktemp("root")
    for name, text in completions.files().items():
        (folder / name).write_text(text)
    for path in ("etc/nbdnfs/swap0.toml", "run/nbdnfs-config/cmdline.toml", "run/nbdnfs/old/state"):
        (folder / path).parent.mkdir(parents=True)
        (folder / path).touch()
    return folder


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["do"], {"doctor", "down"}),
        (["-v", "do"], {"doctor", "down"}),
        (["--ver"], {"--version", "--verbose"}),
        (["down", ""], {"swap0", "cmdline", "old"}),
        (["down", "s"], {"swap0"}),
        (["down", "--"], {"--help", "--service"}),
        (["down", "--service", "c"], {"cmdline"}),
        (["down", "swap0", ""], set()),
        (["top", "--interval", "s"], set()),
        (["top", "--interval", "2s", "s"], {"swap0"}),
        (["top", "--interval", "=", "2s", "s"], {"swap0"}),
        (["serve", "nfs://nas/a/b", "--socket", "nbdnfs.b"], {"nbdnfs.bash"}),
        (["serve", "nfs://nas/a/b", "--socket", "=", "nbdnfs.b"], {"nbdnfs.bash"}),
        (["serve", "--engine", "s"], set()),
        (["install-units", "--root", "e"], {"etc"}),
        (["create", ""], set()),
    ],
)
def test_bash_completes(root: Path, words: list[str], expected: set[str]) -> None:
    """Commands, options, names of devices, files and folders, each where it may stand."""
    assert completed(root, *words) == expected
