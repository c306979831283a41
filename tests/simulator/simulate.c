/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Options, faults by the clock, seeds, and the report. */
#include "sim.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "wrapped.h"

/* Faults end after so long, whatever has been asked by then; and what waits then ends within so long (0020). */
#define FAULTS_NS (900 * S)
#define LIMIT_NS (1200 * S)
/* A run that takes so long by the real clock does not end. Most take some hundredths of a second. */
#define RUN_LIMIT_S 600

struct sim_options options;
struct sim_result result;

static const char *const fault_names[] = {
#define X(name) #name,
	FAULTS(X)
#undef X
};

/* ---- faults ---- */

static bool are_active[FAULT_COUNT];
static struct rng fault_times[FAULT_COUNT];
static bool are_over, is_cut;
int64_t woke_at_ns;

bool fault_is_active(enum fault fault)
{
	return are_active[fault] || (fault == FAULT_partition && is_cut);
}

bool run_is_calm(uint32_t besides)
{
	return (options.faults & ~(CALM_FAULTS | besides)) == 0 && options.fail_at == 0 && options.crash_at == 0;
}

bool faults_are_over(void)
{
	return are_over;
}

static void partition_ends(void *a, uint64_t b, uint64_t c)
{
	(void)a, (void)b, (void)c;
	is_cut = false;
}

void fault_partition(int64_t length_ns)
{
	is_cut = true;
	event_at(now_ns + length_ns, partition_ends, NULL, 0, 0);
}

void fault_sleep(int64_t length_ns)
{
	slept_ns += length_ns;
	woke_at_ns = now_ns;
}

static void set_fault(enum fault fault, bool begins)
{
	struct rng *times = &fault_times[fault];

	if (are_active[fault] == begins)
		return;
	are_active[fault] = begins;
	result.faults[fault] += begins;
	trace(0x200 + fault * 2 + begins);
	if (options.verbose)
		fprintf(stderr, "%14.6f fault %s %s\n", (double)now_ns / 1e9, fault_names[fault],
			begins ? "begins" : "ends");
	if (fault == FAULT_worker_crash && begins)
		crash_soon(1 + rng_below(times, 400));
	if (fault == FAULT_hang_up && begins)
		nbd_client_hang_up_soon(1 + rng_below(times, 64u << rng_below(times, 12)));
	if (fault == FAULT_suspend && begins)
		fault_sleep(rng_between(times, 0, 60 * S));
	network_fault(fault == FAULT_reset || fault == FAULT_blackhole ? fault : FAULT_reset,
		      begins && (fault == FAULT_reset || fault == FAULT_blackhole));
	nas_fault(fault, begins);
}

/* A time around the mean, often much shorter and sometimes longer. */
static int64_t some_ns(struct rng *times, int64_t mean_ns)
{
	int64_t ns = mean_ns >> rng_below(times, 6);

	return 1 + rng_between(times, 0, 3 * ns);
}

static void fault_turns(void *a, uint64_t b, uint64_t c)
{
	enum fault fault = (enum fault)b;
	struct rng *times = &fault_times[fault];
	/* a permission lasts for 20 s, and looks are refused for longer than that */
	int64_t length_ns = options.fault_length_ns * (fault == FAULT_owner_refused ? 8 : 1);

	(void)a;
	if (are_over)
		return;
	set_fault(fault, c != 0);
	event_at(now_ns + some_ns(times, c != 0 ? length_ns : options.fault_gap_ns), fault_turns, NULL, b,
		 c == 0);
}

static void check_end(void *a, uint64_t b, uint64_t c)
{
	(void)a, (void)b, (void)c;
	sim_fail("hung: %lld s after the last fault, %s", LIMIT_NS / S, load_oldest());
}

void faults_end(void)
{
	if (are_over)
		return;
	for (enum fault fault = 0; fault < FAULT_COUNT; fault++)
		set_fault(fault, false);
	are_over = true;
	is_cut = false;
	event_at(now_ns + LIMIT_NS, check_end, NULL, 0, 0);
}

static void faults_must_end(void *a, uint64_t b, uint64_t c)
{
	(void)a, (void)b, (void)c;
	faults_end();
}

