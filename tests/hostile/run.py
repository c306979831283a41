# SPDX-License-Identifier: LGPL-2.1-or-later
"""A seeded run against a hostile server: mutated answers while a verified load runs, and then none.

    make hostile ARGS="--answers 1000000 [--seed N] [--minutes M]"

Before the open, libnfs reads the answers, and some versions of it crash there; that is counted apart. After the open
there must be no crash, no wrong byte and no error, and each request must end once the server behaves. Each life of a
client has a seed of its own, which is printed; `--only SEED` replays one. Exit status 0: all of that held.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import queue
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from support.fake_nas import FakeNas, Oddities

from hostile.load import PAGE, page_content
from hostile.mutations import Mutations
from nbdnfs.nas import owner_record
from nbdnfs.nas.owner_record import Identity, Timing

CLIENT = Path(__file__).with_name("client.py")
SWAP = "/export/swap"
PAGES = 1024
REGION_PAGES = 256
SILENCE_MS = 500
REFRESH_MS = 500
ANSWERS_OF_A_LIFE = 5000
# Clients mostly wait: for a new connection, or for an answer that does not come.
JOBS = 8
# Sparse enough for most requests to get through, dense enough for each connection to see some.
CHANCE, SILENT_CHANCE = 1 / 50, 1 / 1000
OPEN_CHANCE = 1 / 3
# When the faults have ended: the limits of docs/servers.md with SILENCE_MS, and a machine with other work.
DEADLINE_S = 60.0
LIFE_LIMIT_S = 60.0
_EVENT_PAUSES_S = (0.2, 2.0)


@dataclasses.dataclass
class Report:
    """What a run has seen. `failures` are texts, each with the seed that shows it."""

    answers: int = 0
    mutated: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    opens: int = 0
    open_answers: int = 0
    open_crashes: int = 0
    open_hung: int = 0
    lives: int = 0
    requests: int = 0
    crashes: int = 0
    wrong_pages: int = 0
    hung_requests: int = 0
    errors: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    longest_flush_s: float = 0.0
    reconnects: int = 0
    failures: list[str] = dataclasses.field(default_factory=list)

    def add(self, other: Report) -> None:
        """What another one has seen, too."""
        for field in dataclasses.fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            setattr(self, field.name, max(mine, theirs) if field.name == "longest_flush_s" else mine + theirs)

    def lines(self, seconds: float) -> list[str]:
        return [
            f"before the open: {self.open_answers} answers, {self.opens} tries, {self.open_crashes} crashes of libnfs, "
            f"{self.open_hung} hung",
            f"after the open: {self.answers} answers in {seconds:.0f} s, {self.mutated.total()} of them mutated, "
            f"{self.lives} clients, {self.requests} requests, {self.reconnects} reconnects",
            f"  {self.crashes} crashes, {self.wrong_pages} wrong pages, {self.hung_requests} hung requests, "
            f"{self.errors.total()} errors {dict(self.errors)}",
            f"  the slowest FLUSH after the faults: {self.longest_flush_s:.1f} s",
            "  " + ", ".join(f"{count} {kind}" for kind, count in self.mutated.most_common()),
        ]


class Client:
    """client.py as a process, and its lines."""

    def __init__(self, task: dict[str, Any], log: IO[bytes], environment: dict[str, str]) -> None:
        folder = Path(__file__).resolve().parents[1]
        paths = [str(folder), *(path for path in os.environ.get("PYTHONPATH", "").split(":") if path)]
        self._log = log
        self.process = subprocess.Popen(
            [sys.executable, str(CLIENT), json.dumps(task)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, **environment, "PYTHONPATH": ":".join(dict.fromkeys(paths))},
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line.strip())
        self._lines.put(None)

    def line(self, timeout_s: float) -> str | None:
        """The next one; None at the end, and TimeoutError."""
        try:
            return self._lines.get(timeout=timeout_s)
        except queue.Empty:
            raise TimeoutError from None

    def say(self, line: str) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()

    def said(self) -> str:
        """The last lines of its log, why requests fail, and the stacks of one that hangs."""
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").splitlines()
        stacks = [line for line in lines if line.startswith(("#", "Thread "))]
        lines = [line for line in lines if line.startswith("nbdnfs:")] if stacks else lines
        final = [line for line in lines[:-8] if "from now on" in line]
        return "\n".join(f"  | {line}" for line in (*final, *lines[-8:], *stacks))

    def end(self) -> int:
        """Kill it if it runs, and return its status."""
        self.process.kill()
        status = self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        return status


@contextlib.contextmanager
def client_process(task: dict[str, Any], environment: dict[str, str] | None = None) -> Iterator[Client]:
    """Killed at the end."""
    with tempfile.TemporaryFile() as log:
        client = Client(task, log, environment or {})
        try:
            yield client
        finally:
            client.end()


def before_the_open(seed: int, tries: int, report: Report) -> None:
    """Opens over mutated answers. What libnfs does with them is counted and fails nothing."""
    draw = random.Random(seed)
    with FakeNas(seed=seed) as nas, tempfile.TemporaryDirectory() as folder:
        nas.add(SWAP, bytes(PAGE))
        nas.mutate(Mutations(draw, OPEN_CHANCE, silent_chance=OPEN_CHANCE / 20))
        # a sanitizer's reports on libnfs are not the engine's
        quiet = {"ASAN_OPTIONS": f"log_path={folder}/report:detect_leaks=0:handle_sigill=1"}
        done = 0
        while done < tries:
            with client_process({"phase": "open", "url": nas.url(SWAP), "tries": tries - done}, quiet) as client:
                try:
                    while (line := client.line(LIFE_LIMIT_S / 4)) is not None:
                        done += 1
                    if done < tries:  # it has ended in the middle
                        done += 1
                        report.open_crashes += 1
                except TimeoutError:
                    done += 1
                    report.open_hung += 1
                del line
        report.opens += tries
        report.open_answers += nas.answers


def life(seed: int, answers: int, report: Report) -> None:
    """One client: opened over right answers, loaded over mutated ones, verified over right ones."""
    draw = random.Random(seed)
    machine, boot, hardware = (f"{draw.getrandbits(128):032x}" for _ in range(3))
    me = Identity(machine, boot, hardware, "hostile")
    record = owner_record.new(me, "keeper:swap0", None, "held", Timing(REFRESH_MS, 1000)).to_bytes()
    with FakeNas(Oddities(), seed=seed) as nas:
        nas.add(SWAP, bytes(PAGES * PAGE))
        nas.add(f"/export/{owner_record.name_of('swap')}", record)
        task = {
            "phase": "load",
            "url": nas.url(SWAP),
            "seed": seed,
            "deadline_s": DEADLINE_S,
            "options": {
                "region_pages": REGION_PAGES,
                "connections": 2,
                "read_ahead_pages": 16,
                "silence_ms": SILENCE_MS,
                "connect_timeout_s": 4,  # of a busy machine
                "owner_path": f"/{owner_record.name_of('swap')}",
                "owner_identity": f"\nboot {me.boot}\n",
                "owner_refresh_ms": REFRESH_MS,
            },
        }
        mutations = Mutations(draw, CHANCE, silent_chance=SILENT_CHANCE)
        with client_process(task) as client:
            try:
                _live(client, nas, mutations, draw, answers)
                _judge(client, nas, seed, report)
            except TimeoutError:
                report.hung_requests += 1
                report.failures.append(f"seed {seed}: the client has said nothing for too long\n{client.said()}")
        report.lives += 1
        report.answers += nas.answers
        report.mutated += mutations.counts


def _live(client: Client, nas: FakeNas, mutations: Mutations, draw: random.Random, answers: int) -> None:
    """From the start of the client to the end of the faults."""
    for word in ("open", "ready"):
        if client.line(LIFE_LIMIT_S) != word:
            return
    events = (nas.disconnect, nas.restart, nas.expire_handles, nas.stop_mountd, nas.start_mountd)
    nas.mutate(mutations)
    end_s = time.monotonic() + LIFE_LIMIT_S
    first = nas.answers
    while nas.answers - first < answers and time.monotonic() < end_s and client.process.poll() is None:
        pause_end_s = time.monotonic() + draw.uniform(*_EVENT_PAUSES_S)
        while time.monotonic() < pause_end_s and nas.answers - first < answers:
            time.sleep(0.02)
        draw.choice(events)()
    nas.end_faults()
    nas.start_mountd()
    client.say("end")


def _judge(client: Client, nas: FakeNas, seed: int, report: Report) -> None:
    line = client.line(4 * DEADLINE_S)
    if line is None:
        report.crashes += 1
        report.failures.append(f"seed {seed}: the client ended with status {client.process.wait()}\n{client.said()}")
        return
    result = json.loads(line)
    disk = nas.on_disk(SWAP)
    wrong_on_disk = [
        page
        for page, version in enumerate(result["versions"])
        if disk[page * PAGE : (page + 1) * PAGE] != page_content(seed, page, version)
    ]
    report.requests += result["requests"]
    report.wrong_pages += len(result["wrong"]) + len(wrong_on_disk)
    report.hung_requests += len(result["hung"])
    report.errors += collections.Counter(result["errors"]) + collections.Counter(result["errors_at_the_end"])
    report.longest_flush_s = max(report.longest_flush_s, result["flushed_s"])
    report.reconnects += result["counters"]["reconnects"]
    for what in ("wrong", "hung", "errors", "errors_at_the_end"):
        if result[what]:
            report.failures.append(f"seed {seed}: {what}: {result[what]} {result['counters']}\n{client.said()}")
    if wrong_on_disk:
        report.failures.append(f"seed {seed}: wrong in the file after the last flush: pages {wrong_on_disk[:10]}")


def run(
    *,
    seed: int,
    answers: int,
    minutes: float = 60.0,
    tries: int = 200,
    most_failures: int = 3,
    of_a_life: int = ANSWERS_OF_A_LIFE,
) -> Report:
    """Until so many answers were given after the open, or so much time has passed, or too much has failed."""
    draw = random.Random(seed)
    report = Report()
    lock = threading.Lock()  # of `report` and `draw`
    end_s = time.monotonic() + 60 * minutes
    if tries:
        before_the_open(draw.getrandbits(32), tries, report)

    def work() -> None:
        while True:
            with lock:
                if report.answers >= answers or time.monotonic() >= end_s or len(report.failures) >= most_failures:
                    return
                life_seed = draw.getrandbits(32)
            seen = Report()
            life(life_seed, of_a_life, seen)
            with lock:
                report.add(seen)

    with ThreadPoolExecutor(JOBS) as pool:
        for worker in [pool.submit(work) for _ in range(JOBS)]:
            worker.result()
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description="A verified load on a server that mutates its answers.")
    parser.add_argument("--answers", type=int, default=1_000_000, help="how many, after the open")
    parser.add_argument("--minutes", type=float, default=60.0, help="the most that it may take")
    parser.add_argument("--tries", type=int, default=500, help="how many opens over mutated answers")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32), help="of the whole run")
    parser.add_argument("--only", type=int, metavar="SEED", help="replay one client")
    args = parser.parse_args()
    print(f"seed {args.seed}", flush=True)
    begun_s = time.monotonic()
    if args.only is not None:
        report = Report()
        life(args.only, ANSWERS_OF_A_LIFE, report)
    else:
        report = run(seed=args.seed, answers=args.answers, minutes=args.minutes, tries=args.tries)
    print(*report.lines(time.monotonic() - begun_s), *report.failures, sep="\n", flush=True)
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
