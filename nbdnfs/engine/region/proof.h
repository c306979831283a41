/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * proof: what the region keeps of a page that is on the NAS, to tell whether the NAS returns what was written to it.
 *
 * It is the CRC-32C of the page. 0 stands for "unknown": a page whose CRC-32C happens to be 0 is not checked.
 *
 * No locks: what is read of the region is constant.
 */
#ifndef NBDNFS_PROOF_H
#define NBDNFS_PROOF_H

#include <stdbool.h>
#include <stdint.h>

#include "region/region.h"

#define NO_PROOF 0u

/* Of a page as it was written to the device. */
uint64_t proof_of(const struct region *region, const uint8_t *data);

/*
 * `data` is a page as the NAS returned it: is it what `proof` was made of? True also without a proof. When false,
 * `data` has no meaning any more.
 */
bool proof_open(const struct region *region, uint64_t page, uint64_t proof, uint8_t *data);

#endif