static void faults_reset(void)
{
	memset(are_active, 0, sizeof(are_active));
	are_over = is_cut = false;
	woke_at_ns = -S;
	event_at(FAULTS_NS, faults_must_end, NULL, 0, 0);
	for (enum fault fault = 0; fault < FAULT_COUNT; fault++) {
		fault_times[fault].state = options.seed ^ 0xfa0175 ^ (uint64_t)(fault + 1) << 32;
		if (options.faults >> fault & 1)
			event_at(some_ns(&fault_times[fault], options.fault_gap_ns), fault_turns, NULL, fault, 1);
	}
}

/* ---- a seed ---- */

static enum habit forced_habit = HABIT_COUNT; /* by the command line */

/* Some seeds have a habit, and what brings it out. */
static void apply_habit(struct rng *rng)
{
	uint32_t any = rng_below(rng, 16);

	options.habit = forced_habit < HABIT_COUNT ? forced_habit : any < HABIT_COUNT ? any : HABIT_MIXED;
	switch (options.habit) {
	case HABIT_REWRITES:
		options.faults &= CALM_FAULTS;
		options.threads = 4 + rng_below(rng, 5);
		options.hot_pages = 1 + rng_below(rng, 2);
		options.words_of_8 = options.round = options.read_ahead_pages = 0;
		options.slots = options.slots < 64 ? 64 : options.slots;
		options.latency_ns = 20 * MS;
		options.pages = 64;
		options.pause_chance = 1024;
		options.read_factor = 1;
		options.requests = 12800;
		break;
	case HABIT_WALKS:
		if (rng_chance(rng, 512))
			options.faults &= CALM_FAULTS;
		options.pages = 64;
		options.slots = 16 + 8 * rng_below(rng, 3);
		options.threads = 2 + rng_below(rng, 5);
		options.hot_pages = options.pages;
		options.read_ahead_pages = 8u << rng_below(rng, 3);
		options.words_of_8 = 0;
		options.latency_ns = rng_chance(rng, 512) ? 300 * US : 2 * MS;
		options.requests = 3200;
		break;
	case HABIT_HOLES:
		options.faults = (options.faults & CALM_FAULTS) | 1u << FAULT_blackhole;
		options.fault_gap_ns = 60 * S;
		options.fault_length_ns = S;
		options.pause_chance = 1024;
		options.requests = 800;
		break;
	default:
		break;
	}
}

static int forced_loop = -1;     /* by the command line */

/* One seed of four has the loop. The numbers are its own: another seed is the same run as before there was one. */
static void choose_loop(uint64_t seed)
{
	struct rng rng = { seed * 0x9e3779b97f4a7c15u ^ 0x100b };

	options.loop = rng_chance(&rng, 256);
	if (forced_loop >= 0)
		options.loop = forced_loop != 0;
	if (!options.loop) {
		options.faults &= ~(1u << FAULT_hang_up);
		return;
	}
	/* nothing needs the tick: with one of an hour, a wake-up that is lost is a hang */
	options.loop_tick_ms = rng_chance(&rng, 128) ? 2000 : 3600000;
	options.client_buffer_bytes = 2048u << rng_below(&rng, 8);
	options.client_errors = rng_chance(&rng, 512) ? 0 : 1u << rng_below(&rng, 6);
	options.client_pause = rng_chance(&rng, 512) ? 0 : 1u << rng_below(&rng, 6);
	if (options.habit == HABIT_MIXED && rng_chance(&rng, 256)) {
		options.threads = 12 + rng_below(&rng, REQUESTERS_MAX - 11);
		options.round = options.round > 0 ? options.threads * (1 + rng_below(&rng, 6)) : 0;
	}
}

static int64_t forced_soft_ms = -1; /* by the command line */

/* Some seeds are soft. Again by numbers of their own. */
static void choose_soft(uint64_t seed)
{
	struct rng rng = { seed * 0x9e3779b97f4a7c15u ^ 0x50f7 };

	options.soft_limit_ms = rng_chance(&rng, options.loop ? 256 : 64) ? 1000u << rng_below(&rng, 5) : 0;
	if (forced_soft_ms >= 0)
		options.soft_limit_ms = (uint32_t)forced_soft_ms;
	if (options.soft_limit_ms > 0 && options.habit == HABIT_MIXED && rng_chance(&rng, 512)) {
		/* the server is away, for longer than most limits, and that is all that happens */
		options.faults = (options.faults & CALM_FAULTS) | 1u << FAULT_partition;
		options.fault_gap_ns = 20 * S;
		options.fault_length_ns = 40 * S;
	}
}

