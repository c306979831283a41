/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Clock, events, and threads that are coroutines: one of them runs at a time, and the seed says which. */
#include "sim.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define STACK_BYTES (256u * 1024)

static _Alignas(4096) uint8_t stacks[THREADS_MAX][STACK_BYTES];
#define EVENTS_MAX 65536u

int64_t now_ns, slept_ns;
unsigned current = THREADS_MAX;
struct thread threads[THREADS_MAX];

static uint64_t runnable;       /* threads, as bits */
static int64_t next_deadline_ns;
static void *scheduler_stack;
static bool stopped;
static struct rng schedule;

struct event {
	int64_t at_ns;
	uint64_t number;        /* of two at the same time, the one that was made first comes first */
	event_fn fn;
	void *a;
	uint64_t b, c;
};

static struct event heap[EVENTS_MAX];
static uint32_t heap_count;
static uint64_t event_number;

void trace(uint64_t what)
{
	result.trace = (result.trace ^ what) * 0x9e3779b97f4a7c15u;
	result.trace ^= result.trace >> 29;
}

/* ---- events ---- */

static bool comes_before(const struct event *one, const struct event *other)
{
	return one->at_ns != other->at_ns ? one->at_ns < other->at_ns : one->number < other->number;
}

void event_at(int64_t at_ns, event_fn fn, void *a, uint64_t b, uint64_t c)
{
	struct event event = { at_ns, event_number++, fn, a, b, c };
	uint32_t at = heap_count++;

	if (heap_count > EVENTS_MAX) {
		fprintf(stderr, "simulate: too many events\n");
		abort();
	}
	while (at > 0 && comes_before(&event, &heap[(at - 1) / 2])) {
		heap[at] = heap[(at - 1) / 2];
		at = (at - 1) / 2;
	}
	heap[at] = event;
}

static struct event event_take(void)
{
	struct event first = heap[0], last = heap[--heap_count];
	uint32_t at = 0, child;

	while ((child = 2 * at + 1) < heap_count) {
		if (child + 1 < heap_count && comes_before(&heap[child + 1], &heap[child]))
			child++;
		if (!comes_before(&heap[child], &last))
			break;
		heap[at] = heap[child];
		at = child;
	}
	heap[at] = last;
	return first;
}

/* ---- coroutines ---- */

#if defined(__x86_64__)
/* Save what a called function must keep, change stacks, and take it from there. */
void sim_switch(void **save, void *to);
__asm__(".text\n"
	".globl sim_switch\n"
	".type sim_switch, @function\n"
	"sim_switch:\n"
	"	pushq %rbp\n	pushq %rbx\n	pushq %r12\n	pushq %r13\n	pushq %r14\n	pushq %r15\n"
	"	movq %rsp, (%rdi)\n"
	"	movq %rsi, %rsp\n"
	"	popq %r15\n	popq %r14\n	popq %r13\n	popq %r12\n	popq %rbx\n	popq %rbp\n"
	"	ret\n"
	".size sim_switch, .-sim_switch\n");

static void thread_main(void);

static void *prepare_stack(uint8_t *stack)
{
	uintptr_t *top = (uintptr_t *)(stack + STACK_BYTES);

	*--top = 0; /* thread_main() does not return; the stack is aligned as after a call */
	*--top = (uintptr_t)thread_main;
	for (int i = 0; i < 6; i++)
		*--top = 0;
	return top;
}
#else
#include <ucontext.h>

static void thread_main(void);

static void sim_switch(void **save, void *to)
{
	ucontext_t here;

	*save = &here;
	swapcontext(&here, to);
}

static void *prepare_stack(uint8_t *stack)
{
	ucontext_t *context = (ucontext_t *)stack;

	getcontext(context);
	context->uc_stack.ss_sp = stack + sizeof(*context);
	context->uc_stack.ss_size = STACK_BYTES - sizeof(*context);
	makecontext(context, thread_main, 0);
	return context;
}
#endif

static void to_scheduler(void)
{
	unsigned me = current;

	sim_switch(&threads[me].stack_pointer, scheduler_stack);
}

static void thread_main(void)
{
	struct thread *thread = &threads[current];

	thread->body(thread->argument);
	thread->ended = true;
	trace(0x100 + current);
	threads_wake(thread->joiners);
	runnable &= ~thread_bit();
	to_scheduler();
	abort();
}

