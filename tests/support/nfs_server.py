# SPDX-License-Identifier: LGPL-2.1-or-later
"""A throwaway NFS-Ganesha on loopback, and the faults of a NAS: it stops, dies, hangs and returns.

An ordinary process with its own ports, log and state directory, not a system service; NFSv3 and NFSv4 over TCP.
It must run as root: FSAL VFS opens files by handle (CAP_DAC_READ_SEARCH), and rpcbind binds port 111.
"""

from __future__ import annotations

import atexit
import collections
import dataclasses
import os
import random
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Literal
from urllib.parse import urlencode

from nbdnfs import programs
from nbdnfs.errors import UnavailableError

LOOPBACK = "127.0.0.1"

# RPC program numbers, /etc/rpc
_PORTMAPPER = 100000
_NFS = 100003
_MOUNT = 100005
_RPCBIND_PORT = 111

_START_DEADLINE_S = 30.0
_STOP_DEADLINE_S = 15.0
_POLL_S = 0.02
_REGISTRATION_ATTEMPTS = 10
_REGISTRATION_PAUSE_S = 0.1
_LOG_TAIL_LINES = 15

# Below net.ipv4.ip_local_port_range (32768-60999): while the server is stopped, no outgoing connection can take its
# ports, so that it can return on them.
_PORT_RANGE = range(20000, 32000)
_BLOCK_PORTS = 500
_BLOCKS_MAX = 4


class ServerError(RuntimeError):
    """The server, or a program that it needs, does not run. The text has the end of its log."""


def program(name: str, package: str) -> str:
    """As programs.find_program, with a ServerError that names the Debian package."""
    try:
        return programs.find_program(name, package)
    except UnavailableError as error:
        raise ServerError(f"{error.message}: {error.hint}") from None


def environment() -> dict[str, str]:
    """The environment of programs that are not under test: without a sanitizer that is preloaded for the tests."""
    return {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}


def rpc_null_answers(port: int, rpc_program: int, version: int, timeout_s: float = 1.0) -> bool:
    """Whether the NULL procedure of an RPC program answers on a TCP port of loopback.

    A connection alone proves little: the kernel accepts it before the program serves. RFC 5531.
    """
    xid = random.getrandbits(31)
    # message type CALL, RPC version 2, procedure 0, and no credentials or verifier
    call = struct.pack(">10I", xid, 0, 2, rpc_program, version, 0, 0, 0, 0, 0)
    try:
        with socket.create_connection((LOOPBACK, port), timeout=timeout_s) as connection:
            connection.sendall(struct.pack(">I", 0x8000_0000 | len(call)) + call)
            reply = b""
            while len(reply) < 28:
                received = connection.recv(4096)
                if not received:
                    return False
                reply += received
    except OSError:
        return False
    _, reply_xid, message_type, reply_stat, _, _, accept_stat = struct.unpack(">7I", reply[:28])
    return (reply_xid, message_type, reply_stat, accept_stat) == (xid, 1, 0, 0)


def ensure_rpcbind(pid_file: Path) -> None:
    """Start rpcbind when none answers on port 111, and leave it running; its pid goes to `pid_file`.

    Ganesha registers NFSv3 and MOUNT with it, and exits when it cannot. No client asks it for a port.
    """
    if rpc_null_answers(_RPCBIND_PORT, _PORTMAPPER, 2):
        return
    rpcbind = program("rpcbind", "rpcbind")
    script = 'setsid "$1" -w -f </dev/null >/dev/null 2>&1 & echo $!'
    started = subprocess.run(
        ["/bin/sh", "-c", script, "sh", rpcbind], check=True, capture_output=True, timeout=10, env=environment()
    )
    pid_file.write_bytes(started.stdout)
    deadline = time.monotonic() + 10
    while not rpc_null_answers(_RPCBIND_PORT, _PORTMAPPER, 2):
        if time.monotonic() > deadline:
            raise ServerError("rpcbind does not answer on port 111 (it needs root)")
        time.sleep(_POLL_S)


