# SPDX-License-Identifier: LGPL-2.1-or-later
"""Fault tool: an NFSv3 server with one file in memory and with faults that a test sets.

    with FakeNfsServer(bytes(1 << 20)) as server:
        device = Engine(server.url(), LOOPBACK)
        server.hold("READ")                        # READs wait ...
        server.wait_for(4, timeout_s=10)           # ... until four of them do ...
        server.release()                           # ... and are answered
        server.fail("WRITE", NFS3ERR_NOSPC, times=2)
        server.crash()                             # unstable writes are lost, the verifier changes

It is for faults that a real server shows too rarely. Everything else is tested with Ganesha.
Procedures are named as in RFC 1813: "READ", "WRITE", "COMMIT", "GETATTR", "LOOKUP", "ACCESS", "FSINFO",
"FSSTAT", "PATHCONF", and "MNT" for MOUNT's.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from urllib.parse import urlencode

from support.nfs_server import LOOPBACK
from support.sunrpc import (
    GARBAGE_ARGS,
    PROC_UNAVAIL,
    PROG_UNAVAIL,
    SUCCESS,
    Credentials,
    RpcCall,
    RpcServer,
    XdrReader,
    opaque,
    record,
    u32,
    u64,
)

# nfsstat3 and mountstat3, RFC 1813
NFS3_OK = 0
NFS3ERR_PERM = 1
NFS3ERR_NOENT = 2
NFS3ERR_IO = 5
NFS3ERR_NXIO = 6
NFS3ERR_ACCES = 13
NFS3ERR_INVAL = 22
NFS3ERR_FBIG = 27
NFS3ERR_NOSPC = 28
NFS3ERR_ROFS = 30
NFS3ERR_DQUOT = 69
NFS3ERR_STALE = 70
NFS3ERR_BADHANDLE = 10001
NFS3ERR_SERVERFAULT = 10006
NFS3ERR_JUKEBOX = 10008

# stable_how
UNSTABLE, DATA_SYNC, FILE_SYNC = 0, 1, 2

MOUNT_PROGRAM = 100005
_PROCEDURES = {
    100003: {
        0: "NULL",
        1: "GETATTR",
        3: "LOOKUP",
        4: "ACCESS",
        6: "READ",
        7: "WRITE",
        18: "FSSTAT",
        19: "FSINFO",
        20: "PATHCONF",
        21: "COMMIT",
    },
    MOUNT_PROGRAM: {0: "NULL", 1: "MNT", 3: "UMNT", 5: "EXPORT"},
}
_NO_ATTRIBUTES = u32(0)
_NO_WCC = u32(0, 0)
# What follows the status in a failed answer.
_AFTER_FAILURE = {
    **dict.fromkeys(("LOOKUP", "ACCESS", "READ", "FSSTAT", "FSINFO", "PATHCONF"), _NO_ATTRIBUTES),
    **dict.fromkeys(("WRITE", "COMMIT"), _NO_WCC),
}
_REGULAR, _DIRECTORY = 1, 2
MIB = 1 << 20


def _put(file: bytearray, offset: int, data: bytes | bytearray) -> None:
    """As pwrite(2): a gap between the end and a later offset is filled with zeros."""
    file.extend(bytes(max(0, offset - len(file))))
    file[offset : offset + len(data)] = data


@dataclasses.dataclass(frozen=True)
class Call:
    """A call that arrived. Offset, count and stable are 0 where the procedure has none.

    The xid, the connection's number, its client's port and the credentials do not count in comparisons.
    """

    op: str
    offset: int = 0
    count: int = 0
    stable: int = 0
    xid: int = dataclasses.field(default=0, compare=False)
    connection: int = dataclasses.field(default=0, compare=False)
    client_port: int = dataclasses.field(default=0, compare=False)
    credentials: Credentials | None = dataclasses.field(default=None, compare=False)


@dataclasses.dataclass
class _Faults:
    """What one procedure does wrong. Guarded by the server's lock."""

    delay_s: float = 0.0
    statuses: list[int] = dataclasses.field(default_factory=list)  # of the next calls
    status: int = NFS3_OK  # of all calls after those
    limit_bytes: int | None = None
    claimed_count: int | None = None
    claimed_stable: int | None = None
    mangle: Callable[[bytes], bytes] | None = None
    rewrite: Callable[[bytes], bytes] | None = None
    rewritten_times: int | None = None
    held: bool = False
    held_after: bool = False
    held_times: int | None = None


