/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The fake NAS's NFSv3 (RFC 1813) and MOUNT: calls from a stream, carried out after a while, and answered. */
#include "fake_nas.h"

#include <endian.h>
#include <stdio.h>
#include <string.h>

#define CALLS_MAX 2048u
#define DATA_BYTES_MAX (132u * 1024)
#define RPC_LAST 0x80000000u
#define NFS3_OK 0u
#define NFS3ERR_NOENT 2u
#define NFS3ERR_STALE 70u
#define NFS3ERR_JUKEBOX 10008u
/*
 * A look permits pages for 20 s from its beginning (decision 0009), up to the last byte of each; and some time, for a
 * thread that others keep from running between the question and the call. The other 30 s that a new owner waits are for
 * what is on its way.
 */
#define PERMITTED_NS (20 * S + 500 * MS)
/* What a killed worker had under way is held back for a second (decision 0011). */
#define HURRY_NS (900 * MS)
/* The handle that a worker has used for so long is in the region. */
#define KEPT_NS (1 * S)
/* A COMMIT that is refused is sent again after a pause, of half a second at least. */
#define REFUSED_COMMITS_MAX 8u

enum procedure { PROC_NULL = 0, PROC_GETATTR = 1, PROC_LOOKUP = 3, PROC_READ = 6, PROC_WRITE = 7, PROC_FSINFO = 19,
		 PROC_COMMIT = 21, PROC_MNT = 1000 };

struct call {
	struct sim_conn *conn;
	uint32_t epoch, forgotten, xid, procedure, count, stable;
	uint64_t offset;
	enum nas_object object; /* OBJECT_NONE: the handle is stale */
	char name[64];
	uint8_t data[DATA_BYTES_MAX];
	struct call *next;
	bool taken;             /* and not carried out yet */
	bool was_read;          /* `data` is what was in the file when it was taken */
	uint64_t serial;
	int64_t due_ns;
	int64_t sent_at_ns;     /* by the server's clock */
	uint32_t answer_bytes;  /* to be sent later */
	uint8_t answer[1024];
};

static struct call calls[CALLS_MAX];
static struct call *spare;
static uint64_t serials;

void calls_reset(void)
{
	spare = NULL;
	serials = 0;
	for (unsigned i = CALLS_MAX; i-- > 0;) {
		calls[i].taken = false;
		calls[i].next = spare;
		spare = &calls[i];
	}
}

/* ---- XDR ---- */

static uint32_t get32(const uint8_t **at)
{
	uint32_t value;

	memcpy(&value, *at, 4);
	*at += 4;
	return be32toh(value);
}

static uint64_t get64(const uint8_t **at)
{
	uint64_t high = get32(at);

	return high << 32 | get32(at);
}

static void put32(uint8_t **at, uint32_t value)
{
	value = htobe32(value);
	memcpy(*at, &value, 4);
	*at += 4;
}

static void put64(uint8_t **at, uint64_t value)
{
	put32(at, (uint32_t)(value >> 32));
	put32(at, (uint32_t)value);
}

static uint32_t padded(uint32_t bytes)
{
	return (bytes + 3) & ~3u;
}

/* ---- answers ---- */

static void put_attributes(uint8_t **at, enum nas_object object)
{
	bool is_pages = object == OBJECT_FILE || object == OBJECT_OTHER, is_file = is_pages || object == OBJECT_RECORD;
	uint64_t id = object == OBJECT_FILE ? NAS_FILE_ID : object == OBJECT_OTHER ? nas_other_id() : 5000u + object;

	put32(at, is_file ? 1 : 2);
	put32(at, 0600);
	put32(at, is_file ? 1 : 2);
	put32(at, 0);
	put32(at, 0);
	put64(at, is_pages ? disk_bytes() : RECORD_BYTES);
	put64(at, is_pages ? disk_bytes() : RECORD_BYTES);
	put64(at, 0);
	put64(at, nas.fsid);
	put64(at, id);
	memset(*at, 0, 24);
	*at += 24;
}

/* post_op_attr: servers may leave it out. */
static void put_optional_attributes(uint8_t **at, enum nas_object object)
{
	bool has = object != OBJECT_NONE && !rng_chance(&nas.calls, 64);

	put32(at, has);
	if (has)
		put_attributes(at, object);
}

