/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The kernel's part: requests, and what each may return. Every write to a page has a version, one more than the one
 * before, and the bytes say which. At most one write of a page is under way at a time, as in a swap area. So
 *
 *   a READ returns the version that was complete when it began, or a later one that has been asked for;
 *   after a FLUSH the server's disk has, of each page that was not written since, that version and no other;
 *   after a FUA write the disk has it at once.
 *
 * What a worker had under way when it was killed is asked again, with the same bytes. Until that is done, the page may
 * be torn, or an error: nothing reads it then but this program.
 */
#include "sim.h"

#include "block/engine.h"
#include "nbd/protocol.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

#define COUNT_MAX 96u
/* Pages of a WRITE that was sent twice are not sent again for so long, whatever is written to them (0011). */
#define HELD_NS (5 * S)
/* nbd/places.c: what comes while all are taken is not received before others have ended. */
#define LOOP_PLACES 64u
#define LOOP_PLACE_PAGES 8u

enum kind { KIND_NONE, KIND_READ, KIND_WRITE, KIND_FLUSH, KIND_TRIM };

static const char *const kind_names[] = { "nothing", "READ", "WRITE", "FLUSH", "TRIM" };

struct request {
	enum kind kind;
	uint32_t page, count;
	bool fua;
};

struct requester {
	struct request now;     /* KIND_NONE: it has none */
	int64_t since_ns;
	uint32_t turns;         /* how often all of the loop's places must be free again before it has one */
	uint32_t next_page;     /* of its walk over the device */
	uint32_t lowest[PAGES_MAX]; /* for a READ or FLUSH: the versions that were complete when it began */
	bool torn[COUNT_MAX];
	uint64_t stamp;
	_Alignas(PAGE_BYTES) uint8_t buffer[COUNT_MAX * PAGE_BYTES];
};

static struct requester requesters[REQUESTERS_MAX + 1];
/* Asks for what is checked before and after the load. A killed worker's is not asked again: the check is. */
static struct requester *const checker = &requesters[REQUESTERS_MAX];
static struct request again[REQUESTERS_MAX]; /* what a killed worker had under way, and WRITEs that were late */
static uint32_t again_count;
static uint32_t issued[PAGES_MAX], completed[PAGES_MAX], on_disk[PAGES_MAX];
static bool busy[PAGES_MAX], torn[PAGES_MAX];
static uint64_t trimmed_at[PAGES_MAX], stamps;
static uint32_t asked, weights[4];
static uint32_t round_end;      /* so many are asked before the requesters wait for each other */
static uint64_t at_barrier;     /* threads that do, as bits */
static struct rng load, pauses;

/* ---- what a version looks like ---- */

static bool is_word(uint32_t page, uint32_t version)
{
	return ((page * 0x9e3779b1u ^ version * 0x85ebca77u) >> 9) % 8 < options.words_of_8;
}

/* What a version says of its page. One of eight says the same of two neighbours: they must differ on the NAS. */
static uint64_t first_word(uint32_t page, uint32_t version)
{
	return (uint64_t)(version % 8 == 7 ? page & ~1u : page) << 32 | version;
}

static void fill_page(uint8_t *data, uint32_t page, uint32_t version)
{
	uint64_t *words = (uint64_t *)(void *)data, first = first_word(page, version);
	uint32_t word = page << 22 | version;

	if (version == 0) {
		memset(data, 0, PAGE_BYTES);
	} else if (is_word(page, version)) {
		for (unsigned i = 0; i < PAGE_BYTES / 8; i++)
			words[i] = (uint64_t)word << 32 | word;
	} else {
		for (unsigned i = 0; i < PAGE_BYTES / 8; i++)
			words[i] = first + i * 0x9e3779b97f4a7c15u;
	}
}

