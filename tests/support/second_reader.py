# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reads a file from an NFS server with PyPI's libnfs package, without any code of the project."""

from __future__ import annotations

import importlib
import os
import sys
import warnings

IS_POSSIBLE = sys.version_info < (3, 12)
WHY_NOT = "PyPI's libnfs imports imp, which Python 3.12 dropped"

_PIECE_BYTES = 256 * 1024


def read(url: str, offset: int, length: int) -> bytes:
    """Bytes of the file that a libnfs URL names; fewer at its end."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it imports `imp`
        libnfs = importlib.import_module("libnfs")
    path, query = url.split("?")
    directory, _, name = path.rpartition("/")
    share = libnfs.NFS(f"{directory}?{query}")  # to be kept: what it opens dies with it
    file = share.open(f"/{name}", mode="rb")
    file.seek(offset, os.SEEK_SET)
    content = bytearray()
    while len(content) < length and (piece := file.read(min(_PIECE_BYTES, length - len(content)))):
        content += piece
    file.close()
    return bytes(content)