static void put_wcc(uint8_t **at, enum nas_object object)
{
	put32(at, 0);
	put_optional_attributes(at, object);
}

static void put_handle(uint8_t **at, enum nas_object object)
{
	uint8_t handle[HANDLE_BYTES_MAX];
	uint32_t bytes = nas_handle(object, handle);

	put32(at, bytes);
	memcpy(*at, handle, bytes);
	*at += bytes;
}

static uint64_t verifier_now(void)
{
	return nas.verifier + (fault_is_active(FAULT_verifier_flutter) ? rng_below(&nas.faults, 2) << 20 : 0);
}

/* How much of a transfer is done: less where the fault strikes. */
static uint32_t moved(uint32_t count)
{
	if (!fault_is_active(FAULT_short_transfer) || rng_chance(&nas.faults, 512) || count < 2)
		return count;
	if (rng_chance(&nas.faults, 512) && count > SECTOR_BYTES)
		return (1 + rng_below(&nas.faults, count / SECTOR_BYTES)) * SECTOR_BYTES;
	return 1 + rng_below(&nas.faults, count - 1);
}

/* All of another file is one byte, but for one page, which it may have in common with the real one. */
static void read_other(const struct call *call, uint8_t *data, uint32_t count)
{
	uint64_t page_at = (uint64_t)nas.other_page * PAGE_BYTES;

	memset(data, nas.other_byte, count);
	if (nas.other_page < options.pages && call->offset <= page_at && page_at + PAGE_BYTES <= call->offset + count)
		memcpy(data + (page_at - call->offset), disk_current(page_at), PAGE_BYTES);
}

/* What is in the file or the record. */
static void read_bytes(const struct call *call, uint8_t *data, uint32_t count)
{
	if (call->object == OBJECT_OTHER)
		read_other(call, data, count);
	else if (call->was_read)
		memcpy(data, call->data, count);
	else
		memcpy(data, call->object == OBJECT_FILE ? disk_current(call->offset) : nas.record + call->offset,
		       count);
}

/* Change a byte, or answer with what a page was before, or with another page. */
static void spoil(const struct call *call, uint8_t *data, uint32_t count)
{
	uint32_t wrong = rng_below(&nas.faults, count), at = wrong / PAGE_BYTES * PAGE_BYTES;
	uint64_t page = (call->offset + wrong) / PAGE_BYTES, other = rng_below(&nas.faults, options.pages);
	const uint8_t *instead = rng_chance(&nas.faults, 512) ? nas_stable_page((uint32_t)page)
							      : disk_current(other * PAGE_BYTES);
	bool is_whole = call->offset % PAGE_BYTES == 0 && at + PAGE_BYTES <= count;

	if (!disk_read_is_wrong(page))
		return;
	if (is_whole && rng_chance(&nas.faults, 512))
		memcpy(data + at, instead, PAGE_BYTES);
	else
		data[wrong] ^= (uint8_t)(1 + rng_below(&nas.faults, 255));
}

/* Another file has the name, and a worker takes it for its own. */
static void check_other(const struct call *call, bool is_written)
{
	if (call->object != OBJECT_OTHER)
		return;
	if (!load_is_recognisable())
		world_stop(); /* nothing was known by which it could be told: from now on it is the file */
	else if (is_written)
		sim_fail("another file that has the name is written to");
}

static void do_read(struct call *call, uint8_t **at)
{
	bool is_page = call->object == OBJECT_FILE || call->object == OBJECT_OTHER;
	uint64_t size = is_page ? disk_bytes() : RECORD_BYTES;
	uint32_t count = call->offset < size ? moved(call->count) : 0;
	uint8_t *data;

	if (count > size - call->offset)
		count = (uint32_t)(size - call->offset);
	check_other(call, false);
	put32(at, NFS3_OK);
	put_optional_attributes(at, call->object);
	put32(at, count);
	put32(at, call->offset + count == size);
	put32(at, count);
	data = *at;
	read_bytes(call, data, count);
	if (call->object == OBJECT_FILE && count > 0 && fault_is_active(FAULT_corrupt_read) &&
	    rng_chance(&nas.faults, 128))
		spoil(call, data, count);
	memset(data + count, 0, padded(count) - count);
	*at += padded(count);
}

