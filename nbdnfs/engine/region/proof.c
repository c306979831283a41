/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "region/proof.h"

#include "base/crc32c.h"

uint64_t proof_of(const struct region *region, const uint8_t *data)
{
	return crc32c(data, SLOT_BYTES);
}

bool proof_open(const struct region *region, uint64_t page, uint64_t proof, uint8_t *data)
{
	return proof == NO_PROOF || crc32c(data, SLOT_BYTES) == proof;
}
