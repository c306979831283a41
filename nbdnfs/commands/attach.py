# SPDX-License-Identifier: LGPL-2.1-or-later
"""`nbdnfs attach` and `nbdnfs detach`: a kernel block device without a keeper."""

from __future__ import annotations

import argparse

from nbdnfs.kernel import nbd_device


def run_attach(args: argparse.Namespace) -> int:
    """Print the device's path. Errors as `nbd_device.attach`."""
    print(nbd_device.attach(args.socket, args.device, warm=not args.no_warm_up).path)
    return 0


def run_detach(args: argparse.Namespace) -> int:
    """Errors as `nbd_device.detach`."""
    nbd_device.detach(args.device)
    return 0