static void tell(const struct call *call, const char *what, uint32_t stable)
{
	if (options.verbose)
		fprintf(stderr, "%14.6f server %s %llu+%u, %u, verifier %llx, due %.6f%s, begins %016llx\n",
			(double)now_ns / 1e9, what, (unsigned long long)call->offset / PAGE_BYTES,
			call->count / PAGE_BYTES, stable, (unsigned long long)nas.verifier, (double)call->due_ns / 1e9,
			conn_has_client(call->conn) ? "" : ", late",
			(unsigned long long)*(const uint64_t *)(const void *)call->data);
}

/* Who sends pages has given a sign of life not long before, and has not lost the file. */
static void check_owner(const struct call *call)
{
	if (call->object != OBJECT_FILE)
		return;
	if (options.owner && call->sent_at_ns > nas.signed_at_ns + PERMITTED_NS)
		sim_fail("a page was sent %.3f s after the last sign of life",
			 (double)(call->sent_at_ns - nas.signed_at_ns) / 1e9);
	if (stolen_at_ns != NEVER && call->sent_at_ns > stolen_at_ns + PERMITTED_NS)
		sim_fail("a page was sent %.3f s after the file was stolen",
			 (double)(call->sent_at_ns - stolen_at_ns) / 1e9);
}

static void check_pages(const struct call *call)
{
	if (call->object != OBJECT_FILE || !options.encrypt || call->offset % PAGE_BYTES != 0)
		return;
	for (uint32_t at = 0; at + PAGE_BYTES <= call->count; at += PAGE_BYTES)
		load_check_sealed((uint32_t)((call->offset + at) / PAGE_BYTES), call->data + at);
}

static void do_write(struct call *call, uint8_t **at)
{
	uint32_t count = moved(call->count), committed = call->stable;

	check_other(call, true);
	check_owner(call);
	check_pages(call);
	if (committed == 0 && fault_is_active(FAULT_stability) && rng_chance(&nas.faults, 512))
		committed = 1 + rng_below(&nas.faults, 2);
	else if (committed == 2 && call->object == OBJECT_FILE && fault_is_active(FAULT_stability) &&
		 rng_chance(&nas.faults, 64))
		committed = rng_below(&nas.faults, 2); /* RFC 1813 does not allow it */
	/* DATA_SYNC: where the data lies may be lost */
	if (call->object == OBJECT_FILE)
		disk_write(call->offset, call->data, count, committed == 2);
	else if (call->object == OBJECT_RECORD)
		memcpy(nas.record + call->offset, call->data, count);
	if (call->object == OBJECT_RECORD) {
		nas.missing = 0; /* whoever writes has found it */
		nas.signed_at_ns = servers_ns();
	}
	if (call->object == OBJECT_FILE)
		tell(call, "WRITE", committed);
	put32(at, NFS3_OK);
	put_wcc(at, call->object);
	put32(at, count);
	put32(at, committed);
	put64(at, verifier_now());
}

/* Is the record said to be missing although it is there? Not three times in a row: that is a theft. */
static bool record_is_missing(void)
{
	if (nas.record_is_gone)
		return true;
	if (!fault_is_active(FAULT_owner_refused) || nas.missing >= 2 || !rng_chance(&nas.faults, 256))
		return false;
	nas.missing++;
	return true;
}

/*
 * A worker whose predecessor used the file goes on with the handle that is in the region, for as long as the server
 * knows it: a look-up would find another file, or none, where the name is not the file's any more. Of several
 * connections, one that has not noticed yet that a handle is stale may be the last to say where the file is.
 */
static void check_lookup(void)
{
	uint32_t reasons = 1u << FAULT_replaced | 1u << FAULT_refuse;

	if (nas.is_handed_on && options.connections == 1 && (options.faults & reasons) == 0 &&
	    options.fail_at == 0)
		sim_fail("the file is looked up by its name, although its handle is known and the server knows it");
}

