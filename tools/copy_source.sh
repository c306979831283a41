#!/bin/bash
# SPDX-License-Identifier: LGPL-2.1-or-later
#
# Copy the source to a folder: what is under version control or is about to be, or, without git, everything.
set -eu
cd "$(dirname "$0")/.."
mkdir -p "$1"
if git rev-parse --is-inside-work-tree >/dev/null 2>&1; then
    git ls-files -z --cached --others --exclude-standard
else
    find . -type f -not -path './.venv/*' -not -path './build/*' -not -name '*.so' -not -name '*.pyc' -print0
fi | tar -c --null --files-from=- --ignore-failed-read | tar -x -C "$1"