/* The page's version, or -1: it is none that was ever written to this page. */
static int64_t version_of(const uint8_t *data, uint32_t page)
{
	const uint64_t *words = (const uint64_t *)(const void *)data;
	uint64_t first = words[0], differs = 0;
	uint32_t version = (uint32_t)first;

	if (words[1] == first) {
		for (unsigned i = 0; i < PAGE_BYTES / 8; i++)
			differs |= words[i] ^ first;
		if (differs != 0 || (first >> 32) != (first & UINT32_MAX))
			return -1;
		if (first == 0)
			return 0;
		version &= 0x3fffff;
		return (uint32_t)first >> 22 == page && is_word(page, version) ? (int64_t)version : -1;
	}
	for (unsigned i = 0; i < PAGE_BYTES / 8; i++)
		differs |= words[i] ^ (first + i * 0x9e3779b97f4a7c15u);
	return differs == 0 && first == first_word(page, version) && !is_word(page, version) ? (int64_t)version : -1;
}

/* ---- what may be ---- */

static bool is_stolen(void)
{
	return stolen_at_ns != NEVER;
}

/* Has it waited so long that it may be an error? */
static bool is_late(const struct requester *me)
{
	/* the engine counts whole milliseconds */
	return options.soft_limit_ms > 0 && now_ns - me->since_ns > (options.soft_limit_ms - 1) * MS;
}

static void check_error(const struct requester *me, int error, const char *what)
{
	const struct request *request = &me->now;
	bool may_be_torn = false;

	if (is_late(me))
		return;
	for (uint32_t i = 0; request->kind == KIND_READ && i < request->count; i++)
		may_be_torn |= me->torn[i];
	if (error == -EIO && (is_stolen() || may_be_torn))
		return;
	sim_fail("%s of %u pages at page %u: error %d", what, request->count, request->page, -error);
}

/* Of a page whose write was cut off: each of its bytes is of a version that may be there. */
static bool is_mix(const uint8_t *data, uint32_t page, uint32_t lowest, uint32_t highest)
{
	static _Alignas(8) uint8_t right[PAGE_BYTES];
	static bool found[PAGE_BYTES];
	uint32_t missing = PAGE_BYTES;
	int64_t whole = version_of(data, page);

	if (whole >= lowest && whole <= highest)
		return true; /* as most are */
	memset(found, 0, sizeof(found));
	for (uint32_t version = lowest; version <= highest && missing > 0; version++) {
		fill_page(right, page, version);
		for (unsigned i = 0; i < PAGE_BYTES; i++)
			if (!found[i] && data[i] == right[i]) {
				found[i] = true;
				missing--;
			}
	}
	return missing == 0;
}

static void check_read(const struct requester *me, uint32_t number)
{
	const uint8_t *data = me->buffer + (size_t)number * PAGE_BYTES;
	uint32_t page = me->now.page + number, lowest = me->lowest[number];
	int64_t version = version_of(data, page);

	if (lowest == 0 || trimmed_at[page] > me->stamp)
		return; /* a page that was trimmed, or never written, reads as anything */
	if (version >= lowest && version <= issued[page])
		return;
	if (version == -1 && me->torn[number] && is_mix(data, page, lowest, issued[page]))
		return;
	sim_fail("page %u reads as version %lld: %u was complete before, and %u was the newest%s", page,
		 (long long)version, lowest, issued[page], me->torn[number] ? " (torn)" : "");
}

/* The server's disk, which must have exactly this version. What is encrypted is read in the end. */
static void check_disk(uint32_t page, uint32_t version, const char *after)
{
	int64_t found;

	if (on_disk[page] == version)
		return;
	found = options.encrypt ? version : version_of(nas_stable_page(page), page);
	if (found != version)
		sim_fail("after %s the server's disk has version %lld of page %u instead of %u", after,
			 (long long)found, page, version);
	on_disk[page] = version;
}

