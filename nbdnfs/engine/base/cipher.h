/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * cipher: pages as the NAS sees them, by libsodium or nettle. docs/decisions/0028 has the constructions and their
 * reasons.
 *
 * A page has a tag, a keyed hash of its bytes. The page is encrypted with a key stream that page number and tag select:
 * another page, or other bytes, have another one. Who decrypts knows the tag, computes it from the bytes that come out,
 * and compares. This is the composition of SIV (RFC 5297), with the tag kept here instead of beside the ciphertext.
 *
 * No locks, and no allocation for a page. A cipher is constant while it is used.
 */
#ifndef NBDNFS_CIPHER_H
#define NBDNFS_CIPHER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <nettle/aes.h>
#include <nettle/umac.h>

enum cipher_kind {
	CIPHER_XCHACHA20,       /* and SipHash-2-4 for the tag: libsodium's, on any processor */
	CIPHER_AES,             /* AES-256 in counter mode, and UMAC-64: nettle, where the processor has AES */
};

/* Random, and known to this machine alone until it boots. The same for each kind. */
struct cipher_keys {
	uint8_t tag[16];
	uint8_t stream[32];
	uint8_t reserved[16];   /* zeros */
};

/* What tags and encrypts pages under one set of keys. */
struct cipher {
	enum cipher_kind kind;
	const struct cipher_keys *keys;
	/* of CIPHER_AES: what the keys expand to */
	struct umac64_ctx umac;
	struct aes256_ctx aes;
};

/* The fastest one for this processor. */
enum cipher_kind cipher_best(void);

/*
 * Before the first page, for the kind that is used: choose the implementation for this processor, and run all code and
 * use all tables that cipher_tag() and cipher_apply() will use, so that they fault in nothing later. Any thread, any
 * number of times. Returns 0 or -ENOSYS.
 */
int cipher_init(enum cipher_kind kind);

/* Waits until the kernel's random number generator is seeded. Returns 0 or -errno. */
int cipher_make_keys(struct cipher_keys *keys);

/* Overwrite them, even where nothing reads them any more. */
void cipher_forget_keys(struct cipher_keys *keys);

/*
 * In memory of its own, which is in no core file. The keys must stay where they are until cipher_end(), which
 * overwrites what was made of them. NULL: out of memory.
 */
struct cipher *cipher_begin(enum cipher_kind kind, const struct cipher_keys *keys);
void cipher_end(struct cipher *cipher);

#define CIPHER_PAGE_BYTES 4096

/* Of a page of CIPHER_PAGE_BYTES. Never 0. */
uint64_t cipher_tag(const struct cipher *cipher, const uint8_t *data);

/* Encrypt or decrypt a page in place: one is the other's opposite. Its number is less than 2^56. */
void cipher_apply(const struct cipher *cipher, uint64_t page, uint64_t tag, uint8_t *data);

#endif
