#!/bin/bash
# SPDX-License-Identifier: LGPL-2.1-or-later
#
# Run a command that builds the C extensions, on this machine for another one: cross.sh PREFIX ROOT COMMAND...
# PREFIX is that of the compiler (aarch64-linux-gnu: package gcc-aarch64-linux-gnu), ROOT has a Debian of the other
# architecture, whose headers and libraries are taken: libnfs-dev, libsodium-dev, nettle-dev, python3-dev. Any Python
# can run the build, because the extensions have the limited API. An emulated compiler takes ten times as long.
set -eu
prefix=$1 root=$(realpath "$2")
shift 2

command -v "$prefix-gcc" >/dev/null || {
    echo "cross: there is no $prefix-gcc here" >&2
    echo "cross: apt install gcc-$prefix" >&2
    exit 1
}
# Both come before the folders of this machine's Python, which setuptools names.
headers=$(echo "$root"/usr/include/python3.*) libraries=$root/usr/lib/$prefix
export CC="$prefix-gcc --sysroot=$root -I$headers ${CROSS_CFLAGS:-}"
export LDSHARED="$CC -shared -L$libraries"
export PKG_CONFIG_SYSROOT_DIR=$root PKG_CONFIG_LIBDIR=$libraries/pkgconfig
export _PYTHON_HOST_PLATFORM=linux-${prefix%%-*} # of the wheel: sysconfig.get_platform()
exec "$@"