/* How pages are encrypted. Again by numbers of its own. */
static void choose_cipher(uint64_t seed)
{
	struct rng rng = { seed * 0x9e3779b97f4a7c15u ^ 0xc1f4 };

	options.aes = rng_chance(&rng, 512);
}

static void options_of(uint64_t seed)
{
	struct rng rng = { seed * 0x9e3779b97f4a7c15u ^ 0x0975 };
	static const uint32_t preempts[] = { 4, 32, 128, 512 };
	static const int64_t latencies[] = { 50 * US, 300 * US, 2 * MS, 20 * MS };

	options.seed = seed;
	options.pages = 64u << rng_below(&rng, 4);
	options.slots = 16u << rng_below(&rng, 4);
	options.threads = 1 + rng_below(&rng, 12);
	options.connections = 1 + rng_below(&rng, 4);
	options.read_ahead_pages = rng_chance(&rng, 768) ? 8u << rng_below(&rng, 3) : 0;
	options.preempt = preempts[rng_below(&rng, 4)];
	options.latency_ns = latencies[rng_below(&rng, 4)];
	options.fault_gap_ns = (100 * MS) << rng_below(&rng, 8);
	options.fault_length_ns = (10 * MS) << rng_below(&rng, 10);
	options.send_buffer_bytes = 4096u << rng_below(&rng, 8);
	options.hot_pages = 1 + rng_below(&rng, rng_chance(&rng, 512) ? 8 : options.pages);
	options.pause_chance = rng_chance(&rng, 512) ? 1024 : 64;
	options.encrypt = rng_chance(&rng, 100);
	options.stable_writes = rng_chance(&rng, 64);
	options.owner = rng_chance(&rng, 300);
	options.faults = (uint32_t)rng_next(&rng) & (uint32_t)rng_next(&rng) & ((1u << FAULT_COUNT) - 1);
	options.requests = 100u << rng_below(&rng, 6);
	options.round = rng_chance(&rng, 512) ? options.threads * (1 + rng_below(&rng, 6)) : 0;
	options.words_of_8 = rng_chance(&rng, 768) ? 2 : rng_below(&rng, 8);
	options.read_factor = rng_chance(&rng, 128) ? 64 : 1;
	if (!options.owner || !rng_chance(&rng, 200))
		options.faults &= ~(1u << FAULT_thief);
	if (!options.owner)
		options.faults &= ~(1u << FAULT_owner_refused);
	options.late_ns = 4500 * MS; /* what was sent twice is held back for five seconds (0011) */
	apply_habit(&rng);
	choose_loop(seed);
	choose_soft(seed);
	choose_cipher(seed);
}

static void run_seed(void)
{
	memset(&result, 0, sizeof(result));
	world_reset();
	network_reset();
	region_forget();
	nas_reset();
	load_reset();
	nbd_client_reset();
	worker_reset();
	faults_reset();
	worker_start();
	world_run();
	result.time_ns = now_ns;
}

/* ---- the command line ---- */

struct overrides {
	int64_t requests, threads, pages, slots, connections, owner;
	uint32_t without, only;
	bool has_only;
	uint64_t crash_at, crash_end, fail_at, fail_end;
	uint32_t fail_variant;
	bool verbose, each;
};

static uint32_t fault_bits(const char *list)
{
	uint32_t bits = 0;

	while (*list != '\0') {
		size_t length = strcspn(list, ",");
		unsigned found = FAULT_COUNT;

		for (unsigned i = 0; i < FAULT_COUNT; i++)
			if (strlen(fault_names[i]) == length && strncmp(fault_names[i], list, length) == 0)
				found = i;
		if (found == FAULT_COUNT) {
			fprintf(stderr, "simulate: %.*s is no fault\n", (int)length, list);
			exit(2);
		}
		bits |= 1u << found;
		list += length + (list[length] == ',');
	}
	return bits;
}

