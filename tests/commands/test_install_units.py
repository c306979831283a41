# SPDX-License-Identifier: LGPL-2.1-or-later
"""`nbdnfs install-units` and the files of systemd/: where they go, systemd's own check of them, and the generator."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbdnfs import config, programs, quantities
from nbdnfs.commands import doctor, install_units
from nbdnfs.errors import BusyError, ConfigError, PermissionDeniedError
from nbdnfs.keeper import failures

SYSTEMD = Path(__file__).resolve().parents[2] / "systemd"
PROGRAM = "/usr/local/bin/nbdnfs"
LIB = "usr/local/lib"
UNIT = f"{LIB}/systemd/system/nbdnfs@.service"
URL = "nfs://nas/export/swap/%m.swap?version=3&uid=0"
YES, NO = ("1", "yes", "true", "on"), ("0", "no", "false", "off")


def make_systemd(root: Path, version: int) -> None:
    """Make `root` an image whose systemd has that version."""
    library = root / f"usr/lib/x86_64-linux-gnu/systemd/libsystemd-shared-{version}.so"
    library.parent.mkdir(parents=True)
    library.touch()


def files(root: Path) -> dict[str, bytes]:
    """Path ▸ content of every file below the root."""
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


# install-units


def test_install_is_complete_and_idempotent(tmp_path: Path) -> None:
    """Every file of systemd/ is installed, scripts are executable, and a second run writes nothing."""
    make_systemd(tmp_path, 257)
    written = install_units.install(tmp_path, program=PROGRAM)
    installed = files(tmp_path)
    for source in SYSTEMD.iterdir():
        if source.name != "README" and source.is_file():
            assert source.read_bytes() in installed.values(), source.name
    assert all(path.stat().st_mode & 0o022 == 0 for path in written)
    assert os.access(tmp_path / f"{LIB}/systemd/system-generators/nbdnfs-generator", os.X_OK)
    assert install_units.install(tmp_path, program=PROGRAM) == []
    assert files(tmp_path) == installed
    subprocess.run(["sha256sum", "--quiet", "-c", f"{LIB}/nbdnfs/installed.sha256"], cwd=tmp_path, check=True)


def test_differing(tmp_path: Path) -> None:
    """What is installed and not of this version, whatever program it starts; None where nothing is installed."""
    assert install_units.differing(tmp_path) is None
    install_units.install(tmp_path, program="/opt/nbdnfs/bin/nbdnfs")
    assert install_units.differing(tmp_path) == []
    (tmp_path / f"{LIB}/nbdnfs/reserve").unlink()
    (tmp_path / UNIT).write_text((tmp_path / UNIT).read_text() + "# of another version\n")
    (tmp_path / "etc/nbdnfs/example.toml.disabled").unlink()
    assert install_units.differing(tmp_path) == [f"/{UNIT}", f"/{LIB}/nbdnfs/reserve"]
    found = {one.subject: one for one in doctor.examine(root=write_machine(tmp_path))}["systemd units"]
    assert (found.good, found.advice) == (False, "nbdnfs install-units")


def write_machine(root: Path) -> Path:
    """The files of /proc and /sys without which nothing is examined."""
    (root / "sys/block").mkdir(parents=True)
    (root / "proc").mkdir()
    (root / "proc/meminfo").write_text(
        "MemTotal: 1 kB\nMemFree: 1 kB\nMemAvailable: 1 kB\nSwapTotal: 0 kB\nSwapFree: 0 kB\n"
    )
    return root


def test_settings_are_put_into_force(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The keys of sysctl.conf, and no others; what the administrator has set for them wins, which systemd-sysctl(8)
    sees to."""
    started: list[list[str]] = []
    program = tmp_path / "systemd-sysctl"
    program.touch()
    monkeypatch.setattr(install_units, "_SYSTEMD_SYSCTL", (tmp_path / "missing", program))
    monkeypatch.setattr(programs, "find_program", lambda name, package: name)
    monkeypatch.setattr(programs, "run", lambda argv, **options: started.append(argv))
    install_units._put_into_force()
    assert started == [
        ["systemctl", "daemon-reload"],
        [
            str(program),
            "--prefix=/vm/watermark_scale_factor",
            "--prefix=/vm/compact_unevictable_allowed",
            "--prefix=/vm/watermark_boost_factor",
        ],
    ]