/* The same where the page has been written again since: a newer write may be under way, and half done. */
static void check_newer(uint32_t page, uint32_t lowest)
{
	if (!options.encrypt && !is_mix(nas_stable_page(page), page, lowest, issued[page]))
		sim_fail("after FLUSH the server's disk has bytes of page %u that are older than version %u", page,
			 lowest);
}

bool load_is_recognisable(void)
{
	for (uint32_t page = 0; page < options.pages; page++)
		if (!busy[page] && completed[page] != 0 && on_disk[page] == completed[page])
			return true;
	return false;
}

/*
 * The first 16 bytes of a page's key stream, for each version that the page may be. Where two versions or two pages
 * have the same, one key stream was used twice. A wrong guess of the version gives bytes that no other guess gives.
 */
#define STREAMS (1u << 14)
#define VERSIONS_TRIED 3u

static struct key_stream {
	uint64_t words[2];
	uint32_t page, version;
} streams[STREAMS];

static void note_stream(uint32_t page, uint32_t version, const uint8_t *data)
{
	static _Alignas(8) uint8_t plain[PAGE_BYTES];
	struct key_stream found = { .page = page, .version = version }, *known;

	fill_page(plain, page, version);
	for (unsigned i = 0; i < 2; i++)
		found.words[i] = ((const uint64_t *)(const void *)data)[i] ^ ((uint64_t *)(void *)plain)[i];
	known = &streams[found.words[0] % STREAMS];
	if (known->words[0] == found.words[0] && known->words[1] == found.words[1] &&
	    (known->page != page || known->version != version))
		sim_fail("version %u of page %u and version %u of page %u have the same key stream", version, page,
			 known->version, known->page);
	*known = found;
}

void load_check_sealed(uint32_t page, const uint8_t *data)
{
	static _Alignas(8) uint8_t copy[PAGE_BYTES];
	int64_t version;

	memcpy(copy, data, PAGE_BYTES);
	version = version_of(copy, page);
	if (page < 1) { /* worker.c: clear_bytes */
		if (version < 0 && !is_mix(copy, page, 0, issued[page]))
			sim_fail("page %u is not to be encrypted, and is sent as something else", page);
		return;
	}
	if (version > 0)
		sim_fail("version %lld of page %u is sent in the clear", (long long)version, page);
	for (uint32_t i = 0; i < VERSIONS_TRIED && i < issued[page]; i++)
		note_stream(page, issued[page] - i, copy);
}

/* ---- requests ---- */

/* What is known when it is asked. */
static void prepare(struct requester *me)
{
	const struct request *request = &me->now;

	if (request->kind == KIND_READ || request->kind == KIND_FLUSH)
		me->stamp = ++stamps;
	if (request->kind == KIND_FLUSH)
		memcpy(me->lowest, completed, options.pages * sizeof(completed[0]));
	for (uint32_t i = 0; request->kind == KIND_READ && i < request->count; i++) {
		me->lowest[i] = completed[request->page + i];
		me->torn[i] = torn[request->page + i];
	}
	for (uint32_t i = 0; request->kind == KIND_WRITE && i < request->count; i++)
		fill_page(me->buffer + (size_t)i * PAGE_BYTES, request->page + i, issued[request->page + i]);
}

static int call_engine(struct requester *me)
{
	const struct request *request = &me->now;
	uint64_t offset_bytes = (uint64_t)request->page * PAGE_BYTES;
	uint64_t length_bytes = (uint64_t)request->count * PAGE_BYTES;

	switch (request->kind) {
	case KIND_READ:
		return engine_read(worker_engine, me->buffer, offset_bytes, length_bytes);
	case KIND_WRITE:
		return engine_write(worker_engine, me->buffer, offset_bytes, length_bytes, request->fua);
	case KIND_FLUSH:
		return engine_flush(worker_engine);
	case KIND_TRIM:
		return engine_trim(worker_engine, offset_bytes, length_bytes);
	default:
		return 0;
	}
}

