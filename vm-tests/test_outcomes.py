# SPDX-License-Identifier: LGPL-2.1-or-later
"""The harness with real guests: each outcome that a test can have, brought about on purpose."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from vmtest.guest import Guest
from vmtest.outcome import GuestFailedError, LostGuestError

pytestmark = pytest.mark.timeout(600)


def test_passed(boot: Callable[..., Guest], tmp_path: Path) -> None:
    """Commands, files, a verdict, a reboot that keeps the disk, an orderly end: nothing to complain about."""
    with boot() as guest:
        boot_id = guest.channel.boot_id
        done = guest.run("echo out; echo err >&2; exit 3", check=False)
        assert (done.status, done.stdout, done.stderr) == (3, "out\n", "err\n")
        assert guest.run("kill -9 $$", check=False).status == -9
        with pytest.raises(GuestFailedError, match="exit status 1: false"):
            guest.run("false")

        # several at once, one of them too slow, one killed on request
        slow, killed = guest.start("sleep 100", timeout_s=0.5), guest.start("sleep 100")
        assert guest.run("head -c 1000000 /dev/zero | tr '\\0' x").stdout == "x" * 1_000_000
        with pytest.raises(GuestFailedError, match="timed out: sleep 100"):
            slow.wait()
        killed.kill()
        assert killed.wait().status == -9

        source = tmp_path / "source"
        source.write_bytes(bytes(range(256)) * 800)
        guest.push(source, "/root/kept", mode=0o600)
        assert guest.pull("/root/kept") == source.read_bytes()

        hog = guest.start(f"hog --size 32 --processes 2 --report {guest.verdict_target}", timeout_s=60)
        verdict = guest.wait_verdict(hog, timeout_s=70).check()
        assert (verdict.pages, verdict.checked) == (8192, 3 * 8192)
        assert [one.order for one in verdict.passes] == ["fill", "sequential", "random", "sequential"]

        guest.settle()
        guest.reboot()
        assert guest.channel.boot_id != boot_id
        assert guest.pull("/root/kept") == source.read_bytes()
        guest.settle()
        assert guest.run("hostname; cat /proc/sys/kernel/hung_task_timeout_secs").stdout == "guest\n60\n"
        assert "10.0.2.15" in guest.run("ip -4 -o address").stdout
        guest.shutdown()


def test_failed(boot: Callable[..., Guest]) -> None:
    """A wrong page, a hog that is killed, and the kernel's log of that are failures of a living guest."""
    with boot(allow={"oom"}) as guest:
        hog = guest.start(f"hog --size 16 --spoil 100 --report {guest.verdict_target}", timeout_s=60)
        verdict = guest.wait_verdict(hog, timeout_s=70)
        assert verdict.wrong == 1
        with pytest.raises(GuestFailedError, match="1 wrong pages"):
            verdict.check()
        ended = hog.wait()
        assert ended.status == 1
        assert "hog: process 0 page 100 generation 1: wrong from word 511 on" in ended.stderr

        guest.settle()
        guest.reboot()  # a verdict port of its own
        guest.run("mkdir /sys/fs/cgroup/hog && echo 16M > /sys/fs/cgroup/hog/memory.max")
        hog = guest.start(f"hog --size 64 --cgroup /sys/fs/cgroup/hog --report {guest.verdict_target}", timeout_s=60)
        with pytest.raises(GuestFailedError, match=r"ended with signal 9 in the fill pass|ended with -9"):
            guest.wait_verdict(hog, timeout_s=70)
        guest.check_kernel_log()
        guest.allow = frozenset()
        with pytest.raises(GuestFailedError, match=r"\[oom\] .*Memory cgroup out of memory: Killed process"):
            guest.check_kernel_log()
        guest.allow = frozenset({"oom"})


def test_lost_by_panic(boot: Callable[..., Guest]) -> None:
    """A guest that panics is lost at once, whatever is waited for, and the panic is the reason."""
    with boot() as guest:
        waiting = guest.start("sleep 100")
        guest.start("echo c > /proc/sysrq-trigger")
        started = time.monotonic()
        with pytest.raises(LostGuestError, match=r"guest died: \[(panic|oops)\] "):
            waiting.wait()
        assert time.monotonic() - started < 30
        with pytest.raises(LostGuestError):
            guest.run("true")
        with pytest.raises(GuestFailedError, match=r"\[panic\]"):
            guest.check_kernel_log()
        guest.allow = frozenset({"panic", "oops", "warning"})


def _lose(guest: Guest) -> None:
    guest.start("exec sleep 9999")
    guest.wait_until(lambda: False, 1, "what never happens")


def test_lost_with_what_its_tasks_do(boot: Callable[..., Guest]) -> None:
    """The kernel log of a guest that is lost, though it lives, ends with what each task waits for."""
    guest = boot()
    with pytest.raises(LostGuestError), guest:
        _lose(guest)
    assert re.search(r"task:sleep .*\n(?:(?!.*task:).*\n)+?.*nanosleep", guest.kernel_log)


def test_lost_by_silence(boot: Callable[..., Guest]) -> None:
    """A guest that lives but is not heard of is lost too, after the time that it was given."""
    with boot(silence_s=15) as guest:
        waiting = guest.start("sleep 100")
        guest.start("kill -STOP $(pidof agent)")
        with pytest.raises(LostGuestError, match="guest has been silent for 15 s"):
            waiting.wait()


def test_lost_before_it_was_there(boot: Callable[..., Guest]) -> None:
    """A kernel that finds no root ends in a panic during the boot; the reason is the panic."""
    guest = boot(arguments=["rdinit=/none", "root=/dev/none"])
    with pytest.raises(LostGuestError, match=r"guest died: \[panic\] .*VFS") as caught, guest:
        pass
    assert "the end of" in caught.value.__notes__[0]