# The ports of this process, in blocks, each with the abstract Unix socket that it holds as long as it lives: a port
# that nothing listens on yet, or just now, is not given to another process of the tests. Within a process, a port comes
# again after all others.
_ports_lock = threading.Lock()  # of _ports
_ports: collections.deque[int] = collections.deque()


def _claim_block() -> None:
    for first in random.sample(_PORT_RANGE[::_BLOCK_PORTS], len(_PORT_RANGE) // _BLOCK_PORTS):
        claim = socket.socket(socket.AF_UNIX)
        try:
            claim.bind(f"\0nbdnfs-tests-ports-{first}")
        except OSError:
            claim.close()
            continue
        atexit.register(claim.close)
        _ports.extendleft(reversed(range(first, first + _BLOCK_PORTS)))
        return
    raise ServerError("no free TCP ports")


def free_ports(count: int, address: str = LOOPBACK) -> list[int]:
    """Unused TCP ports of `address`."""
    found: list[int] = []
    with _ports_lock:
        for _ in range(_BLOCKS_MAX):
            for _ in range(len(_ports)):
                _ports.rotate(-1)
                if _is_unused(_ports[-1], address):
                    found.append(_ports[-1])
                if len(found) == count:
                    return found
            _claim_block()
    raise ServerError("no free TCP ports")


def _is_unused(port: int, address: str) -> bool:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((address, port))
        except OSError:
            return False
    return True


# The kernel signals a child when the *thread* that started it ends (prctl(2), PR_SET_PDEATHSIG), and a test
# may restart a server in a thread that ends soon. This thread lives as long as the process and starts them.
_spawner = ThreadPoolExecutor(1, "ganesha-spawner")


def _spawn(argv: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start a program that is killed when this process ends, however that happens, SIGKILL included."""
    return _spawner.submit(
        subprocess.Popen,
        [program("setpriv", "util-linux"), "--pdeathsig", "KILL", *argv],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment(),
        start_new_session=True,
    ).result(_START_DEADLINE_S)


class Ganesha:
    """One NFS server with one export; `with Ganesha(workdir) as server:` starts it and ends it.

    Everything it writes lies below `workdir`: `export/` (unless `export` names another directory, for example
    a small file system of the caller's), `ganesha.log`, `ganesha.conf` and `state/`. Its ports stay the same
    for as long as the object lives, whatever happens to the process. It dies with its starter.

    squash       "none": a client's uid 0 stays root; "root": it becomes uid 65534; "all": every uid does
    access       "RW" or "RO"
    protocols    NFS versions; 4 means 4.0, 4.1 and 4.2
    lease_s      NFSv4 lease time
    grace_s      NFSv4 grace period after a start; 0: none
    attr_cache_s how long the server trusts attributes and names that it has seen. 0, so that what a test does
                 to the files behind its back is seen at once; its own default is 60.

    Not thread-safe, but any thread may use it, one at a time.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        export: Path | None = None,
        squash: Literal["none", "root", "all"] = "none",
        access: Literal["RW", "RO"] = "RW",
        protocols: Sequence[int] = (3, 4),
        lease_s: int = 60,
        grace_s: int = 0,
        attr_cache_s: int = 0,
        bind_address: str = LOOPBACK,
    ) -> None:
        self.workdir = workdir.resolve()
        self.export_path = (export or workdir / "export").resolve()
        self.log_path = self.workdir / "ganesha.log"
        self.nfs_port, self.mount_port = free_ports(2, bind_address)
        self._squash = squash
        self._access = access
        self._protocols = tuple(protocols)
        self._lease_s = lease_s
        self._grace_s = grace_s
        self._attr_cache_s = attr_cache_s
        self._bind_address = bind_address
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Ganesha:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def url(self, name: str, version: int = 3, **params: str | int) -> str:
        """The libnfs URL of a file of the export. The path is the same in both versions.

        `params` are added, and replace what is there: `url("swap0", nfsport=proxy.port)` takes a proxy's way.
        """
        query: dict[str, str | int] = {"version": version, "nfsport": self.nfs_port}
        if version == 3:
            query["mountport"] = self.mount_port
        return f"nfs://{LOOPBACK}{self.export_path}/{name}?{urlencode({**query, **params})}"

    @property
    def pid(self) -> int:
        """The server's process. ServerError when it does not run."""
        if self._process is None:
            raise ServerError("the server is not running")
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether there is a process, paused or not."""
        return self._process is not None and self._process.poll() is None

    def start(self, deadline_s: float = _START_DEADLINE_S) -> None:
        """Start the server and wait until NFS and MOUNT answer.

        ServerError with the end of the log when it does not come up within `deadline_s`. Another Ganesha that
        starts at the same moment may take this one's registrations at rpcbind, on which it gives up: it is
        started again then.
        """
        if self.is_running:
            raise ServerError("the server is already running")
        if os.geteuid() != 0:
            raise ServerError("ganesha.nfsd opens files by handle, which needs root")
        for directory in (self.workdir / "state", self.export_path):
            directory.mkdir(parents=True, exist_ok=True)
        if 3 in self._protocols:
            ensure_rpcbind(self.workdir / "rpcbind.pid")
        (self.workdir / "ganesha.conf").write_text(self._config())
        deadline = time.monotonic() + deadline_s
        for attempts_left in reversed(range(_REGISTRATION_ATTEMPTS)):
            if self._start_once(deadline, may_try_again=attempts_left > 0):
                return
            time.sleep(_REGISTRATION_PAUSE_S)

    def _start_once(self, deadline: float, *, may_try_again: bool) -> bool:
        """True: it answers. False: it ended for a passing reason. ServerError: it cannot run."""
        log_start = self.log_path.stat().st_size if self.log_path.exists() else 0
        self._process = _spawn(
            [
                program("ganesha.nfsd", "nfs-ganesha nfs-ganesha-vfs"),
                *("-F", "-f", str(self.workdir / "ganesha.conf")),
                *("-L", str(self.log_path), "-p", str(self.workdir / "ganesha.pid")),
            ]
        )
        # Services answer before they are registered, and a failed registration still ends the server.
        while not (self._answers() and "NFS SERVER INITIALIZED" in self._log_since(log_start)):
            status = self._process.poll()
            if status is not None:
                if may_try_again and "Cannot register" in self._log_since(log_start):
                    return False
                raise ServerError(f"ganesha.nfsd ended with status {status}\n{self.log_tail()}")
            if time.monotonic() > deadline:
                self.kill()
                raise ServerError(f"ganesha.nfsd does not answer\n{self.log_tail()}")
            time.sleep(_POLL_S)
        # With an export that it cannot use, the server runs all the same.
        complaints = self._log_since(log_start)
        if "(EXPORT)" in complaints:
            self.kill()
            critical = [line for line in complaints.splitlines() if ":CRIT :" in line or ":MAJ :" in line]
            raise ServerError("\n".join([f"ganesha.nfsd cannot export {self.export_path}", *critical]))
        return True

    def _answers(self) -> bool:
        return all(
            rpc_null_answers(port, rpc_program, version)
            for port, rpc_program, version, protocol in (
                (self.nfs_port, _NFS, 3, 3),
                (self.mount_port, _MOUNT, 3, 3),
                (self.nfs_port, _NFS, 4, 4),
            )
            if protocol in self._protocols
        )

    def stop(self) -> None:
        """End the server with SIGTERM (a paused one too), and wait for it.

        Nothing happens if it was stopped or killed before; ServerError if it ended by itself.
        """
        if self._process is None:
            return
        process, self._process = self._process, None
        status = process.poll()
        if status is not None:
            raise ServerError(f"ganesha.nfsd ended by itself with status {status}\n{self.log_tail()}")
        process.terminate()
        process.send_signal(signal.SIGCONT)
        try:
            process.wait(_STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(_STOP_DEADLINE_S)

    def kill(self) -> None:
        """SIGKILL, as when the NAS loses power; but data in the kernel's page cache survives."""
        os.kill(self.pid, signal.SIGKILL)
        assert self._process is not None
        self._process.wait(_STOP_DEADLINE_S)
        self._process = None

    def restart(self) -> None:
        """Stop and start."""
        self.stop()
        self.start()

    def pause(self) -> None:
        """SIGSTOP: connections stay up, TCP acknowledges, no reply comes. Returns when all threads have stopped."""
        os.kill(self.pid, signal.SIGSTOP)
        deadline = time.monotonic() + _STOP_DEADLINE_S
        while os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOHANG) is None:
            if time.monotonic() > deadline:
                raise ServerError("the server does not stop on SIGSTOP")
            time.sleep(0.001)

    def resume(self) -> None:
        """SIGCONT: it goes on with the requests that have arrived."""
        os.kill(self.pid, signal.SIGCONT)

    def log_tail(self) -> str:
        """The last lines of the server's log."""
        if not self.log_path.exists():
            return f"(no {self.log_path})"
        lines = self.log_path.read_text(errors="replace").splitlines()
        return "\n".join(lines[-_LOG_TAIL_LINES:])

    def _log_since(self, offset: int) -> str:
        if not self.log_path.exists():
            return ""
        with self.log_path.open("rb") as log:
            log.seek(offset)
            return log.read().decode(errors="replace")

    def _config(self) -> str:
        protocols = ",".join(str(version) for version in self._protocols)
        squash = {"none": "No_Root_Squash", "root": "Root_Squash", "all": "All_Squash"}[self._squash]
        # allow_set_io_flusher_fail: Ganesha 6 wants CAP_SYS_RESOURCE otherwise; older ones ignore the line.
        # mount_path_pseudo: NFSv3 mounts and NFSv4 paths are then the same text, so one URL serves both.
        return f"""\
NFS_CORE_PARAM {{
    NFS_Port = {self.nfs_port};
    MNT_Port = {self.mount_port};
    Bind_addr = {self._bind_address};
    Protocols = {protocols};
    Enable_NLM = false;
    Enable_RQUOTA = false;
    Enable_UDP = false;
    allow_set_io_flusher_fail = true;
    mount_path_pseudo = true;
}}
NFSv4 {{
    Lease_Lifetime = {self._lease_s};
    Graceless = {"false" if self._grace_s else "true"};
    Grace_Period = {self._grace_s or 1};
    Minor_Versions = 0,1,2;
    RecoveryRoot = "{self.workdir / "state"}";
    IdmapConf = "{self.workdir / "state" / "idmapd.conf"}";
    Only_Numeric_Owners = true;
}}
NFS_KRB5 {{
    Active_krb5 = false;
    CCacheDir = "{self.workdir / "state"}";
}}
EXPORT {{
    Export_Id = 1;
    Path = "{self.export_path}";
    Pseudo = "{self.export_path}";
    Access_Type = {self._access};
    Squash = {squash};
    Anonymous_Uid = 65534;
    Anonymous_Gid = 65534;
    SecType = sys;
    Protocols = {protocols};
    Transports = TCP;
    Attr_Expiration_Time = {self._attr_cache_s};
    FSAL {{ Name = VFS; }}
}}
MDCACHE {{
    Dir_Chunk = {128 if self._attr_cache_s else 0};
}}
LOG {{
    Default_Log_Level = EVENT;
}}
"""


@dataclasses.dataclass(frozen=True)
class FileOnServer:
    """A file of an export: its URL for clients, and its path behind the server's back."""

    server: Ganesha
    name: str
    size_bytes: int

    @property
    def path(self) -> Path:
        return self.server.export_path / self.name

    def url(self, version: int = 3, **params: str | int) -> str:
        """As Ganesha.url."""
        return self.server.url(self.name, version, **params)
