#!/bin/bash
# SPDX-License-Identifier: LGPL-2.1-or-later
#
# Build wheel and source distribution from a copy of the source: build_dist.sh FOLDER
# The wheel's extensions are stripped, and name no folder of this machine; two builds of one source are the same.
set -eu
source=$(cd "$(dirname "$0")/.." && pwd)
folder=$(realpath -m "$1")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$source/tools/copy_source.sh" "$work/nbdnfs"
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git -C "$source" log -1 --format=%ct 2>/dev/null || date +%s)}
export SOURCE_DATE_EPOCH PYTHONHASHSEED=0 LC_ALL=C.UTF-8
export NBDNFS_CFLAGS="-g0 -ffile-prefix-map=$work=." NBDNFS_LDFLAGS="-Wl,--strip-all -Wl,--build-id=none"
umask 022
cd "$work/nbdnfs"
"$source/.venv/bin/python" -W ignore setup.py -q sdist --formats=tar --dist-dir "$work/sdist"
"$source/.venv/bin/python" -W ignore setup.py -q bdist_wheel --dist-dir "$work/dist"
# An archive has times, owners and an order of its own.
mkdir "$work/unpacked"
tar -xf "$work"/sdist/*.tar -C "$work/unpacked"
name=$(ls "$work/unpacked")
tar -c --format=gnu --sort=name --mtime="@$SOURCE_DATE_EPOCH" --owner=0 --group=0 --numeric-owner --mode=go=rX,u+rw \
    -C "$work/unpacked" "$name" | gzip --no-name --best >"$work/dist/$name.tar.gz"
rm -rf "$folder"
mkdir -p "$folder"
mv "$work"/dist/* "$folder"
ls "$folder"/*