/* The same over the loop, as the kernel asks it. */
static void ask_loop(struct requester *me)
{
	static const uint16_t types[] = { [KIND_READ] = NBD_CMD_READ, [KIND_WRITE] = NBD_CMD_WRITE,
					  [KIND_FLUSH] = NBD_CMD_FLUSH, [KIND_TRIM] = NBD_CMD_TRIM };
	const struct request *request = &me->now;
	bool has_range = request->kind != KIND_FLUSH;
	struct nbd_ask ask = {
		.type = types[request->kind],
		.flags = request->fua ? NBD_CMD_FLAG_FUA : 0,
		.offset_bytes = has_range ? (uint64_t)request->page * PAGE_BYTES : 0,
		.length_bytes = has_range ? request->count * PAGE_BYTES : 0,
		.data = me->buffer,
	};

	/* for what may read as anything, zeros are as good */
	if (request->kind == KIND_TRIM && (request->page + request->count) % 2 == 1) {
		ask.type = NBD_CMD_WRITE_ZEROES;
		ask.flags = (request->page % 2 == 1 ? NBD_CMD_FLAG_NO_HOLE : 0) |
			    (request->count % 4 == 0 ? NBD_CMD_FLAG_FUA : 0);
	}
	nbd_client_ask((uint32_t)(me - requesters), &ask);
}

static void read_ended(struct requester *me, int error)
{
	const struct request *request = &me->now;

	if (error != 0) {
		check_error(me, error, "READ");
		return;
	}
	for (uint32_t i = 0; i < request->count && !is_stolen(); i++)
		check_read(me, i);
}

static void ask_again(const struct request *request)
{
	if (again_count == REQUESTERS_MAX)
		sim_fail("more requests are to be asked again than there are requesters");
	again[again_count++] = *request;
}

static void write_ended(struct requester *me, int error)
{
	const struct request *request = &me->now;

	if (error != 0)
		check_error(me, error, "WRITE");
	if (error != 0 && !is_stolen()) { /* nobody knows which of its pages were written, until it is asked again */
		ask_again(request);
		return;
	}
	for (uint32_t i = 0; i < request->count; i++) {
		uint32_t page = request->page + i;

		if (error == 0)
			completed[page] = issued[page];
		if (error == 0 && request->fua && !is_stolen())
			check_disk(page, issued[page], "a FUA write");
		torn[page] = busy[page] = false;
	}
}

static void flush_ended(struct requester *me, int error)
{
	if (error != 0) {
		check_error(me, error, "FLUSH");
		return;
	}
	for (uint32_t page = 0; page < options.pages && !is_stolen(); page++) {
		if (me->lowest[page] == 0 || trimmed_at[page] > me->stamp)
			continue;
		if (issued[page] == me->lowest[page])
			check_disk(page, me->lowest[page], "FLUSH");
		else
			check_newer(page, me->lowest[page]);
	}
}

static void trim_ended(struct requester *me, int error)
{
	const struct request *request = &me->now;

	if (error != 0)
		check_error(me, error, "TRIM");
	for (uint32_t i = 0; i < request->count; i++)
		busy[request->page + i] = false;
}

static void tell(const struct requester *me, const char *what)
{
	if (options.verbose)
		fprintf(stderr, "%14.6f %s %s %u+%u%s by %u\n", (double)now_ns / 1e9, what, kind_names[me->now.kind],
			me->now.page, me->now.count, me->now.fua ? " FUA" : "", (unsigned)(me - requesters));
}

/* How long it has waited of a silence that the engine did not make itself, by holding pages back. */
static int64_t waited_in(const struct requester *me, const struct silence *silence, int64_t to_ns)
{
	int64_t from_ns = silence->from_ns + (silence->has_twins ? HELD_NS : 0);

	return to_ns - (from_ns > me->since_ns ? from_ns : me->since_ns);
}

/*
 * A soft request is an error in time, however long the server is away. A READ: a thread reads 64 pages at once, and the
 * loop has one thread for those that need a longer look. For the others, the limit restarts with each answer, and at
 * the end of a hold.
 */
