# SPDX-License-Identifier: LGPL-2.1-or-later
"""make autopkgtest: debian/tests, by Debian's own runner, in a guest that has the package which `make check-deb` built.

    python vm-tests/run_autopkgtest.py [--test-name=boot-and-swap] [OPTION-OF-AUTOPKGTEST...]

The test bed is the usual image with Debian's larger kernel: the runner's shared folder needs 9p, which the cloud kernel
lacks. $SUITE chooses the Debian. Exit status 0 when every test passed; a skipped one has not.
"""

from __future__ import annotations

import shlex
import signal
import sys
import tempfile
from pathlib import Path

from vmtest import host, initramfs
from vmtest.architecture import ARCHITECTURES
from vmtest.guest import KERNEL_ARGUMENTS, accelerator
from vmtest.image import Image, default_suite, image
from vmtest.more_packages import with_packages
from vmtest.outcome import HarnessError

_ROOT = Path(__file__).parents[1]
# The runner installs the first two itself, where they are missing: an emulated processor takes minutes for that.
_PACKAGES = ("apt-utils", "dpkg-dev", "man-db")
_MEMORY_MIB, _CPUS = 1024, 2
_BOOT_TIMEOUT_S = 100
# An emulated processor on a machine with other work.
_TIMEOUT_FACTOR = 20

# autopkgtest-virt-qemu(1) waits for a login prompt on the first serial port, and then wants a shell on hvc1.
# An interactive shell ignores SIGTERM, so that a reboot would wait for it.
_UNIT = """\
[Unit]
Description=A shell for autopkgtest
Wants=network-online.target
After=network-online.target

[Service]
Type=exec
ExecStart=/bin/sh
ExecStartPost=/bin/sh -c 'echo "guest login: " >/dev/{console}'
StandardInput=tty
TTYPath=/dev/hvc1
KillSignal=SIGHUP
"""

# The runner asks for KVM wherever there is /dev/kvm, and cannot pass an argument that has spaces.
_QEMU = """\
#!/bin/bash
words=()
for word; do
    [ "$word" = -enable-kvm ] || words+=("$word")
done
exec {command} "${{words[@]}}"
"""

# With all of its deadlines prolonged, which no option does: a shell has to answer within a second. And it takes no more
# than it waits for: 5.28's setup_config() waits for a prompt that may have come together with the answer before it.
_BED = """\
#!/usr/bin/python3
import _socket, signal, socket
alarm = signal.alarm
signal.alarm = lambda seconds: alarm(seconds * {factor})
socket.socket.recv = lambda self, size, *flags: _socket.socket.recv(self, 1, *flags)
__file__ = {program!r}
exec(compile(open(__file__).read(), __file__, "exec"))
"""


def main() -> int:
    """Run it; returns the exit status."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that nothing is left behind
    try:
        return _run(sys.argv[1:])
    except HarnessError as error:
        print(f"autopkgtest: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("autopkgtest: interrupted; nothing is left running", file=sys.stderr)
        return 130


def _run(options: list[str]) -> int:
    runner, virtual = (host.find_program(name, "autopkgtest") for name in ("autopkgtest", "autopkgtest-virt-qemu"))
    usual = image(default_suite(), "generic", ARCHITECTURES["amd64"])
    package = _package(_ROOT / f"build/deb/{usual.suite}-{usual.architecture.name}")
    bed = with_packages(usual, "autopkgtest", _PACKAGES)
    with tempfile.TemporaryDirectory(prefix="nbdnfs-autopkgtest-") as folder:
        work = Path(folder)
        host.run([_ROOT / "tools/copy_source.sh", work / "source"], what="copying the source", timeout_s=120)
        command: list[str | Path] = [
            *(runner, f"--timeout-factor={_TIMEOUT_FACTOR}", *options),
            *(package, work / "source"),
            *("--", _program(work / "bed", _BED.format(factor=_TIMEOUT_FACTOR, program=virtual))),
            *("--qemu-command", _program(work / "qemu", _qemu(bed)), "--overlay-dir", folder),
            *("--cpus", str(_CPUS), "--ram-size", str(_MEMORY_MIB), "--timeout-reboot", str(_BOOT_TIMEOUT_S)),
            *(bed.disk, _payload(bed, work)),
        ]
        process = host.start(command, output=sys.stdout.buffer)
        try:
            return process.wait()
        finally:
            process.terminate()  # it ends its guest
            process.wait()


def _package(folder: Path) -> Path:
    found = sorted(folder.glob("nbdnfs_*.deb"))
    if len(found) != 1:
        raise HarnessError(f"{folder} has no package", "build it: make check-deb")
    return found[0]


def _program(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


def _qemu(bed: Image) -> str:
    """A script that is QEMU for `bed`, with what the runner cannot be told."""
    kind = bed.architecture
    words = [
        *(host.find_program(*kind.qemu), "-machine", kind.machine, "-cpu", kind.cpu, *accelerator()),
        *("-kernel", str(bed.kernel), "-initrd", str(initramfs.initrd(bed))),
        *("-append", " ".join([f"console={kind.console}", *KERNEL_ARGUMENTS, *kind.kernel_arguments])),
    ]
    return _QEMU.format(command=shlex.join(words))


def _payload(bed: Image, work: Path) -> Path:
    """The second disk, whose files the initramfs copies over the root."""
    units = work / "payload/etc/systemd/system"
    (units / "multi-user.target.wants").mkdir(parents=True)
    (units / "autopkgtest.service").write_text(_UNIT.format(console=bed.architecture.console))
    (units / "multi-user.target.wants/autopkgtest.service").symlink_to("../autopkgtest.service")
    disk = work / "payload.raw"
    mke2fs = host.find_program("mke2fs", "e2fsprogs")
    host.run(
        [mke2fs, "-q", "-t", "ext4", "-O", "^has_journal", "-d", work / "payload", disk, "8M"],
        what="making the payload disk",
        timeout_s=60,
    )
    return disk


if __name__ == "__main__":
    sys.exit(main())
