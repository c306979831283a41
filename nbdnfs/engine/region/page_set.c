/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "region/page_set.h"

#include "base/assert.h"

#include <stdlib.h>
#include <string.h>

static uint64_t words_for(uint64_t bits)
{
	return (bits + 63) / 64;
}

bool page_set_init(struct page_set *set, uint64_t limit)
{
	uint64_t words = 0, bits = limit, bytes;
	uint64_t *at;

	assert(limit > 0);
	*set = (struct page_set){ .limit = limit };
	do {
		assert(set->level_count < PAGE_SET_LEVELS);
		set->level_count++;
		bits = words_for(bits);
		words += bits;
	} while (bits > 1);
	bytes = words_for(words * sizeof(*at)) * 64; /* aligned_alloc() wants multiples */
	if (bytes > SIZE_MAX / 2)
		return false;
	set->words = at = aligned_alloc(64, (size_t)bytes);
	if (at == NULL)
		return false;
	memset(at, 0, (size_t)bytes); /* faults the pages in now, not when memory is short */
	bits = limit;
	for (unsigned level = 0; level < set->level_count; level++) {
		set->levels[level] = at;
		bits = words_for(bits);
		at += bits;
	}
	return true;
}

void page_set_deinit(struct page_set *set)
{
	free(set->words);
	*set = (struct page_set){ 0 };
}

void page_set_put(struct page_set *set, uint64_t number, bool is_member)
{
	assert(number < set->limit);
	for (unsigned level = 0; level < set->level_count; level++, number /= 64) {
		uint64_t *word = &set->levels[level][number / 64], before = *word;
		uint64_t bit = (uint64_t)1 << (number % 64);

		*word = is_member ? before | bit : before & ~bit;
		if ((*word == 0) == (before == 0))
			return; /* nothing changes above */
	}
}

bool page_set_next(const struct page_set *set, uint64_t from, uint64_t *member)
{
	uint64_t number = from, bits = set->limit, word = 0;
	unsigned level;

	/* up, until a word has a bit from `number` on */
	for (level = 0; level < set->level_count && number < bits; level++) {
		word = set->levels[level][number / 64] >> (number % 64);
		if (word != 0)
			break;
		number = number / 64 + 1;
		bits = words_for(bits);
	}
	if (word == 0)
		return false;
	number += (uint64_t)__builtin_ctzll(word);
	/* and down to it */
	while (level > 0) {
		word = set->levels[--level][number];
		assert(word != 0);
		number = number * 64 + (uint64_t)__builtin_ctzll(word);
	}
	*member = number;
	return true;
}