void nas_worker_starts(void)
{
	nas.is_handed_on = nas.used_since_ns != NEVER;
}

static void do_lookup(const struct call *call, uint8_t **at)
{
	enum nas_object found = OBJECT_NONE;

	if (call->object == OBJECT_ROOT && strcmp(call->name, "dir") == 0)
		found = OBJECT_DIRECTORY;
	else if (call->object == OBJECT_DIRECTORY && strcmp(call->name, "swap") == 0) {
		check_lookup();
		found = nas.is_replaced ? OBJECT_OTHER : OBJECT_FILE;
		nas.found = nas.generations[OBJECT_FILE];
		nas.found_at_ns = now_ns;
	} else if (call->object == OBJECT_DIRECTORY && strcmp(call->name, OWNER_PATH + 1) == 0 && options.owner &&
		 !record_is_missing())
		found = OBJECT_RECORD;
	put32(at, found != OBJECT_NONE ? NFS3_OK : NFS3ERR_NOENT);
	if (found != OBJECT_NONE) {
		put_handle(at, found);
		put_optional_attributes(at, found);
	}
	put_optional_attributes(at, call->object);
}

static void do_fsinfo(uint8_t **at)
{
	put32(at, NFS3_OK);
	put32(at, 0);
	put32(at, nas.read_max_bytes);
	put32(at, nas.read_max_bytes);
	put32(at, 1);
	put32(at, nas.write_max_bytes);
	put32(at, nas.write_max_bytes);
	put32(at, 1);
	put32(at, 4096);
	put64(at, UINT64_MAX >> 1);
	put64(at, 1);
	put32(at, 0x1b);
}

static void note_refused_commit(void)
{
	static int64_t second;
	static uint32_t count;

	if (now_ns / S != second)
		count = 0;
	second = now_ns / S;
	if (++count > REFUSED_COMMITS_MAX)
		sim_fail("more than %u COMMITs in a second although they are refused", REFUSED_COMMITS_MAX);
}

/* A status instead of results; 0: there are results. */
static uint32_t refusal_of(const struct call *call)
{
	bool writes = call->procedure == PROC_WRITE || call->procedure == PROC_COMMIT;

	if (call->procedure == PROC_NULL || call->procedure == PROC_MNT)
		return 0;
	if (call->object == OBJECT_NONE)
		return NFS3ERR_STALE;
	if (fault_is_active(FAULT_jukebox) && rng_chance(&nas.faults, 512))
		return NFS3ERR_JUKEBOX;
	if (call->object == OBJECT_RECORD || (call->procedure == PROC_LOOKUP && call->object == OBJECT_DIRECTORY))
		return fault_is_active(FAULT_owner_refused) && writes ? nas.refusal : 0;
	if (fault_is_active(FAULT_refuse) && rng_chance(&nas.faults, 512) &&
	    (writes || (nas.refuses_reads && call->procedure == PROC_READ))) {
		if (call->procedure == PROC_COMMIT)
			note_refused_commit();
		return nas.refusal;
	}
	return 0;
}

static void put_refusal(const struct call *call, uint32_t status, uint8_t **at)
{
	put32(at, status);
	if (call->procedure == PROC_WRITE || call->procedure == PROC_COMMIT)
		put_wcc(at, call->object);
	else if (call->procedure != PROC_GETATTR)
		put_optional_attributes(at, call->object);
}

/*
 * A connection that writes has recognised the file, and has told the engine so. Not where its worker has been killed:
 * that one may have written before it told.
 */
static void note_use(const struct call *call)
{
	bool is_write = call->procedure == PROC_WRITE || call->procedure == PROC_COMMIT;

	if (is_write && call->object == OBJECT_FILE && call->forgotten == nas.forgotten &&
	    conn_has_client(call->conn) && nas.used_since_ns == NEVER)
		nas.used_since_ns = now_ns;
}

