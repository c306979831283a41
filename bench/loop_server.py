#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a keeper's worker with `loop = true` serves with, for clients one after the other.

    loop_server.py SOCKET URL [the plugin's settings, KEY=VALUE ...]

Such a worker serves one client and ends, and its start would count. Here the same engine, with its memory locked in the
same way, serves each client that connects. nbdkit is left out: it has no part in a request.
"""

from __future__ import annotations

import socket
import sys

from nbdnfs.engine import Engine
from nbdnfs.worker import life, settings


def main() -> None:
    """Until it is killed."""
    path, url, *more = sys.argv[1:]
    worker = life.Worker(settings.parse({"url": url, **dict(setting.split("=", 1) for setting in more)}))
    worker.prepare()
    worker.lock_memory()
    engine = worker.open_engine()
    assert isinstance(engine, Engine)
    worker.settle_memory()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        while True:
            client, _ = listener.accept()
            with client:
                engine.serve(client.fileno())


if __name__ == "__main__":
    main()
