# SPDX-License-Identifier: LGPL-2.1-or-later
"""Acts of an administrator, and a model of what each must come to.

An act does something to the guest, and to the model what should follow. `Run` chooses them, and looks at the guest
until it agrees with the model or a deadline passes.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from support.nfs_server import Ganesha

from vmtest import host
from vmtest.guest import Guest, GuestJob, seen_from_guest
from vmtest.image import Image
from vmtest.journal import keep_on_disk
from vmtest.machine import Result
from vmtest.observed import NAME, TOP, UNIT, Observed, contradictions, look
from vmtest.outcome import GuestFailedError, LostGuestError

DEVICE_MIB = 48
LOAD_MIB = 24
# memory.high of the load's cgroup, not memory.max: nothing is killed for it.
HIGH_MIB = 12
_CGROUP = "/sys/fs/cgroup/load"
_CONFIG = f"/etc/nbdnfs/{NAME}.toml"
_ENOUGH = "/run/enough"
# An emulated CPU on a busy machine: a start of the unit has taken three minutes.
_SETTLE_S = 300.0
_COMMAND_S = 300.0
_PAUSE_S = 5.0
# systemd's words for a unit that is on its way to another state.
_PASSING = frozenset({"activating", "deactivating", "reloading"})

_BROKEN = ("url = nfs://", 'size = "1G"', 'url = "nfs://10.0.2.2/a/b"\nno_such_key = 1', "\\377\\376")


@dataclass
class Model:
    """What must hold. None: either.

    config    "good", "bad" or "missing"
    attached  our device is there
    swap      it is swap itself
    top       another device lies on it, and is swap
    keeper    one runs
    """

    config: str = "good"
    attached: bool | None = False
    swap: bool | None = False
    top: bool = False
    keeper: bool | None = False

    def wanted_up(self) -> None:
        """What a start comes to, and a restart."""
        if self.config == "good" or self.attached:
            self.keeper = True
        if self.config == "good" and not self.top:
            self.attached = self.swap = True
        elif self.attached and not self.swap and not self.top:
            self.swap = None  # with what was configured before, or not

    def wanted_down(self, *, is_refused: bool) -> None:
        """What a stop comes to. It is refused where another device lies on ours, and where the load has no room: then
        the keeper stays, or systemd starts it again."""
        if not self.top and not is_refused:
            self.attached = self.swap = self.keeper = False

    def disagreements(self, real: Observed) -> list[str]:
        """With what was observed, a sentence each."""
        found = {
            "attached": bool(real.devices),
            "swap": real.is_swap_on,
            "top": real.is_top_on,
            "keeper": bool(real.keepers),
        }
        must = {key: value for key, value in asdict(self).items() if key in found and value is not None}
        wrong = [f"{key} must be {value}" for key, value in must.items() if found[key] != value]
        if len(real.devices) > 1 or len(real.keepers) > 1 or len(real.serving) > 2:
            wrong.append("there are more devices, keepers or workers than there may be")
        if real.unit == "active" and real.unit_pid not in real.keepers:
            wrong.append("the unit is active without a keeper")
        if real.unit in _PASSING:  # nothing is learned of a moment that passes
            wrong.append(f"the unit is still {real.unit}")
        if real.tracebacks:
            wrong.append("there is a traceback in the journal")
        return wrong

    def learn(self, real: Observed) -> None:
        """What was left open."""
        self.attached, self.swap, self.keeper = bool(real.devices), real.is_swap_on, bool(real.keepers)


class Run:
    """Acts on one guest, in the order of the seed.

    nfs_port  of the server, or of a proxy before it
    checked   pages that the load has looked at; each time that it is done with
    """

    def __init__(
        self,
        guest: Guest,
        server: Ganesha,
        wheel: Callable[[Image, str], Path],
        seed: int,
        names: list[str],
        *,
        nfs_port: int | None = None,
    ) -> None:
        self.guest = guest
        self.server = server
        self.model = Model()
        self.said: list[str] = []
        self.done = 0
        self.checked = 0
        self._wheel = wheel
        self._random = random.Random(seed)
        self._names = names
        self._load: GuestJob | None = None
        self._started_s = time.monotonic()
        self.url = seen_from_guest(server.url(f"{NAME}.swap", nfsport=nfs_port or server.nfs_port))

    def do(self, count: int, *, stop: bool, limit_s: float = float("inf")) -> list[str]:
        """That many acts, or those that begin within `limit_s`. The failures, a text each; with `stop` one at most."""
        host.nbdnfs_create(self.server.url(f"{NAME}.swap"), DEVICE_MIB, timeout_s=120)
        self._set_up()
        failures: list[str] = []
        while self.done < count and time.monotonic() - self._started_s < limit_s:
            self.done += 1
            failure = self._act(self.done, "start" if self.done == 1 else "")
            if failure is None:
                continue
            failures.append(failure)
            if stop:
                return failures
            self._boot_anew()
        try:
            self._end_load()
        except (GuestFailedError, LostGuestError) as error:
            failures.append(f"at the end: {error}")
        return failures

    def _act(self, number: int, name: str = "") -> str | None:
        """The act `name`, or the next one that can be done now."""
        self.said = []
        before = f"{self.model}"
        try:
            self._keep_load()
            if name:
                ACTS[name](self, self._random)
            while not self.said:
                name = self._random.choice(self._names)
                ACTS[name](self, random.Random(self._random.randrange(1 << 30)))
            self.tell(f"{number} {name}: {'; '.join(self.said)}")
            self._settle()
            self.tell(f"  {self.model}")
        except (GuestFailedError, LostGuestError, ValueError) as error:
            text = f"{number} {name} ({'; '.join(self.said)})\n  before {before}\n  now    {self.model}\n  {error}"
            self.tell(f"FAILED {text}")
            self.tell(self._journal())
            return text
        return None

    def _settle(self) -> None:
        """Look until the guest is as the model says, and states it. GuestFailedError for what still differs."""
        deadline = time.monotonic() + _SETTLE_S
        while True:
            real = look(self.guest)
            wrong = self.model.disagreements(real)
            if not wrong:
                wrong = contradictions(self.guest, real, is_config_good=self.model.config == "good")
            if not wrong:
                break
            self.guest.check_kernel_log()
            self._check_load()
            if time.monotonic() > deadline:
                raise GuestFailedError("; ".join(wrong) + f"\n  {real}")
        self.model.learn(real)
        self.guest.check_kernel_log()
        self._check_load()
        if self.model.swap or self.model.top:  # what came in when swap was off goes out again
            self.sh(f"echo {HIGH_MIB}M > {_CGROUP}/memory.high", note=False)

    # What acts use

    def tell(self, text: str) -> None:
        print(f"[{time.monotonic() - self._started_s:6.1f} s] {text}", flush=True)

    def sh(self, command: str, *, note: bool = True) -> Result:
        """Run it to its end, whatever that is. GuestFailedError for a traceback."""
        result = self.guest.run(command, _COMMAND_S, check=False)
        if note:
            last = (result.stderr.strip().splitlines() or [""])[-1]
            self.said.append(f"{command} ▸ {result.status} {last}".rstrip())
        if "Traceback (most" in result.stderr + result.stdout:
            raise GuestFailedError(f"{command}: {result.stderr}")
        return result

    def must(self, holds: bool, text: str) -> None:
        """GuestFailedError unless it holds."""
        if not holds:
            raise GuestFailedError(text)

    def make_room(self) -> None:
        """So that all of the load fits into its cgroup; `_settle` takes the room away where there is swap again."""
        self.sh(f"echo max > {_CGROUP}/memory.high")

    def kill(self, what: str) -> None:
        """By their records: those of processes that have ended are passed over."""
        wanted = {"all": "keeper worker standby", "both": "keeper worker"}.get(what, what)
        self.sh(
            f"for w in {wanted}; do read -r pid rest < /run/nbdnfs/{NAME}/$w && kill -9 $pid; done 2>/dev/null; true"
        )

    def install_again(self) -> None:
        """The same version, built again."""
        version = self.sh("nbdnfs --version", note=False).stdout.split()[1]
        new = self._wheel(self.guest.image, version)
        self.guest.push(new, f"/root/{new.name}")
        self.guest.run(
            f"pip install --quiet --no-index --no-deps --force-reinstall --break-system-packages /root/{new.name}", 600
        )

    def configure(self, text: str) -> None:
        """As an editor saves it."""
        self.sh(f"printf '{text}' > {_CONFIG}.new && mv {_CONFIG}.new {_CONFIG}", note=False)

    @property
    def good(self) -> str:
        """A configuration that works, for printf(1)."""
        return f'url = "{self.url}"\\npriority = 100\\n'

    # The machine and its load

    def _set_up(self) -> None:
        self.guest.settle(_SETTLE_S * 3)
        keep_on_disk(self.guest)
        self.guest.run("nbdnfs install-units && mkdir -p /etc/nbdnfs", 200)
        self.configure(self.good)
        self.guest.run(
            "grep -qw memory /sys/fs/cgroup/cgroup.subtree_control"
            " || echo +memory > /sys/fs/cgroup/cgroup.subtree_control;"
            f" mkdir -p {_CGROUP} && echo {HIGH_MIB}M > {_CGROUP}/memory.high; modprobe nbd; modprobe dm-mod; sync"
        )
        self.model = Model()

    def _boot_anew(self) -> None:
        self.tell("booting anew")
        self._load = None
        self.guest.crash()
        self.guest.boot()
        self._set_up()

    def _keep_load(self) -> None:
        """Start the stress program where none runs and there is swap for it."""
        if self._load is not None and not self._load.running:
            self._end_load()
        if self._load is None and self.model.swap:
            passes = ",".join(["fill", *["sequential", "random"] * 31])
            self.sh(f"rm -f {_ENOUGH}", note=False)
            self._load = self.guest.start(
                f"exec hog --size {LOAD_MIB} --passes {passes} --pause 1000 --until {_ENOUGH} --cgroup {_CGROUP}"
                f" --report {self.guest.verdict_target}",
                7200,
            )

    def _check_load(self) -> None:
        """GuestFailedError when it has ended otherwise than well."""
        if self._load is not None and not self._load.running:
            self.guest.wait_verdict(self._load, 60).check()

    def _end_load(self) -> None:
        """Have it check all pages once more. GuestFailedError for a wrong one."""
        if self._load is None:
            return
        load, self._load = self._load, None
        self.guest.run(f"touch {_ENOUGH}")
        verdict = self.guest.wait_verdict(load, 600).check()
        self.checked += verdict.checked
        load.wait()
        moved = self.guest.run("grep -E '^pswp' /proc/vmstat | tr '\\n' ' '").stdout
        self.tell(f"{verdict.checked} pages checked, {verdict.wrong} wrong; {moved}")

    def _journal(self) -> str:
        try:
            return self.guest.run(f"journalctl -b -u {UNIT} --no-pager -o short-monotonic | tail -n 40", 120).stdout
        except (GuestFailedError, LostGuestError) as error:
            return str(error)


# One that does not apply now does nothing, and says nothing.
Act = Callable[[Run, random.Random], None]


def start(run: Run, _: random.Random) -> None:
    """systemctl start"""
    was_up = run.model.keeper
    run.sh(f"systemctl start {UNIT}")
    if not was_up:
        run.model.wanted_up()


def stop(run: Run, rng: random.Random) -> None:
    """systemctl stop, with room for the load or without"""
    _take_down(run, f"systemctl stop {UNIT}", rng)


def _take_down(run: Run, command: str, rng: random.Random) -> None:
    has_room = rng.random() < 0.6
    if has_room:
        run.make_room()
    is_up = run.model.attached
    result = run.sh(command)
    run.must(not (is_up and has_room) or run.model.top or result.status == 0, f"refused: {result.stderr}")
    is_nothing = command.startswith("systemctl") and not run.model.keeper  # a unit that does not run
    run.model.wanted_down(is_refused=bool(is_up) and (result.status != 0 or is_nothing))


def restart(run: Run, _: random.Random) -> None:
    """systemctl restart"""
    run.sh(f"systemctl restart {UNIT}")
    run.model.wanted_up()


def up(run: Run, _: random.Random) -> None:
    """nbdnfs up, from a folder that has a package nbdnfs of its own"""
    run.sh("mkdir -p /tmp/here/nbdnfs && echo 'raise SystemExit(\"foreign code runs\")' > /tmp/here/nbdnfs/__init__.py")
    result = run.sh(f"cd /tmp/here && nbdnfs up {NAME}")
    run.must("foreign code" not in result.stderr + result.stdout, "a package in the current directory is run as root")
    model = run.model
    if model.swap is False and not model.top and model.attached:
        model.swap = True if result.status == 0 else None
    elif not model.keeper:
        model.wanted_up()


def down(run: Run, rng: random.Random) -> None:
    """nbdnfs down, with room for the load or without"""
    _take_down(run, f"nbdnfs down {NAME}", rng)


def run_beside(run: Run, _: random.Random) -> None:
    """nbdnfs run, beside the keeper that runs"""
    if not run.model.keeper:
        return
    result = run.sh(f"timeout -k 5 240 nbdnfs run {NAME}")
    run.must(result.status not in (0, 124, 137), "a second keeper of the same device runs")


def run_by_hand(run: Run, _: random.Random) -> None:
    """nbdnfs run where none runs, ended by SIGTERM; then the unit takes over"""
    model = run.model
    if model.keeper or model.attached or model.config != "good":
        return
    run.said.append(f"nbdnfs run {NAME} &")
    keeper = run.guest.start(f"exec nbdnfs run {NAME}", 600)
    run.guest.wait_until(lambda: not keeper.running or look(run.guest).is_swap_on, 240, "swap, by a keeper by hand")
    run.must(keeper.running, f"the keeper by hand has ended: {keeper.stderr}")
    run.sh(f"read -r pid rest < /run/nbdnfs/{NAME}/keeper && kill $pid")
    run.must(keeper.wait().status == 0, f"SIGTERM: {keeper.stderr}")
    restart(run, _)


def sighup(run: Run, _: random.Random) -> None:
    """SIGHUP: a fresh worker"""
    if not run.model.keeper:
        return
    run.sh(f"systemctl reload {UNIT}")


def edit(run: Run, rng: random.Random) -> None:
    """a valid configuration, perhaps the first after a bad one"""
    run.configure(run.good + rng.choice(["", "# a comment\\n", "connections = 2\\n", "threads = 6\\n"]))
    run.said.append("a valid configuration")
    run.model.config = "good"


def delete(run: Run, _: random.Random) -> None:
    """rm the configuration"""
    run.sh(f"rm -f {_CONFIG}")
    run.model.config = "missing"


def break_it(run: Run, rng: random.Random) -> None:
    """a configuration that is not valid"""
    text = rng.choice(_BROKEN)
    run.configure(text)
    run.said.append(f"a configuration of {text}")
    run.model.config = "bad"


def fill_run(run: Run, rng: random.Random) -> None:
    """/run is full while a process is killed or the unit is restarted"""
    if not run.model.keeper:
        return
    run.sh("dd if=/dev/zero of=/run/fill bs=64k 2>/dev/null; true")
    what = rng.choice(["worker", "keeper", "all", "restart"])
    if what == "restart":
        run.sh(f"timeout 60 systemctl restart {UNIT}")
        run.model.wanted_up()
    else:
        run.kill(what)
        kill_expected(run)
    real = look(run.guest)
    run.said.append(f"swap is {'on' if real.is_swap_on else 'off'} while /run is full")
    run.sh("rm -f /run/fill", note=False)


def swapoff(run: Run, _: random.Random) -> None:
    """swapoff by hand"""
    if not run.model.swap:
        return
    run.make_room()
    run.sh("swapoff /dev/nbd*")
    run.model.swap = False


def kill_expected(run: Run) -> None:
    """After a kill: another one, which turns swap on where it is off."""
    if run.model.swap is False and not run.model.top:
        run.model.swap = None


def kill(run: Run, rng: random.Random) -> None:
    """SIGKILL for worker, keeper, standby, both or all"""
    if not run.model.keeper:
        return
    what = rng.choice(["worker", "keeper", "standby", "both", "all"])
    run.said.append(what)
    run.kill(what)
    kill_expected(run)


def upgrade(run: Run, rng: random.Random) -> None:
    """the package installed again, and a restart of what runs"""
    if not run.model.keeper:
        return
    run.install_again()
    run.said.append("installed again")
    restart(run, rng)


def top_on(run: Run, _: random.Random) -> None:
    """swap moves to a device-mapper device on top of ours"""
    if not run.model.swap or not run.model.keeper:
        return
    device = look(run.guest).devices[0]
    run.make_room()
    run.sh(
        f"swapoff /dev/{device} && dmsetup create {TOP} --table"
        f' "0 $(cat /sys/block/{device}/size) linear /dev/{device} 0" && swapon /dev/mapper/{TOP}'
    )
    run.model.swap, run.model.top = False, True


def top_off(run: Run, rng: random.Random) -> None:
    """and back"""
    if not run.model.top:
        return
    run.make_room()
    run.sh(f"swapoff /dev/mapper/{TOP} && dmsetup remove --retry {TOP}")
    run.model.top = False
    restart(run, rng)


def pause_nas(run: Run, _: random.Random) -> None:
    """the NAS stands still for some seconds"""
    run.said.append(f"for {_PAUSE_S:g} s")
    run.server.pause()
    try:
        time.sleep(_PAUSE_S)  # what it is about
    finally:
        run.server.resume()


def detach(run: Run, _: random.Random) -> None:
    """nbdnfs detach"""
    model = run.model
    result = run.sh("for d in /sys/block/nbd*; do [ -e $d/pid ] && exec nbdnfs detach /dev/${d##*/}; done; exit 1")
    run.must(not (model.swap or model.top) or result.status != 0, "detach takes a device that is in use")
    if model.attached and not model.swap and not model.top and result.status == 0:
        had_keeper = model.keeper
        model.attached = model.swap = model.keeper = False
        if had_keeper and model.config == "good":  # the unit brings it back
            model.wanted_up()


ACTS: dict[str, Act] = {
    "start": start,
    "stop": stop,
    "restart": restart,
    "up": up,
    "down": down,
    "run-beside": run_beside,
    "run-by-hand": run_by_hand,
    "sighup": sighup,
    "edit": edit,
    "delete": delete,
    "break": break_it,
    "fill-run": fill_run,
    "swapoff": swapoff,
    "kill": kill,
    "upgrade": upgrade,
    "top-on": top_on,
    "top-off": top_off,
    "pause-nas": pause_nas,
    "detach": detach,
}
