# SPDX-License-Identifier: LGPL-2.1-or-later
"""Run a program under a sanitizer and show every report: tools/run_sanitized.py address|thread FOLDER COMMAND...

The sanitizers write to files below FOLDER, one for each process, because pytest captures the descriptors of a test and
throws them away when it passes. FOLDER/test has the id of the test that runs now (support.sanitizer_reports writes it),
which names the test also when the sanitizer ends the process.

Exit status: the command's; 66 when that is 0 and there are reports.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

LIBRARIES = {"address": "libasan.so", "thread": "libtsan.so"}
STATUS_REPORTED = 66


def main() -> int:
    kind, folder, *command = sys.argv[1:]
    # absolute: a process may have another working directory when it reports
    reports = Path(folder).resolve()
    shutil.rmtree(reports, ignore_errors=True)
    reports.mkdir(parents=True)
    status = subprocess.run(command, check=False, env=os.environ | environment(kind, reports)).returncode
    found = sorted(reports.glob("report.*"))
    for report in found:
        print(f"\n{report}:\n{report.read_text(errors='replace')}", file=sys.stderr)
    test = reports / "test"
    if found and test.exists():
        print(f"sanitizer: the run ended during {test.read_text()}", file=sys.stderr)
    if found:
        print(f"sanitizer: {len(found)} processes reported; their reports are above", file=sys.stderr)
    if status < 0:
        print(f"sanitizer: the command was ended by signal {-status}", file=sys.stderr)
        return 128 - status
    return status or (STATUS_REPORTED if found else 0)


def environment(kind: str, reports: Path) -> dict[str, str]:
    """What makes an unsanitized Python load a sanitized extension, and where the reports go."""
    library = subprocess.run(
        ["gcc", f"-print-file-name={LIBRARIES[kind]}"], check=True, capture_output=True, text=True
    ).stdout.strip()
    log = f"log_path={reports}/report"
    return {
        "LD_PRELOAD": library,
        "NBDNFS_SANITIZER_REPORTS": str(reports),
        # CPython leaks by design when it ends, and is not built with a sanitizer: only our code counts.
        "ASAN_OPTIONS": f"{log}:detect_leaks=0:abort_on_error=0:handle_sigill=1",
        "TSAN_OPTIONS": f"{log}:exitcode={STATUS_REPORTED}:history_size=4",
    }


if __name__ == "__main__":
    sys.exit(main())
