#!/bin/bash
# SPDX-License-Identifier: LGPL-2.1-or-later
#
# Build the Debian package for the Debian that this runs on, from a copy of the source: build_deb.sh FOLDER
# The packages are in FOLDER. Anything that lintian says is an error.
set -eu
source=$(cd "$(dirname "$0")/.." && pwd)
folder=$(realpath -m "$1")
rm -rf "$folder"
"$source/tools/copy_source.sh" "$folder/nbdnfs"
cd "$folder/nbdnfs"
# The date of the last change, so that two builds of one source are the same.
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git -C "$source" log -1 --format=%ct 2>/dev/null || date +%s)}
export SOURCE_DATE_EPOCH
# pybuild takes the first python3.11 there is, which need not be the system's.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
dpkg-buildpackage --build=binary --no-sign >"$folder/build.log" 2>&1 || { tail -n 40 "$folder/build.log" >&2; exit 1; }
cd "$folder"
rm -rf nbdnfs
# It counts what it does not show, so that its own --fail-on is of no use here.
found=$(lintian --allow-root --display-info --pedantic nbdnfs_*.changes 2>&1) || :
[ -z "$found" ] || { echo "$found" >&2; exit 1; }
ls "$folder"/nbdnfs_*.deb
