# SPDX-License-Identifier: LGPL-2.1-or-later
"""Odd servers: create a backing file, claim it, serve it under a verified load, restart the server, verify.

make odd-servers                                        runs all, and writes the table of docs/servers.md
python tests/hostile/odd_servers.py --table             the same, to stdout
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from support.fake_nas import FakeNas, Oddities
from support.nfs_server import LOOPBACK
from support.waiting import in_background, wait_until

from hostile.load import PAGE, EngineLoad
from nbdnfs.engine import Engine
from nbdnfs.errors import NbdnfsError
from nbdnfs.nas import backing_file, owner_record, ownership
from nbdnfs.nas.owner_record import Identity, Timing

PAGES, REGION_PAGES = 1024, 256
TIMING = Timing(refresh_ms=500, in_flight_ms=300)
SILENCE_MS = 500
LOAD_S = 1.0
# Each of the steps, on a machine with other work.
DEADLINE_S = 25.0
PROCESS_DEADLINE_S = 110.0
PAGE_OF_TABLE = Path(__file__).resolve().parents[2] / "docs" / "servers.md"
_BEGIN, _END = "<!-- the table: make odd-servers -->", "<!-- the end of the table -->"


@dataclasses.dataclass(frozen=True)
class OddServer:
    """An odd server.

    name           what it is, in the words of the table
    directory      of the backing file
    refused_with   what the message has where it cannot be used; "": it can
    while_serving  what happens to it once it serves
    """

    name: str
    oddities: Oddities
    directory: str = "/export"
    refused_with: str = ""
    while_serving: Callable[[FakeNas], None] = lambda nas: None


@dataclasses.dataclass
class Outcome:
    """What was seen. `error` is what ended the run early."""

    name: str
    requests: int = 0
    wrong_pages: int = 0
    hung: list[str] = dataclasses.field(default_factory=list)
    errors: dict[str, int] = dataclasses.field(default_factory=dict)
    create_s: float = 0.0
    open_s: float = 0.0
    restart_s: float = 0.0
    error: str = ""
    crash: str = ""

    @property
    def is_good(self) -> bool:
        """Whether it serves, and rightly."""
        return not (self.wrong_pages or self.hung or self.errors or self.error or self.crash)

    def row(self) -> str:
        """Of the table."""
        seen = self.crash or self.error or ("right" if self.is_good else "wrong")
        times = (f"{seconds:.1f} s" if seconds else "" for seconds in (self.create_s, self.open_s, self.restart_s))
        return f"| {self.name} | {' | '.join(times)} | {self.wrong_pages} | {len(self.hung)} | {seen} |"


_SILENT_OPS = ("GETATTR", "LOOKUP", "ACCESS", "READ", "WRITE", "COMMIT", "FSINFO")
SERVERS = {
    "tiny": OddServer("limits of 4 KiB, which libnfs refuses", Oddities(rtmax=4096, wtmax=4096), refused_with="4096"),
    "small": OddServer("limits of 8 KiB", Oddities(rtmax=8192, wtmax=8192)),
    "large": OddServer("limits of 4 MiB, 64 KiB preferred", Oddities(rtmax=4 << 20, wtmax=4 << 20, rtpref=65536)),
    "smaller-later": OddServer(
        "limits of 1 MiB that are 4 KiB after the restart",
        Oddities(),
        while_serving=lambda nas: nas.become(dataclasses.replace(nas.oddities, rtmax=4096, wtmax=4096)),
    ),
    "jukebox": OddServer("JUKEBOX to one in ten calls of any procedure", Oddities(jukebox_chance=0.1)),
    "no-links": OddServer("no hard links", Oddities(has_hard_links=False)),
    "exports": OddServer("10,000 exports", Oddities(exports=("/export", *(f"/exports/{n:04}" for n in range(9999))))),
    "nested": OddServer("an export inside ours that is closed to us", Oddities(closed_exports=("/export/closed",))),
    "root": OddServer("the export `/`", Oddities(exports=("/",)), directory="/"),
    "no-mountd": OddServer("no mountd after the start", Oddities(), while_serving=FakeNas.stop_mountd),
    "renumbered": OddServer("other file numbers after the restart, the same handles", Oddities(new_fileids=True)),
    "other-handles": OddServer(
        "other handles and file numbers after the restart", Oddities(new_fileids=True, new_handles=True)
    ),
    "silent": OddServer(
        "one in 200 calls of each procedure is not answered",
        Oddities(silent_every=dict.fromkeys(_SILENT_OPS, 200)),
    ),
    "idle": OddServer("connections are closed after 0.3 s of idleness", Oddities(idle_limit_s=0.3)),
    "fragments": OddServer("answers in RPC fragments of any size", Oddities(in_fragments=True)),
    "long-handles": OddServer("handles of 64 bytes", Oddities(handle_bytes=64)),
    "short-handles": OddServer("handles of 8 bytes", Oddities(handle_bytes=8)),
    "no-attributes": OddServer("no attributes in answers (post_op_attr, wcc_data)", Oddities(has_attributes=False)),
    "data-sync": OddServer("DATA_SYNC in answer to UNSTABLE writes", Oddities(stability=1)),
    "short": OddServer("READ and WRITE move any number of bytes, from one on", Oddities(shortest_bytes=1)),
}


def run(name: str, seed: int = 1) -> Outcome:
    """One server. Never raises for what the server causes: that is the outcome's `error`."""
    server = SERVERS[name]
    # one `create` at a time for each path of an address, whatever the port
    path = f"{server.directory.rstrip('/')}/swap-{name}"
    outcome = Outcome(server.name)
    begun_s = time.monotonic()
    with FakeNas(server.oddities, seed=seed) as nas:
        url = nas.url(path)
        me = Identity(secrets.token_hex(16), secrets.token_hex(16), secrets.token_hex(16), "odd")
        try:
            in_background(backing_file.create, url, PAGES * PAGE).result(DEADLINE_S)
            in_background(_claim, url, me).result(DEADLINE_S)
            outcome.create_s = time.monotonic() - begun_s
            begun_s = time.monotonic()
            engine = in_background(_open, url, path, me).result(DEADLINE_S)
            outcome.open_s = time.monotonic() - begun_s
        except TimeoutError:
            outcome.hung.append("create, claim or open")
            outcome.error = "hangs before it serves"
            return outcome
        except (NbdnfsError, OSError) as error:
            outcome.error = str(error)
            return outcome
        _serve(engine, nas, path, server.while_serving, seed, outcome)
        if not outcome.hung:
            in_background(engine.close).result(DEADLINE_S)
    return outcome