static void put_results(struct call *call, uint8_t **at)
{
	uint32_t status = refusal_of(call);

	if (status != 0) {
		put_refusal(call, status, at);
		return;
	}
	note_use(call);
	switch (call->procedure) {
	case PROC_GETATTR:
		put32(at, NFS3_OK);
		put_attributes(at, call->object);
		break;
	case PROC_LOOKUP:
		do_lookup(call, at);
		break;
	case PROC_READ:
		do_read(call, at);
		break;
	case PROC_WRITE:
		do_write(call, at);
		break;
	case PROC_FSINFO:
		do_fsinfo(at);
		break;
	case PROC_COMMIT:
		if (call->object == OBJECT_FILE)
			disk_commit();
		tell(call, "COMMIT", 2);
		put32(at, NFS3_OK);
		put_wcc(at, call->object);
		put64(at, verifier_now());
		break;
	case PROC_MNT:
		put32(at, NFS3_OK);
		put_handle(at, OBJECT_ROOT);
		put32(at, 1);
		put32(at, 1);
		break;
	default: /* NULL */
		break;
	}
}

static void put_head(const struct call *call, uint8_t **at)
{
	uint32_t verifier_bytes = rng_chance(&nas.calls, 16) ? 8 : 0;

	put32(at, call->xid);
	put32(at, 1); /* REPLY */
	put32(at, 0); /* MSG_ACCEPTED */
	put32(at, 0); /* AUTH_NONE */
	put32(at, verifier_bytes);
	memset(*at, 0, verifier_bytes);
	*at += verifier_bytes;
	put32(at, 0); /* SUCCESS */
}

/* The message at `from` as a record of several fragments. Returns its length. */
static uint32_t put_fragments(const uint8_t *from, uint32_t bytes, uint8_t *to)
{
	uint8_t *at = to;

	while (bytes > 0) {
		uint32_t piece = 1 + rng_below(&nas.faults, bytes);

		put32(&at, piece | (piece == bytes ? RPC_LAST : 0));
		memcpy(at, from, piece);
		at += piece;
		from += piece;
		bytes -= piece;
	}
	return (uint32_t)(at - to);
}

static void answer(struct call *call)
{
	static uint8_t message[(1u << 20) + 1024];
	uint32_t room = 1024 + padded(call->procedure == PROC_READ ? call->count : 0), bytes;
	bool in_fragments = fault_is_active(FAULT_fragments) && rng_chance(&nas.faults, 512);
	/* what others may overtake: a READ's data is not copied for that */
	bool is_later = call->procedure != PROC_READ && !in_fragments && rng_chance(&nas.calls, 512);
	uint8_t *to = is_later ? call->answer : conn_room(call->conn, in_fragments ? room * 5 : room), *begin, *at;

	begin = at = in_fragments ? message : to;
	if (!in_fragments)
		at += 4;
	put_head(call, &at);
	put_results(call, &at);
	bytes = (uint32_t)(at - begin);
	if (in_fragments) {
		bytes = put_fragments(message, bytes, to);
	} else {
		uint8_t *mark = to;

		put32(&mark, RPC_LAST | (bytes - 4));
	}
	if (fault_is_active(FAULT_drop_answer) && rng_chance(&nas.faults, 64))
		return; /* it was done, and nobody hears of it */
	if (is_later)
		call->answer_bytes = bytes;
	else if (conn_is_open(call->conn))
		conn_answer(call->conn, bytes);
}

static void let_go(struct call *call)
{
	conn_let_go(call->conn);
	call->next = spare;
	spare = call;
}

/* An event: the answer to a call that was carried out is sent. */
static void send_answer(void *a, uint64_t b, uint64_t c)
{
	struct call *call = a;

	(void)b, (void)c;
	if (call->epoch == nas.epoch && conn_is_open(call->conn)) {
		memcpy(conn_room(call->conn, call->answer_bytes), call->answer, call->answer_bytes);
		conn_answer(call->conn, call->answer_bytes);
	}
	let_go(call);
}

/* An event: the time has come for call number b. */
static void carry_out(void *a, uint64_t b, uint64_t c)
{
	struct call *call = a;

	(void)c;
	if (call->serial != b || !call->taken)
		return;
	call->taken = false;
	call->answer_bytes = 0;
	if (call->epoch == nas.epoch)
		answer(call);
	if (call->answer_bytes > 0)
		event_at(now_ns + rng_between(&nas.calls, 0, 4 * options.latency_ns), send_answer, call, b, 0);
	else
		let_go(call);
}

