#!/bin/bash
# SPDX-License-Identifier: LGPL-2.1-or-later
#
# Run the engine's tests against a build with sanitizers: tools/sanitize.sh address|thread [pytest options]
# or a program of tests/:                                 tools/sanitize.sh address|thread --program FILE [its options]
# or both, side by side, because most of these tests wait: tools/sanitize.sh both [pytest options]
# (address includes undefined behaviour). The build is below build/ and changes nothing else. Reports are shown at the
# end and stay in build/KIND/reports; a test during which one was written fails.
#
# Undefined behaviour traps, and AddressSanitizer reports the trap (ILL) with its stack: beside AddressSanitizer, GCC's
# libubsan writes to stderr whatever its log_path is, and pytest has stderr.

set -eu
cd "$(dirname "$0")/.."

if [ "${1:-}" = both ]; then
    shift
    mkdir -p build
    tools/sanitize.sh address "$@" >build/address.log 2>&1 &
    address=$! status=0
    tools/sanitize.sh thread "$@" || status=$?
    wait "$address" || status=$?
    cat build/address.log
    exit "$status"
fi

case "${1:-}" in
    address) flags="-fsanitize=address,undefined -fsanitize-undefined-trap-on-error" ;;
    thread) flags="-fsanitize=thread" ;;
    *) echo "usage: tools/sanitize.sh address|thread|both [pytest options]" >&2; exit 64 ;;
esac
kind=$1
shift

NBDNFS_CFLAGS="$flags -g -O1 -fno-omit-frame-pointer" NBDNFS_LDFLAGS="$flags" \
    .venv/bin/python -W ignore setup.py -q build --build-base "build/$kind" --build-lib "build/$kind/lib" >/dev/null

if [ "${1:-}" = --program ]; then
    shift
    PYTHONPATH=build/$kind/lib:tests exec .venv/bin/python tools/run_sanitized.py "$kind" "build/$kind/reports" \
        .venv/bin/python "$@"
fi

# Two runs side by side, for most of these tests wait. Each has its own folder for reports: in one folder, nothing says
# which run's test was the cause.
first="tests/engine/test_faults.py tests/engine/test_owner.py tests/engine/test_waiting_reader.py
    tests/engine/test_waking.py tests/engine/test_short_writes.py tests/engine/test_encryption.py
    tests/engine/test_loop.py tests/hostile/test_hostile_client.py"
second="tests/engine/test_transport.py tests/engine/test_conformance.py tests/engine/test_wire.py
    tests/engine/test_liveness.py tests/engine/test_reconnecting.py tests/engine/test_finding_again.py
    tests/engine/test_next_worker.py"
# A run of minutes that ThreadSanitizer would make an hour.
[ "$kind" != address ] || first="$first tests/hostile/test_hostile.py"

# The reference engine is not ours. Everything takes several times as long as without a sanitizer.
run_tests() { # FOLDER-FOR-REPORTS TESTS... -- [pytest options]
    reports=$1 files=()
    shift
    while [ "$1" != -- ]; do
        files+=("$1")
        shift
    done
    shift
    # pytest as a program, not as a module: the checkout must not come before the build
    PYTHONPATH=build/$kind/lib .venv/bin/python tools/run_sanitized.py "$kind" "$reports" \
        .venv/bin/pytest -p no:cacheprovider --timeout 360 -k "not libnfs-python" "$@" "${files[@]}"
}

status=0
# shellcheck disable=SC2086 # lists of files
run_tests "build/$kind/reports/1" $first -- "$@" >"build/$kind-1.log" 2>&1 &
# shellcheck disable=SC2086
run_tests "build/$kind/reports/2" $second -- "$@" || status=$?
wait $! || status=$?
cat "build/$kind-1.log"
exit "$status"
