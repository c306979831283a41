# SPDX-License-Identifier: LGPL-2.1-or-later
"""The C core. Everything else about the package stands in pyproject.toml."""

import glob
import os
import shlex
import subprocess

from setuptools import Extension, setup


def pkg_config(*words: str) -> list[str]:
    tool = os.environ.get("PKG_CONFIG", "pkg-config")
    try:
        return shlex.split(subprocess.check_output([tool, *words, "libnfs"], text=True))
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(
            f"nbdnfs: libnfs cannot be found ({error})\n"
            "nbdnfs: install its headers and pkg-config (Debian: apt install libnfs-dev pkg-config)"
        ) from None


def extension(name: str, sources: list[str], *, libraries: bool) -> Extension:
    """A limited-API extension: one build serves every CPython from 3.11 on, nbdkit's included."""
    return Extension(
        name,
        sources=sorted(sources),
        depends=sorted(glob.glob("nbdnfs/engine/**/*.h", recursive=True)) if libraries else [],
        include_dirs=["nbdnfs/engine"] if libraries else [],
        define_macros=[
            ("Py_LIMITED_API", "0x030B0000"),
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
            *(pkg_config("--cflags") if libraries else []),
            *shlex.split(os.environ.get("NBDNFS_CFLAGS", "")),
        ],
        extra_link_args=[
            *(pkg_config("--libs") if libraries else []),
            "-pthread",
            *shlex.split(os.environ.get("NBDNFS_LDFLAGS", "")),
        ],
        py_limited_api=True,
    )


setup(
    ext_modules=[
        extension("nbdnfs.engine._engine", glob.glob("nbdnfs/engine/**/*.c", recursive=True), libraries=True),
        extension("nbdnfs._memlock", ["nbdnfs/_memlock.c"], libraries=False),
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
