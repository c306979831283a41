# SPDX-License-Identifier: LGPL-2.1-or-later
"""What this machine can tell about others: on 32-bit ones it compiles and sizes do not wrap, and arm64 has threads."""

from __future__ import annotations

import platform
import re
import runpy
import shlex
import subprocess
from pathlib import Path

import pytest
import setuptools

from nbdnfs import region
from nbdnfs.sizes import SLOT_BYTES

ROOT = Path(__file__).resolve().parents[2]
ENGINE = ROOT / "nbdnfs" / "engine"
SOURCES = sorted(path for room in ("base", "region", "nfs", "block") for path in (ENGINE / room).glob("*.c"))
SLOTS = 4096
# PTHREAD_STACK_MIN of glibc on arm64 and ppc64; on x86 it is 16 KiB
STACK_MIN_BYTES = 128 << 10
GIB = 1 << 30

# The compiler computes the size, and refuses to compile the call where it is another. Nothing runs.
SIZE = """
#include "region/region.h"

void wrong_size(void) __attribute__((error("wrong size")));

void check(void)
{{
    if (region_size_bytes({device_bytes}ull, {slots}, {version}) != {region_bytes}ull)
        wrong_size();
    if ((region_size_bytes({device_bytes}ull, {slots}, {version}) <= REGION_BYTES_MAX) != {fits})
        wrong_size();
}}
"""


def is_x86() -> bool:
    """Whether the compiler has -m32. It has no libc for it, which compiling does not need."""
    return platform.machine() == "x86_64"


def compile_for(bits: int, source: Path, *options: str) -> None:
    """AssertionError with the compiler's messages when it fails."""
    command = ["gcc", f"-m{bits}", "-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter"]
    command += ["-Wno-psabi", *options, f"-I{ENGINE}", "-c", str(source), "-o", "/dev/null"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def round_up(size_bytes: int) -> int:
    """To whole pages."""
    return -(-size_bytes // SLOT_BYTES) * SLOT_BYTES


def region_bytes(device_bytes: int, entry_bytes: int) -> int:
    """Header, slot table, an entry and a bit for each page of the device, slots."""
    pages = device_bytes // SLOT_BYTES
    bitmap = round_up(-(-pages // 64) * 8)
    return (
        round_up(region.HEADER_BYTES)
        + round_up(SLOTS * 8)
        + round_up(pages * entry_bytes)
        + bitmap
        + SLOTS * SLOT_BYTES
    )


@pytest.mark.skipif(not is_x86(), reason="only an x86 compiler has -m32")
@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("device_gib", [1, 1024, 4096, 1 << 18])
@pytest.mark.parametrize(("version", "entry_bytes"), [("REGION_PLAIN", 4), ("REGION_XCHACHA20", 8), ("REGION_AES", 8)])
def test_sizes(tmp_path: Path, device_gib: int, bits: int, version: str, entry_bytes: int) -> None:
    """The same on both, for a file of 4 TiB too; on a 32-bit machine that one does not fit. And so is the layout:
    region.h asserts it."""
    size = region_bytes(device_gib * GIB, entry_bytes)
    source = tmp_path / "size.c"
    source.write_text(
        SIZE.format(
            device_bytes=device_gib * GIB,
            slots=SLOTS,
            version=version,
            region_bytes=size,
            fits=int(size < 1 << (bits - 1)),
        )
    )
    compile_for(bits, source, "-ffreestanding")


@pytest.mark.skipif(not is_x86(), reason="only an x86 compiler has -m32")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_compiles_for_32_bits(tmp_path: Path, source: Path) -> None:
    """Without a warning: as setup.py compiles it, with the headers of the 64-bit libc."""
    stubs = tmp_path / "gnu" / "stubs-32.h"  # all that those lack; it lists functions without an implementation
    stubs.parent.mkdir()
    stubs.touch()
    multiarch = subprocess.check_output(["gcc", "-print-multiarch"], text=True).strip()
    libnfs = shlex.split(subprocess.check_output(["pkg-config", "--cflags", "libnfs"], text=True))
    folders = [f"-I{tmp_path}", f"-I/usr/include/{multiarch}", *libnfs]
    compile_for(32, source, "-D_GNU_SOURCE", "-D_FILE_OFFSET_BITS=64", *folders)


@pytest.mark.parametrize("needs_library", [False, True])
def test_links_atomics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, needs_library: bool) -> None:
    """setup.py links libatomic where a program with 64-bit atomics does not link without it, as on ARMv6."""
    compiler = tmp_path / "cc"
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *-latomic*) exit 0 ;; esac\nexit {int(needs_library)}\n')
    compiler.chmod(0o755)
    found: dict[str, list[str]] = {}

    def setup(*, ext_modules: list[setuptools.Extension], **_: object) -> None:
        found.update({extension.name: extension.extra_link_args for extension in ext_modules})

    monkeypatch.setattr(setuptools, "setup", setup)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    assert ("-latomic" in found["nbdnfs.engine._engine"]) == needs_library
    assert "-latomic" not in found["nbdnfs._memlock"]


def test_stacks_are_large_enough_for_arm64() -> None:
    """A thread with a smaller one is not made: EINVAL, which was a keeper without an heir."""
    found: dict[str, int] = {}
    for path in (ROOT / "nbdnfs").rglob("*.[ch]"):
        text = path.read_text()
        for name in re.findall(r"pthread_attr_setstacksize\(&\w+, ([A-Z_]+)\)", text):
            header = path.with_suffix(".h")
            defined = text if f"#define {name} " in text else header.read_text()
            kib = re.search(rf"#define {name} \((\d+) \* 1024\)", defined)
            assert kib, f"{path.name}: {name}"
            found[path.name] = int(kib[1]) << 10
    assert len(found) >= 3
    assert min(found.values()) >= STACK_MIN_BYTES, found
