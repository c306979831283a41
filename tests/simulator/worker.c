/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* One worker after the other on one region, as a keeper has it; and what is looked at in the end. */
#include "sim.h"

#include "block/engine.h"
#include "nbd/loop.h"
#include "wrapped.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

enum phase { PHASE_LOAD, PHASE_FLUSH, PHASE_CHECK };

struct engine *worker_engine;
bool worker_place_is_known, worker_directory_is_known;

static bool kill_is_due, has_exited;
static uint32_t requesters_running;
static unsigned main_thread;
static enum phase phase;
static struct rng workers;

bool worker_kill_is_due(void)
{
	return kill_is_due;
}

void worker_kill(void)
{
	kill_is_due = true;
}

void worker_exit(void)
{
	has_exited = true;
	worker_kill();
	thread_yield();
}

void worker_requester_ended(void)
{
	if (--requesters_running > 0)
		return;
	if (options.loop)
		nbd_client_finish();
	else
		thread_wake(main_thread);
}

/* Errors of a start that a keeper answers with another one. */
static void check_start(int error, const struct nfsio_failure *why)
{
	static const int expected[] = { ENOTCONN,     ETIMEDOUT,  EAGAIN, ECONNREFUSED,
					ECONNRESET, ENOENT, ESTALE, ECANCELED };
	uint32_t refusing = 1u << FAULT_owner_refused | 1u << FAULT_refuse | 1u << FAULT_replaced;

	if (live_allocations != 0)
		sim_fail("a start that failed (%d) leaves %llu allocations", -error,
			 (unsigned long long)live_allocations);
	for (unsigned i = 0; i < sizeof(expected) / sizeof(expected[0]); i++)
		if (error == -expected[i])
			return;
	if (options.fail_at == 0 && (options.faults & refusing) == 0)
		sim_fail("a worker does not start: error %d, %s", -error, why->message);
}

static void start_engine(void)
{
	struct engine_options engine_options = {
		.nfs = {
			.url = "nfs://nas/export/dir/swap?version=3&nfsport=2049&mountport=20048&uid=0&gid=0",
			.address = "10.0.0.1",
			.transport = NFSIO_OVER_WIRE,
			.connect_timeout_s = 15,
			.soft_limit_ms = options.soft_limit_ms,
		},
		.region_fd = CALLERS_REGION_FD,
		.region_pages = options.slots,
		.region_version = !options.encrypt ? REGION_PLAIN : options.aes ? REGION_AES : REGION_XCHACHA20,
		.clear_bytes = options.encrypt ? PAGE_BYTES : 0,
		.connections = options.connections,
		.stable_writes = options.stable_writes,
		.read_ahead_pages = options.read_ahead_pages,
	};
	struct nfsio_failure why = { 0 };
	int error;

	if (options.owner)
		engine_options.owner = (struct owner_options){ .path = OWNER_PATH, .identity = OWNER_IDENTITY,
							       .refresh_ms = OWNER_REFRESH_MS };
	while ((error = engine_create(&engine_options, &worker_engine, &why)) != 0) {
		check_start(error, &why);
		memory_rewind();
		thread_sleep(rng_between(&workers, 50 * MS, 500 * MS));
	}
	worker_place_is_known = true;
	worker_directory_is_known = block_knows_directory(worker_engine);
}

/* Serve the client until it disconnects; until it leaves: then the worker ends, as in nbdnfs/worker/life.py. */
static void serve_client(void)
{
	int fd = network_client_fd(), error;
	struct nbd_loop *loop;

	thread_new(nbd_client_thread, NULL);
	error = nbd_loop_create(worker_engine, fd, options.loop_tick_ms, &loop);
	if (error != 0) {
		if (options.fail_at == 0)
			sim_fail("the loop does not start: error %d", -error);
		worker_exit();
	}
	error = nbd_loop_run(loop);
	if (error != 0)
		sim_fail("the loop ends with error %d", -error);
	if (!nbd_socket_was_left() && (options.fail_at == 0 || nbd_client_is_up()))
		sim_fail("the loop has ended, and its client is there");
	nbd_loop_destroy(loop);
	check_idle_block(worker_engine);
	if (!nbd_client_has_disconnected())
		worker_exit();
	close(fd);
}

static void run_load(void)
{
	requesters_running = options.threads;
	for (uint32_t i = 0; i < options.threads; i++)
		thread_new(load_thread, load_requester(i));
	if (options.loop)
		serve_client();
	while (requesters_running > 0)
		thread_block(NEVER);
	check_idle_block(worker_engine);
}

/*
 * All requests are done: after a last FLUSH the power of the server is cut, and another worker reads everything. Not
 * where the file was stolen: then all of it is the thief's.
 */
static void *worker_main(void *argument)
{
	(void)argument;
	start_engine();
	if (phase == PHASE_LOAD) {
		if (rng_chance(&workers, 512))
			load_check_torn();
		run_load();
		phase = PHASE_FLUSH;
	}
	if (stolen_at_ns != NEVER)
		phase = PHASE_CHECK;
	if (phase == PHASE_FLUSH) {
		load_flush();
		nas_lose_cache();
		conns_server_down(false);
		phase = PHASE_CHECK;
		if (rng_chance(&workers, 512)) {
			worker_kill();
			thread_yield();
		}
		engine_destroy(worker_engine);
		if (live_allocations != 0)
			sim_fail("an engine that has ended leaves %llu allocations",
				 (unsigned long long)live_allocations);
		start_engine();
	}
	load_check_all();
	engine_destroy(worker_engine);
	world_stop();
	return NULL;
}

static void start_again(void *a, uint64_t b, uint64_t c)
{
	(void)a, (void)b, (void)c;
	worker_start();
}

void worker_start(void)
{
	memory_reset();
	nas_worker_starts();
	main_thread = thread_new(worker_main, NULL);
}

void worker_killed(void)
{
	bool was_killed = !has_exited;

	kill_is_due = has_exited = false;
	threads_drop();
	nas_hurry();
	network_close_all();
	region_let_go();
	if (options.loop)
		nbd_client_interrupted(was_killed);
	load_interrupted(was_killed);
	*(was_killed ? &result.worker_crashes : &result.hang_ups) += 1;
	if (options.verbose)
		fprintf(stderr, "%14.6f the worker %s\n", (double)now_ns / 1e9, was_killed ? "is killed" : "ends");
	memory_reset();
	event_at(now_ns + rng_between(&workers, 5 * MS, 700 * MS), start_again, NULL, 0, 0);
}

void worker_reset(void)
{
	kill_is_due = has_exited = worker_place_is_known = worker_directory_is_known = false;
	phase = PHASE_LOAD;
	workers.state = options.seed ^ 0x303c;
	memory_reset();
}
