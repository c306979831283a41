# SPDX-License-Identifier: LGPL-2.1-or-later
"""Builds the simulator: the engine's sources, unchanged or with a patch, and tests/simulator/*.c, into one program."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
import subprocess
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
ENGINE = PROJECT / "nbdnfs" / "engine"
HERE = Path(__file__).resolve().parent
BUILD = PROJECT / "build" / "simulator"
ROOMS = ("base", "region", "nfs", "block", "nbd")
# libnfs makes the first open, over sockets of its own: fake_open.c stands in for it.
LEFT_OUT = {"nfs/connect_libnfs.c"}

FLAGS = ["-std=gnu11", "-D_GNU_SOURCE", "-g", "-Wall", "-Wextra", "-Wshadow", "-Wno-unused-parameter"]
# A page is copied by memcpy(3), which is wrapped, and not by `rep movs`, in which no worker would be killed.
COPY_BY_CALL = ["-mstringop-strategy=libcall"] if platform.machine() == "x86_64" else ["-fno-builtin-memcpy"]
# By name: how the engine's files are compiled, and all of it.
VARIANTS: dict[str, tuple[list[str], list[str]]] = {
    "plain": (COPY_BY_CALL, ["-O2"]),
    # every store calls a function (stores.c): gcc's hooks for ThreadSanitizer, without its library
    "stores": (["-fsanitize=thread", *COPY_BY_CALL], ["-O1"]),
    "coverage": (["--coverage", *COPY_BY_CALL], ["-O0"]),
}


def wrapped() -> list[str]:
    """The functions of the C library that are simulated."""
    names = re.findall(r"\b__wrap_(\w+)\(", (HERE / "wrapped.h").read_text())
    return [f"-Wl,--wrap={name}" for name in sorted(set(names))]


def pkg_config(what: str) -> list[str]:
    """Flags for the libraries that the engine uses."""
    return shlex.split(subprocess.check_output(["pkg-config", what, "libnfs", "libsodium", "nettle"], text=True))


def headers_text(changed: Mapping[str, str]) -> str:
    """All headers: an object is made anew when one of them changes."""
    ours = [changed.get(str(path.relative_to(ENGINE)), path.read_text()) for path in sorted(ENGINE.rglob("*.h"))]
    return "".join([*ours, *(path.read_text() for path in sorted(HERE.glob("*.h")))])


def engine_sources() -> list[str]:
    """Relative to the engine's folder."""
    found = [str(path.relative_to(ENGINE)) for room in ROOMS for path in sorted((ENGINE / room).glob("*.c"))]
    return [name for name in found if name not in LEFT_OUT]


def compile_one(text: str, name: str, include: list[Path], flags: list[str], headers: str, variant: str) -> Path:
    """An object for this text, made once. Coverage's are made of the file itself, which is what gcov(1) names, and lie
    where it looks for their notes."""
    key = hashlib.sha256("\0".join([text, name, headers, *flags, *map(str, include)]).encode()).hexdigest()[:20]
    folder = BUILD / "objects" / (variant if variant == "coverage" else "") / key
    target = folder / (name.replace("/", "_")[:-2] + ".o")
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    source = ENGINE / name
    if variant != "coverage":
        # of this process: another one may build the same, and gcc would read what is half written
        source = folder / f"{os.getpid()}-{name.replace('/', '_')}"
        source.write_text(f'#line 1 "{name}"\n{text}')
    part = target.with_suffix(f".{os.getpid()}.o") if variant != "coverage" else target
    includes = [f"-I{path}" for path in include]
    subprocess.run(["gcc", *FLAGS, *flags, *includes, "-c", "-o", part, source], check=True, text=True)
    part.rename(target)
    return target


def build(variant: str = "plain", changed: Mapping[str, str] | None = None, *, name: str | None = None) -> Path:
    """The program. `changed` has texts in place of the engine's files, by their path in its folder.

    Raises subprocess.CalledProcessError where something does not compile.
    """
    changed = changed or {}
    engine_flags, flags = VARIANTS[variant]
    headers = headers_text(changed)
    cflags = [*pkg_config("--cflags"), *flags]
    include = [ENGINE, HERE]
    changed_headers = {path: text for path, text in changed.items() if path.endswith(".h")}
    if changed_headers:
        include.insert(0, put_headers(changed_headers))
    jobs = [
        (changed.get(path, (ENGINE / path).read_text()), path, include, [*cflags, *engine_flags], headers, variant)
        for path in engine_sources()
    ]
    # the simulator's own files have no hooks and are not measured
    jobs += [
        (path.read_text(), f"simulator/{path.name}", include, [*cflags, *stores_flag(variant)], headers, "plain")
        for path in sorted(HERE.glob("*.c"))
    ]
    with ThreadPoolExecutor(os.cpu_count() or 2) as pool:
        objects = list(pool.map(lambda job: compile_one(*job), jobs))
    program = BUILD / (name or f"simulate-{variant}")
    part = program.with_suffix(f".{os.getpid()}.part")
    # in two steps: gcov's own calls, at the end of the process, are not for the simulated machine
    whole = part.with_suffix(".o")
    subprocess.run(["gcc", "-r", "-o", whole, *map(str, objects), *wrapped()], check=True, text=True)
    flags = ["--coverage"] if variant == "coverage" else []
    subprocess.run(["gcc", *flags, "-o", part, whole, *pkg_config("--libs"), "-pthread"], check=True, text=True)
    whole.unlink()
    part.rename(program)
    return program


def stores_flag(variant: str) -> list[str]:
    return ["-DSTORE_HOOKS"] if variant == "stores" else []


def put_headers(changed: Mapping[str, str]) -> Path:
    """A folder with the headers that differ, to be searched first."""
    key = hashlib.sha256("\0".join(sorted(changed.values())).encode()).hexdigest()[:20]
    folder = BUILD / "headers" / key
    for path, text in changed.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    return folder