void nas_hurry(void)
{
	if (now_ns - nas.used_since_ns < KEPT_NS)
		nas.used_since_ns = NEVER;
	for (unsigned i = 0; i < CALLS_MAX; i++) {
		struct call *call = &calls[i];

		if (call->taken && conn_has_client(call->conn) && call->due_ns > now_ns + HURRY_NS) {
			call->due_ns = now_ns + rng_between(&nas.calls, 0, HURRY_NS);
			event_at(call->due_ns, carry_out, call, call->serial, 0);
		}
	}
}

void calls_cut(void)
{
	for (unsigned i = 0; i < CALLS_MAX; i++) {
		struct call *call = &calls[i];

		if (!call->taken || call->procedure != PROC_WRITE || call->object != OBJECT_FILE ||
		    !rng_chance(&nas.power, 256))
			continue;
		for (uint32_t at = 0; at + SECTOR_BYTES <= call->count; at += SECTOR_BYTES)
			if (rng_chance(&nas.power, 512))
				disk_write(call->offset + at, call->data + at, SECTOR_BYTES, true);
	}
}

/* ---- calls ---- */

static enum nas_object object_of(const uint8_t *handle, uint32_t bytes)
{
	for (enum nas_object object = OBJECT_FILE; object < OBJECT_COUNT; object++) {
		uint8_t known[HANDLE_BYTES_MAX];

		if (object == (nas.is_replaced ? OBJECT_FILE : OBJECT_OTHER))
			continue;
		if (nas_handle(object, known) == bytes && memcmp(known, handle, bytes) == 0)
			return object;
	}
	return OBJECT_NONE;
}

static void get_name(struct call *call, const uint8_t **at)
{
	uint32_t bytes = get32(at);

	if (bytes >= sizeof(call->name))
		bytes = sizeof(call->name) - 1;
	memcpy(call->name, *at, bytes);
	call->name[bytes] = '\0';
}

static void get_arguments(struct call *call, const uint8_t *at)
{
	uint32_t bytes;

	if (call->procedure == PROC_NULL || call->procedure == PROC_MNT)
		return;
	bytes = get32(&at);
	call->object = object_of(at, bytes);
	at += padded(bytes);
	switch (call->procedure) {
	case PROC_LOOKUP:
		get_name(call, &at);
		break;
	case PROC_READ:
		call->offset = get64(&at);
		call->count = get32(&at);
		if (call->count > nas.read_max_bytes)
			sim_fail("a READ of %u bytes, and the server takes %u", call->count, nas.read_max_bytes);
		break;
	case PROC_WRITE:
		call->offset = get64(&at);
		call->count = get32(&at);
		call->stable = get32(&at);
		if (get32(&at) != call->count || call->count > DATA_BYTES_MAX)
			sim_fail("a WRITE of %u bytes that has another length", call->count);
		else
			memcpy(call->data, at, call->count);
		if (call->count > nas.write_max_bytes)
			sim_fail("a WRITE of %u bytes, and the server takes %u", call->count, nas.write_max_bytes);
		if (call->object == OBJECT_FILE && call->offset + call->count > disk_bytes())
			sim_fail("a WRITE beyond the file's end");
		break;
	default:
		break;
	}
}

/* How long a call takes. */
static int64_t service_ns(void)
{
	int64_t most_ns = options.latency_ns;

	if (fault_is_active(FAULT_slow) && rng_chance(&nas.faults, 256))
		return rng_between(&nas.faults, 0, options.late_ns);
	if (rng_chance(&nas.calls, 32))
		most_ns *= 8;
	if (most_ns > options.late_ns)
		most_ns = options.late_ns;
	return (int64_t)(rng_next(&nas.calls) % (uint64_t)most_ns);
}

/* An attempt to connect takes no longer. */
#define ATTEMPT_NS (20 * S)

/*
 * The handle that a look-up found was stale when it was used. With several connections, the last look-up may have been
 * another one's.
 */