def test_final_statuses_are_those_of_the_unit() -> None:
    """The exit statuses after which no keeper waits are those after which the unit starts none."""
    (line,) = (
        line for line in (SYSTEMD / "nbdnfs@.service").read_text().splitlines() if line.startswith("RestartPrevent")
    )
    assert {int(word) for word in line.partition("=")[2].split()} == failures.FINAL_STATUSES


def test_the_program_that_installs_is_started(tmp_path: Path) -> None:
    """The nbdnfs of a virtual environment stands in each command of the unit; a path with a space is refused."""
    install_units.install(tmp_path, program="/opt/nbdnfs/bin/nbdnfs")
    text = (tmp_path / UNIT).read_text()
    assert "ExecStart=/opt/nbdnfs/bin/nbdnfs run %i\n" in text
    assert "ExecStop=/opt/nbdnfs/bin/nbdnfs down --service %i\n" in text
    assert "RequiresMountsFor=/opt/nbdnfs/bin/nbdnfs\n" in text
    assert PROGRAM not in text
    with pytest.raises(ConfigError, match="cannot be named in a unit"):
        install_units.install(tmp_path, program="/opt/my programs/nbdnfs")


def test_the_command_line_names_its_own_program(tmp_path: Path) -> None:
    """The units start the very `nbdnfs` that installed them."""
    program = tmp_path / "bin/nbdnfs"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\nfrom nbdnfs.cli import main\nmain()\n")
    program.chmod(0o755)
    root = tmp_path / "root"
    environment = {**os.environ, "PYTHONPATH": str(SYSTEMD.parent)}
    command = [str(program), "install-units", "--root", str(root)]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1].endswith("then: systemctl enable --now nbdnfs@swap0")
    assert f"ExecStart={program} run %i\n" in (root / UNIT).read_text()
    again = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=60)
    assert again.stdout == "everything is already installed\n"


def test_changed_file_is_never_overwritten(tmp_path: Path) -> None:
    """A changed file stops the installation before anything is written; --force or removing the file helps."""
    install_units.install(tmp_path, program=PROGRAM)
    (tmp_path / UNIT).write_text("[Service]\n")
    before = files(tmp_path)
    with pytest.raises(ConfigError) as caught:
        install_units.install(tmp_path, program="/opt/bin/nbdnfs")
    assert str(tmp_path / UNIT) in caught.value.message
    assert "systemctl edit" in caught.value.hint
    assert files(tmp_path) == before
    install_units.install(tmp_path, program=PROGRAM, force=True)
    (tmp_path / UNIT).unlink()
    assert install_units.install(tmp_path, program=PROGRAM) == [tmp_path / UNIT]


def test_existing_file_is_not_overwritten(tmp_path: Path) -> None:
    """A file that existed before the first installation counts as changed."""
    (tmp_path / "etc/nbdnfs").mkdir(parents=True)
    (tmp_path / "etc/nbdnfs/example.toml.disabled").write_text("mine")
    with pytest.raises(ConfigError, match=r"example\.toml\.disabled: changed"):
        install_units.install(tmp_path, program=PROGRAM)


def test_update_replaces_and_removes_its_own(tmp_path: Path) -> None:
    """With another version of systemd or nbdnfs, unchanged files are replaced, and obsolete ones removed."""
    make_systemd(tmp_path, 257)
    install_units.install(tmp_path, program=PROGRAM)
    drop_ins = tmp_path / f"{LIB}/systemd/system/nbdnfs@.service.d"
    assert sorted(path.name for path in drop_ins.iterdir()) == ["50-systemd-254.conf", "50-systemd-255.conf"]
    shutil.rmtree(tmp_path / "usr/lib")
    make_systemd(tmp_path, 252)
    metrics_unit = tmp_path / f"{LIB}/systemd/system/nbdnfs-metrics.service"
    assert install_units.install(tmp_path, program="/opt/bin/nbdnfs") == [tmp_path / UNIT, metrics_unit]
    assert not drop_ins.exists()


def test_file_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    """A directory where a file should be is an error of one line."""
    (tmp_path / UNIT).mkdir(parents=True)
    with pytest.raises(PermissionDeniedError, match=r"cannot read .*Is a directory"):
        install_units.install(tmp_path, program=PROGRAM)


