# SPDX-License-Identifier: LGPL-2.1-or-later
"""Real kernels in QEMU: images, guests, verdicts. Nothing is imported here, so that there is no import circle."""