static void check_soft_limit(const struct requester *me)
{
	const uint32_t away = 1u << FAULT_partition | 1u << FAULT_blackhole | 1u << FAULT_reset | 1u << FAULT_slow;
	int64_t limit_ns = (1 + me->turns) * options.soft_limit_ms * MS, waited_ns;

	if (limit_ns == 0 || !run_is_calm(away))
		return;
	if (me->now.kind == KIND_READ) {
		limit_ns *= options.loop ? 2 : (me->now.count + 63) / 64;
		waited_ns = now_ns - me->since_ns;
	} else {
		int64_t before_ns = waited_in(me, &silence_before, silence_before.to_ns);

		waited_ns = waited_in(me, &silence_now, now_ns);
		waited_ns = before_ns > waited_ns ? before_ns : waited_ns;
	}
	if (waited_ns > 5 * S + limit_ns)
		sim_fail("%s of %u pages at page %u took %.3f s, and was to be an error after %u ms",
			 kind_names[me->now.kind], me->now.count, me->now.page, (double)(now_ns - me->since_ns) / 1e9,
			 options.soft_limit_ms);
}

/*
 * A calm run keeps nobody waiting: a FLUSH has a write-back and a COMMIT to wait for, a few times for each region full
 * of pages, however often they are written again meanwhile.
 */
static void check_time(const struct requester *me)
{
	bool has_slept = options.owner && woke_at_ns > me->since_ns;
	int64_t from_ns = has_slept ? woke_at_ns : me->since_ns, took_ns = now_ns - from_ns;
	int64_t held_ns = options.owner ? lost_at_ns + HELD_NS - from_ns : 0;
	int64_t limit_ns = 5 * S + (options.pages / options.slots + 1) * 24 * options.latency_ns * options.read_factor;

	/*
	 * with an owner, a sleep may end a look, and a connection with half a WRITE: what it had is held back, for
	 * what is asked after that, too
	 */
	if (held_ns > 0)
		limit_ns += held_ns < HELD_NS ? held_ns : HELD_NS;
	if (run_is_calm(1u << FAULT_suspend) && options.habit != HABIT_WALKS && took_ns > limit_ns)
		sim_fail("%s of %u pages at page %u took %.3f s, and nothing was in its way", kind_names[me->now.kind],
			 me->now.count, me->now.page, (double)took_ns / 1e9);
	check_soft_limit(me);
}

/* Of the loop's places for data: what READs and WRITEs have, or wait for. */
static uint32_t places_under_way(void)
{
	uint32_t places = 0;

	for (uint32_t i = 0; i < REQUESTERS_MAX; i++)
		if (requesters[i].now.kind == KIND_READ || requesters[i].now.kind == KIND_WRITE)
			places += (requesters[i].now.count + LOOP_PLACE_PAGES - 1) / LOOP_PLACE_PAGES;
	return places;
}

static void begin(struct requester *me)
{
	me->since_ns = now_ns;
	me->turns = options.loop ? places_under_way() / (LOOP_PLACES - COUNT_MAX / LOOP_PLACE_PAGES) : 0;
	tell(me, "begins");
	prepare(me);
}

static void end(struct requester *me, int error)
{
	switch (me->now.kind) {
	case KIND_READ:
		read_ended(me, error);
		break;
	case KIND_WRITE:
		write_ended(me, error);
		break;
	case KIND_FLUSH:
		flush_ended(me, error);
		break;
	case KIND_TRIM:
		trim_ended(me, error);
		break;
	case KIND_NONE:
		break;
	}
	tell(me, "has ended");
	check_time(me);
	result.requests++;
	result.page_ops += me->now.kind == KIND_FLUSH ? 1 : me->now.count;
	me->now.kind = KIND_NONE;
}

static void carry_out(struct requester *me)
{
	begin(me);
	end(me, call_engine(me));
}

