/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "base/cipher.h"

#include <errno.h>
#include <nettle/version.h>
#include <sodium.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#ifdef __aarch64__
#include <sys/auxv.h>
#endif

#include "base/assert.h"

_Static_assert(crypto_shorthash_siphash24_KEYBYTES == sizeof(((struct cipher_keys *)NULL)->tag), "SipHash-2-4's key");
_Static_assert(crypto_shorthash_siphash24_BYTES == sizeof(uint64_t), "its result");
_Static_assert(crypto_stream_xchacha20_KEYBYTES == sizeof(((struct cipher_keys *)NULL)->stream), "XChaCha20's key");
_Static_assert(UMAC_KEY_SIZE == sizeof(((struct cipher_keys *)NULL)->tag), "UMAC's key");
_Static_assert(UMAC64_DIGEST_SIZE == sizeof(uint64_t), "its result");
_Static_assert(AES256_KEY_SIZE == sizeof(((struct cipher_keys *)NULL)->stream), "AES-256's key");
_Static_assert(sizeof(struct cipher_keys) == 64, "layout of the region's header");

/* What stands for "unknown" in the region's table is not a tag. */
#define INSTEAD_OF_ZERO 1u

enum cipher_kind cipher_best(void)
{
	/* where nettle uses the processor's AES; without, it has tables, which are slow and leak by their timing */
#if defined(__x86_64__)
	return __builtin_cpu_supports("aes") ? CIPHER_AES : CIPHER_XCHACHA20;
#elif defined(__aarch64__) && (NETTLE_VERSION_MAJOR > 3 || NETTLE_VERSION_MINOR >= 8)
	return getauxval(AT_HWCAP) & HWCAP_AES ? CIPHER_AES : CIPHER_XCHACHA20;
#else
	return CIPHER_XCHACHA20;
#endif
}

static void expand(struct cipher *cipher, enum cipher_kind kind, const struct cipher_keys *keys)
{
	cipher->kind = kind;
	cipher->keys = keys;
	if (kind != CIPHER_AES)
		return;
	umac64_set_key(&cipher->umac, keys->tag);
	aes256_set_encrypt_key(&cipher->aes, keys->stream);
}

int cipher_init(enum cipher_kind kind)
{
	static const struct cipher_keys keys = { .tag = { 1 }, .stream = { 1 } };
	uint8_t data[CIPHER_PAGE_BYTES] = { 1 };
	struct cipher cipher;
	uint64_t tag;

	if (kind == CIPHER_XCHACHA20 && sodium_init() < 0)
		return -ENOSYS;
	expand(&cipher, kind, &keys);
	tag = cipher_tag(&cipher, data);
	cipher_apply(&cipher, 0, tag, data);
	assert(cipher_tag(&cipher, data) != tag);
	cipher_apply(&cipher, 0, tag, data);
	assert(cipher_tag(&cipher, data) == tag);
	return 0;
}

int cipher_make_keys(struct cipher_keys *keys)
{
	struct cipher_keys made = { .tag = { 0 } };

	/* at most 256 bytes are never interrupted (getrandom(2)), and the rest of the structure stays 0 */
	if (getrandom(made.tag, sizeof(made.tag), 0) != sizeof(made.tag) ||
	    getrandom(made.stream, sizeof(made.stream), 0) != sizeof(made.stream))
		return errno != 0 ? -errno : -EIO;
	*keys = made;
	sodium_memzero(&made, sizeof(made));
	return 0;
}

void cipher_forget_keys(struct cipher_keys *keys)
{
	sodium_memzero(keys, sizeof(*keys));
}

