# SPDX-License-Identifier: LGPL-2.1-or-later
"""`nbdnfs list`: the network block devices of this machine; and, with a NAME or a URL, the files of a NAS folder.

A machine's devices come from /proc, /sys and the configuration alone: that also works while the NAS is away.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from nbdnfs import config, quantities
from nbdnfs.commands import claiming, where
from nbdnfs.errors import NbdnfsError
from nbdnfs.kernel import nbd_device, swap_area
from nbdnfs.kernel import state as kernel_state

# Raised when a field changes its meaning or goes.
SCHEMA = 1
# For a folder of a server that does not answer
_LIMIT_S = 60.0
_OURS = nbd_device.backend_of("")


@dataclass(frozen=True)
class Device:
    """A device of this machine. None stands for what does not exist.

    kind      "configured": it has a NAME; "attached": nbdnfs attach made it, or its configuration is gone;
              "foreign": of another program
    problem   why the configuration is not valid
    """

    kind: str
    name: str | None
    device: str | None = None
    size_bytes: int | None = None
    swap_used_bytes: int | None = None
    url: str | None = None
    problem: str | None = None

    def text(self) -> str:
        """One line for a terminal."""
        size = "" if self.size_bytes is None else quantities.format_size(self.size_bytes)
        use = self.problem or ("not up" if self.device is None else "no swap")
        if self.swap_used_bytes is not None:
            use = f"swap, {quantities.format_size(self.swap_used_bytes)} in use"
        line = f"{self.name or '-':<16} {self.kind:<10} {self.device or '-':<11} {size:>9}  {use}"
        return f"{line}  {self.url}" if self.url else line


def run(args: argparse.Namespace) -> int:
    """The exit status. Errors as `where.url_of` and `folder.find`."""
    if args.where is None:
        found = devices()
        if args.json:
            _print_json(devices=[asdict(device) for device in found])
        else:
            print(*(device.text() for device in found) if found else ["no network block devices"], sep="\n")
        return 0
    files = claiming.run_until_signal(lambda stop: _files(args.where), limit_s=_LIMIT_S, grace_s=0.0)
    if args.json:
        _print_json(files=files)
    else:
        print(*map(_file_text, files) if files else ["no backing files"], sep="\n")
    return 0


def _print_json(**parts: list[dict[str, object]]) -> None:
    print(json.dumps({"schema": SCHEMA, **parts}, indent=2))


def devices(root: Path = Path("/")) -> list[Device]:
    """All of them: configured ones by name, then the others by device."""
    attached = {state.backend or "": state for state in kernel_state.nbd_devices(root) if state.attached}
    try:
        names = config.names(root)
    except NbdnfsError as error:
        print(f"nbdnfs: {error.message}: what is attached is listed all the same", file=sys.stderr)
        names = []
    found = []
    for name in names:
        url, problem = _configured(name, root)
        found.append(_device("configured", name, attached.pop(nbd_device.backend_of(name), None), root, url, problem))
    for state in sorted(kernel_state.nbd_devices(root), key=lambda state: state.index):
        if state.attached and (state.backend or "") in attached:
            backend = state.backend or ""
            is_ours = backend.startswith(_OURS)
            shown = backend.removeprefix(_OURS) if is_ours else backend or None
            found.append(_device("attached" if is_ours else "foreign", shown, state, root, None, None))
    return found


def _configured(name: str, root: Path) -> tuple[str | None, str | None]:
    """The URL, and what is wrong with the configuration."""
    try:
        return config.load(name, root).url, None
    except NbdnfsError as error:
        return None, error.message


def _device(
    kind: str,
    name: str | None,
    state: kernel_state.NbdDevice | None,
    root: Path,
    url: str | None,
    problem: str | None,
) -> Device:
    if state is None:
        return Device(kind, name, url=url, problem=problem)
    path = f"/dev/{state.name}"
    swap = swap_area.find(path, root)
    return Device(kind, name, path, state.size_bytes, None if swap is None else swap.used_bytes, url, problem)


def _files(name_or_url: str) -> list[dict[str, object]]:
    from nbdnfs.nas import folder  # only here: it loads libnfs

    rows: list[dict[str, object]] = []
    for entry in folder.find(where.url_of(name_or_url)).entries():
        record = entry.owner.record
        rows.append(
            {
                "kind": entry.kind,
                "name": entry.name,
                "size_bytes": entry.size_bytes,
                "mode": f"{entry.mode:04o}",
                "changed_s_ago": round(entry.age_s, 1),
                "owner": None if record is None or record.state == "free" else record.host,
                "owner_silent_s": None if entry.owner.age_s is None else round(entry.owner.age_s, 1),
                "owner_text": entry.owner.text(),
            }
        )
    return rows


def _file_text(row: dict[str, object]) -> str:
    size, changed = row["size_bytes"], row["changed_s_ago"]
    assert isinstance(size, int)
    assert isinstance(changed, float)
    what = {"file": "", "part": ", incomplete", "record": ", the file is missing"}[str(row["kind"])]
    used = f"changed {quantities.format_duration(changed)} ago"
    name = where.printable(str(row["name"]))
    return f"{name:<40} {quantities.format_size(size):>9}  {used}{what}  {row['owner_text']}"