@pytest.mark.parametrize("version", [252, 253, 254, 257])
def test_systemd_version(tmp_path: Path, version: int) -> None:
    """The version comes from the library's name, where Debian and others place it; 0 without systemd."""
    assert install_units.systemd_version(tmp_path) == 0
    make_systemd(tmp_path, version)
    assert install_units.systemd_version(tmp_path) == version


def test_a_package_has_its_own_folders() -> None:
    """The same files for a package: its program, its scripts, systemd's own folders, nothing in /etc or /usr/local."""
    layout = install_units.Layout(lib="usr/lib", systemd="lib/systemd", udev="lib/udev")
    found = {file.path: file.data.decode() for file in install_units.contents("/usr/bin/nbdnfs", 257, layout)}
    unit = found["lib/systemd/system/nbdnfs@.service"]
    assert "ExecStart=/usr/bin/nbdnfs run %i\n" in unit
    assert "ExecStartPre=-/bin/sh /usr/lib/nbdnfs/reserve\n" in unit
    assert {"usr/lib/nbdnfs/reserve", "lib/udev/rules.d/59-nbdnfs.rules"} <= set(found)
    assert len(found) == len(layout.paths(257))
    assert [path for path, text in found.items() if path.startswith("etc/") or "/usr/local" in text] == []


@pytest.mark.parametrize("folder", ["usr/lib/systemd/system", "lib/systemd/system"])
def test_units_of_a_package_are_not_shadowed(tmp_path: Path, folder: str) -> None:
    """/usr/local would take precedence over what the package installs and updates."""
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / "nbdnfs@.service").touch()
    with pytest.raises(ConfigError, match="the units of the package nbdnfs are installed"):
        install_units.install(tmp_path, program=PROGRAM)
    assert not (tmp_path / LIB).exists()


def test_a_package_is_compared_with_this_version(tmp_path: Path) -> None:
    """Its files count where none are in /usr/local; a drop-in that its release does not have is not missed."""
    make_systemd(tmp_path, 257)
    for file in install_units.contents("/usr/bin/nbdnfs", 252, install_units.PACKAGE):
        (tmp_path / file.path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file.path).write_bytes(file.data)
    assert install_units.differing(tmp_path) == []
    (tmp_path / "usr/lib/nbdnfs/reserve").unlink()
    (tmp_path / "usr/lib/systemd/system/nbdnfs.slice").write_text("[Slice]\n")
    assert install_units.differing(tmp_path) == ["/usr/lib/systemd/system/nbdnfs.slice", "/usr/lib/nbdnfs/reserve"]


def test_doctor_names_units_that_shadow_a_package(tmp_path: Path) -> None:
    """Those in /usr/local are another version's sooner or later."""
    install_units.install(tmp_path, program=PROGRAM)
    assert not install_units.is_shadowing_package(tmp_path)
    (tmp_path / "usr/lib/systemd/system").mkdir(parents=True)
    (tmp_path / "usr/lib/systemd/system/nbdnfs@.service").touch()
    assert install_units.is_shadowing_package(tmp_path)
    found = {one.subject: one for one in doctor.examine(root=write_machine(tmp_path))}["systemd units"]
    assert (found.good, found.advice) == (False, "nbdnfs uninstall-units")


# uninstall-units


def test_uninstall_leaves_nothing(tmp_path: Path) -> None:
    """All files, links of enabled devices and empty folders go; a configuration stays. A second run does nothing."""
    (tmp_path / "etc/nbdnfs").mkdir(parents=True)
    (tmp_path / "etc/nbdnfs/swap0.toml").write_text('url = "nfs://nas/export/swap"\n')
    (tmp_path / "etc/systemd/system/multi-user.target.wants").mkdir(parents=True)
    (tmp_path / LIB).mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    make_systemd(tmp_path, 257)
    install_units.install(tmp_path, program=PROGRAM)
    shutil.rmtree(tmp_path / "usr/lib")
    link = tmp_path / "etc/systemd/system/multi-user.target.wants/nbdnfs@swap0.service"
    link.symlink_to(f"/{UNIT}")
    timer = tmp_path / "etc/systemd/system/timers.target.wants/nbdnfs-metrics.timer"
    timer.parent.mkdir()
    timer.symlink_to(f"/{LIB}/systemd/system/nbdnfs-metrics.timer")
    removed = install_units.uninstall(tmp_path)
    assert {tmp_path / UNIT, tmp_path / f"{LIB}/nbdnfs/installed.sha256", link, timer} <= set(removed)
    left = set(before) - {link.parent}
    assert set(tmp_path.rglob("*")) == left
    assert install_units.uninstall(tmp_path) == []