unsigned thread_new(void *(*body)(void *), void *argument)
{
	for (unsigned i = 0; i < THREADS_MAX; i++) {
		struct thread *thread = &threads[i];

		if (thread->used)
			continue;
		*thread = (struct thread){ .body = body, .argument = argument, .wake_at_ns = NEVER, .used = true };
		thread->stack_pointer = prepare_stack(stacks[i]);
		runnable |= (uint64_t)1 << i;
		return i;
	}
	fprintf(stderr, "simulate: too many threads\n");
	abort();
}

void threads_drop(void)
{
	for (unsigned i = 0; i < THREADS_MAX; i++)
		threads[i].used = false;
	runnable = 0;
}

void thread_block(int64_t wake_at_ns)
{
	threads[current].wake_at_ns = wake_at_ns;
	if (wake_at_ns < next_deadline_ns)
		next_deadline_ns = wake_at_ns;
	runnable &= ~thread_bit();
	to_scheduler();
	threads[current].wake_at_ns = NEVER;
}

void thread_wake(unsigned thread)
{
	if (threads[thread].used && !threads[thread].ended)
		runnable |= (uint64_t)1 << thread;
}

void threads_wake(uint64_t mask)
{
	for (; mask != 0; mask &= mask - 1)
		thread_wake((unsigned)__builtin_ctzll(mask));
}

void thread_yield(void)
{
	if ((runnable & (runnable - 1)) != 0 || worker_kill_is_due())
		to_scheduler();
}

void thread_preempt(void)
{
	if (current < THREADS_MAX && rng_chance(&schedule, options.preempt))
		thread_yield();
}

void thread_sleep(int64_t ns)
{
	int64_t until_ns = now_ns + ns;

	while (now_ns < until_ns)
		thread_block(until_ns);
}

/* ---- who runs ---- */

static void wake_late(void)
{
	int64_t next_ns = NEVER;

	for (unsigned i = 0; i < THREADS_MAX; i++) {
		struct thread *thread = &threads[i];

		if (!thread->used || thread->ended || thread->wake_at_ns == NEVER)
			continue;
		if (thread->wake_at_ns <= now_ns) {
			runnable |= (uint64_t)1 << i;
			thread->wake_at_ns = NEVER;
		} else if (thread->wake_at_ns < next_ns) {
			next_ns = thread->wake_at_ns;
		}
	}
	next_deadline_ns = next_ns;
}

/* One of them by chance. */
static unsigned choose(uint64_t mask)
{
	uint32_t number = rng_below(&schedule, (uint32_t)__builtin_popcountll(mask));

	while (number-- > 0)
		mask &= mask - 1;
	return (unsigned)__builtin_ctzll(mask);
}

static void run_thread(unsigned thread)
{
	current = thread;
	trace(thread ^ (uint64_t)now_ns << 8);
	sim_switch(&scheduler_stack, threads[thread].stack_pointer);
	current = THREADS_MAX;
	now_ns += (int64_t)(rng_next(&schedule) >> 51); /* up to 8 us */
}

void world_run(void)
{
	while (!stopped && !result.failed) {
		if (worker_kill_is_due()) {
			worker_killed();
			continue;
		}
		if (now_ns >= next_deadline_ns)
			wake_late();
		if (heap_count > 0 && heap[0].at_ns <= now_ns) {
			struct event event = event_take();

			trace(event.b ^ event.c << 32);
			event.fn(event.a, event.b, event.c);
			continue;
		}
		if (runnable != 0) {
			run_thread(choose(runnable));
			continue;
		}
		if (heap_count == 0 && next_deadline_ns == NEVER) {
			sim_fail("deadlock: no thread can run, and nothing will happen");
			return;
		}
		now_ns = heap_count > 0 && heap[0].at_ns < next_deadline_ns ? heap[0].at_ns : next_deadline_ns;
	}
}

void world_stop(void)
{
	stopped = true;
}

void world_reset(void)
{
	threads_drop();
	heap_count = 0;
	event_number = 0;
	now_ns = slept_ns = 0;
	next_deadline_ns = NEVER;
	stopped = false;
	current = THREADS_MAX;
	schedule.state = options.seed ^ 0x5c4ed01e;
}

void sim_fail(const char *format, ...)
{
	va_list ap;

	if (!result.failed) {
		int length = snprintf(result.why, sizeof(result.why), "after %.6f s: ", (double)now_ns / 1e9);

		va_start(ap, format);
		vsnprintf(result.why + length, sizeof(result.why) - (size_t)length, format, ap);
		va_end(ap);
	}
	result.failed = true;
	if (current < THREADS_MAX)
		to_scheduler();
}
