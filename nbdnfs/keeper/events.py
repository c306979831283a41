# SPDX-License-Identifier: LGPL-2.1-or-later
"""The keeper's changes of state, each with its MESSAGE_ID in the journal, systemd.journal-fields(7). Imports nothing.

An id stays for as long as its event means the same; docs/monitoring.md has the table.
"""

STEP = "2025d8616809471c82b01dc7c0fc1771"
SWAP_ON = "de739658d6bb453981f8c38cf89d7b9e"
WORKER_SERVES = "48ad2ebfa2bb4bcdb567fc08b32064db"
WORKER_ENDED = "27f36e86911146a48c20758788a8faa8"
WORKER_REPLACED = "f795bfe0801f4bf5855fc5bc1dc1d562"
WORKER_ADOPTED = "6eb7bf6641164b5f92c5e9a1e9b37e9c"
STANDBY_ADOPTED = "a214a9282dd54636b685eeb642d6d81f"
STANDBY_ENDED = "5bca5c82448c46c889e7d7a82e9512f4"
SERVER_MOVED = "edc77b5101b044dcaa88deaf8c582cc2"
SERVER_SILENT = "c698aa49e4684439bd8c38d5e0a5ca0d"
SERVER_ANSWERS = "c3ddb8cdfb93459a9ec7c099969c3adc"
ROOT_SILENT = "308e5da8e3f24ed09449ac23785e06b6"
ROOT_ANSWERS = "392e78df19b54176a4802d57bc481bdf"
HANDED_OVER = "410cc2eff4d44bfdaedaf7c6e5e7a6e9"
# What is wrong, once in ten minutes for as long as it is.
COMPLAINT = "54dfb98769134f519df15aac6aa63869"
