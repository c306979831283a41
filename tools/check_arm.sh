#!/bin/bash
# SPDX-License-Identifier: LGPL-2.1-or-later
#
# ARM without a machine: check_arm.sh armhf|arm64 [SUITE [pytest options]] cross-compiles the C extensions, warnings as
# errors, and runs the unit tests under user-mode emulation. Those that need a server, a kernel or nbdkit are not among
# them. armhf is a 32-bit machine, and is compiled for ARMv6 as well; arm64 has pages of 16 KiB here. Needs root, the
# network and a quarter of an hour; the Debian stays in build/ARCH/SUITE for the next time.
set -eu
cd "$(dirname "$0")/.."
arch=${1:-} suite=${2:-trixie}
shift $(($# < 2 ? $# : 2))
root=$PWD/build/$arch/$suite
python=$PWD/.venv/bin/python

fail() {
    echo "check_arm: $1" >&2
    echo "check_arm: $2" >&2
    exit 1
}

case $arch in
    armhf) emulator=qemu-arm prefix=arm-linux-gnueabihf page_bytes=4096 ;;
    arm64) emulator=qemu-aarch64 prefix=aarch64-linux-gnu page_bytes=16384 ;;
    *) fail "armhf or arm64, not '$arch'" "tools/check_arm.sh armhf" ;;
esac
[ -e "/proc/sys/fs/binfmt_misc/$emulator" ] || fail "programs for $arch do not run here" \
    "install qemu-user-static, and systemctl restart systemd-binfmt"

# Unpacked, not installed: the packages' own scripts would run for an hour under emulation.
unpack_debian() {
    packages=gcc,libc6-dev,libnfs-dev,libsodium-dev,nettle-dev,pkg-config,nbdkit,nbdkit-plugin-python
    packages=$packages,python3-dev,python3-setuptools,python3-pyroute2
    packages=$packages,python3-pytest,python3-pytest-timeout,python3-hypothesis
    # what every Debian has
    packages=$packages,base-files,base-passwd,libc-bin,coreutils,findutils,dash,bash,sed,grep,mawk
    packages=$packages,util-linux,mount,procps,netbase
    rm -rf "$root.making"
    mkdir -p "$root.making"
    mmdebstrap --quiet --variant=extract --architectures="$arch" --include="$packages" \
        "$suite" "$root.making" "deb ${MIRROR:-http://deb.debian.org/debian} $suite main"
    mv "$root.making" "$root"
}

compile() { # FOLDER CFLAGS
    (cd "$root/source" && CROSS_CFLAGS=$2 NBDNFS_CFLAGS=-Werror tools/cross.sh "$prefix" "$root" \
        "$python" -W ignore setup.py -q build_ext --build-temp "$1" --build-lib "$1/lib")
}

if [ ! -d "$root" ]; then
    echo "check_arm: unpacking Debian $suite for $arch"
    unpack_debian
fi

echo "check_arm: compiling"
rm -rf "$root/source"
tools/copy_source.sh "$root/source"
compile build/lib -D_TIME_BITS=64 # as Debian 13's compiler for armhf does
cp -r "$root/source/build/lib/lib/nbdnfs" "$root/source"
if [ "$arch" = armhf ]; then
    # A Raspberry Pi 1 and Zero: no 64-bit atomics in the processor.
    compile build/armv6 "-march=armv6 -mfpu=vfp -marm"
    readelf --dynamic "$root"/source/build/armv6/lib/nbdnfs/engine/_engine.*.so | grep -q 'NEEDED.*libatomic' ||
        fail "the engine does not link libatomic on ARMv6" "see atomic_library() in setup.py"
fi

# What QEMU's emulation of a user's program does otherwise than Linux, or what takes it long:
not_emulated=(
    # open_tree(2), generic netlink and sock_diag: "Function not implemented", "Protocol not supported"
    tests/foundation/test_own_root.py
    tests/kernel/test_nbd_netlink.py::test_on_the_running_kernel
    tests/kernel/test_nbd_netlink.py::test_a_resident_process_pays_little
    tests/nas/test_explain.py
    tests/engine/test_finding_again.py::test_a_server_on_other_ports
    tests/commands/test_attach.py::test_no_driver_on_this_machine
    # posix_spawn(3) does not tell that exec failed
    tests/foundation/test_programs.py::test_run
    tests/foundation/test_programs.py::test_a_program_that_cannot_be_started
    # /proc/PID is the emulator's
    tests/kernel/test_processes.py::test_this_process
    tests/keeper/test_records.py::test_region_in_another_process
    tests/engine/test_cache_cost.py # measures
    tests/commands/test_top_screen.py::test_on_a_terminal # what it starts takes longer than it waits
    tests/structure tests/benchmarks tests/simulator # the same on each machine
    # systemd-analyze and promtool would say the same
    tests/commands/test_install_units.py::test_units_verify
    tests/commands/test_install_units.py::test_exposure
    tests/commands/test_metrics.py::test_promtool_accepts_it
    tests/commands/test_metrics.py::test_alert_rules
)

echo "check_arm: running the unit tests on $(chroot "$root" env QEMU_PAGESIZE=$page_bytes python3 -c '
import platform, os; print(platform.machine(), "with pages of", os.sysconf("SC_PAGE_SIZE"), "bytes")')"
# The mounts end with the processes.
# shellcheck disable=SC2016 # the shell inside expands it
unshare --mount sh -euc '
    mount --rbind "$1" "$1"
    mount -t proc proc "$1/proc"
    mount --rbind /dev "$1/dev"
    mount --rbind /sys "$1/sys"
    exec chroot "$@"
' sh "$root" env "QEMU_PAGESIZE=$page_bytes" sh -c 'cd /source && exec python3 -m pytest "$@"' sh \
    -q -p no:cacheprovider -m "not server and not fake and not long" --timeout 900 --hypothesis-profile ci \
    "${not_emulated[@]/#/--deselect=}" "$@"
