#!/bin/bash
# SPDX-License-Identifier: LGPL-2.1-or-later
#
# Wheel and source distribution: the same from two builds, and of use by themselves: check_dist.sh [FOLDER]
# They are in FOLDER afterwards, where one is given.
set -eu
folder=${1:+$(realpath -m "$1")}
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

fail() {
    echo "check_dist: $*" >&2
    exit 1
}

tools/build_dist.sh "$work/one" >/dev/null
tools/build_dist.sh "$work/two" >/dev/null
diff --recursive "$work/one" "$work/two" || fail "two builds differ"

mkdir "$work/wheel"
.venv/bin/python -m zipfile -e "$work"/one/*.whl "$work/wheel"
[ -z "$(find "$work/wheel" -name '*.[ch]')" ] || fail "the wheel has C sources"
extensions=$(find "$work/wheel" -name '*.so')
built=$(find nbdnfs -name '*.so' | wc -l)
[ "$(echo "$extensions" | wc -l)" = "$built" ] || fail "the wheel's extensions: $extensions"
for extension in $extensions; do
    ! readelf --sections --wide "$extension" | grep -E '\.(symtab|debug_)' || fail "$extension is not stripped"
    ! strings "$extension" | grep -F -e "$work" -e "$PWD" || fail "$extension names a folder of this machine"
done
PYTHONPATH=$work/wheel .venv/bin/python -P -m nbdnfs --version >/dev/null || fail "the wheel does not run"

# The source distribution: the extension builds from it, and its own tests pass. What they need is in .venv; the path
# comes first, so that they import what was unpacked.
mkdir "$work/source"
tar -xf "$work"/one/*.tar.gz -C "$work/source" --strip-components=1
python=$PWD/.venv/bin/python
cd "$work/source"
"$python" -W ignore setup.py -q build_ext --inplace
export PYTHONPATH=$PWD
"$python" -c 'import nbdnfs.engine, sys; sys.exit(not nbdnfs.__file__.startswith(sys.argv[1]))' "$PWD" ||
    fail "the tests would import another nbdnfs"
"$python" -m pytest -q -p no:cacheprovider tests/foundation tests/structure tests/commands ||
    fail "the tests of the source distribution fail"
[ -z "$folder" ] || cp -r "$work/one" "$folder"
echo "check_dist: wheel and source distribution are fine"
