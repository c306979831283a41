# SPDX-License-Identifier: LGPL-2.1-or-later
"""Fault tool: a whole NAS in memory, with names: NFSv3 and MOUNT over TCP, and a portmapper where it is given a port.

    with FakeNas(Oddities(has_hard_links=False)) as nas:
        nas.add("/export/swap", bytes(1 << 20))
        device = Engine(nas.url("/export/swap"), LOOPBACK)
        nas.drop("LOOKUP")                         # the next one is executed and not answered
        nas.jukebox("LINK", times=3)
        nas.mutate(lambda call, message: ...)      # every answer goes through it
        nas.stop_mountd()
        nas.restart()                              # unstable writes are lost, the verifier changes

`Oddities` are what a server is like; the methods are what happens to it. Procedures are named as in RFC 1813 ("READ",
"MNT", ...), and "MOUNT_NULL" and "PORTMAP" for what has no name of its own there. tests/support/fake_nfs.py has one
file and more faults of a single transfer.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Self
from urllib.parse import urlencode

from support.fake_nfs import NFS3_OK, NFS3ERR_JUKEBOX
from support.file_tree import FileTree, Node
from support.nas_procedures import Procedures, Refused
from support.nfs_server import LOOPBACK, free_ports
from support.sunrpc import (
    GARBAGE_ARGS,
    LAST_FRAGMENT,
    PROC_UNAVAIL,
    PROG_MISMATCH,
    PROG_UNAVAIL,
    SUCCESS,
    RpcCall,
    RpcServer,
    XdrReader,
    record,
    u32,
)

PORTMAP, NFS, MOUNT = 100000, 100003, 100005
_NFS_PROCEDURES = (
    *("NULL", "GETATTR", "SETATTR", "LOOKUP", "ACCESS", "READLINK", "READ", "WRITE", "CREATE", "MKDIR", "SYMLINK"),
    *("MKNOD", "REMOVE", "RMDIR", "RENAME", "LINK", "READDIR", "READDIRPLUS", "FSSTAT", "FSINFO", "PATHCONF", "COMMIT"),
)
_MOUNT_PROCEDURES = ["MOUNT_NULL", "MNT", "DUMP", "UMNT", "UMNTALL", "EXPORT"]
OPS = (*_NFS_PROCEDURES, *_MOUNT_PROCEDURES, "PORTMAP")
MIB = 1 << 20
_CALLS_KEPT = 100_000


@dataclasses.dataclass(frozen=True)
class Oddities:
    """What a server is like. The defaults are those of an ordinary one.

    exports, closed_exports   what may be mounted; what EXPORT lists besides, and MNT refuses
    rtmax ... wtpref          as FSINFO reports them, in bytes; a READ or WRITE moves no more
    shortest_bytes            each READ and WRITE moves a random count from this on; None: as many as asked for
    handle_bytes              the length of a file handle, 8 to 64
    has_attributes            whether post_op_attr and wcc_data have any
    stability                 stable_how of the answer to an UNSTABLE write: the disk has it when that is not UNSTABLE
    idle_limit_s              a connection is closed after such a time without a call
    in_fragments              answers come in several RPC fragments of random sizes
    jukebox_chance            how many of the calls are answered with JUKEBOX, 0 to 1: all but NULL
    silent_every              of each procedure, one of how many calls is executed and not answered
    total_bytes, available_bytes   what FSSTAT says; nothing keeps to it
    new_fileids, new_handles, new_fsid   what a restart changes
    """

    exports: tuple[str, ...] = ("/export",)
    closed_exports: tuple[str, ...] = ()
    rtmax: int = MIB
    wtmax: int = MIB
    rtpref: int | None = None
    wtpref: int | None = None
    shortest_bytes: int | None = None
    handle_bytes: int = 32
    has_hard_links: bool = True
    has_attributes: bool = True
    stability: int = 0
    idle_limit_s: float | None = None
    in_fragments: bool = False
    jukebox_chance: float = 0.0
    silent_every: Mapping[str, int] = dataclasses.field(default_factory=dict)
    total_bytes: int = 1 << 40
    available_bytes: int = 1 << 40
    new_fileids: bool = False
    new_handles: bool = False
    new_fsid: bool = False


@dataclasses.dataclass(frozen=True)
class NasCall:
    """A call that arrived. `offset` and `count` are 0 but for READ, WRITE and COMMIT; `name` is LOOKUP's and such."""

    op: str
    at_s: float
    offset: int = 0
    count: int = 0
    name: str = ""
    client_port: int = 0


