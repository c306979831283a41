#!/bin/bash
# SPDX-License-Identifier: LGPL-2.1-or-later
#
# Build the package in a fresh Debian, and install, use, remove and purge it in another:
#   check_deb.sh bookworm|trixie [ARCHITECTURE]
# The packages are in build/deb/SUITE-ARCHITECTURE afterwards: this version, and in `next` a later one for tests of an
# upgrade. Needs root, the network and some minutes; for another architecture than this machine's also qemu-user-static
# and arch-test, and an hour. The two Debians are kept beside the guests' images, until they were unused for a week.
set -eu
cd "$(dirname "$0")/.."
suite=${1:-bookworm}
architecture=${2:-$(dpkg --print-architecture)}
name=$suite-$architecture
out=$PWD/build/deb/$name
cache=${NBDNFS_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/nbdnfs}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

say() { echo "check_deb: $name: $*"; }

# A Debian in the folder $1: a copy of the cached one, or of one that mmdebstrap makes now. The options, a file that
# they name and the week decide whether there is one, so that what Debian changes is in it a week later.
# Two that ask at once: the second waits.
fresh_debian() { # FOLDER KIND FILE MMDEBSTRAP-OPTION...
    folder=$1 kind=deb-$2-$name file=$3
    shift 3
    options=(--quiet --architectures="$architecture" --dpkgopt=force-unsafe-io "$@" "$suite")
    entry=$cache/$kind-$({ echo "${options[@]//$work/}"; cat "$file"; date +%G-%V; } | sha256sum | cut -c 1-12)
    mkdir -p "$cache"
    (
        flock 9
        if [ ! -e "$entry" ]; then
            say "making a Debian: ${entry##*/}"
            rm -rf "$entry.building"
            # What it mounts is in a namespace that ends with it.
            unshare --mount mmdebstrap "${options[@]}" "$entry.building"
            mv "$entry.building" "$entry"
        fi
        touch "$entry"
        find "$cache" -maxdepth 1 -name "$kind-*" -mtime +7 -exec rm -rf {} +
    ) 9>"$cache/.$kind.lock"
    cp --archive --reflink=auto "$entry" "$folder"
    cp --remove-destination /etc/resolv.conf "$folder/etc/resolv.conf"
}

in_debian() { # FOLDER COMMAND...
    # shellcheck disable=SC2016 # the inner shell's
    unshare --mount --pid --fork --kill-child sh -ec '
        mount -t proc proc "$0/proc"
        mount --rbind /sys "$0/sys"
        mount --rbind /dev "$0/dev"
        exec env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8 chroot "$0" "$@"' "$@"
}

# The same package under a later version. Nothing but the version differs, so it need not be built.
later_version() { # DEB VERSION FOLDER
    mkdir -p "$3"
    dpkg-deb --raw-extract "$1" "$work/later"
    sed -i "s/^Version: .*/Version: $2/" "$work/later/DEBIAN/control"
    sed -i "s/^__version__ = .*/__version__ = \"$2\"/" "$work"/later/usr/lib/python3/dist-packages/nbdnfs/__init__.py
    (
        cd "$work/later"
        find . -path ./DEBIAN -prune -o -type f -printf '%P\0' | sort -z | xargs -0 md5sum >DEBIAN/md5sums
    )
    dpkg-deb --root-owner-group --build "$work/later" "$3/nbdnfs_$2_$architecture.deb" >/dev/null
}

say "building"
rm -rf "$out"
mkdir -p "$out"
mkdir -p "$work/build-depends/debian"
control=$work/build-depends/debian/control
sed '/^$/,$d' debian/control >"$control"
printf '\nPackage: nbdnfs\nArchitecture: any\nDescription: none\n' >>"$control"
fresh_debian "$work/builder" build "$control" --variant=buildd --include=lintian,zsh,fish \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*' \
    --customize-hook="copy-in $work/build-depends /" \
    --customize-hook='chroot "$1" apt-get -q -y -o Dpkg::Use-Pty=0 build-dep /build-depends >/dev/null'
tools/copy_source.sh "$work/builder/source"
in_debian "$work/builder" env SOURCE_DATE_EPOCH="$(git log -1 --format=%ct 2>/dev/null || date +%s)" sh -ec '
    /source/tools/build_deb.sh /out
    dpkg-deb -x /out/nbdnfs_*.deb /unpacked
    zsh -n /unpacked/usr/share/zsh/vendor-completions/_nbdnfs
    fish -n /unpacked/usr/share/fish/vendor_completions.d/nbdnfs.fish'
cp -r "$work"/builder/out/. "$out"
rm -rf "$work/builder"
deb=$(ls "$out"/nbdnfs_*.deb)
later_version "$deb" 99 "$out/next"

say "installing it in a minimal Debian"
dpkg-deb -f "$deb" Depends >"$work/depends"
# What it depends on, or recommends, stays when it goes: it is there before.
fresh_debian "$work/user" install "$work/depends" --variant=minbase --include=man-db,bash-completion,systemd \
    --customize-hook="copy-in $work/depends /root" \
    --customize-hook='chroot "$1" apt-get -q -y --no-install-recommends -o Dpkg::Use-Pty=0 \
        satisfy "$(cat "$1/root/depends")" >/dev/null'
cp "$deb" "$work/user/root/nbdnfs.deb"
cp tools/check_installation.sh "$work/user/root"
in_debian "$work/user" sh /root/check_installation.sh
say "fine: $deb"
