/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Every store to the region is a place where the worker may be killed. In the build for that, gcc calls these functions
 * before each load and store of the engine's (-fsanitize=thread, without its library), and in place of each atomic
 * operation. What is copied into the region goes there 64 bytes at a time, as the widest store does it.
 */
#include "sim.h"

#include "wrapped.h"

#define WIDEST_STORE_BYTES 64u

/* A store to the region is about to be made. */
static void store_to(const volatile void *at)
{
	if (current == THREADS_MAX || !is_in_region((const void *)at))
		return;
	result.stores++;
	crash_point();
}

void copy_to_region(void *to, const void *from, size_t bytes)
{
	for (size_t at = 0; at < bytes; at += WIDEST_STORE_BYTES) {
		size_t piece = bytes - at < WIDEST_STORE_BYTES ? bytes - at : WIDEST_STORE_BYTES;

		store_to((uint8_t *)to + at);
		__real_memcpy((uint8_t *)to + at, (const uint8_t *)from + at, piece);
	}
}

#ifdef STORE_HOOKS

const bool has_store_hooks = true;

void __tsan_init(void);
void __tsan_func_entry(void *pc);
void __tsan_func_exit(void);

void __tsan_init(void)
{
}

void __tsan_func_entry(void *pc)
{
	(void)pc;
}

void __tsan_func_exit(void)
{
}

#define LOAD_AND_STORE(bytes)                                                                                          \
	void __tsan_read##bytes(void *at);                                                                             \
	void __tsan_write##bytes(void *at);                                                                            \
	void __tsan_unaligned_read##bytes(void *at);                                                                   \
	void __tsan_unaligned_write##bytes(void *at);                                                                  \
	void __tsan_read##bytes(void *at)                                                                              \
	{                                                                                                              \
		(void)at;                                                                                              \
	}                                                                                                              \
	void __tsan_write##bytes(void *at)                                                                             \
	{                                                                                                              \
		store_to(at);                                                                                          \
	}                                                                                                              \
	void __tsan_unaligned_read##bytes(void *at)                                                                    \
	{                                                                                                              \
		(void)at;                                                                                              \
	}                                                                                                              \
	void __tsan_unaligned_write##bytes(void *at)                                                                   \
	{                                                                                                              \
		store_to(at);                                                                                          \
	}

LOAD_AND_STORE(1)
LOAD_AND_STORE(2)
LOAD_AND_STORE(4)
LOAD_AND_STORE(8)
LOAD_AND_STORE(16)

void __tsan_read_range(void *at, size_t bytes);
void __tsan_write_range(void *at, size_t bytes);

void __tsan_read_range(void *at, size_t bytes)
{
	(void)at, (void)bytes;
}

void __tsan_write_range(void *at, size_t bytes)
{
	(void)bytes;
	store_to(at);
}

#define FETCH_AND(bits, name, builtin)                                                                                 \
	uint##bits##_t __tsan_atomic##bits##_##name(volatile uint##bits##_t *at, uint##bits##_t value, int order);     \
	uint##bits##_t __tsan_atomic##bits##_##name(volatile uint##bits##_t *at, uint##bits##_t value, int order)      \
	{                                                                                                              \
		(void)order;                                                                                           \
		store_to(at);                                                                                          \
		return builtin(at, value, __ATOMIC_SEQ_CST);                                                           \
	}

#define COMPARE_AND_EXCHANGE(bits, name)                                                                               \
	bool __tsan_atomic##bits##_##name(volatile uint##bits##_t *at, uint##bits##_t *expected, uint##bits##_t value, \
					  int order, int otherwise);                                                   \
	bool __tsan_atomic##bits##_##name(volatile uint##bits##_t *at, uint##bits##_t *expected, uint##bits##_t value, \
					  int order, int otherwise)                                                    \
	{                                                                                                              \
		(void)order, (void)otherwise;                                                                          \
		store_to(at);                                                                                          \
		return __atomic_compare_exchange_n(at, expected, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);    \
	}

#define ATOMICS(bits)                                                                                                  \
	uint##bits##_t __tsan_atomic##bits##_load(const volatile uint##bits##_t *at, int order);                       \
	void __tsan_atomic##bits##_store(volatile uint##bits##_t *at, uint##bits##_t value, int order);                \
	uint##bits##_t __tsan_atomic##bits##_load(const volatile uint##bits##_t *at, int order)                        \
	{                                                                                                              \
		(void)order;                                                                                           \
		return __atomic_load_n(at, __ATOMIC_SEQ_CST);                                                          \
	}                                                                                                              \
	void __tsan_atomic##bits##_store(volatile uint##bits##_t *at, uint##bits##_t value, int order)                 \
	{                                                                                                              \
		(void)order;                                                                                           \
		store_to(at);                                                                                          \
		__atomic_store_n(at, value, __ATOMIC_SEQ_CST);                                                         \
	}                                                                                                              \
	FETCH_AND(bits, exchange, __atomic_exchange_n)                                                                 \
	FETCH_AND(bits, fetch_add, __atomic_fetch_add)                                                                 \
	FETCH_AND(bits, fetch_sub, __atomic_fetch_sub)                                                                 \
	FETCH_AND(bits, fetch_and, __atomic_fetch_and)                                                                 \
	FETCH_AND(bits, fetch_or, __atomic_fetch_or)                                                                   \
	COMPARE_AND_EXCHANGE(bits, compare_exchange_strong)                                                            \
	COMPARE_AND_EXCHANGE(bits, compare_exchange_weak)

ATOMICS(8)
ATOMICS(16)
ATOMICS(32)
ATOMICS(64)

#else

const bool has_store_hooks = false;

#endif
