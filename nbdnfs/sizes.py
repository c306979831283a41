# SPDX-License-Identifier: LGPL-2.1-or-later
"""Sizes that several parts agree on. The slot and the kernel's page have the same size on most machines, not on all."""

import os

# The engine's unit: one slot of the region, and the block size of the NBD export and of the kernel's nbd device.
# SLOT_BYTES in nbdnfs/engine is the same number.
SLOT_BYTES = 4096

# The unit of sizes in /sys/block, whatever the device's own block size (include/linux/blk_types.h).
SECTOR_BYTES = 512

# A page of the running kernel: the unit of swap areas, of vm.page-cluster and of what a fault reads in.
KERNEL_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
