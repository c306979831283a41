# SPDX-License-Identifier: LGPL-2.1-or-later
"""The C core. Everything else about the package stands in pyproject.toml."""

import glob
import os
import shlex
import subprocess
import sysconfig
import tempfile

from setuptools import Extension, setup


def pkg_config(*words: str, library: str = "libnfs") -> list[str]:
    tool = os.environ.get("PKG_CONFIG", "pkg-config")
    try:
        return shlex.split(subprocess.check_output([tool, *words, library], text=True))
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(
            f"nbdnfs: {library} cannot be found ({error})\n"
            "nbdnfs: install its headers and pkg-config (Debian: apt install libnfs-dev libsodium-dev nettle-dev"
            " pkg-config)"
        ) from None


LIBRARIES = ("libnfs", "libsodium", "nettle")


_ATOMIC = """
#include <stdatomic.h>
#include <stdint.h>
static _Atomic uint64_t counter;
int main(void) { return (int)atomic_fetch_add(&counter, 1) + (int)atomic_fetch_or(&counter, 1); }
"""


def atomic_library() -> list[str]:
    """What to link for the region's 64-bit atomics: nothing where the processor has them, libatomic on ARMv6."""
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
    flags = shlex.split(os.environ.get("CFLAGS", "") + " " + os.environ.get("NBDNFS_CFLAGS", ""))
    flags += shlex.split(os.environ.get("LDFLAGS", "") + " " + os.environ.get("NBDNFS_LDFLAGS", ""))
    with tempfile.TemporaryDirectory() as folder:
        source, program = os.path.join(folder, "atomic.c"), os.path.join(folder, "atomic")
        with open(source, "w") as file:
            file.write(_ATOMIC)
        for libraries in ([], ["-latomic"]):
            command = [*compiler, *flags, "-o", program, source, *libraries]
            if subprocess.run(command, capture_output=True, check=False).returncode == 0:
                return libraries
    return []  # the build itself shows what is wrong with the compiler


def extension(name: str, sources: list[str], *, libraries: bool = False, headers: str = "") -> Extension:
    """A limited-API extension: one build serves every CPython from 3.11 on, nbdkit's included."""
    return Extension(
        name,
        sources=sorted(sources),
        depends=sorted(glob.glob(f"{headers}/**/*.h", recursive=True)) if headers else [],
        include_dirs=[headers] if headers else [],
        define_macros=[
            ("Py_LIMITED_API", "0x030B0000"),
            ("_FILE_OFFSET_BITS", "64"),  # off_t of 32-bit machines
            # libnfs reports its version at run time from 6.0 on only: the build records it.
            *([("LIBNFS_BUILT_WITH", f'"{pkg_config("--modversion")[0]}"')] if libraries else []),
        ],
        # setuptools passes what Python was built with, NDEBUG too; asserts are for production (engine/base/assert.h)
        undef_macros=["NDEBUG"],
        extra_compile_args=[
            "-std=c11",
            "-D_GNU_SOURCE",
            "-Wall",
            "-Wextra",
            "-Wshadow",
            "-Wundef",
            "-Wstrict-prototypes",
            "-Wmissing-prototypes",
            "-Wno-unused-parameter",
            "-fvisibility=hidden",
            *(word for library in LIBRARIES if libraries for word in pkg_config("--cflags", library=library)),
            *shlex.split(os.environ.get("NBDNFS_CFLAGS", "")),
        ],
        extra_link_args=[
            *(word for library in LIBRARIES if libraries for word in pkg_config("--libs", library=library)),
            *(atomic_library() if libraries else []),
            "-pthread",
            *([] if libraries else ["-Wl,-z,now"]),  # all functions are bound at the start: nbdnfs/heir/life.c
            *shlex.split(os.environ.get("NBDNFS_LDFLAGS", "")),
        ],
        py_limited_api=True,
    )


setup(
    ext_modules=[
        extension(
            "nbdnfs.engine._engine",
            glob.glob("nbdnfs/engine/**/*.c", recursive=True),
            libraries=True,
            headers="nbdnfs/engine",
        ),
        extension("nbdnfs.heir._heir", glob.glob("nbdnfs/heir/*.c"), headers="nbdnfs/heir"),
        extension("nbdnfs._memlock", ["nbdnfs/_memlock.c"]),
        extension("nbdnfs._own_root", ["nbdnfs/_own_root.c"]),
        extension("nbdnfs._spawner", ["nbdnfs/_spawner.c"]),
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