@dataclasses.dataclass(frozen=True)
class WriteStep:
    """How one WRITE is carried out. With `restarts`, the server has restarted just before, and its connections live.

    count_bytes  it moves that many bytes at most; None: all
    stable       it does and claims this, or what was asked for where that is more
    """

    count_bytes: int | None = None
    stable: int = UNSTABLE
    restarts: bool = False


class _Refused(Exception):
    """A procedure's status is not NFS3_OK."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class FakeNfsServer(RpcServer):
    """Fault tool: NFSv3 and MOUNT on one port, one export, one file. Any thread may use it.

    content     the file
    path        the file's path; its directories are there too
    export      the directory that may be mounted; by default the file's
    rtmax, wtmax  the most bytes that a READ and a WRITE may move, as FSINFO reports
    narrow      as RpcServer
    exports     what MOUNT's EXPORT lists

    `lying` may be set at any time: an "async" export. Data written or committed meanwhile never reaches the disk.
    """

    def __init__(
        self,
        content: bytes,
        *,
        path: str = "/export/swap",
        export: str | None = None,
        rtmax: int = 1 << 20,
        wtmax: int = 1 << 20,
        narrow: bool = False,
        exports: Sequence[str] = (),
    ) -> None:
        super().__init__(narrow=narrow)
        self._exports = exports
        self._path = path
        self._mountable = path.rpartition("/")[0] if export is None else export
        self._rtmax, self._wtmax = rtmax, wtmax
        self._refuse_larger: int | None = None
        self._has_mountd = True
        self._fileid = 1000
        self._generation = 1  # of the file handles: one that has another is stale
        self._content = bytearray(content)  # as clients see it
        self._on_disk = bytearray(content)  # as it is after a crash
        self._unstable: list[tuple[int, int]] = []  # offset and length of what a COMMIT brings to the disk
        self._verifier = 1
        self.lying = False
        self._write_steps: list[WriteStep] = []
        self._claimed_size: int | None = None
        self._calls: list[Call] = []
        self._faults: dict[str, _Faults] = {}
        self._held: list[tuple[RpcCall, bytes | None]] = []  # with the answer, where the work is done
        self._changed = threading.Condition(self._lock)  # a call was held

    def url(self, **params: str | int) -> str:
        """The file's URL; `params` are added and replace what is there: `url(nfsport=proxy.port)`."""
        query = {"version": 3, "nfsport": self.port, "mountport": self.port, **params}
        return f"nfs://{LOOPBACK}{self._path}?{urlencode(query)}"

    # Faults

    def delay(self, op: str, seconds: float) -> None:
        """Execute and answer every call of `op` this much later; calls do not wait for each other."""
        with self._lock:
            self._of(op).delay_s = seconds

    def fail(self, op: str, status: int, times: int | None = None) -> None:
        """The next `times` calls of `op`, or all of them, are answered with an nfsstat3 and do nothing."""
        with self._lock:
            if times is None:
                self._of(op).status = status
            else:
                self._of(op).statuses += [status] * times

    def limit(self, op: str, count: int | None) -> None:
        """READ or WRITE moves `count` bytes at most; None: as many as asked for."""
        with self._lock:
            self._of(op).limit_bytes = count

    def claim_count(self, op: str, count: int | None) -> None:
        """READ or WRITE claims to have moved `count` bytes, whatever was asked; None: the truth.

        READ's answer has that many bytes, up to a MiB.
        """
        with self._lock:
            self._of(op).claimed_count = count

    def claim_stable(self, stable: int | None) -> None:
        """WRITE claims to have written `stable` (UNSTABLE, ...), whatever it did; None: the truth."""
        with self._lock:
            self._of("WRITE").claimed_stable = stable

    def claim_size(self, size_bytes: int | None) -> None:
        """Attributes say that the file has `size_bytes`; None: the truth."""
        with self._lock:
            self._claimed_size = size_bytes

    def script_writes(self, steps: Iterable[WriteStep]) -> None:
        """The next WRITEs are carried out like this, one step each, and those after them as ever."""
        with self._lock:
            self._write_steps = list(steps)

    def mangle(self, op: str, change: Callable[[bytes], bytes] | None) -> None:
        """The results of `op`, from the status on, go through `change`; None: as they are."""
        with self._lock:
            self._of(op).mangle = change

    def rewrite(self, op: str, change: Callable[[bytes], bytes] | None, times: int | None = None) -> None:
        """Of an answer to `op`, or of the next `times`, `change(message)` is sent; None: the message as it is.

        The message begins with the xid. What is sent is to begin with a record mark: `sunrpc.record(message)`.
        """
        with self._lock:
            self._of(op).rewrite, self._of(op).rewritten_times = change, times

    def send_in_pieces(self, sizes: Iterable[int] | None) -> None:
        """Send in pieces of these sizes from now on, each piece when the client has read the one before.

        Without further sizes, and with None, there are no pieces.
        """
        with self._lock:
            self._piece_sizes = None if sizes is None else iter(sizes)

    def receive(self, count: int | None) -> None:
        """Receive `count` more bytes and then nothing; None: everything."""
        with self._lock:
            self._may_receive_bytes = count
        self._wake()

    @property
    def has_received(self) -> bool:
        """Whether as many bytes have arrived as `receive()` allows."""
        with self._lock:
            return self._may_receive_bytes == 0

    def hold(self, op: str, *, after: bool = False, times: int | None = None) -> None:
        """Calls of `op`, or the next `times` of them, wait until `release()`.

        With `after`, the call is executed when it arrives, and only its answer waits.
        """
        with self._lock:
            faults = self._of(op)
            faults.held, faults.held_after, faults.held_times = not after, after, times

    def wait_for(self, count: int, timeout_s: float) -> None:
        """Wait until `count` calls are held. AssertionError when they are not within `timeout_s`."""
        with self._lock:
            if not self._changed.wait_for(lambda: len(self._held) >= count, timeout_s):
                raise AssertionError(f"{len(self._held)} calls are held after {timeout_s} s, not {count}")

    @property
    def held_count(self) -> int:
        """How many calls are held now."""
        with self._lock:
            return len(self._held)

    def release(self, *, reverse: bool = False, order: Sequence[int] | None = None) -> None:
        """Answer the held calls, the last to arrive first if `reverse`, and hold no more.

        `order` lists places in the order of arrival: of the call answered first, second, ...
        """
        with self._lock:
            for faults in self._faults.values():
                faults.held = faults.held_after = False
                faults.held_times = None
            if order is None:
                order = range(len(self._held))[:: -1 if reverse else 1]
            for call, answer in [self._held[place] for place in order]:
                if answer is None:
                    self._answer_at(call, time.monotonic())
                else:
                    self._send_reply(call, SUCCESS, answer)
            self._held.clear()
        self._wake()

    def answer_held(self, count: int | None = None) -> None:
        """Answer the calls that are held now, or the first `count` of them. Others are held as before."""
        with self._lock:
            for call, answer in self._held[:count]:
                if answer is None:
                    self._answer_at(call, time.monotonic())
                else:
                    self._send_reply(call, SUCCESS, answer)
            del self._held[:count]
        self._wake()

    def crash(self) -> None:
        """Power fails and returns: data not on disk is lost, connections are reset, the write verifier changes."""
        with self._lock:
            self._restart()
            self._held.clear()
            self._reset_connections()
        self._wait_for_reset()

    def _restart(self) -> None:
        self._content = self._on_disk.copy()
        self._unstable.clear()
        self._verifier += 1

    def disconnect(self) -> None:
        """Reset the connections. Held calls stay: when released they are executed, and their answers are dropped."""
        with self._lock:
            self._reset_connections()
        self._wait_for_reset()

    def expire_handles(self) -> None:
        """Make every file handle issued so far stale. The file stays the same."""
        with self._lock:
            self._generation += 1

    def replace(self, content: bytes, fileid: int) -> None:
        """Put another file under the name, or the same one if `fileid` is the old one. Every handle is stale."""
        with self._lock:
            self._fileid = fileid
            self._generation += 1
            self._content, self._on_disk = bytearray(content), bytearray(content)

    def shrink_transfers(self, limit_bytes: int, refuse: int | None = None) -> None:
        """From now on FSINFO says that READ and WRITE may move this much.

        A call for more is answered with the nfsstat3 `refuse`; None: it moves less.
        """
        with self._lock:
            self._rtmax = self._wtmax = limit_bytes
            self._refuse_larger = refuse

    def rename(self, path: str) -> None:
        """The file has another name now, in the same directory; its handle stays."""
        with self._lock:
            self._path = path

    def stop_mounting(self) -> None:
        """mountd is dead: a connection over which MOUNT is called is reset."""
        with self._lock:
            self._has_mountd = False

    # The file and the log

    @property
    def fileid(self) -> int:
        """The file's number, which is its identity."""
        with self._lock:
            return self._fileid

    @property
    def content(self) -> bytes:
        """The file as clients see it."""
        with self._lock:
            return bytes(self._content)

    @content.setter
    def content(self, content: bytes) -> None:
        with self._lock:
            self._content, self._on_disk = bytearray(content), bytearray(content)

    def overwrite(self, offset: int, data: bytes) -> None:
        """Bytes of the file change behind the clients' backs."""
        with self._lock:
            _put(self._content, offset, data)
            _put(self._on_disk, offset, data)

    @property
    def on_disk(self) -> bytes:
        """The file as it would be after a crash."""
        with self._lock:
            return bytes(self._on_disk)

    def calls(self, *ops: str) -> list[Call]:
        """The calls so far, in the order of their arrival: those of `ops`, or all."""
        with self._lock:
            return [call for call in self._calls if not ops or call.op in ops]

    # The thread: from a call to its answer

    def _of(self, op: str) -> _Faults:
        assert any(op in names.values() for names in _PROCEDURES.values()), f"there is no {op}"
        return self._faults.setdefault(op, _Faults())

    def _op(self, call: RpcCall) -> str | None:
        return _PROCEDURES.get(call.program, {}).get(call.procedure) if call.version == 3 else None

    def _arrived(self, call: RpcCall) -> None:
        op = self._op(call)
        if call.program == MOUNT_PROGRAM and not self._has_mountd:
            self._drop(call.connection)
            return
        if op is None:
            self._answer_at(call, 0.0)
            return
        self._calls.append(self._describe(op, call))
        faults = self._of(op)
        if (faults.held or faults.held_after) and faults.held_times != 0:
            if faults.held_times is not None:
                faults.held_times -= 1
            self._held.append((call, None if faults.held else self._run_call(call)[1]))
            self._changed.notify_all()
        else:
            self._answer_at(call, time.monotonic() + faults.delay_s)

    def _describe(self, op: str, call: RpcCall) -> Call:
        caller = (call.xid, call.connection.number, call.connection.client_port, call.credentials)
        if op not in ("READ", "WRITE", "COMMIT"):
            return Call(op, 0, 0, 0, *caller)
        arguments = XdrReader(call.arguments)
        arguments.opaque()
        return Call(op, arguments.u64(), arguments.u32(), arguments.u32() if op == "WRITE" else 0, *caller)

    def _on_the_wire(self, call: RpcCall, message: bytes) -> bytes:
        faults = self._of(self._op(call) or "NULL")
        if faults.rewrite is None or faults.rewritten_times == 0:
            return record(message)
        if faults.rewritten_times is not None:
            faults.rewritten_times -= 1
        return faults.rewrite(message)

    def _run_call(self, call: RpcCall) -> tuple[int, bytes]:
        op = self._op(call)
        if op is None:
            return (PROC_UNAVAIL if call.program in _PROCEDURES else PROG_UNAVAIL), b""
        faults = self._of(op)
        try:
            status = faults.statuses.pop(0) if faults.statuses else faults.status
            if status != NFS3_OK:
                raise _Refused(status)
            result = getattr(self, f"_{op.lower()}")(XdrReader(call.arguments))
        except _Refused as refused:
            result = u32(refused.status) + _AFTER_FAILURE.get(op, b"")
        except ValueError:
            return GARBAGE_ARGS, b""
        return SUCCESS, faults.mangle(result) if faults.mangle else result

    # Handles and attributes

    def _handle(self, path: str) -> bytes:
        if path == self._path:
            return b"f" + u64(self._fileid, self._generation)
        return b"d" + path.encode()

    def _path_of(self, handle: bytes) -> str:
        """The path behind a handle. _Refused when it is stale."""
        if handle.startswith(b"d"):
            return handle[1:].decode()
        if handle != self._handle(self._path):
            raise _Refused(NFS3ERR_STALE)
        return self._path

    def _attributes(self, path: str) -> bytes:
        """fattr3"""
        is_file = path == self._path
        size = 4096 if not is_file else len(self._content) if self._claimed_size is None else self._claimed_size
        return (
            u32(_REGULAR if is_file else _DIRECTORY, 0o600 if is_file else 0o755, 1, 0, 0)
            + u64(size, size)
            + u32(0, 0)
            + u64(1, self._fileid if is_file else len(path))
            + u32(0, 0) * 3
        )

    def _post_op(self, path: str) -> bytes:
        return u32(1) + self._attributes(path)

    # Procedures: the arguments in, the result from the status on out

    def _null(self, arguments: XdrReader) -> bytes:
        return b""

    _umnt = _null

    def _export(self, arguments: XdrReader) -> bytes:
        return b"".join(u32(1) + opaque(export.encode()) + u32(0) for export in self._exports) + u32(0)

    def _mnt(self, arguments: XdrReader) -> bytes:
        path = arguments.opaque().decode()
        if (path.rstrip("/") or path) != (self._mountable.rstrip("/") or "/"):
            raise _Refused(NFS3ERR_ACCES)
        return u32(NFS3_OK) + opaque(self._handle(path.rstrip("/"))) + u32(1, 1)  # one flavour, AUTH_SYS

    def _getattr(self, arguments: XdrReader) -> bytes:
        return u32(NFS3_OK) + self._attributes(self._path_of(arguments.opaque()))

    def _lookup(self, arguments: XdrReader) -> bytes:
        directory = self._path_of(arguments.opaque())
        name = arguments.opaque().decode()
        path = f"{directory}/{name}" if name not in (".", "") else directory
        if not f"{self._path}/".startswith(f"{path}/"):
            raise _Refused(NFS3ERR_NOENT)
        return u32(NFS3_OK) + opaque(self._handle(path)) + self._post_op(path) + self._post_op(directory)

    def _access(self, arguments: XdrReader) -> bytes:
        path = self._path_of(arguments.opaque())
        return u32(NFS3_OK) + self._post_op(path) + u32(arguments.u32())

    def _read(self, arguments: XdrReader) -> bytes:
        path = self._path_of(arguments.opaque())
        offset, count = arguments.u64(), arguments.u32()
        if count > self._rtmax and self._refuse_larger is not None:
            raise _Refused(self._refuse_larger)
        count = min(count, self._rtmax)
        faults = self._of("READ")
        count = count if faults.limit_bytes is None else min(count, faults.limit_bytes)
        data = bytes(self._content[offset : offset + count])
        at_end = offset + len(data) >= len(self._content)
        if faults.claimed_count is not None:
            data = data.ljust(min(faults.claimed_count, MIB), b"?")
        claim = len(data) if faults.claimed_count is None else faults.claimed_count
        return u32(NFS3_OK) + self._post_op(path) + u32(claim, at_end) + opaque(data)

    def _write(self, arguments: XdrReader) -> bytes:
        self._path_of(arguments.opaque())
        offset, _, stable, data = arguments.u64(), arguments.u32(), arguments.u32(), arguments.opaque()
        if len(data) > self._wtmax and self._refuse_larger is not None:
            raise _Refused(self._refuse_larger)
        faults = self._of("WRITE")
        step = self._write_steps.pop(0) if self._write_steps else WriteStep()
        if step.restarts:
            self._restart()
        stable = max(stable, step.stable)
        data = data[: step.count_bytes]
        data = data[: self._wtmax if faults.limit_bytes is None else min(faults.limit_bytes, self._wtmax)]
        before = u32(1) + u64(len(self._content)) + u32(0, 0, 0, 0)
        _put(self._content, offset, data)
        if not self.lying:
            self._unstable.append((offset, len(data)))
            if stable == FILE_SYNC:  # DATA_SYNC may need a COMMIT for the file's size and blocks
                self._make_stable(self._unstable.pop())
        claim = len(data) if faults.claimed_count is None else faults.claimed_count
        stable = stable if faults.claimed_stable is None else faults.claimed_stable
        return u32(NFS3_OK) + before + _NO_ATTRIBUTES + u32(claim, stable) + u64(self._verifier)

    def _commit(self, arguments: XdrReader) -> bytes:
        self._path_of(arguments.opaque())
        while self._unstable:
            written = self._unstable.pop()
            if not self.lying:
                self._make_stable(written)
        return u32(NFS3_OK) + _NO_WCC + u64(self._verifier)

    def _make_stable(self, written: tuple[int, int]) -> None:
        offset, length = written
        _put(self._on_disk, offset, self._content[offset : offset + length])

    def _fsstat(self, arguments: XdrReader) -> bytes:
        path = self._path_of(arguments.opaque())
        return u32(NFS3_OK) + self._post_op(path) + u64(*[1 << 40] * 6) + u32(0)

    def _fsinfo(self, arguments: XdrReader) -> bytes:
        path = self._path_of(arguments.opaque())
        sizes = u32(self._rtmax, self._rtmax, 1, self._wtmax, self._wtmax, 1, 4096)
        return u32(NFS3_OK) + self._post_op(path) + sizes + u64(1 << 50) + u32(0, 1, 0x1B)

    def _pathconf(self, arguments: XdrReader) -> bytes:
        path = self._path_of(arguments.opaque())
        return u32(NFS3_OK) + self._post_op(path) + u32(1024, 255, 1, 1, 0, 1)
