/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "base/cipher.h"

#include <errno.h>
#include <sodium.h>
#include <string.h>
#include <sys/random.h>

#include "base/assert.h"

_Static_assert(crypto_shorthash_siphash24_KEYBYTES == sizeof(((struct cipher_keys *)NULL)->tag), "SipHash-2-4's key");
_Static_assert(crypto_shorthash_siphash24_BYTES == sizeof(uint64_t), "its result");
_Static_assert(crypto_stream_xchacha20_KEYBYTES == sizeof(((struct cipher_keys *)NULL)->stream), "XChaCha20's key");
_Static_assert(sizeof(struct cipher_keys) == 64, "layout of the region's header");

/* What stands for "unknown" in the region's table is not a tag. */
#define INSTEAD_OF_ZERO 1u
#define PAGE_BYTES 4096

int cipher_init(void)
{
	static const struct cipher_keys keys = { .tag = { 1 }, .stream = { 1 } };
	uint8_t data[PAGE_BYTES] = { 1 };
	uint64_t tag;

	if (sodium_init() < 0)
		return -ENOSYS;
	tag = cipher_tag(&keys, data, sizeof(data));
	cipher_apply(&keys, 0, tag, data, sizeof(data));
	assert(cipher_tag(&keys, data, sizeof(data)) != tag);
	cipher_apply(&keys, 0, tag, data, sizeof(data));
	assert(cipher_tag(&keys, data, sizeof(data)) == tag);
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

uint64_t cipher_tag(const struct cipher_keys *keys, const uint8_t *data, size_t length)
{
	uint64_t tag;

	crypto_shorthash_siphash24((uint8_t *)&tag, data, length, keys->tag);
	return tag != 0 ? tag : INSTEAD_OF_ZERO;
}

void cipher_apply(const struct cipher_keys *keys, uint64_t page, uint64_t tag, uint8_t *data, size_t length)
{
	uint8_t nonce[crypto_stream_xchacha20_NONCEBYTES] = { 0 };

	assert(tag != 0);
	memcpy(nonce, &page, sizeof(page));
	memcpy(nonce + sizeof(page), &tag, sizeof(tag));
	crypto_stream_xchacha20_xor(data, data, length, nonce, keys->stream);
}