static void apply(const struct overrides *overrides)
{
	if (overrides->requests >= 0)
		options.requests = (uint32_t)overrides->requests;
	if (overrides->threads > 0)
		options.threads = (uint32_t)overrides->threads;
	if (overrides->pages > 0)
		options.pages = (uint32_t)overrides->pages;
	if (overrides->slots > 0)
		options.slots = (uint32_t)overrides->slots;
	if (overrides->connections > 0)
		options.connections = (uint32_t)overrides->connections;
	if (overrides->owner >= 0)
		options.owner = overrides->owner != 0;
	if (options.hot_pages > options.pages)
		options.hot_pages = options.pages;
	if (overrides->has_only)
		options.faults = overrides->only;
	options.faults &= ~overrides->without;
	options.crash_at = overrides->crash_at;
	options.fail_at = overrides->fail_at;
	options.fail_variant = overrides->fail_variant;
	options.verbose = overrides->verbose;
}

static void crashed(int signal)
{
	char text[64];
	int length = snprintf(text, sizeof(text), "{\"seed\": %llu, \"failed\": \"signal %d\"}\n",
			      (unsigned long long)options.seed, signal);

	(void)!__real_write(1, text, (size_t)length);
	_exit(3);
}

static void watch_signals(void)
{
	static uint8_t stack[64 * 1024];
	stack_t alternative = { .ss_sp = stack, .ss_size = sizeof(stack) };
	struct sigaction action = { .sa_handler = crashed, .sa_flags = SA_ONSTACK };
	const int signals[] = { SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SIGALRM };

	sigaltstack(&alternative, NULL);
	for (unsigned i = 0; i < sizeof(signals) / sizeof(signals[0]); i++)
		sigaction(signals[i], &action, NULL);
}

static void add(struct sim_result *sum, const struct sim_result *one)
{
	sum->time_ns += one->time_ns;
	sum->page_ops += one->page_ops;
	sum->requests += one->requests;
	sum->worker_crashes += one->worker_crashes;
	sum->nas_crashes += one->nas_crashes;
	sum->loop_requests += one->loop_requests;
	sum->hang_ups += one->hang_ups;
	sum->connections += one->connections;
	sum->calls_nfs += one->calls_nfs;
	sum->points += one->points;
	sum->failable += one->failable;
	sum->failed_calls += one->failed_calls;
	sum->stores += one->stores;
	sum->copied_pages += one->copied_pages;
	sum->trace = (sum->trace ^ one->trace) * 0x9e3779b97f4a7c15u;
	for (unsigned i = 0; i < FAULT_COUNT; i++)
		sum->faults[i] += one->faults[i];
}

static void print(const struct sim_result *sum, uint64_t first, uint64_t seeds, double seconds)
{
	const struct {
		const char *name;
		uint64_t value;
	} numbers[] = {
		{ "page_ops", sum->page_ops },           { "requests", sum->requests },
		{ "worker_crashes", sum->worker_crashes }, { "nas_crashes", sum->nas_crashes },
		{ "connections", sum->connections },     { "nfs_calls", sum->calls_nfs },
		{ "points", sum->points },               { "failable", sum->failable },
		{ "failed_calls", sum->failed_calls },   { "stores", sum->stores },
		{ "copied_pages", sum->copied_pages },   { "loop_requests", sum->loop_requests },
		{ "hang_ups", sum->hang_ups },
	};

	printf("{\"first_seed\": %llu, \"seeds\": %llu, \"seconds\": %.3f, \"simulated_s\": %.3f",
	       (unsigned long long)first, (unsigned long long)seeds, seconds, (double)sum->time_ns / 1e9);
	for (unsigned i = 0; i < sizeof(numbers) / sizeof(numbers[0]); i++)
		printf(", \"%s\": %llu", numbers[i].name, (unsigned long long)numbers[i].value);
	printf(", \"trace\": \"%016llx\"", (unsigned long long)sum->trace);
	for (unsigned i = 0; i < FAULT_COUNT; i++)
		printf("%s\"%s\": %llu", i == 0 ? ", \"faults\": {" : ", ", fault_names[i],
		       (unsigned long long)sum->faults[i]);
	printf("}}\n");
}

/* Of the processor's time: the machine may have other work. */
static double used_seconds(void)
{
	return (double)clock() / CLOCKS_PER_SEC;
}

