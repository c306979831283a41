/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * proof: what the region keeps of a page that is on the NAS, to tell whether the NAS returns what was written to it;
 * and how a page looks on the NAS.
 *
 * Not encrypted: the CRC-32C of the page, which is on the NAS as it was written. NO_PROOF stands for "unknown": a page
 * whose CRC-32C happens to be 0 is not checked.
 *
 * Encrypted: the page's tag (base/cipher.h). A page without a proof was not written under these keys: what the NAS has
 * of it has no meaning, and it is opened as zeros. The pages from the device's start up to `clear_pages` are not
 * encrypted, and are as the NAS has them while they have no proof: a swap header is found there after a boot.
 *
 * No locks: what is read of the region is constant.
 */
#ifndef NBDNFS_PROOF_H
#define NBDNFS_PROOF_H

#include <stdbool.h>
#include <stdint.h>

#include "region/region.h"

#define NO_PROOF 0u

/* Are the bytes that go to the NAS others than those that were written to the device? */
static inline bool proof_is_sealed(const struct region *region, uint64_t page)
{
	return region->cipher != NULL && page >= region->clear_pages;
}

/* Of a page as it was written to the device. */
uint64_t proof_of(const struct region *region, const uint8_t *data);

/* Of several pages, whose bytes are `stride_bytes` apart; 0: they have the same ones. */
void proofs_of(const struct region *region, const uint8_t *data, size_t stride_bytes, uint32_t pages, uint64_t *proofs);

/* `data` is a page as it was written to the device: make of it what goes to the NAS. */
void proof_seal(const struct region *region, uint64_t page, uint64_t proof, uint8_t *data);

/*
 * `data` is a page as the NAS returned it: make of it what was written to the device. Returns whether it is what
 * `proof` was made of; true also without a proof. When false, `data` has no meaning any more.
 */
bool proof_open(const struct region *region, uint64_t page, uint64_t proof, uint8_t *data);

#endif
