#!/bin/bash
# SPDX-License-Identifier: LGPL-2.1-or-later
#
# Run the engine's tests against a build with sanitizers: tools/sanitize.sh address|thread [pytest options]
# (address brings undefined behaviour along). The build lies below build/ and changes nothing else.

set -eu
cd "$(dirname "$0")/.."

case "${1:-}" in
    address) flags="-fsanitize=address,undefined -fno-sanitize-recover=undefined" library=libasan.so ;;
    thread) flags="-fsanitize=thread" library=libtsan.so ;;
    *) echo "usage: tools/sanitize.sh address|thread [pytest options]" >&2; exit 64 ;;
esac
kind=$1
shift

NBDNFS_CFLAGS="$flags -g -O1 -fno-omit-frame-pointer" NBDNFS_LDFLAGS="$flags" \
    .venv/bin/python -W ignore setup.py -q build --build-base "build/$kind" --build-lib "build/$kind/lib" >/dev/null

# CPython leaks by design at its end, and is not built for either: only what our code does is looked at.
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=0
export UBSAN_OPTIONS=print_stacktrace=1
export TSAN_OPTIONS=exitcode=66:history_size=4
# pytest as a program, not as a module: the checkout must not come before the build
PYTHONPATH=build/$kind/lib LD_PRELOAD=$(gcc -print-file-name="$library") \
    exec .venv/bin/pytest -p no:cacheprovider "$@" \
    tests/engine/test_transport.py tests/engine/test_conformance.py tests/engine/test_wire.py \
    tests/engine/test_faults.py tests/engine/test_owner.py