void load_ended(uint32_t number, int error)
{
	result.loop_requests++;
	end(&requesters[number], error);
}

/* ---- which requests ---- */

static uint32_t choose_count(void)
{
	if (options.habit == HABIT_REWRITES)
		return 1;
	if (options.habit == HABIT_WALKS)
		return 1 + rng_below(&load, 4);
	switch (rng_below(&load, 16)) {
	case 0:
		return 1 + rng_below(&load, COUNT_MAX);
	case 1:
	case 2:
	case 3:
		return 1 + rng_below(&load, 32);
	case 4:
	case 5:
	case 6:
	case 7:
		return 1 + rng_below(&load, 8);
	default:
		return 1;
	}
}

static uint32_t choose_page(struct requester *me)
{
	if (options.habit == HABIT_REWRITES)
		return rng_below(&load, options.hot_pages);
	if (options.habit == HABIT_WALKS && rng_chance(&load, 960))
		return me->next_page % options.pages;
	switch (rng_below(&load, 8)) {
	case 0:
		return rng_below(&load, options.pages);
	case 1:
		return me->next_page % options.pages;
	case 2:
		return (me->next_page + 11) % options.pages;
	default:
		return rng_below(&load, options.hot_pages);
	}
}

static bool is_any_busy(uint32_t page, uint32_t count)
{
	while (count-- > 0)
		if (busy[page++])
			return true;
	return false;
}

static enum kind choose_kind(void)
{
	uint32_t number = rng_below(&load, weights[0] + weights[1] + weights[2] + weights[3]);

	if (number < weights[0])
		return KIND_READ;
	if (number < weights[0] + weights[1])
		return KIND_WRITE;
	return number < weights[0] + weights[1] + weights[2] ? KIND_FLUSH : KIND_TRIM;
}

static void mark_busy(const struct request *request)
{
	for (uint32_t page = request->page; page < request->page + request->count; page++) {
		busy[page] = true;
		on_disk[page] = UINT32_MAX;
		if (request->kind == KIND_WRITE) {
			issued[page]++;
		} else {
			completed[page] = 0;
			trimmed_at[page] = ++stamps;
		}
	}
}

static void generate(struct requester *me)
{
	struct request *request = &me->now;

	request->kind = choose_kind();
	if (options.habit == HABIT_REWRITES) /* one flushes, and the others do not wait for it */
		request->kind = me == requesters ? KIND_FLUSH : rng_chance(&load, 900) ? KIND_WRITE : KIND_READ;
	request->page = choose_page(me);
	request->count = choose_count();
	request->fua = request->kind == KIND_WRITE && options.habit != HABIT_REWRITES && rng_chance(&load, 64);
	if (request->count > options.pages - request->page)
		request->count = options.pages - request->page;
	me->next_page = request->page + request->count;
	if (request->kind != KIND_WRITE && request->kind != KIND_TRIM)
		return;
	if (is_any_busy(request->page, request->count))
		request->kind = KIND_READ;
	else
		mark_busy(request);
}

/*
 * Every so many requests all requesters wait for each other: what was forgotten then stays forgotten, rather than being
 * woken by the next request.
 */
static void wait_for_others(void)
{
	while (options.round > 0 && asked >= round_end && asked < options.requests && again_count == 0) {
		at_barrier |= thread_bit();
		if ((uint32_t)__builtin_popcountll(at_barrier) == options.threads) {
			round_end = asked + options.round;
			threads_wake(at_barrier);
			at_barrier = 0;
			return;
		}
		thread_block(NEVER);
	}
}

static bool next(struct requester *me)
{
	wait_for_others();
	if (again_count > 0) {
		uint32_t which = rng_below(&load, again_count);

		me->now = again[which];
		again[which] = again[--again_count];
		return true;
	}
	if (asked >= options.requests) {
		faults_end();
		return false;
	}
	asked++;
	generate(me);
	return true;
}

