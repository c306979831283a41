#!/bin/bash
# SPDX-License-Identifier: LGPL-2.1-or-later
#
# Prepare a Debian 12 or 13 machine for `make test`, `make demo` or `make bench` (bootstrap.sh test|demo|bench):
# install missing Debian packages, make .venv from the system's Python, install nbdnfs into it, build its C extension.
# For `make deb` (bootstrap.sh deb) only packages are installed: those that debian/control names, and lintian.
# It can run any number of times; when there is nothing to do, it takes a second and prints one line.

set -eu
cd "$(dirname "$0")/.."

say() { echo "bootstrap: $*"; }
die() { say "$1" >&2; shift; for hint; do say "$hint" >&2; done; exit 1; }

case "${1:-}" in
    test) packages_for_mode="strace systemd mandoc prometheus" ;; # prometheus: for its promtool
    demo) packages_for_mode="" ;;
    bench) packages_for_mode="qemu-block-extra" ;;
    deb) packages_for_mode="" ;;
    *) die "usage: tools/bootstrap.sh test|demo|bench|deb" ;;
esac

# build
packages="gcc libc6-dev make pkg-config libnfs-dev libsodium-dev nettle-dev python3-dev python3-venv"
# run
packages="$packages nbdkit nbdkit-plugin-python libnbd-bin"
# the throwaway NFS server, and a small file system for it to fill
# (netbase: without /etc/rpc and /etc/services the server cannot register with rpcbind)
packages="$packages nfs-ganesha nfs-ganesha-vfs rpcbind netbase e2fsprogs"
# guests
packages="$packages qemu-system-x86 qemu-utils ipxe-qemu mmdebstrap gpg iproute2 squashfs-tools"
# guests of another architecture: their image is installed under user-mode emulation, nbdnfs is cross-compiled for it
case "${ARCH:-amd64}" in
    arm64) packages="$packages qemu-system-arm qemu-user-static arch-test gcc-aarch64-linux-gnu" ;;
    armhf) packages="$packages qemu-user-static arch-test gcc-arm-linux-gnueabihf" ;; # no guests
esac
packages="$packages $packages_for_mode"

# Of two that run at once, the second waits.
exec 9<"$0"
flock -w 1800 9 || die \
    "another bootstrap.sh is still running after 30 minutes" "wait for it, or end it, and run this again"

did_something=no

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi
}

is_installed() {
    [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]
}

install_packages() {
    command -v dpkg-query >/dev/null || die \
        "this is not Debian: packages cannot be installed automatically" \
        "install these, under Debian's names: $packages"
    missing=""
    for package in $packages; do
        is_installed "$package" || missing="$missing $package"
    done
    [ -n "$missing" ] || return 0
    did_something=yes
    say "installing Debian packages:$missing"
    [ "$(id -u)" = 0 ] || command -v sudo >/dev/null || die \
        "installing packages needs root, and sudo is not installed" "run this as root"

    # The tests start servers of their own, or none. These packages would start one on all addresses, now and at every
    # boot: their units are masked during the installation and disabled afterwards. (dpkg's helper warns about masked
    # units and goes on.)
    keep_off=""
    if [ -d /run/systemd/system ]; then
        case " $missing " in *" nfs-ganesha "*) keep_off="nfs-ganesha.service nfs-ganesha-lock.service" ;; esac
        case " $missing " in *" prometheus "*) keep_off="$keep_off prometheus.service" ;; esac
    fi
    # shellcheck disable=SC2086 # lists of words
    {
        [ -z "$keep_off" ] || as_root systemctl --quiet --runtime mask $keep_off || :
        as_root apt-get -q -o DPkg::Lock::Timeout=300 update
        status=0
        as_root env DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=300 \
            install --no-install-recommends $missing || status=$?
        if [ -n "$keep_off" ]; then
            as_root systemctl --quiet --runtime unmask $keep_off || :
            as_root systemctl --quiet disable $keep_off || :
        fi
    }
    [ "$status" = 0 ] || die "apt-get failed with status $status" "see its messages above"
}

