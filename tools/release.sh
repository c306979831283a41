#!/bin/bash
# SPDX-License-Identifier: LGPL-2.1-or-later
#
# What is published of a version: release.sh SUITE[/ARCHITECTURE]... makes build/release from a clean clone of HEAD: the
# wheel, the source distribution, a Debian package for each suite, and their checksums. Each is built twice or in a
# fresh root, and installed and used in another one, by tools/check_dist.sh and tools/check_deb.sh. Nothing is published
# or tagged. Needs root, the network, and about half an hour for each suite; for another architecture several times
# that.
set -eu
cd "$(dirname "$0")/.."
source=$PWD
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

fail() {
    echo "release: $1" >&2
    echo "release: $2" >&2
    exit 1
}

[ $# -gt 0 ] || fail "no suite is named" "tools/release.sh bookworm trixie bookworm/arm64 trixie/arm64"
[ -z "$(git status --porcelain)" ] || fail "there are changes that are not committed" "commit them, or put them aside"
git clone --quiet --no-hardlinks "$source" "$work/nbdnfs"
cd "$work/nbdnfs"

# The version is what nbdnfs says; the two files for readers must say the same, with a date.
version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' nbdnfs/__init__.py)
grep -qE "^## ${version//./\\.} \([0-9]{4}-[0-9]{2}-[0-9]{2}\)$" CHANGELOG.md ||
    fail "CHANGELOG.md has no section '## $version (DATE)'" "write it: what users notice, and the day"
head -n 1 debian/changelog | grep -qF "nbdnfs ($version) " ||
    fail "debian/changelog is not about $version" "its first line is: $(head -n 1 debian/changelog)"
echo "release: $version, from $(git log -1 --format='%h %s')"

tools/bootstrap.sh test
tools/check_dist.sh "$work/release"
for suite; do
    # shellcheck disable=SC2086 # two words, or one
    tools/check_deb.sh ${suite/\// }
    cp "build/deb/${suite%/*}"-*/nbdnfs_*.deb "$work/release"
done

cd "$work/release"
sha256sum -- * >SHA256SUMS
rm -rf "$source/build/release"
mkdir -p "$source/build"
cp -r "$work/release" "$source/build/release"
echo "release: $version is in build/release:"
cat "$source/build/release/SHA256SUMS"
