/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * cipher: pages as the NAS sees them, by libsodium. docs/decisions/0028 has the construction and its reasons.
 *
 * A page has a tag, a pseudo-random function of its bytes (SipHash-2-4). The page is encrypted with XChaCha20 under the
 * nonce "page number, tag": another page, or other bytes, have another key stream. Who decrypts knows the tag, computes
 * it from the bytes that come out, and compares. This is the composition of SIV (RFC 5297), with the tag kept here
 * instead of beside the ciphertext.
 *
 * No locks, no allocation. All functions but cipher_init() only read the keys.
 */
#ifndef NBDNFS_CIPHER_H
#define NBDNFS_CIPHER_H

#include <stddef.h>
#include <stdint.h>

/* Random, and known to this machine alone until it boots. */
struct cipher_keys {
	uint8_t tag[16];
	uint8_t stream[32];
	uint8_t reserved[16];   /* zeros */
};

/*
 * Before any other function: choose the implementation for this processor, and run all code and use all tables that the
 * functions below will use, so that they fault in nothing later. Any thread, any number of times. Returns 0 or -ENOSYS.
 */
int cipher_init(void);

/* Waits until the kernel's random number generator is seeded. Returns 0 or -errno. */
int cipher_make_keys(struct cipher_keys *keys);

/* Overwrite them, even where nothing reads them any more. */
void cipher_forget_keys(struct cipher_keys *keys);

/* Of a page of `length` bytes. Never 0. */
uint64_t cipher_tag(const struct cipher_keys *keys, const uint8_t *data, size_t length);

/* Encrypt or decrypt in place: one is the other's opposite. */
void cipher_apply(const struct cipher_keys *keys, uint64_t page, uint64_t tag, uint8_t *data, size_t length);

#endif