struct cipher *cipher_begin(enum cipher_kind kind, const struct cipher_keys *keys)
{
	struct cipher *cipher =
		mmap(NULL, sizeof(*cipher), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (cipher == MAP_FAILED)
		return NULL;
	madvise(cipher, sizeof(*cipher), MADV_DONTDUMP);
	expand(cipher, kind, keys);
	return cipher;
}

void cipher_end(struct cipher *cipher)
{
	sodium_memzero(cipher, sizeof(*cipher));
	munmap(cipher, sizeof(*cipher));
}

/* What of a context is used for whole blocks: its buffer comes last, and stays unused. */
#define UMAC_BYTES offsetof(struct umac64_ctx, block)
_Static_assert(CIPHER_PAGE_BYTES % UMAC_BLOCK_SIZE == 0, "whole blocks");

/* With the nonce that a key begins with. A context counts nonces, so each tag takes a copy of the fresh one. */
static uint64_t umac_tag(const struct umac64_ctx *fresh, const uint8_t *data)
{
	struct umac64_ctx umac;
	uint64_t tag;

	memcpy(&umac, fresh, UMAC_BYTES);
	umac64_update(&umac, CIPHER_PAGE_BYTES, data);
	umac64_digest(&umac, sizeof(tag), (uint8_t *)&tag);
	sodium_memzero(&umac, UMAC_BYTES);
	return tag;
}

uint64_t cipher_tag(const struct cipher *cipher, const uint8_t *data)
{
	uint64_t tag;

	if (cipher->kind == CIPHER_AES)
		tag = umac_tag(&cipher->umac, data);
	else
		crypto_shorthash_siphash24((uint8_t *)&tag, data, CIPHER_PAGE_BYTES, cipher->keys->tag);
	return tag != 0 ? tag : INSTEAD_OF_ZERO;
}

/*
 * Counter mode over nettle's AES. nettle's own function for it does the same in half as many instructions again
 * (docs/decisions/0028, "Cost").
 */
typedef uint8_t aes_block __attribute__((vector_size(AES_BLOCK_SIZE)));

/* What is encrypted in one call: a part of a page, as threads have small stacks. */
#define STREAM_BLOCKS 64
_Static_assert(CIPHER_PAGE_BYTES % (STREAM_BLOCKS * AES_BLOCK_SIZE) == 0, "whole parts");

/* The number of a page's first block, big-endian: its last byte counts to 255 and does not carry. */
_Static_assert(CIPHER_PAGE_BYTES / AES_BLOCK_SIZE == 256, "as many blocks as a byte has values");

static void aes_apply(const struct aes256_ctx *aes, uint64_t page, uint64_t tag, uint8_t *data)
{
	static const aes_block one = { 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1 };
	aes_block stream[STREAM_BLOCKS], counter;
	uint8_t number[sizeof(page)];

	for (unsigned i = 0; i < sizeof(number); i++)
		number[i] = (uint8_t)(page << 8 >> (56 - 8 * i));
	memcpy(&counter, &tag, sizeof(tag));
	memcpy((uint8_t *)&counter + sizeof(tag), number, sizeof(number));
	for (uint8_t *part = data; part < data + CIPHER_PAGE_BYTES; part += sizeof(stream)) {
#pragma GCC unroll 8
		for (unsigned i = 0; i < STREAM_BLOCKS; i++) {
			stream[i] = counter;
			counter += one;
		}
		aes256_encrypt(aes, sizeof(stream), (uint8_t *)stream, (const uint8_t *)stream);
#pragma GCC unroll 8
		for (unsigned i = 0; i < STREAM_BLOCKS; i++) {
			aes_block text;

			memcpy(&text, part + (size_t)i * sizeof(text), sizeof(text));
			text ^= stream[i];
			memcpy(part + (size_t)i * sizeof(text), &text, sizeof(text));
		}
	}
}

static void xchacha20_apply(const uint8_t *key, uint64_t page, uint64_t tag, uint8_t *data)
{
	uint8_t nonce[crypto_stream_xchacha20_NONCEBYTES] = { 0 };

	memcpy(nonce, &page, sizeof(page));
	memcpy(nonce + sizeof(page), &tag, sizeof(tag));
	crypto_stream_xchacha20_xor(data, data, CIPHER_PAGE_BYTES, nonce, key);
}

void cipher_apply(const struct cipher *cipher, uint64_t page, uint64_t tag, uint8_t *data)
{
	assert(tag != 0);
	if (cipher->kind == CIPHER_AES)
		aes_apply(&cipher->aes, page, tag, data);
	else
		xchacha20_apply(cipher->keys->stream, page, tag, data);
}