@dataclasses.dataclass
class _Fault:
    """What happens to the calls of a procedure: `skip` of them pass first, then `times` are struck (None: all)."""

    op: str
    skip: int
    times: int | None
    until_s: float | None = None
    status: int = NFS3_OK
    answered: bool = True
    executed: bool = True
    seconds: float = 0.0

    def strikes(self, op: str) -> bool:
        if op != self.op or self.times == 0 or (self.until_s is not None and time.monotonic() >= self.until_s):
            return False
        if self.skip > 0:
            self.skip -= 1
            return False
        if self.times is not None:
            self.times -= 1
        return True


class _Service(RpcServer):
    """One port of the NAS, and the RPC programs behind it."""

    def __init__(self, nas: FakeNas, port: int, programs: frozenset[int], idle_limit_s: float | None = None) -> None:
        super().__init__(port=port, idle_limit_s=idle_limit_s)
        self._nas = nas
        self._programs = programs
        self._results: dict[RpcCall, tuple[int, bytes]] = {}  # of calls that are executed and not answered yet
        self.answers = 0

    def _arrived(self, call: RpcCall) -> None:
        if call.program not in self._programs:
            self._results[call] = PROG_UNAVAIL, b""
            self._answer_at(call, 0.0)
            return
        delay_s, result = self._nas.take(call)
        if delay_s is None:
            return
        if result is not None:
            self._results[call] = result
        self._answer_at(call, time.monotonic() + delay_s if delay_s else 0.0)

    def _run_call(self, call: RpcCall) -> tuple[int, bytes]:
        return self._results.pop(call, None) or self._nas.execute(call)

    def _on_the_wire(self, call: RpcCall, message: bytes) -> bytes:
        self.answers += 1
        return self._nas.on_the_wire(call, message)

    def disconnect(self) -> None:
        """Reset all connections."""
        with self._lock:
            self._results.clear()
            self._reset_connections()
        self._wait_for_reset()


