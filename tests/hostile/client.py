# SPDX-License-Identifier: LGPL-2.1-or-later
"""The client of a hostile server, in a process of its own, so that a crash ends no test: run.py starts it.

    python tests/hostile/client.py '{"phase": "open", ...}'

phase "open"  opens the file again and again; a line for each try
phase "read"  opens it, says "open", reads a page when a line comes on stdin, and says what it has in hexadecimal
phase "load"  opens it, says "open", fills it, says "ready", runs a verified load until "end" comes on stdin and faults
              have ended, flushes, reads all of it, and prints the result as JSON

It leaves with os._exit: requests that hang must not keep it, and ThreadSanitizer or AddressSanitizer reports what there
is to report at once.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from typing import Any

from support.nfs_server import LOOPBACK

from hostile.load import EngineLoad
from nbdnfs.engine import Engine, NfsFile

CONNECT_TIMEOUT_S = 1
COUNTERS = (
    "reconnects",
    "checksum_rereads",
    "checksum_failures",
    "lost_uncommitted_pages",
    "file_state",
    "owner_state",
)


def say(line: str) -> None:
    print(line, flush=True)


def open_again_and_again(task: dict[str, Any]) -> None:
    for number in range(task["tries"]):
        try:
            file = NfsFile(task["url"], LOOPBACK, connect_timeout_s=CONNECT_TIMEOUT_S, gone_limit_ms=1000)
            file.close()
            say(f"{number} opened")
        except OSError as error:
            say(f"{number} {error.errno}")


def read(task: dict[str, Any]) -> None:
    engine = Engine(task["url"], LOOPBACK, **task["options"])
    say("open")
    sys.stdin.readline()
    buffer = bytearray(4096)
    engine.pread(buffer, task["page"] * 4096)
    say(buffer.hex())


def show_stacks() -> None:
    """Where each thread of this process is: to the log, where there is a debugger."""
    if shutil.which("gdb") is not None:
        command = ["gdb", "-p", str(os.getpid()), "-batch", "-ex", "thread apply all backtrace"]
        subprocess.run(command, stdout=sys.stderr, stderr=subprocess.DEVNULL, timeout=60, check=False)


def load(task: dict[str, Any]) -> None:
    engine = Engine(task["url"], LOOPBACK, **task["options"])
    say("open")
    run = EngineLoad(engine, seed=task["seed"])
    run.fill()
    say("ready")
    run.start()
    assert sys.stdin.readline() == "end\n"
    begun_s = time.monotonic()
    run.stop(task["deadline_s"])
    run.flush(task["deadline_s"])
    flushed_s = time.monotonic() - begun_s
    errors_before = dict(run.errors)
    run.errors.clear()
    run.verify(task["deadline_s"])
    if run.hung:
        show_stacks()
    counters = engine.counters()
    result = {
        "requests": run.requests,
        "longest_s": run.longest_s,
        "flushed_s": flushed_s,
        "wrong": run.wrong,
        "hung": run.hung,
        "errors": errors_before,
        "errors_at_the_end": dict(run.errors),
        "versions": run.versions,
        "counters": {name: counters[name] for name in COUNTERS},
    }
    say(json.dumps(result))


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    {"open": open_again_and_again, "read": read, "load": load}[job["phase"]](job)
    sys.stdout.flush()
    os._exit(0)
