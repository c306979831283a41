# SPDX-License-Identifier: LGPL-2.1-or-later
"""`python -m nbdnfs`, the same as `nbdnfs`."""

from nbdnfs.cli import main

main()