# NFS-Ganesha reads /etc/mtab. systemd's package makes it; a minimal root file system may lack both.
link_mtab() {
    [ ! -e /etc/mtab ] && [ ! -L /etc/mtab ] || return 0
    did_something=yes
    say "linking /etc/mtab to /proc/self/mounts"
    as_root ln -s ../proc/self/mounts /etc/mtab
}

# nbdkit embeds the system's Python: the extension and the packages must be for that one.
make_venv() {
    system_python=$(/usr/bin/python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    case "$system_python" in
        3.[0-9] | 3.10) die \
            "/usr/bin/python3 is Python $system_python, and nbdnfs needs 3.11 or newer" "use Debian 12 or newer" ;;
    esac
    venv_python=$(.venv/bin/python -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || echo none)
    if [ "$venv_python" != "$system_python" ]; then
        did_something=yes
        say "making .venv from /usr/bin/python3 (Python $system_python)"
        rm -rf .venv
        /usr/bin/python3 -m venv .venv
    fi

    # A checkout that was moved, or whose metadata changed, is installed again.
    wanted=$(cat pyproject.toml setup.py; pwd)
    if [ "$(cat .venv/installed-for 2>/dev/null)" != "$wanted" ]; then
        did_something=yes
        say "installing nbdnfs and its Python packages into .venv"
        # Without build isolation there is one set of build tools, in .venv. Debian 12's pip needs `wheel` to build
        # packages that have only a setup.py (libnfs). From version 77 on, setuptools warns at each build about the
        # form of the licence field, the only form that Debian 12's setuptools understands.
        .venv/bin/python -m pip install --quiet --disable-pip-version-check 'setuptools>=70.1,<77' wheel
        .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -e '.[test]'
        echo "$wanted" >.venv/installed-for
    fi
}

# setuptools compares the times of sources and extension, but does not notice another libnfs.
build_extension() {
    libnfs=$(pkg-config --modversion libnfs)
    force=""
    [ "$(cat .venv/built-with-libnfs 2>/dev/null)" = "$libnfs" ] || force=--force
    before=$(stat -c %y nbdnfs/engine/*.so 2>/dev/null || :)
    output=$(.venv/bin/python setup.py -q build_ext --inplace $force 2>&1) || {
        printf '%s\n' "$output" >&2
        die "the C extension does not build" "see the compiler's messages above"
    }
    echo "$libnfs" >.venv/built-with-libnfs
    [ -z "$output" ] || printf '%s\n' "$output"
    if [ "$before" != "$(stat -c %y nbdnfs/engine/*.so)" ]; then
        did_something=yes
        say "built the C extension"
    fi
}

compare_pythons() {
    nbdkit_python=$(nbdkit python --dump-plugin | sed -n 's/^python_version=\([0-9]*\.[0-9]*\).*/\1/p')
    [ "$nbdkit_python" = "$system_python" ] || die \
        "nbdkit embeds Python ${nbdkit_python:-(unknown)}, but .venv has Python $system_python: it cannot load nbdnfs" \
        "install nbdkit-plugin-python and python3 from the same Debian release"
}

# What debian/control names, by apt's own reading of it.
install_for_deb() {
    if is_installed lintian && command -v dpkg-checkbuilddeps >/dev/null && dpkg-checkbuilddeps 2>/dev/null; then
        say "everything is up to date ($(dpkg-query -W -f 'debhelper ${Version}' debhelper))"
        return 0
    fi
    packages="build-essential lintian"
    install_packages
    as_root env DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=300 \
        build-dep --no-install-recommends "$PWD"
    say "ready to build the package"
}

if [ "$1" = deb ]; then
    install_for_deb
    exit 0
fi
install_packages
link_mtab
make_venv
build_extension
compare_pythons
if [ "$did_something" = no ]; then
    say "everything is up to date (Python $system_python, $(nbdkit --version), libnfs $libnfs)"
else
    say "ready (Python $system_python, $(nbdkit --version), libnfs $libnfs)"
fi