static bool run_and_add(uint64_t seed, const struct overrides *overrides, struct sim_result *sum)
{
	options_of(seed);
	apply(overrides);
	alarm(RUN_LIMIT_S);
	run_seed();
	add(sum, &result);
	if (result.failed)
		printf("{\"seed\": %llu, \"requests\": %u, \"crash_at\": %llu, \"fail_at\": %llu, "
		       "\"fail_variant\": %u, \"failed\": \"%s\"}\n",
		       (unsigned long long)seed, options.requests, (unsigned long long)options.crash_at,
		       (unsigned long long)options.fail_at, options.fail_variant, result.why);
	else if (overrides->each)
		print(&result, seed, 1, 0);
	return !result.failed;
}

/* The next point to be killed at, or the next call to fail. Returns false when the seed is done. */
static bool next_of_enumeration(struct overrides *overrides)
{
	if (overrides->crash_at < overrides->crash_end) {
		overrides->crash_at++;
		return true;
	}
	if (overrides->fail_at > overrides->fail_end || overrides->fail_end == 0)
		return false;
	/* the ways of this call to fail, until there are no more */
	if (result.failed_calls > 0) {
		overrides->fail_variant++;
	} else {
		overrides->fail_variant = 0;
		overrides->fail_at++;
	}
	return overrides->fail_at <= overrides->fail_end;
}

/*
 * simulate FIRST_SEED [seeds=N] [seconds=T of the processor's] [requests=N] [threads=N] [pages=N] [slots=N]
 *   [connections=N] [owner=0|1] [loop=0|1] [soft_ms=N] [habit=N] [without=FAULT,...] [only=FAULT,...]
 *   [crash_at=N [crash_end=N]] [fail_at=N [fail_variant=N] [fail_end=N]] [keep=1] [each=1] [verbose=1]
 *
 * With crash_end, the seed is run once for each point from crash_at to crash_end; with fail_end, once for each way in
 * which each call from fail_at to fail_end can fail. With keep, it goes on after a failure. A line of JSON for each
 * failure (with `each`, for each run), and one for all at the end. Status 0; 1 after a failure, 3 after a crash.
 */
int main(int count, char **words)
{
	struct overrides overrides = { .requests = -1, .owner = -1 };
	struct sim_result sum = { 0 };
	uint64_t first = count > 1 ? strtoull(words[1], NULL, 10) : 1, seeds = 1, done = 0, keep = 0;
	double limit_s = 1e9;
	bool is_right = true;

	for (int i = 2; i < count; i++) {
		char *value = strchr(words[i], '=');
		int64_t number;

		if (value == NULL)
			return 2;
		*value++ = '\0';
		number = strtoll(value, NULL, 10);
#define OPTION(name, target) else if (strcmp(words[i], name) == 0) target
		if (strcmp(words[i], "seeds") == 0)
			seeds = (uint64_t)number;
		OPTION("seconds", (limit_s = (double)number, seeds = UINT64_MAX));
		OPTION("requests", overrides.requests = number);
		OPTION("threads", overrides.threads = number);
		OPTION("pages", overrides.pages = number);
		OPTION("slots", overrides.slots = number);
		OPTION("connections", overrides.connections = number);
		OPTION("owner", overrides.owner = number);
		OPTION("loop", forced_loop = (int)number);
		OPTION("soft_ms", forced_soft_ms = number);
		OPTION("habit", forced_habit = (enum habit)number);
		OPTION("without", overrides.without = fault_bits(value));
		OPTION("only", (overrides.only = fault_bits(value), overrides.has_only = true));
		OPTION("crash_at", overrides.crash_at = (uint64_t)number);
		OPTION("crash_end", overrides.crash_end = (uint64_t)number);
		OPTION("fail_at", overrides.fail_at = (uint64_t)number);
		OPTION("fail_end", overrides.fail_end = (uint64_t)number);
		OPTION("fail_variant", overrides.fail_variant = (uint32_t)number);
		OPTION("keep", keep = (uint64_t)number);
		OPTION("each", overrides.each = number != 0);
		OPTION("verbose", overrides.verbose = number != 0);
		else return 2;
	}
	watch_signals();
	while (done < seeds && used_seconds() < limit_s && (is_right || keep)) {
		is_right &= run_and_add(first + done, &overrides, &sum);
		fflush(stdout);
		if (!next_of_enumeration(&overrides))
			done++;
	}
	print(&sum, first, done, used_seconds());
	return is_right ? 0 : 1;
}
