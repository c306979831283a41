# SPDX-License-Identifier: LGPL-2.1-or-later
"""The plugin's settings: checked once, then used to open the engine. Runs inside nbdkit, so imports little."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nbdnfs import diagnose, engine
from nbdnfs.errors import ConfigError
from nbdnfs.url import NfsUrl
from nbdnfs.url import parse as parse_url

if TYPE_CHECKING:
    from nbdnfs.reference import Engine as ReferenceEngine

ENGINES = ("c", "libnfs-python")
KEYS = ("url", "engine")

# The kernel's requests are far smaller; nbdkit itself allows 64 MiB (docs/nbdkit-protocol.pod).
MAX_REQUEST_BYTES = 32 * 1024 * 1024


@dataclass(frozen=True)
class WorkerConfig:
    """What the plugin was told. `address` is the server's, resolved before anything is locked or short."""

    url: NfsUrl
    address: str
    engine: str

    def open_engine(self) -> engine.Engine | ReferenceEngine:
        """Connect to the server and open the file. Raises NbdnfsError."""
        try:
            if self.engine == "libnfs-python":
                from nbdnfs.reference import Engine as Reference

                return Reference(self.url.text, self.address)
            engine.keep_thread_states()
            return engine.Engine(self.url.text, self.address)
        except OSError as error:
            raise diagnose.explain(error, self.url, self.address) from None


def parse(settings: Mapping[str, str]) -> WorkerConfig:
    """Check the plugin's key=value settings. Raises NbdnfsError; asks the resolver for the server's address."""
    for key in settings:
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, n=1)
            hint = f"did you mean '{near[0]}'?" if near else "the keys are " + ", ".join(KEYS)
            raise ConfigError(f"'{key}' is no setting of the nbdnfs plugin", hint)
    if "url" not in settings:
        raise ConfigError("the nbdnfs plugin needs url=", "for example url=nfs://nas/export/swap/box.swap")
    kind = settings.get("engine", ENGINES[0])
    if kind not in ENGINES:
        raise ConfigError(f"there is no engine '{kind}'", "the engines are " + " and ".join(ENGINES))
    url = parse_url(settings["url"])
    diagnose.refuse_unsupported(url, engine.libnfs_version)
    return WorkerConfig(url=url, address=url.resolve(), engine=kind)
