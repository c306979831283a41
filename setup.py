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


setup(
    ext_modules=[
        Extension(
            "nbdnfs.engine._engine",
            sources=sorted(glob.glob("nbdnfs/engine/*.c")),
            depends=sorted(glob.glob("nbdnfs/engine/*.h")),
            # No libnfs tells its version at run time before 6.0: the build remembers it.
            define_macros=[
                ("Py_LIMITED_API", "0x030B0000"),
                ("LIBNFS_BUILT_WITH", f'"{pkg_config("--modversion")[0]}"'),
            ],
            extra_compile_args=[
                "-std=c11",
                "-D_GNU_SOURCE",
                "-Wall",
                "-Wextra",
                "-Wshadow",
                "-Wno-unused-parameter",
                "-fvisibility=hidden",
                *pkg_config("--cflags"),
                *shlex.split(os.environ.get("NBDNFS_CFLAGS", "")),
            ],
            extra_link_args=[
                *pkg_config("--libs"),
                "-pthread",
                *shlex.split(os.environ.get("NBDNFS_LDFLAGS", "")),
            ],
            py_limited_api=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
