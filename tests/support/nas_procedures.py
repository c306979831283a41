# SPDX-License-Identifier: LGPL-2.1-or-later
"""The procedures of FakeNas: NFSv3 and MOUNT (RFC 1813), and what clients ask a portmapper (RFC 1833)."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from support.fake_nfs import (
    NFS3_OK,
    NFS3ERR_ACCES,
    NFS3ERR_BADHANDLE,
    NFS3ERR_NOENT,
    NFS3ERR_STALE,
    UNSTABLE,
)
from support.file_tree import DIRECTORY, REGULAR, SYMLINK, FileTree, Node
from support.sunrpc import PROC_UNAVAIL, SUCCESS, Credentials, XdrReader, opaque, u32, u64

if TYPE_CHECKING:
    from support.fake_nas import Oddities

NFS3ERR_EXIST = 17
NFS3ERR_NOTDIR = 20
NFS3ERR_ISDIR = 21
NFS3ERR_INVAL = 22
NFS3ERR_NOTEMPTY = 66
NFS3ERR_NOTSUPP = 10004

_UNCHECKED, _GUARDED, _EXCLUSIVE = range(3)
_NO_ATTRIBUTES, _NO_WCC = u32(0), u32(0, 0)
# What follows the status in a failed answer; nothing for the others.
AFTER_FAILURE = {
    **dict.fromkeys(
        ["LOOKUP", "ACCESS", "READLINK", "READ", "FSSTAT", "FSINFO", "PATHCONF", "READDIR", "READDIRPLUS"],
        _NO_ATTRIBUTES,
    ),
    **dict.fromkeys(["SETATTR", "WRITE", "COMMIT", "CREATE", "MKDIR", "SYMLINK", "MKNOD", "REMOVE", "RMDIR"], _NO_WCC),
    "RENAME": _NO_WCC * 2,
    "LINK": _NO_ATTRIBUTES + _NO_WCC,
}
_HANDLE_HEAD = struct.Struct(">II")


class Refused(Exception):
    """A procedure's status is not NFS3_OK."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class Procedures:
    """Executes one call at a time; FakeNas has the lock."""

    def __init__(self, tree: FileTree, oddities: Oddities, draw: random.Random) -> None:
        self.oddities = oddities
        self._tree = tree
        self._draw = draw
        self._handle_epoch = 1
        self._fsid = 7
        self._verifier = draw.getrandbits(64)

    def new_boot(self) -> None:
        """What a restart changes."""
        self._verifier = self._draw.getrandbits(64)
        if self.oddities.new_fileids:
            self._tree.renumber()
        if self.oddities.new_handles:
            self.expire_handles()
        if self.oddities.new_fsid:
            self._fsid += 1

    def expire_handles(self) -> None:
        self._handle_epoch += 1

    def run(self, op: str, arguments: XdrReader, credentials: Credentials | None) -> bytes:
        """The results. Refused, ValueError (arguments that end too early) or NotImplementedError."""
        procedure: Callable[[XdrReader, Credentials | None], bytes] | None = getattr(self, f"_{op.lower()}", None)
        if procedure is None:
            raise NotImplementedError(op)
        return procedure(arguments, credentials)

    def refusal(self, op: str, status: int) -> bytes:
        """The results of a call that fails."""
        return u32(status) + AFTER_FAILURE.get(op, b"")

    def portmap(
        self, version: int, procedure: int, arguments: XdrReader, ports: Mapping[tuple[int, int], int]
    ) -> tuple[int, bytes]:
        """GETPORT of version 2, GETADDR of 3 and 4, and NULL."""
        if procedure == 0:
            return SUCCESS, b""
        if procedure != 3:
            return PROC_UNAVAIL, b""
        port = ports.get((arguments.u32(), arguments.u32()), 0)
        if version == 2:
            return SUCCESS, u32(port if arguments.u32() == 6 else 0)  # IPPROTO_TCP
        return SUCCESS, opaque(f"0.0.0.0.{port >> 8}.{port & 255}".encode() if port else b"")

    # Handles and attributes

    def _handle(self, node: Node) -> bytes:
        head = _HANDLE_HEAD.pack(self._handle_epoch, node.key)
        return opaque(head + bytes([0xA5]) * (self.oddities.handle_bytes - len(head)))

    def _node(self, arguments: XdrReader, kind: int | None = None) -> Node:
        handle = arguments.opaque()
        if len(handle) != self.oddities.handle_bytes or handle[8:] != bytes([0xA5]) * (len(handle) - 8):
            raise Refused(NFS3ERR_BADHANDLE)
        epoch, key = _HANDLE_HEAD.unpack(handle[:8])
        node = self._tree.by_key(key)
        if node is None or epoch != self._handle_epoch:
            raise Refused(NFS3ERR_STALE)
        if kind == DIRECTORY and node.kind != DIRECTORY:
            raise Refused(NFS3ERR_NOTDIR)
        if kind == REGULAR and node.kind != REGULAR:
            raise Refused(NFS3ERR_ISDIR if node.kind == DIRECTORY else NFS3ERR_INVAL)
        return node

    def _attributes(self, node: Node) -> bytes:
        size = node.size_bytes
        seconds = u32(int(node.modified_s), int(node.modified_s % 1 * 1e9))
        return (
            u32(node.kind, node.mode, node.links, node.uid, node.gid)
            + u64(size, size + -size % 4096)
            + u32(0, 0)
            + u64(self._fsid, node.fileid)
            + seconds * 3
        )

    def _post_op(self, node: Node) -> bytes:
        return u32(1) + self._attributes(node) if self.oddities.has_attributes else _NO_ATTRIBUTES

    def _wcc(self, node: Node, size_before_bytes: int | None = None) -> bytes:
        if not self.oddities.has_attributes:
            return _NO_WCC
        size = node.size_bytes if size_before_bytes is None else size_before_bytes
        seconds = u32(int(node.modified_s), 0)
        return u32(1) + u64(size) + seconds * 2 + self._post_op(node)

    def _set(self, node: Node, arguments: XdrReader) -> None:
        """sattr3."""
        for field in ("mode", "uid", "gid"):
            if arguments.u32():
                setattr(node, field, arguments.u32())
        if arguments.u32():
            node.resize(arguments.u64())
        for _time in range(2):
            if arguments.u32() == 2:
                arguments.u64()

    def _entry(self, parent: Node, name: str) -> Node:
        if name not in parent.entries:
            raise Refused(NFS3ERR_NOENT)
        return parent.entries[name]

    # MOUNT

    def _mount_null(self, arguments: XdrReader, credentials: Credentials | None) -> bytes:
        return b""

    def _mnt(self, arguments: XdrReader, credentials: Credentials | None) -> bytes:
        path = arguments.opaque().decode(errors="replace")
        if not path.startswith("/"):
            raise Refused(NFS3ERR_NOENT)
        if path != "/":
            path = path.rstrip("/")
        if path not in self.oddities.exports:
            raise Refused(NFS3ERR_ACCES)
        return u32(0) + self._handle(self._tree.make_directories(path)) + u32(1, 1)

    def _umnt(self, arguments: XdrReader, credentials: Credentials | None) -> bytes:
        return b""

    def _export(self, arguments: XdrReader, credentials: Credentials | None) -> bytes:
        paths = (*self.oddities.exports, *self.oddities.closed_exports)
        return b"".join(u32(1) + opaque(path.encode()) + u32(0) for path in paths) + u32(0)

    # Names

    def _null(self, arguments: XdrReader, credentials: Credentials | None) -> bytes:
        return b""

    def _getattr(self, arguments: XdrReader, credentials: Credentials | None) -> bytes:
        return u32(NFS3_OK) + self._attributes(self._node(arguments))

    def _setattr(self, arguments: XdrReader, credentials: Credentials | None) -> bytes:
        node = self._node(arguments)
        before = node.size_bytes
        self._set(node, arguments)
        return u32(NFS3_OK) + self._wcc(node, before)

    def _lookup(self, arguments: XdrReader, credentials: Credentials | None) -> bytes:
        parent = self._node(arguments, DIRECTORY)
        name = arguments.opaque().decode(errors="replace")
        node = parent if name in ("", ".") else self._entry(parent, name)
        return u32(NFS3_OK) + self._handle(node) + self._post_op(node) + self._post_op(parent)

    def _access(self, arguments: XdrReader, credentials: Credentials | None) -> bytes:
        node = self._node(arguments)
        return u32(NFS3_OK) + self._post_op(node) + u32(arguments.u32())

    def _readlink(self, arguments: XdrReader, credentials: Credentials | None) -> bytes:
        node = self._node(arguments)
        if node.kind != SYMLINK:
            raise Refused(NFS3ERR_INVAL)
        return u32(NFS3_OK) + self._post_op(node) + opaque(node.target.encode())

    def _created(self, node: Node, parent: Node) -> bytes:
        return u32(NFS3_OK, 1) + self._handle(node) + self._post_op(node) + self._wcc(parent)

    def _create(self, arguments: XdrReader, credentials: Credentials | None) -> bytes:
        parent = self._node(arguments, DIRECTORY)
        name = arguments.opaque().decode(errors="replace")
        how = arguments.u32()
        verifier = struct.pack(">Q", arguments.u64()) if how == _EXCLUSIVE else b""
        node = parent.entries.get(name)
        if node is not None:
            if how == _GUARDED or (how == _EXCLUSIVE and node.create_verifier != verifier):
                raise Refused(NFS3ERR_EXIST)
        else:
            node = self._tree.make(parent, name, REGULAR, 0o600)
            node.create_verifier = verifier
            if credentials is not None:
                node.uid, node.gid = credentials.uid, credentials.gid
        if how != _EXCLUSIVE:
            self._set(node, arguments)
        return self._created(node, parent)

    def _mkdir(self, arguments: XdrReader, credentials: Credentials | None) -> bytes:
        parent = self._node(arguments, DIRECTORY)
        name = arguments.opaque().decode(errors="replace")
        if name in parent.entries:
            raise Refused(NFS3ERR_EXIST)
        node = self._tree.make(parent, name, DIRECTORY, 0o755)
        self._set(node, arguments)
        return self._created(node, parent)

    def _symlink(self, arguments: XdrReader, credentials: Credentials | None) -> bytes:
        parent = self._node(arguments, DIRECTORY)
        name = arguments.opaque().decode(errors="replace")
        if name in parent.entries:
            raise Refused(NFS3ERR_EXIST)
        node = self._tree.make(parent, name, SYMLINK, 0o777)
        self._set(node, arguments)
        node.target = arguments.opaque().decode(errors="replace")
        return self._created(node, parent)

    def _remove(self, arguments: XdrReader, credentials: Credentials | None) -> bytes:
        parent = self._node(arguments, DIRECTORY)
        name = arguments.opaque().decode(errors="replace")
        if self._entry(parent, name).kind == DIRECTORY:
            raise Refused(NFS3ERR_ISDIR)
        self._tree.remove(parent, name)
        return u32(NFS3_OK) + self._wcc(parent)

    def _rmdir(self, arguments: XdrReader, credentials: Credentials | None) -> bytes:
        parent = self._node(arguments, DIRECTORY)
        name = arguments.opaque().decode(errors="replace")
        if self._entry(parent, name).entries:
            raise Refused(NFS3ERR_NOTEMPTY)
        self._tree.remove(parent, name)
        return u32(NFS3_OK) + self._wcc(parent)

    def _rename(self, arguments: XdrReader, credentials: Credentials | None) -> bytes:
        parent = self._node(arguments, DIRECTORY)
        name = arguments.opaque().decode(errors="replace")
        to = self._node(arguments, DIRECTORY)
        self._entry(parent, name)
        self._tree.rename(parent, name, to, arguments.opaque().decode(errors="replace"))
        return u32(NFS3_OK) + self._wcc(parent) + self._wcc(to)

    def _link(self, arguments: XdrReader, credentials: Credentials | None) -> bytes:
        node = self._node(arguments)
        parent = self._node(arguments, DIRECTORY)
        name = arguments.opaque().decode(errors="replace")
        if not self.oddities.has_hard_links:
            raise Refused(NFS3ERR_NOTSUPP)
        if name in parent.entries:
            raise Refused(NFS3ERR_EXIST)
        self._tree.link(node, parent, name)
        return u32(NFS3_OK) + self._post_op(node) + self._wcc(parent)

    def _listing(self, arguments: XdrReader) -> tuple[Node, list[tuple[int, str, Node]]]:
        """A directory, and its entries after the cookie with theirs."""
        parent = self._node(arguments, DIRECTORY)
        after = arguments.u64()
        names = [(".", parent), ("..", parent), *sorted(parent.entries.items())]
        return parent, [(cookie, *entry) for cookie, entry in enumerate(names, 1) if cookie > after]

    def _readdir(self, arguments: XdrReader, credentials: Credentials | None) -> bytes:
        parent, entries = self._listing(arguments)
        listed = b"".join(
            u32(1) + u64(node.fileid) + opaque(name.encode()) + u64(cookie) for cookie, name, node in entries
        )
        return u32(NFS3_OK) + self._post_op(parent) + bytes(8) + listed + u32(0, 1)

    def _readdirplus(self, arguments: XdrReader, credentials: Credentials | None) -> bytes:
        parent, entries = self._listing(arguments)
        listed = b"".join(
            u32(1)
            + u64(node.fileid)
            + opaque(name.encode())
            + u64(cookie)
            + self._post_op(node)
            + u32(1)
            + self._handle(node)
            for cookie, name, node in entries
        )
        return u32(NFS3_OK) + self._post_op(parent) + bytes(8) + listed + u32(0, 1)

    # Data

    def _count(self, asked: int, limit: int) -> int:
        """How many bytes a READ or WRITE moves."""
        count = min(asked, limit)
        if self.oddities.shortest_bytes is None or count <= self.oddities.shortest_bytes:
            return count
        return self._draw.randint(self.oddities.shortest_bytes, count)

    def _read(self, arguments: XdrReader, credentials: Credentials | None) -> bytes:
        node = self._node(arguments, REGULAR)
        offset = arguments.u64()
        count = self._count(arguments.u32(), self.oddities.rtmax)
        data = bytes(node.content[offset : offset + count])
        ends = offset + len(data) >= len(node.content)
        return u32(NFS3_OK) + self._post_op(node) + u32(len(data), int(ends)) + opaque(data)

    def _write(self, arguments: XdrReader, credentials: Credentials | None) -> bytes:
        node = self._node(arguments, REGULAR)
        offset, count, stable = arguments.u64(), arguments.u32(), arguments.u32()
        data = arguments.opaque()
        if len(data) != count:
            raise Refused(NFS3ERR_INVAL)
        data = data[: self._count(count, self.oddities.wtmax)]
        done = max(stable, self.oddities.stability)
        before = node.size_bytes
        node.write(offset, data, stable=done != UNSTABLE)
        return u32(NFS3_OK) + self._wcc(node, before) + u32(len(data), done) + u64(self._verifier)

    def _commit(self, arguments: XdrReader, credentials: Credentials | None) -> bytes:
        node = self._node(arguments, REGULAR)
        node.commit()
        return u32(NFS3_OK) + self._wcc(node) + u64(self._verifier)

    # File systems

    def _fsstat(self, arguments: XdrReader, credentials: Credentials | None) -> bytes:
        odd = self.oddities
        sizes = u64(odd.total_bytes, odd.available_bytes, odd.available_bytes)
        return u32(NFS3_OK) + self._post_op(self._node(arguments)) + sizes + u64(*[1 << 40] * 3) + u32(0)

    def _fsinfo(self, arguments: XdrReader, credentials: Credentials | None) -> bytes:
        node = self._node(arguments)
        odd = self.oddities
        sizes = u32(odd.rtmax, odd.rtpref or odd.rtmax, 1, odd.wtmax, odd.wtpref or odd.wtmax, 1, 4096)
        links = 0x1 if odd.has_hard_links else 0x0
        return u32(NFS3_OK) + self._post_op(node) + sizes + u64(1 << 50) + u32(0, 1, 0x1A | links)

    def _pathconf(self, arguments: XdrReader, credentials: Credentials | None) -> bytes:
        node = self._node(arguments)
        return u32(NFS3_OK) + self._post_op(node) + u32(1024, 255, 1, 1, 0, 1)