static void pause(void)
{
	if (!rng_chance(&pauses, options.pause_chance))
		return;
	if (options.habit != HABIT_REWRITES && rng_chance(&pauses, 8))
		thread_sleep(rng_between(&pauses, 0, 12 * S));
	else
		thread_sleep(rng_between(&pauses, 0, rng_chance(&pauses, 512) ? 5 * MS : options.latency_ns));
}

void *load_thread(void *argument)
{
	struct requester *me = argument;

	while (next(me)) {
		if (options.loop) {
			begin(me);
			ask_loop(me);
		} else {
			carry_out(me);
		}
		if (!faults_are_over())
			pause();
	}
	worker_requester_ended();
	return NULL;
}

/* ---- for the worker ---- */

void *load_requester(uint32_t number)
{
	return &requesters[number];
}

void load_interrupted(bool was_killed)
{
	at_barrier = 0;
	for (uint32_t i = 0; i < REQUESTERS_MAX; i++) {
		struct request *request = &requesters[i].now;

		if (request->kind == KIND_NONE)
			continue;
		for (uint32_t at = 0; was_killed && request->kind == KIND_WRITE && at < request->count; at++)
			torn[request->page + at] = true;
		ask_again(request);
		request->kind = KIND_NONE;
	}
	checker->now.kind = KIND_NONE;
}

const char *load_oldest(void)
{
	static char text[128];
	const struct requester *oldest = NULL;

	for (uint32_t i = 0; i <= REQUESTERS_MAX; i++)
		if (requesters[i].now.kind != KIND_NONE &&
		    (oldest == NULL || requesters[i].since_ns < oldest->since_ns))
			oldest = &requesters[i];
	if (oldest == NULL)
		return "no request is under way";
	snprintf(text, sizeof(text), "%s of %u pages at page %u waits since %.3f s", kind_names[oldest->now.kind],
		 oldest->now.count, oldest->now.page, (double)oldest->since_ns / 1e9);
	return text;
}

/* Pages whose write was cut off have bytes of that write and of the one before, and none of another page. */
void load_check_torn(void)
{
	for (uint32_t page = 0; page < options.pages; page++) {
		if (!torn[page])
			continue;
		checker->now = (struct request){ .kind = KIND_READ, .page = page, .count = 1 };
		carry_out(checker);
	}
}

void load_flush(void)
{
	checker->now = (struct request){ .kind = KIND_FLUSH };
	carry_out(checker);
}

/* The last version of every page, and nothing else. */
void load_check_all(void)
{
	for (uint32_t page = 0; page < options.pages; page += 32) {
		checker->now = (struct request){ .kind = KIND_READ, .page = page,
					    .count = options.pages - page < 32 ? options.pages - page : 32 };
		carry_out(checker);
	}
}

void load_reset(void)
{
	memset(issued, 0, sizeof(issued));
	memset(completed, 0, sizeof(completed));
	memset(busy, 0, sizeof(busy));
	memset(torn, 0, sizeof(torn));
	memset(trimmed_at, 0, sizeof(trimmed_at));
	memset(on_disk, 0xff, sizeof(on_disk));
	for (uint32_t i = 0; i <= REQUESTERS_MAX; i++) {
		requesters[i].now.kind = KIND_NONE;
		requesters[i].next_page = i * 37;
	}
	again_count = asked = 0;
	round_end = options.round;
	at_barrier = 0;
	stamps = 0;
	load.state = options.seed ^ 0x10ad;
	pauses.state = options.seed ^ 0x9a05e;
	weights[0] = 10 + rng_below(&load, 60);
	weights[1] = 10 + rng_below(&load, 60);
	weights[2] = rng_below(&load, 8);
	weights[3] = rng_below(&load, 6);
	if (options.habit == HABIT_WALKS)
		weights[2] = 8;
	if (options.encrypt)
		memset(streams, 0, sizeof(streams));
}