class FakeNas:
    """Any thread may use it.

    seed          decides all that is random
    portmap_port  where a portmapper listens; None: nowhere, for the URL has the ports
    """

    def __init__(self, oddities: Oddities | None = None, *, seed: int = 0, portmap_port: int | None = None) -> None:
        self.oddities = oddities or Oddities()
        self.port, self.mount_port = free_ports(2)
        self._portmap_port = portmap_port
        # Services call with their own lock held, and so this one is the inner one: nothing calls a service under it.
        self._lock = threading.RLock()
        self._draw = random.Random(seed)
        self._tree = FileTree()
        self._procedures = Procedures(self._tree, self.oddities, self._draw)
        for export in (*self.oddities.exports, *self.oddities.closed_exports):
            self._tree.make_directories(export)
        self._faults: list[_Fault] = []
        self._mutate: Callable[[NasCall, bytes], bytes | None] | None = None
        self._calls: collections.deque[NasCall] = collections.deque(maxlen=_CALLS_KEPT)
        self._counts: dict[str, int] = {}
        self._answers_before = 0
        self._services: dict[int, _Service] = {}

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for port in list(self._services):
            self._stop(port)

    def url(self, path: str, **params: str | int) -> str:
        """A file's URL; `params` are added and replace what is there."""
        query = {"version": 3, "nfsport": self.port, "mountport": self.mount_port, "uid": 0, "gid": 0, **params}
        return f"nfs://{LOOPBACK}{path}?{urlencode(query)}"

    # Files

    @contextlib.contextmanager
    def files(self) -> Iterator[FileTree]:
        """The tree, while no call is executed."""
        with self._lock:
            yield self._tree

    def add(self, path: str, content: bytes = b"") -> None:
        """A file, with the directories above it."""
        with self._lock:
            self._tree.add(path, content)

    def names(self, directory: str) -> list[str]:
        """What a directory has, in order."""
        with self._lock:
            return sorted(self._node(directory).entries)

    def content(self, path: str) -> bytes:
        """A file as clients see it."""
        with self._lock:
            return bytes(self._node(path).content)

    def on_disk(self, path: str) -> bytes:
        """A file as a crash would leave it."""
        with self._lock:
            return bytes(self._node(path).on_disk)

    def _node(self, path: str) -> Node:
        node = self._tree.find(path)
        assert node is not None, f"there is no {path}"
        return node

    # Starting and stopping

    def start(self, *, mountd: bool = True) -> None:
        """Start what does not run."""
        self._start(self.port, NFS, self.oddities.idle_limit_s)
        if mountd:
            self.start_mountd()
        if self._portmap_port is not None:
            self._start(self._portmap_port, PORTMAP)

    def stop(self) -> None:
        """Power fails: connections are reset, and what was not on disk is lost."""
        for port in list(self._services):
            self._stop(port)
        with self._lock:
            self._tree.crash()
            self._procedures.new_boot()

    def restart(self) -> None:
        """Stop and start at once."""
        self.stop()
        self.start()

    def start_mountd(self) -> None:
        """Start MOUNT where it does not run."""
        self._start(self.mount_port, MOUNT)

    def stop_mountd(self) -> None:
        """MOUNT's port is closed from now on; files are served as before."""
        self._stop(self.mount_port)

    @property
    def mountd_runs(self) -> bool:
        return self.mount_port in self._services

    def disconnect(self) -> None:
        """Reset all connections for files."""
        self._services[self.port].disconnect()

    def expire_handles(self) -> None:
        """Make all file handles issued so far stale."""
        with self._lock:
            self._procedures.expire_handles()

    def become(self, oddities: Oddities) -> None:
        """Be another server from the next call on. `exports`, `idle_limit_s` and `handle_bytes` stay as they are."""
        with self._lock:
            self.oddities = self._procedures.oddities = oddities

    def _start(self, port: int, program: int, idle_limit_s: float | None = None) -> None:
        if port not in self._services:
            service = _Service(self, port, frozenset((program,)), idle_limit_s)
            self._services[port] = service.__enter__()

    def _stop(self, port: int) -> None:
        service = self._services.pop(port, None)
        if service is not None:
            service.__exit__(None, None, None)
            self._answers_before += service.answers

    # Faults

    def fail(self, op: str, status: int, *, times: int | None = None, after: int = 0, seconds: float = 0.0) -> None:
        """Answer with an nfsstat3 and do nothing: `times` calls (None: all) after `after` others, `seconds` long."""
        until_s = time.monotonic() + seconds if seconds else None
        self._add(_Fault(op, after, times, until_s, status))

    def jukebox(self, op: str, *, times: int | None = None, after: int = 0, seconds: float = 0.0) -> None:
        """`fail()` with "try again later"."""
        self.fail(op, NFS3ERR_JUKEBOX, times=times, after=after, seconds=seconds)

    def drop(self, op: str, *, times: int | None = 1, after: int = 0, executed: bool = True) -> None:
        """Do not answer. `executed`: the call is executed all the same."""
        self._add(_Fault(op, after, times, answered=False, executed=executed))

    def delay(self, op: str, seconds: float, *, times: int | None = 1, after: int = 0) -> None:
        """Execute at once, answer so much later."""
        self._add(_Fault(op, after, times, seconds=seconds))

    def mutate(self, change: Callable[[NasCall, bytes], bytes | None] | None) -> None:
        """`change(call, message)` is what goes over TCP, record marks included; None: the answer as it is.

        Called in the servers' threads, one at a time. The message begins with the xid.
        """
        with self._lock:
            self._mutate = change

    def end_faults(self) -> None:
        """No fault is in force any more. Oddities stay."""
        with self._lock:
            self._faults.clear()
            self._mutate = None

    def _add(self, fault: _Fault) -> None:
        assert fault.op in OPS, f"there is no {fault.op}"
        with self._lock:
            self._faults.append(fault)

    # What happened

    def calls(self, *ops: str) -> list[NasCall]:
        """The last calls, up to 100,000, in the order of their arrival: those of `ops`, or all."""
        with self._lock:
            return [call for call in self._calls if not ops or call.op in ops]

    def struck(self, op: str) -> bool:
        """Whether every fault of `op` with a number of times has struck so often."""
        with self._lock:
            return all(not fault.times for fault in self._faults if fault.op == op)

    @property
    def answers(self) -> int:
        """How many answers were sent."""
        return self._answers_before + sum(service.answers for service in list(self._services.values()))

    # For the services, in their threads

    def take(self, call: RpcCall) -> tuple[float | None, tuple[int, bytes] | None]:
        """A new call: in how many seconds it is answered (None: never), and the result if that is known already."""
        with self._lock:
            op = _op(call)
            if op is None:
                return 0.0, None
            self._counts[op] = self._counts.get(op, 0) + 1
            self._calls.append(_described(op, call))
            fault = next((fault for fault in self._faults if fault.strikes(op)), None)
            if fault is None:
                fault = self._oddity(op)
            if fault is None:
                return 0.0, None
            if fault.status != NFS3_OK:
                return 0.0, (SUCCESS, self._procedures.refusal(op, fault.status))
            result = self.execute(call) if fault.executed else None
            return (fault.seconds, result) if fault.answered else (None, None)

    def _oddity(self, op: str) -> _Fault | None:
        every = self.oddities.silent_every.get(op)
        if every is not None and self._counts[op] % every == 0:
            return _Fault(op, 0, 1, answered=False)
        is_nfs = op in _NFS_PROCEDURES and op != "NULL"
        if is_nfs and self.oddities.jukebox_chance and self._draw.random() < self.oddities.jukebox_chance:
            return _Fault(op, 0, 1, status=NFS3ERR_JUKEBOX)
        return None

    def execute(self, call: RpcCall) -> tuple[int, bytes]:
        """accept_stat and the results."""
        if call.program == PORTMAP:
            ports = {(NFS, 3): self.port, (MOUNT, 3): self.mount_port}
            return self._procedures.portmap(call.version, call.procedure, XdrReader(call.arguments), ports)
        if call.version != 3:
            return PROG_MISMATCH, u32(3, 3)
        op = _op(call)
        if op is None:
            return PROC_UNAVAIL, b""
        with self._lock:
            try:
                return SUCCESS, self._procedures.run(op, XdrReader(call.arguments), call.credentials)
            except Refused as refused:
                return SUCCESS, self._procedures.refusal(op, refused.status)
            except NotImplementedError:
                return PROC_UNAVAIL, b""
            except ValueError:
                return GARBAGE_ARGS, b""

    def on_the_wire(self, call: RpcCall, message: bytes) -> bytes:
        """What is sent for an answer."""
        with self._lock:
            if self._mutate is not None:
                changed = self._mutate(_described(_op(call) or "", call), message)
                if changed is not None:
                    return changed
            return fragments(message, self._draw) if self.oddities.in_fragments else record(message)


def fragments(message: bytes, draw: random.Random) -> bytes:
    """A message as several fragments of random sizes."""
    sent = b""
    while message:
        size = min(len(message), draw.choice((4, 24, 100, 1000, 5000, 100_000)))
        sent += u32(size | (LAST_FRAGMENT if size == len(message) else 0)) + message[:size]
        message = message[size:]
    return sent


def _op(call: RpcCall) -> str | None:
    """The procedure's name; None for what there is not."""
    if call.program == PORTMAP:
        return "PORTMAP"
    names = _NFS_PROCEDURES if call.program == NFS else _MOUNT_PROCEDURES
    return names[call.procedure] if call.version == 3 and call.procedure < len(names) else None


def _described(op: str, call: RpcCall) -> NasCall:
    arguments = XdrReader(call.arguments)
    offset = count = 0
    name = ""
    with contextlib.suppress(ValueError):
        if op in ("READ", "WRITE", "COMMIT"):
            arguments.opaque()
            offset, count = arguments.u64(), arguments.u32()
        elif op in ("LOOKUP", "CREATE", "REMOVE", "RENAME"):
            arguments.opaque()
            name = arguments.opaque().decode(errors="replace")
    return NasCall(op, time.monotonic(), offset, count, name, call.connection.client_port)
