# SPDX-License-Identifier: LGPL-2.1-or-later
"""The machines that guests may be: what differs from one architecture to another, and nothing else."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vmtest.outcome import HarnessError


@dataclass(frozen=True)
class Architecture:
    """`name` is Debian's; `kernels` has its packages by our names of kernels, the usual one first."""

    name: str
    kernels: Mapping[str, str]
    qemu: tuple[str, str]
    """The system emulator, and the package that has it."""
    machine: str
    cpu: str
    console: str
    kernel_arguments: tuple[str, ...] = ()
    interpreter: str = ""
    """How binfmt_misc calls the user-mode emulator that runs its programs on this host; empty where none is needed."""
    compiler_prefix: str = ""
    """Of the compiler for it that runs on this host, which is in the package gcc-PREFIX; set where `interpreter` is."""

    def need_to_run_programs(self) -> None:
        """HarnessError where programs of this architecture do not run on this host."""
        if self.interpreter and not Path("/proc/sys/fs/binfmt_misc", self.interpreter).exists():
            raise HarnessError(
                f"programs for {self.name} do not run here",
                "install qemu-user-static, and systemctl restart systemd-binfmt",
            )


# All that an emulated CPU can do, less what costs it time and is of no use here. With erms or fsrm the kernel copies by
# "rep movsb", which TCG runs byte by byte: 20 us for each page instead of 1 to 4, where a CPU needs a fraction of one.
_AMD64 = Architecture(
    name="amd64",
    # The cloud one is small; the generic one has dm-crypt, zswap and ublk too.
    kernels={"cloud": "linux-image-cloud-amd64", "generic": "linux-image-amd64"},
    qemu=("qemu-system-x86_64", "qemu-system-x86"),
    machine="q35",
    cpu="max,la57=off,svm=off,smap=off,smep=off,pku=off,erms=off,fsrm=off",
    console="ttyS0",
)

# A Raspberry Pi 5 has four of this CPU. It has no pointer authentication, which is dear to emulate.
_ARM64 = Architecture(
    name="arm64",
    # The last one has pages of 16 KiB, and Debian has it from 13 on.
    kernels={
        "cloud": "linux-image-cloud-arm64",
        "generic": "linux-image-arm64",
        "16k": "linux-image-arm64-16k",
    },
    qemu=("qemu-system-aarch64", "qemu-system-arm"),
    machine="virt,gic-version=3",
    cpu="cortex-a76",
    console="ttyAMA0",
    # With a random address the kernel keeps page tables apart, and changes them at each system call: dear to emulate.
    kernel_arguments=("nokaslr",),
    interpreter="qemu-aarch64",
    compiler_prefix="aarch64-linux-gnu",
)

ARCHITECTURES = {one.name: one for one in (_AMD64, _ARM64)}


def default_architecture() -> Architecture:
    """That of $ARCH, or amd64. HarnessError for another name."""
    return ARCHITECTURES[chosen("ARCH", tuple(ARCHITECTURES))]


def chosen(variable: str, names: tuple[str, ...]) -> str:
    """The value of an environment variable, the first of `names` when it has none. HarnessError for another name."""
    found = os.environ.get(variable) or names[0]
    if found not in names:
        raise HarnessError(f"{variable}={found} is not supported", f"choose one of: {', '.join(names)}")
    return found