def run_apart(name: str, seed: int = 1) -> Outcome:
    """`run` in a process of its own, which may crash or hang."""
    argv = [sys.executable, __file__, "--json", "--seed", str(seed), name]
    folder = str(Path(__file__).resolve().parents[1])
    environment = {**os.environ, "PYTHONPATH": f"{folder}:{os.environ.get('PYTHONPATH', '')}"}
    try:
        done = subprocess.run(
            argv, env=environment, stdout=subprocess.PIPE, text=True, timeout=PROCESS_DEADLINE_S, check=False
        )
    except subprocess.TimeoutExpired:
        return Outcome(SERVERS[name].name, hung=["the whole run"])
    if not done.stdout.startswith("{"):
        return Outcome(SERVERS[name].name, crash=f"ends with status {done.returncode}")
    return Outcome(**json.loads(done.stdout))


def _claim(url: str, me: Identity) -> None:
    ownership.claim(url, "keeper:swap0", me, report=lambda line: None, timing=TIMING)


def _open(url: str, path: str, me: Identity) -> Engine:
    return Engine(
        url,
        LOOPBACK,
        region_pages=REGION_PAGES,
        connections=2,
        read_ahead_pages=16,
        silence_ms=SILENCE_MS,
        connect_timeout_s=2,
        owner_path=f"/{owner_record.name_of(path.rpartition('/')[2])}",
        owner_identity=f"\nboot {me.boot}\n",
        owner_refresh_ms=TIMING.refresh_ms,
    )


def _serve(
    engine: Engine, nas: FakeNas, path: str, strike: Callable[[FakeNas], None], seed: int, outcome: Outcome
) -> None:
    load = EngineLoad(engine, seed=seed)
    in_background(load.fill).result(DEADLINE_S)
    strike(nas)
    load.start()
    time.sleep(LOAD_S)  # for what is odd to happen
    mounts = nas.mountd_runs
    nas.stop()
    nas.start(mountd=mounts)
    restarted_s = time.monotonic()
    before = load.requests
    try:
        wait_until(lambda: load.requests >= before + 20, "requests after the restart", DEADLINE_S)
        outcome.restart_s = time.monotonic() - restarted_s
    except AssertionError:
        outcome.hung.append("everything, after the restart")
    time.sleep(LOAD_S)
    load.stop(DEADLINE_S)
    if not load.hung and load.flush(DEADLINE_S):
        load.verify(DEADLINE_S)
        outcome.wrong_pages += len(load.wrong_pages(nas.on_disk(path)))
    outcome.wrong_pages += len(load.wrong)
    outcome.requests = load.requests
    outcome.hung += load.hung
    outcome.errors = dict(load.errors)


def table(outcomes: list[Outcome]) -> str:
    """In Markdown."""
    return "\n".join(
        [
            "| the server has | create and claim | open | back after a restart | wrong pages | hung | outcome |",
            "| --- | ---: | ---: | ---: | ---: | ---: | --- |",
            *(outcome.row() for outcome in outcomes),
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Serve from odd servers.")
    parser.add_argument("--table", action="store_true", help="print the table instead of a line for each server")
    parser.add_argument("--json", action="store_true", help="run one, in this process, and print what was seen")
    parser.add_argument("--write", action="store_true", help="put the table into docs/servers.md")
    parser.add_argument("--seed", type=int, default=1, help="what the servers draw from")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SERVERS)}; all by default")
    args = parser.parse_args()
    if args.json:
        print(json.dumps(dataclasses.asdict(run(args.names[0], args.seed))), flush=True)
        os._exit(0)  # what hangs must not keep it
    outcomes = []
    for name in args.names or SERVERS:
        outcomes.append(run_apart(name, args.seed))
        if not args.table:
            print(name, outcomes[-1], flush=True)
    if args.table:
        print(table(outcomes))
    if args.write:
        before, _, rest = PAGE_OF_TABLE.read_text().partition(_BEGIN)
        after = rest.partition(_END)[2]
        PAGE_OF_TABLE.write_text(f"{before}{_BEGIN}\n\n{table(outcomes)}\n\n{_END}{after}")
    return 0 if all(outcome.is_good or outcome.error for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
