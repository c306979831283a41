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

static uint32_t table[256];
static bool has_instruction;
static pthread_once_t once = PTHREAD_ONCE_INIT; /* guards the two above; read-only afterwards */

static void init(void)
{
	for (uint32_t byte = 0; byte < 256; byte++) {
		uint32_t value = byte;

		for (int bit = 0; bit < 8; bit++)
			value = value >> 1 ^ (value & 1 ? POLYNOMIAL_REFLECTED : 0);
		table[byte] = value;
	}
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
__attribute__((target("sse4.2"))) static uint32_t by_instruction(const uint8_t *data, size_t length)
{
	uint64_t crc = ~0u;

	for (; length >= 8; data += 8, length -= 8) {
		uint64_t word;

		memcpy(&word, data, 8);
		crc = __builtin_ia32_crc32di(crc, word);
	}
	while (length-- > 0)
		crc = __builtin_ia32_crc32qi((uint32_t)crc, *data++);
	return ~(uint32_t)crc;
}
#elif defined(__aarch64__)
__attribute__((target("+crc"))) static uint32_t by_instruction(const uint8_t *data, size_t length)
{
	uint32_t crc = ~0u;

	for (; length >= 8; data += 8, length -= 8) {
		uint64_t word;

		memcpy(&word, data, 8);
		crc = __crc32cd(crc, word);
	}
	while (length-- > 0)
		crc = __crc32cb(crc, *data++);
	return ~crc;
}
#else
#define by_instruction crc32c_by_table
#endif

uint32_t crc32c(const void *data, size_t length)
{
	pthread_once(&once, init);
	return has_instruction ? by_instruction(data, length) : crc32c_by_table(data, length);
}
