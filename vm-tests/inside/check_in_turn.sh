#!/bin/sh
# SPDX-License-Identifier: LGPL-2.1-or-later
#
# What xfstests' `check` prints about one test: check_in_turn.sh SUITE WORK NAME OTHER...
#
# On an emulated processor `check` needs a quarter of a minute before its first test. So one `check` runs NAME and all
# OTHERs, and goes on by itself; a call for the first of the OTHERs, with the rest, waits for that one alone. Where a
# call was killed, or NAME is not among what is run, what runs is killed and another `check` begins with NAME.
# SUITE: its folder; WORK: a folder for what calls leave to each other.
set -u
suite=$1 work=$2 name=$3
shift 2
mkdir -p "$work"
cd "$suite" || exit 71

is_running() { [ -s "$work/pid" ] && kill -0 "$(cat "$work/pid")" 2>/dev/null; }

# The lines from the test's own up to the next one's; status 1 while there is no next one.
about() {
    awk -v name="$name" '
        /^(generic|ext4|xfs)\/[0-9]+[ \t]/ || /^Ran:/ { if (is_on) { ended = 1; exit } is_on = $1 == name }
        is_on { print }
        END { exit !ended }
    ' "$work/out" 2>/dev/null
}

begin() {
    if is_running; then
        kill -s KILL -- "-$(cat "$work/pid")"
        umount /mnt/test /mnt/scratch 2>/dev/null
    fi
    printf '%s\n' "$@" >"$work/names"
    : >"$work/out"
    setsid ./check "$@" >"$work/out" 2>&1 </dev/null &
    echo $! >"$work/pid"
}

if [ -e "$work/busy" ] || ! grep -qxF "$name" "$work/names" 2>/dev/null; then
    begin "$@"
elif ! is_running && ! grep -q "^$name[[:space:]]" "$work/out"; then
    begin "$@"
fi
: >"$work/busy"
while ! about >/dev/null && is_running; do
    sleep 0.5
done
about
status=$?
rm "$work/busy"
exit $status