static bool file_is_stale_again(void)
{
	uint32_t now = nas.generations[OBJECT_FILE];

	if (now == 0)
		return false;
	return options.connections == 1 ? nas.found != now && now_ns - nas.found_at_ns < ATTEMPT_NS
					: now_ns - nas.forgotten_at_ns < ATTEMPT_NS;
}

/*
 * mountd is for the first worker, and for a directory whose handle is stale. A client cannot tell that from a file
 * whose handle is stale again as soon as it has been found.
 */
static void check_mountd(void)
{
	uint32_t reasons = 1u << FAULT_replaced | 1u << FAULT_refuse | 1u << FAULT_owner_refused;
	bool is_stale = nas.generations[OBJECT_DIRECTORY] + nas.generations[OBJECT_ROOT] > 0;

	if (worker_directory_is_known && !is_stale && !file_is_stale_again() && (options.faults & reasons) == 0 &&
	    options.fail_at == 0)
		sim_fail("mountd is asked, although the directory's handle is known and the server knows it");
}

/* Of 1024 READs of a walk, those that take very long: a fetch outlives what is written meanwhile. */
#define LONG_READS 100u

static int64_t read_factor(void)
{
	if (faults_are_over())
		return 1;
	if (options.habit == HABIT_WALKS && rng_chance(&nas.calls, LONG_READS))
		return 32 << rng_below(&nas.calls, 6);
	return options.read_factor;
}

/* A server may read at once, and answer after what was written meanwhile. */
static void read_early(struct call *call)
{
	uint64_t end = call->offset + call->count;

	call->was_read = call->procedure == PROC_READ && call->object == OBJECT_FILE && end <= disk_bytes() &&
			 call->count <= sizeof(call->data) &&
			 rng_chance(&nas.calls, options.habit == HABIT_WALKS ? 768 : 32);
	if (call->was_read)
		memcpy(call->data, disk_current(call->offset), call->count);
}

static void take_call(struct sim_conn *conn, const uint8_t *at, int64_t sent_at_ns)
{
	struct call *call = spare;
	uint32_t program, procedure;

	if (call == NULL) {
		sim_fail("more than %u calls under way", CALLS_MAX);
		return;
	}
	result.calls_nfs++;
	if (fault_is_active(FAULT_drop_request) && rng_chance(&nas.faults, 64))
		return;
	spare = call->next;
	call->conn = conn_hold(conn);
	call->epoch = nas.epoch;
	call->forgotten = nas.forgotten;
	call->sent_at_ns = sent_at_ns;
	call->taken = true;
	call->object = OBJECT_NONE;
	call->xid = get32(&at);
	if (get32(&at) != 0 || get32(&at) != 2)
		sim_fail("what the server receives is not an RPC call");
	program = get32(&at);
	get32(&at);
	procedure = get32(&at);
	call->procedure = program == 100005 ? PROC_MNT : procedure;
	if (call->procedure == PROC_MNT)
		check_mountd();
	get32(&at);
	at += padded(get32(&at)); /* credentials */
	get32(&at);
	at += padded(get32(&at)); /* verifier */
	call->count = 0;
	get_arguments(call, at);
	read_early(call);
	call->due_ns = now_ns + service_ns() * (call->procedure == PROC_READ ? read_factor() : 1);
	if (!conn_has_client(conn) && call->due_ns > now_ns + HURRY_NS)
		call->due_ns = now_ns + rng_between(&nas.calls, 0, HURRY_NS);
	call->serial = ++serials;
	if (call->procedure == PROC_WRITE && call->object == OBJECT_FILE)
		tell(call, "takes WRITE", call->stable);
	event_at(call->due_ns, carry_out, call, call->serial, 0);
}

uint32_t nas_receive(struct sim_conn *conn, const uint8_t *bytes, uint32_t count)
{
	uint32_t done = 0;

	while (count - done >= 4) {
		const uint8_t *at = bytes + done;
		uint32_t length = get32(&at) & ~RPC_LAST;

		if (length > (2u << 20)) {
			sim_fail("what the server receives is not a record");
			return count;
		}
		if (count - done - 4 < length)
			break;
		take_call(conn, at, conn_sent_ns(conn, done + 4 + length));
		done += 4 + length;
	}
	return done;
}
