/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "base/crc32c.h"

#include <pthread.h>
#include <stdbool.h>
#include <string.h>

#if defined(__aarch64__)
#include <arm_acle.h>
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#define POLYNOMIAL_REFLECTED 0x82f63b78u

/* Three parts make most of a page: 4096 bytes are three of them, and 16 more. */
#define PART_BYTES 1360
#define PARTS_BYTES ((size_t)3 * PART_BYTES)

static uint32_t table[256];
static uint32_t zeros_after[4][256]; /* of each byte of a value, what PART_BYTES zeros after it make of it */
static bool has_instruction;
static pthread_once_t once = PTHREAD_ONCE_INIT; /* guards the three above; read-only afterwards */

static void init_zeros_after(void)
{
	for (unsigned bit = 0; bit < 32; bit++) {
		uint32_t value = (uint32_t)1 << bit, *of_byte = zeros_after[bit / 8];

		for (size_t byte = 0; byte < PART_BYTES; byte++)
			value = value >> 8 ^ table[value & 0xff];
		for (uint32_t low = 0; low < (uint32_t)1 << bit % 8; low++)
			of_byte[low | (uint32_t)1 << bit % 8] = of_byte[low] ^ value;
	}
}

static void init(void)
{
	for (uint32_t byte = 0; byte < 256; byte++) {
		uint32_t value = byte;

		for (int bit = 0; bit < 8; bit++)
			value = value >> 1 ^ (value & 1 ? POLYNOMIAL_REFLECTED : 0);
		table[byte] = value;
	}
	init_zeros_after();
#if defined(__x86_64__)
	has_instruction = __builtin_cpu_supports("sse4.2");
#elif defined(__aarch64__)
	has_instruction = getauxval(AT_HWCAP) & HWCAP_CRC32;
#endif
}

uint32_t crc32c_by_table(const void *data, size_t length)
{
	const uint8_t *byte = data;
	uint32_t crc = ~0u;

	pthread_once(&once, init);
	while (length-- > 0)
		crc = crc >> 8 ^ table[(crc ^ *byte++) & 0xff];
	return ~crc;
}

#if defined(__x86_64__)
#define WITH_INSTRUCTION __attribute__((target("sse4.2")))
#define NEXT_WORD(crc, word) __builtin_ia32_crc32di(crc, word)
#define NEXT_BYTE(crc, byte) __builtin_ia32_crc32qi((uint32_t)(crc), byte)
#elif defined(__aarch64__)
#define WITH_INSTRUCTION __attribute__((target("+crc")))
#define NEXT_WORD(crc, word) __crc32cd((uint32_t)(crc), word)
#define NEXT_BYTE(crc, byte) __crc32cb((uint32_t)(crc), byte)
#endif

#ifdef WITH_INSTRUCTION
/* `crc` with PART_BYTES zeros after it. */
static inline uint64_t with_zeros(uint64_t crc)
{
	return zeros_after[0][crc & 0xff] ^ zeros_after[1][crc >> 8 & 0xff] ^ zeros_after[2][crc >> 16 & 0xff] ^
	       zeros_after[3][crc >> 24];
}

static inline uint64_t word_at(const uint8_t *data)
{
	uint64_t word;

	memcpy(&word, data, sizeof(word));
	return word;
}

/* Each instruction waits for the result of the one before, for three cycles: three parts are computed side by side. */
WITH_INSTRUCTION static uint32_t by_instruction(const uint8_t *data, size_t length)
{
	uint64_t crc = ~0u;

	for (; length >= PARTS_BYTES; data += PARTS_BYTES, length -= PARTS_BYTES) {
		uint64_t second = 0, third = 0;

#pragma GCC unroll 10
		for (size_t at = 0; at < PART_BYTES; at += 8) {
			crc = NEXT_WORD(crc, word_at(data + at));
			second = NEXT_WORD(second, word_at(data + at + PART_BYTES));
			third = NEXT_WORD(third, word_at(data + at + (size_t)2 * PART_BYTES));
		}
		crc = with_zeros(with_zeros(crc) ^ second) ^ third;
	}
	for (; length >= 8; data += 8, length -= 8)
		crc = NEXT_WORD(crc, word_at(data));
	while (length-- > 0)
		crc = NEXT_BYTE(crc, *data++);
	return ~(uint32_t)crc;
}
#else
#define by_instruction crc32c_by_table
#endif

uint32_t crc32c(const void *data, size_t length)
{
	pthread_once(&once, init);
	return has_instruction ? by_instruction(data, length) : crc32c_by_table(data, length);
}
