# SPDX-License-Identifier: LGPL-2.1-or-later
"""The files of FakeNas, in memory: directories, files, symlinks and hard links, before a crash and after it."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterator

# ftype3, RFC 1813
REGULAR, DIRECTORY, SYMLINK = 1, 2, 5


@dataclasses.dataclass(eq=False)
class Node:
    """A file, directory or symlink. `key` never changes; `fileid` is what the server reports as its number.

    content  a file as clients see it
    on_disk  the same as a crash leaves it
    unstable offsets and lengths of what a COMMIT brings to the disk
    """

    kind: int
    key: int
    fileid: int
    mode: int
    uid: int = 0
    gid: int = 0
    links: int = 1
    content: bytearray = dataclasses.field(default_factory=bytearray)
    on_disk: bytearray = dataclasses.field(default_factory=bytearray)
    unstable: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    entries: dict[str, Node] = dataclasses.field(default_factory=dict)
    target: str = ""
    create_verifier: bytes = b""
    modified_s: float = dataclasses.field(default_factory=time.time)

    @property
    def size_bytes(self) -> int:
        return len(self.content) if self.kind == REGULAR else 4096

    def write(self, offset: int, data: bytes, *, stable: bool) -> None:
        """As pwrite(2): a gap between the end and a later offset is filled with zeros."""
        _put(self.content, offset, data)
        if stable:
            _put(self.on_disk, offset, data)
        else:
            self.unstable.append((offset, len(data)))
        self.modified_s = time.time()

    def commit(self) -> None:
        """Bring all that was written to the disk."""
        for offset, length in self.unstable:
            _put(self.on_disk, offset, self.content[offset : offset + length])
        self.unstable.clear()

    def resize(self, size_bytes: int) -> None:
        """As ftruncate(2), and stable at once."""
        for data in (self.content, self.on_disk):
            del data[size_bytes:]
            data.extend(bytes(size_bytes - len(data)))
        self.modified_s = time.time()


class FileTree:
    """The files below `/`. Not locked: FakeNas holds its lock around all use."""

    def __init__(self) -> None:
        self._keys = itertools.count(100)
        self._nodes: dict[int, Node] = {}
        self.root = self._new(DIRECTORY, 0o755)

    def _new(self, kind: int, mode: int) -> Node:
        key = next(self._keys)
        node = self._nodes[key] = Node(kind, key, key, mode)
        return node

    def by_key(self, key: int) -> Node | None:
        """None for what was removed."""
        return self._nodes.get(key)

    def make_directories(self, path: str) -> Node:
        """The directory, with those above it; what is there stays."""
        node = self.root
        for name in _names(path):
            if name not in node.entries:
                node.entries[name] = self._new(DIRECTORY, 0o755)
            node = node.entries[name]
        return node

    def make(self, parent: Node, name: str, kind: int, mode: int) -> Node:
        """A new node under a name that is free."""
        assert name not in parent.entries
        node = parent.entries[name] = self._new(kind, mode)
        return node

    def add(self, path: str, content: bytes = b"", *, mode: int = 0o600) -> Node:
        """A file, with the directories above it."""
        above, _, name = path.rpartition("/")
        node = self.make(self.make_directories(above), name, REGULAR, mode)
        node.content, node.on_disk = bytearray(content), bytearray(content)
        return node

    def find(self, path: str) -> Node | None:
        """Symlinks are not followed."""
        node: Node | None = self.root
        for name in _names(path):
            node = node.entries.get(name) if node is not None else None
        return node

    def link(self, node: Node, parent: Node, name: str) -> None:
        """A further name for a file; the name is free."""
        assert name not in parent.entries
        parent.entries[name] = node
        node.links += 1

    def remove(self, parent: Node, name: str) -> None:
        """Take a name away, and the node with its last name."""
        node = parent.entries.pop(name)
        node.links -= 1
        if node.links == 0:
            del self._nodes[node.key]

    def rename(self, parent: Node, name: str, to: Node, new_name: str) -> None:
        """As rename(2): what had the new name loses it; two names of one file stay as they are."""
        node = parent.entries[name]
        if to.entries.get(new_name) is node:
            return
        if new_name in to.entries:
            self.remove(to, new_name)
        del parent.entries[name]
        to.entries[new_name] = node

    def crash(self) -> None:
        """Every file is as it was on the disk."""
        for node in self._nodes.values():
            node.content = node.on_disk.copy()
            node.unstable.clear()

    def renumber(self) -> None:
        """Give everything another file number, as a server does that numbers files when it starts."""
        for node in self._nodes.values():
            node.fileid = node.key + ((node.fileid // 1_000_000) + 1) * 1_000_000


def _names(path: str) -> Iterator[str]:
    return (name for name in path.split("/") if name)


def _put(file: bytearray, offset: int, data: bytes | bytearray) -> None:
    file.extend(bytes(max(0, offset - len(file))))
    file[offset : offset + len(data)] = data