def test_uninstall_keeps_what_was_changed(tmp_path: Path) -> None:
    """A changed file stops the removal before anything is removed; --force removes it, too."""
    install_units.install(tmp_path, program=PROGRAM)
    (tmp_path / UNIT).write_text("[Service]\n")
    before = files(tmp_path)
    with pytest.raises(ConfigError, match="changed since") as caught:
        install_units.uninstall(tmp_path)
    assert caught.value.hint.endswith("nbdnfs uninstall-units --force")
    assert files(tmp_path) == before
    install_units.uninstall(tmp_path, force=True)
    assert files(tmp_path) == {}


def test_uninstall_is_refused_while_a_device_is_up(tmp_path: Path) -> None:
    """Unless a package has units that take over."""
    install_units.install(tmp_path, program=PROGRAM)
    block = tmp_path / "sys/block/nbd0"
    block.mkdir(parents=True)
    (block / "backend").write_text("nbdnfs:swap0\n")
    (block / "size").write_text("8\n")
    with pytest.raises(BusyError, match="the device swap0 is up"):
        install_units.uninstall(tmp_path)
    assert (tmp_path / UNIT).exists()
    packaged = tmp_path / "usr/lib/systemd/system/nbdnfs@.service"
    packaged.parent.mkdir(parents=True)
    packaged.touch()
    link = tmp_path / "etc/systemd/system/multi-user.target.wants/nbdnfs@swap0.service"
    link.parent.mkdir(parents=True)
    link.symlink_to(f"/{UNIT}")
    install_units.uninstall(tmp_path)
    assert not (tmp_path / UNIT).exists()
    assert link.is_symlink()


