#!/bin/bash
# SPDX-License-Identifier: LGPL-2.1-or-later
#
# Build the package in a fresh Debian, and install, use, remove and purge it in another: check_deb.sh bookworm|trixie
# The packages are in build/deb/SUITE afterwards: this version, and in `next` a later one for tests of an upgrade.
# Needs root, the network and some minutes.
set -eu
cd "$(dirname "$0")/.."
suite=${1:-bookworm}
out=$PWD/build/deb/$suite
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# The mounts of the two roots are in a namespace that ends with each.
debian() { # VARIANT OPTION...
    variant=$1
    shift
    unshare --mount mmdebstrap --quiet --variant="$variant" "$@" "$suite" /dev/null
}

echo "check_deb: building for $suite"
rm -rf "$out"
mkdir -p "$out"
tools/copy_source.sh "$work/source"
tar -cf "$work/source.tar" -C "$work/source" .
SOURCE_DATE_EPOCH=$(git log -1 --format=%ct 2>/dev/null || date +%s)
debian buildd --include=lintian,zsh,fish \
    --customize-hook='mkdir -p "$1/source"' \
    --customize-hook="tar-in $work/source.tar /source" \
    --customize-hook='chroot "$1" apt-get -q -y -o Dpkg::Use-Pty=0 build-dep /source >/dev/null' \
    --customize-hook="chroot \"\$1\" env SOURCE_DATE_EPOCH=$SOURCE_DATE_EPOCH sh -ec '
        /source/tools/build_deb.sh /out
        /source/tools/build_deb.sh /next 99
        dpkg-deb -x /out/nbdnfs_*.deb /unpacked
        zsh -n /unpacked/usr/share/zsh/vendor-completions/_nbdnfs
        fish -n /unpacked/usr/share/fish/vendor_completions.d/nbdnfs.fish
        mkdir /out/next && mv /next/nbdnfs_*.deb /out/next'" \
    --customize-hook="sync-out /out $out"

echo "check_deb: installing in a minimal $suite"
cp "$out"/nbdnfs_*.deb "$work/nbdnfs.deb"
debian minbase \
    --customize-hook="upload $work/nbdnfs.deb /root/nbdnfs.deb" \
    --customize-hook="upload tools/check_installation.sh /root/check_installation.sh" \
    --customize-hook='chroot "$1" sh /root/check_installation.sh'
echo "check_deb: $suite is fine: $(ls "$out"/nbdnfs_*.deb)"
