# SPDX-License-Identifier: LGPL-2.1-or-later
"""A server with a new address: a helper looks it up, and a standby that was started with the old one connects to it."""

from __future__ import annotations

import os
from pathlib import Path

from support.fake_nfs import FakeNfsServer
from support.keeper_run import until

from nbdnfs import region
from nbdnfs.config import Config
from nbdnfs.keeper.real_work import RealWork
from nbdnfs.keeper.records import Records

UNUSED_ADDRESS = "127.0.0.9"


def test_a_standby_is_sent_to_another_address(tmp_path: Path) -> None:
    """It was started with an address where no server answers, and is activated with another one."""
    with FakeNfsServer(bytes(1 << 20)) as server:
        work = RealWork(
            Config("t", server.url(), region_pages=256, lock="off", owner=False), server.url(), UNUSED_ADDRESS
        )
        region_fd = region.create()
        worker = work.start_worker(region_fd)
        try:
            until(lambda: worker.check_ready())
            worker.activate("127.0.0.1")
            until(worker.has_greeted)
        finally:
            worker.kill()
            until(worker.has_ended)
            os.close(region_fd)


def test_the_helper_answers_on_its_pipe(tmp_path: Path) -> None:
    """`resolve` and `resolved`, with the real helper."""
    # /run/nbdnfs of the machine that tests is not touched
    (tmp_path / "sitecustomize.py").write_text(
        "import pathlib\nfrom nbdnfs.keeper.records import Records\n"
        f"Records.__init__.__kwdefaults__['run'] = pathlib.Path({str(tmp_path)!r})\n"
    )
    Records("t", run=tmp_path).make()
    with FakeNfsServer(bytes(1 << 20)) as server:
        work = RealWork(Config("t", server.url(), lock="off"), server.url(), UNUSED_ADDRESS)
        work._environment["PYTHONPATH"] += f":{tmp_path}"
        assert ask(work) == "127.0.0.1"
        assert Records("t", run=tmp_path).read(Records.ADDRESS) == f"{server.url()}\n127.0.0.1"
        assert ask(work) == ""  # it has that one by now


def ask(work: RealWork) -> str:
    helper = work.resolve()
    until(lambda: helper.status() is not None)
    return work.resolved()