@pytest.mark.parametrize(
    ("code", "status", "wait_s"),
    [
        ("killed", "KILL", 0),
        ("killed", "TERM", 0),
        ("exited", "0", 0),
        *(("exited", str(status), 0) for status in sorted({*failures.FINAL_STATUSES, os.EX_UNAVAILABLE, os.EX_NOHOST})),
        ("killed", "SEGV", 1),
        ("dumped", "ABRT", 1),
        ("exited", "203", 10),
        ("exited", "1", 10),
        ("exited", "70", 10),
        ("exited", "127", 10),
        ("", "", 0),
    ],
)
def test_the_pace_of_programs_that_cannot_run(code: str, status: str, wait_s: int) -> None:
    """A keeper that was killed, or has waited by itself, is followed at once; a program that is missing or broken,
    after ten seconds; one that crashes, after one."""
    done = subprocess.run(
        ["/bin/sh", SYSTEMD / "pace", "print"],
        env={"EXIT_CODE": code, "EXIT_STATUS": status},
        check=True,
        timeout=10,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert done.stdout == f"{wait_s}\n"


# what limits the wait for a start

# systemctl: the next text of argv[0]'s folder for list-jobs, the last one again and again; it notes what is canceled
FAKE_SYSTEMCTL = """#!/bin/sh
cd "${0%/*}" || exit 1
case $1 in
    cancel) echo "$2" >>canceled ;;
    *) read -r jobs <queue; [ "$(wc -l <queue)" -eq 1 ] || sed -i 1d queue; printf "%b" "$jobs" ;;
esac
"""
OTHERS = "7 nbdnfs@other.service start running\\n8 nbdnfs@swap0.service.wants start running\\n"


def job(number: int, kind: str, state: str = "running") -> str:
    """What systemctl list-jobs prints, other jobs included, for printf's %b."""
    return f"{OTHERS}{number} nbdnfs@swap0.service {kind} {state}\\n"


def canceled(folder: Path, looks: list[str], step_s: int = 10) -> tuple[str, int]:
    """The jobs that start-timeout cancels with a limit of 30 s, and how many pauses it makes. `step_s`: the time from
    one look to the next."""
    for name, text in {
        "systemctl": FAKE_SYSTEMCTL,
        "sleep": '#!/bin/sh\necho >>"${0%/*}/pauses"\n',
        "cut": f'#!/bin/sh\necho $(($(wc -l <"${{0%/*}}/pauses") * {step_s} + 77))\n',
        "queue": "".join(f"{look}\n" for look in looks),
        "canceled": "",
        "pauses": "",
    }.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    subprocess.run(
        ["/bin/sh", SYSTEMD / "start-timeout", "nbdnfs@swap0.service", "30"],
        env={"PATH": f"{folder}:/usr/bin:/bin"},
        check=True,
        timeout=30,
    )
    return (folder / "canceled").read_text().strip(), len((folder / "pauses").read_text())


def test_a_start_is_waited_for_so_long(tmp_path: Path) -> None:
    """Its job is canceled after that; one that waits for other units, or is followed by another, has its time again."""
    assert canceled(tmp_path, [job(5, "start")]) == ("5", 3)
    assert canceled(tmp_path, [job(5, "restart")]) == ("5", 3)
    assert canceled(tmp_path, [*[job(5, "start", "waiting")] * 9, job(5, "start")]) == ("5", 12)
    assert canceled(tmp_path, [*[job(5, "start")] * 3, job(6, "start")]) == ("6", 6)
    assert canceled(tmp_path, [job(5, "start")], step_s=30) == ("5", 1)  # a busy machine, where each look takes long


def test_what_is_not_a_start_is_never_canceled(tmp_path: Path) -> None:
    """A stop may take as long as swapoff does. Without a job there is nothing to wait for."""
    assert canceled(tmp_path, [job(5, "stop")]) == ("", 0)
    assert canceled(tmp_path, [OTHERS]) == ("", 0)
    assert canceled(tmp_path, [*[job(5, "start")] * 2, job(5, "stop")]) == ("", 2)


def test_a_stop_keeps_its_job() -> None:
    """For as long as swapoff may take: at shutdown the network waits for the job, and not for the unit."""
    unit = (SYSTEMD / "nbdnfs@.service").read_text()
    limits_s = {
        key: quantities.parse_duration_s(value)
        for key, value in re.findall(r"(?m)^(JobRunningTimeoutSec|TimeoutStopSec)=(.+)$", unit)
    }
    assert limits_s["JobRunningTimeoutSec"] > limits_s["TimeoutStopSec"]


# the check by systemd


def systemd_analyze() -> str:
    """The path of the program, which is part of the package systemd."""
    found = shutil.which("systemd-analyze")
    assert found is not None, "systemd-analyze is missing (Debian: apt install systemd)"
    return found


def test_units_verify(tmp_path: Path) -> None:
    """`systemd-analyze verify` accepts an instance and the slice, with the drop-ins for its version."""
    version = int(subprocess.run([systemd_analyze(), "--version"], capture_output=True, text=True).stdout.split()[1])
    make_systemd(tmp_path, version)
    install_units.install(tmp_path, program="/usr/bin/true")  # what it starts must exist
    folder = tmp_path / f"{LIB}/systemd/system"
    for unit in ("nbdnfs@", "nbdnfs-start-timeout@"):
        (folder / f"{unit}swap0.service").symlink_to(f"{unit}.service")
    done = subprocess.run(
        # the manual is not installed where the tests run
        [
            systemd_analyze(),
            "--man=no",
            "verify",
            "nbdnfs@swap0.service",
            "nbdnfs-start-timeout@swap0.service",
            "nbdnfs.slice",
            "nbdnfs-metrics.timer",
        ],
        env={**os.environ, "SYSTEMD_UNIT_PATH": f"{folder}:", "SYSTEMD_LOG_LEVEL": "warning"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
    )
    # without IPv6, systemd complains about its own units
    said = [line for line in done.stderr.splitlines() if "IPv6" not in line]
    assert (done.returncode, said, done.stdout) == (0, [], "")


def test_exposure(tmp_path: Path) -> None:
    """What `systemd-analyze security` counts of what the unit could do and need not: 5.1 of 10 with systemd 252, and
    9.6 without the settings. What is left needs a mount namespace, or is needed."""
    make_systemd(tmp_path, 252)
    install_units.install(tmp_path, program="/usr/bin/true")
    folder = tmp_path / f"{LIB}/systemd/system"
    (folder / "nbdnfs@swap0.service").symlink_to("nbdnfs@.service")
    done = subprocess.run(
        [systemd_analyze(), "security", "--no-pager", "--offline=true", "--threshold=51", "nbdnfs@swap0.service"],
        env={**os.environ, "SYSTEMD_UNIT_PATH": f"{folder}:"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "Overall exposure level" in done.stdout, done.stderr
    assert done.returncode == 0, done.stdout


def test_no_mount_namespace() -> None:
    """None of the settings that make one (systemd, src/core/execute.c): see the last lines of the unit."""
    keys = {line.partition("=")[0] for line in (SYSTEMD / "nbdnfs@.service").read_text().splitlines() if "=" in line}
    makes_one = {
        *("PrivateTmp", "PrivateDevices", "PrivateMounts", "PrivateUsers", "ProtectSystem", "ProtectHome"),
        *("ProtectKernelTunables", "ProtectKernelModules", "ProtectKernelLogs", "ProtectControlGroups", "ProtectProc"),
        *("ProcSubset", "RootDirectory", "RootImage", "ReadWritePaths", "ReadOnlyPaths", "InaccessiblePaths"),
        *("BindPaths", "BindReadOnlyPaths", "TemporaryFileSystem", "MountFlags", "PrivateIPC", "StateDirectory"),
    }
    assert keys & makes_one == set()


@pytest.mark.parametrize(("now_kib", "then_kib"), [("2048", "8192"), ("8192", "8192"), ("67584", "67584")])
def test_reserve_is_raised_and_never_lowered(tmp_path: Path, now_kib: str, then_kib: str) -> None:
    """The script raises a small reserve and keeps a larger one, here in a file instead of /proc/sys."""
    file = tmp_path / "min_free_kbytes"
    file.write_text(f"{now_kib}\n")
    subprocess.run(["/bin/sh", SYSTEMD / "reserve", file], check=True, timeout=10)
    assert file.read_text() == f"{then_kib}\n"


def test_reserve_reads_proc_at_once() -> None:
    """A file of /proc/sys gives its number in the first read(2) only, and the script manages with that."""
    subprocess.run(["/bin/sh", SYSTEMD / "reserve", "/proc/sys/kernel/pid_max"], check=True, timeout=10)


def test_no_pressure_figures_of_the_unit_and_its_slice(tmp_path: Path) -> None:
    """Theirs alone are switched off. A slice of the administrator's keeps its own, and so does the machine."""
    groups = ("", "/nbdnfs.slice", "/nbdnfs.slice/nbdnfs@swap0.service", "/a.slice", "/a.slice/nbdnfs@swap0.service")
    for group in groups:
        (tmp_path / group.lstrip("/")).mkdir(exist_ok=True)

    def switched_off(unit: str) -> list[str]:
        for group in groups:
            (tmp_path / group.lstrip("/") / "cgroup.pressure").write_text("1\n")
        subprocess.run(["/bin/sh", SYSTEMD / "no-pressure", tmp_path, unit], check=True, timeout=10)
        return [group for group in groups if (tmp_path / group.lstrip("/") / "cgroup.pressure").read_text() == "0\n"]

    assert switched_off("/a.slice") == []
    assert switched_off(groups[2]) == list(groups[1:3])
    assert switched_off(groups[4]) == [groups[4]]


def test_no_pressure_where_the_kernel_has_no_such_file(tmp_path: Path) -> None:
    """Linux before 6.1, or without PSI: nothing is made, and nothing fails."""
    (tmp_path / "nbdnfs.slice/nbdnfs@swap0.service").mkdir(parents=True)
    group = "/nbdnfs.slice/nbdnfs@swap0.service"
    subprocess.run(["/bin/sh", SYSTEMD / "no-pressure", tmp_path, group], check=True, timeout=10)
    assert list(tmp_path.rglob("cgroup.pressure")) == []


# the generator


class Generated:
    """The files that the generator wrote for a kernel command line."""

    def __init__(self, folder: Path, cmdline: str) -> None:
        self.root = folder
        self.units = folder / "normal"
        self.folder = folder / "run/nbdnfs-config"
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.rmtree(self.units, ignore_errors=True)
        done = subprocess.run(
            [SYSTEMD / "nbdnfs-generator", self.units, folder / "early", folder / "late"],
            env={"SYSTEMD_PROC_CMDLINE": cmdline, "NBDNFS_CONFIG_DIR": str(self.folder)},
            cwd=folder,
            capture_output=True,
            timeout=10,
        )
        assert (done.returncode, done.stdout) == (0, b"")
        self.complaints = done.stderr.decode(errors="replace").splitlines()

    @property
    def values(self) -> dict[str, object]:
        """The values of the configuration; empty where there is none, and then there is no unit either."""
        links = list(self.units.rglob("*.service"))
        file = self.folder / "cmdline.toml"
        if not file.exists():
            assert links == []
            return {}
        assert [str(link.relative_to(self.units)) for link in links] == [
            "multi-user.target.wants/nbdnfs@cmdline.service"
        ]
        assert [path.name for path in self.folder.iterdir()] == ["cmdline.toml"]
        return tomllib.loads(file.read_text())


def test_generator_makes_config_and_link(tmp_path: Path) -> None:
    """URL, size and priority reach the configuration, and config.load accepts it."""
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/machine-id").write_text("0123456789abcdef0123456789abcdef\n")
    made = Generated(tmp_path, f"ro quiet nbdnfs.url={URL} nbdnfs.size=256M nbdnfs.priority=-1 nbdnfs.other=1 x")
    assert made.values == {"url": URL, "size": "256M", "priority": -1}
    assert made.complaints == []
    loaded = config.load("cmdline", tmp_path)
    assert loaded.url == "nfs://nas/export/swap/a88094e54e19421489d85ef6441afd86.swap?version=3&uid=0"
    assert loaded.size_bytes == 256 << 20


@pytest.mark.parametrize(
    ("virtualization", "has_file", "is_made"),
    [("", False, True), ("vm:kvm", False, True), ("container:docker", False, False), ("", True, False)],
)
def test_generator_in_a_container(tmp_path: Path, virtualization: str, has_file: bool, is_made: bool) -> None:
    """/proc/cmdline is the host's there, and so is the swap. systemd says that it is one: in a variable, or, before
    251, in a file in /run."""
    cmdline, container, generator = (tmp_path / name for name in ("cmdline", "container", "generator"))
    cmdline.write_text(f"quiet nbdnfs.url={URL}\n")
    if has_file:
        container.write_text("lxc")
    text = (SYSTEMD / "nbdnfs-generator").read_text()
    for there, here in (("/proc/cmdline", cmdline), ("/run/systemd/container", container)):
        assert there in text
        text = text.replace(there, str(here))
    generator.write_text(text)
    subprocess.run(
        ["/bin/sh", generator, tmp_path / "normal"],
        env={"SYSTEMD_VIRTUALIZATION": virtualization, "NBDNFS_CONFIG_DIR": str(tmp_path / "run")},
        check=True,
        timeout=10,
    )
    assert (tmp_path / "run/cmdline.toml").exists() == is_made
    assert (tmp_path / "normal").exists() == is_made


def test_what_is_wrong_with_the_kernel_command_line(tmp_path: Path) -> None:
    """What the generator lets pass and the configuration refuses is sought where it was written."""
    Generated(tmp_path, "nbdnfs.url=nfs://nas/export/x.swap nbdnfs.size=2KK")
    with pytest.raises(ConfigError, match=r"^nbdnfs\.size on the kernel command line: size: '2KK' is not"):
        config.load("cmdline", tmp_path)


def test_generator_link_leads_to_the_unit(tmp_path: Path) -> None:
    """The link leads to the unit beside the generator, wherever that was installed."""
    install_units.install(tmp_path, program=PROGRAM)
    generator = tmp_path / f"{LIB}/systemd/system-generators/nbdnfs-generator"
    subprocess.run(
        [generator, tmp_path / "normal"],
        env={"SYSTEMD_PROC_CMDLINE": f"nbdnfs.url={URL}", "NBDNFS_CONFIG_DIR": str(tmp_path / "run")},
        check=True,
        timeout=10,
    )
    link = tmp_path / "normal/multi-user.target.wants/nbdnfs@cmdline.service"
    assert link.resolve() == tmp_path / UNIT


@pytest.mark.parametrize(
    ("cmdline", "values", "complaint"),
    [
        ("", {}, ""),
        ("root=/dev/nfs quiet", {}, ""),
        (f"nbdnfs.url={URL}", {"url": URL}, ""),
        (f'nbdnfs.url="{URL}"', {"url": URL}, ""),
        (f"nbdnfs.url=nfs://a/b/c nbdnfs.url={URL}", {"url": URL}, ""),
        (f"nbdnfs.url={URL} nbdnfs.url=nfs://a/$(reboot)", {"url": URL}, "nbdnfs.url is ignored"),
        ("nbdnfs.url=nfs://[fe80::1]/a/b~c@d,e+f", {"url": "nfs://[fe80::1]/a/b~c@d,e+f"}, ""),
        ("nbdnfs.url=http://a/b", {}, "nbdnfs.url is ignored"),
        ("nbdnfs.url=nfs://a", {}, "nbdnfs.url is ignored"),
        ('nbdnfs.url=nfs://a/b"c', {}, "nbdnfs.url is ignored"),
        ("nbdnfs.url=nfs://a/b\\c", {}, "nbdnfs.url is ignored"),
        ("nbdnfs.url=nfs://a/b'c", {}, "nbdnfs.url is ignored"),
        ("nbdnfs.url=nfs://a/*", {}, "nbdnfs.url is ignored"),
        ("nbdnfs.url=", {}, "nbdnfs.url is ignored"),
        ("nbdnfs.size=2G", {}, "there is no nbdnfs.url"),
        (f"nbdnfs.url={URL} nbdnfs.size=ram/2", {"url": URL, "size": "ram/2"}, ""),
        (f"nbdnfs.url={URL} nbdnfs.size=ram*1.5,atmost8G", {"url": URL, "size": "ram*1.5,atmost8G"}, ""),
        (f"nbdnfs.url={URL} nbdnfs.size=most", {"url": URL}, "nbdnfs.size is ignored"),
        (f"nbdnfs.url={URL} nbdnfs.size=lots", {"url": URL}, "nbdnfs.size is ignored"),
        (f"nbdnfs.url={URL} nbdnfs.size=2G;x", {"url": URL}, "nbdnfs.size is ignored"),
        (f"nbdnfs.url={URL} nbdnfs.size=", {"url": URL}, "nbdnfs.size is ignored"),
        (f"nbdnfs.url={URL} nbdnfs.priority=05", {"url": URL}, "nbdnfs.priority is ignored"),
        (f"nbdnfs.url={URL} nbdnfs.priority=high", {"url": URL}, "nbdnfs.priority is ignored"),
        (f"nbdnfs.url={URL} nbdnfs.priority=-", {"url": URL}, "nbdnfs.priority is ignored"),
        (f"nbdnfs.url={URL} nbdnfs.priority=0", {"url": URL, "priority": 0}, ""),
        *((f"nbdnfs.url={URL} nbdnfs.encrypt={no}", {"url": URL, "encrypt": False}, "") for no in NO),
        *((f"nbdnfs.url={URL} nbdnfs.encrypt={yes}", {"url": URL, "encrypt": True}, "") for yes in YES),
        (f"nbdnfs.url={URL} nbdnfs.encrypt=never", {"url": URL}, "nbdnfs.encrypt is ignored"),
        (f"nbdnfs.url={URL} nbdnfs.encrypt=", {"url": URL}, "nbdnfs.encrypt is ignored"),
        ("nbdnfs.encrypt=no", {}, "there is no nbdnfs.url"),
    ],
)
def test_generator_refuses_what_needs_quoting(
    tmp_path: Path, cmdline: str, values: dict[str, object], complaint: str
) -> None:
    """Bad values are reported and left out; the later of two counts unless it is bad."""
    made = Generated(tmp_path, cmdline)
    assert made.values == values
    assert (complaint in "\n".join(made.complaints)) if complaint else made.complaints == []


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    words=st.lists(
        st.tuples(
            st.sampled_from(["nbdnfs.url=", "nbdnfs.size=", "nbdnfs.priority=", "nbdnfs.encrypt=", "nbdnfs.", ""]),
            st.sampled_from(["nfs://h/a/", "2", "-", "no", '"', ""]),
            st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=12),
        ).map("".join),
        max_size=5,
    )
)
def test_generator_never_breaks_out(tmp_path: Path, words: list[str]) -> None:
    """Any command line gives valid TOML with known keys, and no file anywhere else."""
    made = Generated(tmp_path, " ".join(words))
    assert set(made.values) <= {"url", "size", "priority", "encrypt"}
    assert {path.name for path in tmp_path.iterdir()} <= {"normal", "run"}
