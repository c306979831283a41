/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "region/proof.h"

#include <string.h>

#include "base/assert.h"
#include "base/crc32c.h"

_Static_assert(SLOT_BYTES == CIPHER_PAGE_BYTES, "what is encrypted at once");

uint64_t proof_of(const struct region *region, const uint8_t *data)
{
	return region->cipher != NULL ? cipher_tag(region->cipher, data) : crc32c(data, SLOT_BYTES);
}

void proofs_of(const struct region *region, const uint8_t *data, size_t stride_bytes, uint32_t pages, uint64_t *proofs)
{
	for (uint32_t i = 0; i < pages; i++)
		proofs[i] = i > 0 && stride_bytes == 0 ? proofs[0] : proof_of(region, data + i * stride_bytes);
}

void proof_seal(const struct region *region, uint64_t page, uint64_t proof, uint8_t *data)
{
	if (!proof_is_sealed(region, page))
		return;
	assert(proof != NO_PROOF); /* else two pages might have the same key stream */
	cipher_apply(region->cipher, page, proof, data);
}

bool proof_open(const struct region *region, uint64_t page, uint64_t proof, uint8_t *data)
{
	if (proof == NO_PROOF) {
		if (proof_is_sealed(region, page))
			memset(data, 0, SLOT_BYTES);
		return true;
	}
	if (proof_is_sealed(region, page))
		cipher_apply(region->cipher, page, proof, data);
	return proof_of(region, data) == proof;
}
