/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Nothing here allocates once owner_watch_start() has returned. */
#include "nfs/owner_watch.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/log.h"
#include "base/thread.h"

/* The counter in the record: ten digits behind "nbdnfs owner 1\nrefreshed ". A worker writes no other bytes. */
#define COUNTER_OFFSET 25u
#define COUNTER_BYTES 10u
#define RECORD_HEAD "nbdnfs owner 1\nrefreshed "
_Static_assert(sizeof(RECORD_HEAD) - 1 == COUNTER_OFFSET, "the counter follows the head");

/* The pause after a look that failed; it doubles. refresh_ms where that is less. */
#define RETRY_MS 200u
#define RETRY_LIMIT_MS 1000u
/* That nothing, or something that is not a record, has the name is believed only after so many looks in a row. */
#define MISSING_LOOKS 3
/* A call of a look that is not answered for 3/4 of refresh_ms, but at least this, goes over a new connection. */
#define REPEAT_LEAST_MS 1000u

struct owner_watch {
	/* constant */
	struct owner_options options;       /* with copies of its texts */
	char *path, *identity;

	/* constant after owner_watch_start() */
	struct nfsio *io;
	owner_changed_fn changed;
	void *context;
	pthread_t thread;
	bool has_thread;

	_Atomic int64_t permitted_until_ms; /* CLOCK_BOOTTIME, which goes on while the machine sleeps */
	atomic_int state;                   /* enum owner_state; changed by the thread alone */
	atomic_bool asked;                  /* a write waits for a look */

	pthread_mutex_t lock; /* guards `stop` */
	pthread_cond_t wake;
	bool stop;

	/* the thread's own, and owner_watch_start()'s before there is one; look_at() runs while it waits */
	uint8_t known[OWNER_RECORD_BYTES];  /* the record as it was first read; its counter is not compared */
	uint8_t found[OWNER_RECORD_BYTES];
	bool has_known;
	bool is_ours;                       /* what look_at() found */
	uint64_t counter;
	char change[COUNTER_BYTES + 1];
	unsigned missing;
	int logged_error;                   /* the error that was last logged, 0 after a success */
	int failed_error;                   /* of the last look that is done, 0 after a success */
	const char *failed_step;            /* and where it failed */
	struct nfsio_look look;
};

static int64_t boottime_ms(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_BOOTTIME, &ts);
	return (int64_t)ts.tv_sec * 1000 + ts.tv_nsec / 1000000;
}

/* The text after "\nKEY " in the record, up to the end of the line; "?" when there is none. */
static void get_field(const uint8_t *record, uint32_t bytes, const char *key, char *value, size_t room)
{
	char text[OWNER_RECORD_BYTES + 1], line[32];
	const char *at;

	memcpy(text, record, bytes);
	text[bytes] = '\0';
	snprintf(line, sizeof(line), "\n%s ", key);
	at = strstr(text, line);
	snprintf(value, room, "%s", "?");
	if (at != NULL) {
		at += strlen(line);
		snprintf(value, room, "%.*s", (int)strcspn(at, "\n"), at);
	}
}

/* Is the record in force, and this boot's? */
static bool names_us(const struct owner_watch *watch, const uint8_t *record)
{
	char text[OWNER_RECORD_BYTES + 1];

	memcpy(text, record, OWNER_RECORD_BYTES);
	text[OWNER_RECORD_BYTES] = '\0';
	return memcmp(record, RECORD_HEAD, COUNTER_OFFSET) == 0 && strstr(text, "\nstate held\n") != NULL &&
	       strstr(text, watch->options.identity) != NULL;
}

static struct owner_watch *watch_of(struct nfsio_look *look)
{
	return (struct owner_watch *)(void *)((char *)look - offsetof(struct owner_watch, look));
}

/* nfsio_look.wants_change: is the record this machine's? Then mark it as a sign of life. */
static bool look_at(struct nfsio_look *look)
{
	struct owner_watch *watch = watch_of(look);

	watch->is_ours = false;
	if (look->found_bytes != OWNER_RECORD_BYTES)
		return false;
	if (!watch->has_known) {
		if (!names_us(watch, watch->found))
			return false;
		memcpy(watch->known, watch->found, OWNER_RECORD_BYTES);
		watch->has_known = true;
		watch->counter = strtoull((char *)watch->known + COUNTER_OFFSET, NULL, 10);
	} else if (memcmp(watch->known, watch->found, COUNTER_OFFSET) != 0 ||
		   memcmp(watch->known + COUNTER_OFFSET + COUNTER_BYTES, watch->found + COUNTER_OFFSET + COUNTER_BYTES,
			  OWNER_RECORD_BYTES - COUNTER_OFFSET - COUNTER_BYTES) != 0) {
		return false;
	}
	watch->is_ours = true;
	snprintf(watch->change, sizeof(watch->change), "%010llu",
		 (unsigned long long)(++watch->counter % 10000000000ull));
	return true;
}

static void set_state(struct owner_watch *watch, enum owner_state state)
{
	if (atomic_load(&watch->state) == (int)state)
		return;
	watch->changed(watch->context, state); /* first: the state must be known before a write fails for it */
	atomic_store(&watch->state, state);
}

/* The permission has run out, for want of a look that ended well: say why. */
static void log_unsure(struct owner_watch *watch)
{
	int error = watch->failed_error;

	log_line("the owner record %s has not been refreshed for %g s (%s: %s): writes wait until it is",
		 watch->options.path + 1, 2.0 * watch->options.refresh_ms / 1000,
		 error != 0 ? watch->failed_step : watch->look.step, error != 0 ? strerror(-error) : "no result yet");
	watch->logged_error = error;
}

static bool is_about_the_connection(int error)
{
	return error == -ENOTCONN || error == -ECONNRESET || error == -ETIMEDOUT || error == -ECANCELED;
}

/*
 * The last look has failed, or is not done. The state goes by the clock: no answer is needed for it to change. A
 * refusal that comes after that is logged as well; what comes with a broken connection nfsio logs.
 */
static void go_by_the_clock(struct owner_watch *watch)
{
	int state = atomic_load(&watch->state), error = watch->failed_error;

	if (state == OWNER_HELD && boottime_ms() >= atomic_load(&watch->permitted_until_ms)) {
		log_unsure(watch);
		set_state(watch, OWNER_UNSURE);
	} else if (state == OWNER_UNSURE && error != 0 && error != watch->logged_error &&
		   !is_about_the_connection(error)) {
		log_unsure(watch);
	}
}

/* nfsio_look.waiting */
static void look_waits(struct nfsio_look *look)
{
	go_by_the_clock(watch_of(look));
}

/*
 * Has the last look found a record, whosever it is? An answer to LOOKUP may be another one's, and the bytes those of
 * another file.
 */
static bool found_record(const struct owner_watch *watch)
{
	return watch->look.found_bytes == OWNER_RECORD_BYTES &&
	       memcmp(watch->found, RECORD_HEAD, COUNTER_OFFSET) == 0;
}

static void note_stolen(struct owner_watch *watch)
{
	uint32_t found_bytes = watch->look.found_bytes;
	char host[72] = "", since[32] = "";

	if (found_record(watch)) {
		get_field(watch->found, found_bytes, "host", host, sizeof(host));
		get_field(watch->found, found_bytes, "claimed", since, sizeof(since));
		log_line("the backing file has been taken over by %s at %s: all requests fail from now on", host,
			 since);
	} else {
		log_line("the owner record %s is %s: all requests fail from now on", watch->options.path + 1,
			 found_bytes == 0 ? "gone" : "damaged");
	}
	set_state(watch, OWNER_STOLEN);
}

/* A look has ended well: writes are permitted, unless it took so long that the time is over. */
static int note_refreshed(struct owner_watch *watch, int64_t began_ms)
{
	int64_t until_ms = began_ms + 2 * (int64_t)watch->options.refresh_ms;

	watch->look.step = "all calls together";
	if (boottime_ms() >= until_ms)
		return -ETIMEDOUT;
	if (atomic_load(&watch->state) == OWNER_UNSURE)
		log_line("the owner record %s is refreshed again: writes go on", watch->options.path + 1);
	atomic_store(&watch->permitted_until_ms, until_ms);
	set_state(watch, OWNER_HELD);
	watch->logged_error = watch->failed_error = 0;
	return 0;
}

/* One look. Returns 0 when it had a result, else *why and an error that the next look may not meet. */
static int look(struct owner_watch *watch, uint32_t limit_ms, struct nfsio_failure *why)
{
	uint32_t repeat_after_ms = watch->options.refresh_ms / 4 * 3;
	int64_t began_ms = boottime_ms();
	int error;

	watch->look = (struct nfsio_look){
		.limit_ms = limit_ms,
		.repeat_after_ms = repeat_after_ms > REPEAT_LEAST_MS ? repeat_after_ms : REPEAT_LEAST_MS,
		.waiting = look_waits,
		.asks_file = true,
		.data = watch->found,
		.room_bytes = OWNER_RECORD_BYTES,
		.wants_change = look_at,
		.change = (const uint8_t *)watch->change,
		.change_bytes = COUNTER_BYTES,
		.change_offset = COUNTER_OFFSET,
	};
	watch->is_ours = false;
	error = nfsio_look(watch->io, watch->options.path, &watch->look, why);
	if (error == -ENOENT || (error == 0 && !found_record(watch))) {
		if (++watch->missing >= MISSING_LOOKS) {
			note_stolen(watch);
			return 0;
		}
		error = -ENOENT;
	} else {
		watch->missing = 0;
	}
	if (error == 0 && !watch->is_ours) {
		note_stolen(watch);
		return 0;
	}
	/* without the sign of life other machines may take the file over: no permission either */
	if (error == 0)
		error = watch->look.changed ? note_refreshed(watch, began_ms) : -EIO;
	/* -ECANCELED: the engine ends, and the state with it */
	if (error != 0 && error != -ECANCELED) {
		watch->failed_error = error;
		watch->failed_step = watch->look.step;
		go_by_the_clock(watch);
	}
	return error;
}

/*
 * Sleep until it is time for the next look, or a write asks for one, which counts only where the last one ended well.
 * Returns false when the thread must end.
 */
static bool sleep_ms(struct owner_watch *watch, uint32_t ms, bool may_be_asked)
{
	struct timespec until = time_after_ms(ms);
	bool stop;

	pthread_mutex_lock(&watch->lock);
	while (!watch->stop && !(may_be_asked && atomic_exchange(&watch->asked, false)) &&
	       pthread_cond_timedwait(&watch->wake, &watch->lock, &until) != ETIMEDOUT)
		;
	stop = watch->stop;
	pthread_mutex_unlock(&watch->lock);
	return !stop;
}

static void *owner_watch_thread(void *arg)
{
	struct owner_watch *watch = arg;
	struct nfsio_failure why;
	uint32_t refresh_ms = watch->options.refresh_ms, retry_ms = RETRY_MS;
	int error = 0;

	touch_stack();
	while (atomic_load(&watch->state) != OWNER_STOLEN &&
	       sleep_ms(watch, error == 0 || refresh_ms < retry_ms ? refresh_ms : retry_ms, error == 0)) {
		if (error == 0)
			retry_ms = RETRY_MS;
		else
			retry_ms = 2 * retry_ms < RETRY_LIMIT_MS ? 2 * retry_ms : RETRY_LIMIT_MS;
		atomic_store(&watch->asked, false);
		error = look(watch, 0, &why);
	}
	return NULL;
}

struct owner_watch *owner_watch_create(const struct owner_options *options)
{
	struct owner_watch *watch = calloc(1, sizeof(*watch));

	if (watch == NULL)
		return NULL;
	watch->options = *options;
	watch->options.path = watch->path = strdup(options->path);
	watch->options.identity = watch->identity = strdup(options->identity);
	if (watch->path == NULL || watch->identity == NULL) {
		free(watch->path);
		free(watch->identity);
		free(watch);
		return NULL;
	}
	pthread_mutex_init(&watch->lock, NULL);
	condition_init(&watch->wake);
	return watch;
}

int owner_watch_start(struct owner_watch *watch, struct nfsio *io, uint32_t limit_ms, owner_changed_fn changed,
		      void *context, struct nfsio_failure *why)
{
	struct timespec pause = { .tv_nsec = RETRY_MS * 1000000L };
	int64_t end_ms = boottime_ms() + limit_ms;
	int error;

	watch->io = io;
	watch->changed = changed;
	watch->context = context;
	/* a missing record a few times (MISSING_LOOKS), and for a while one whose look took longer than it permits */
	while ((error = look(watch, limit_ms, why)) == -ENOENT ||
	       (error == -ETIMEDOUT && why->error == 0 && boottime_ms() < end_ms))
		nanosleep(&pause, NULL);
	if (error != 0 && why->error == 0) {
		*why = (struct nfsio_failure){ .phase = NFSIO_NAME, .error = error };
		snprintf(why->message, sizeof(why->message), "%s", strerror(-error));
	}
	if (is_about_the_connection(error))
		why->phase = NFSIO_CONNECT;
	if (error != 0 || atomic_load(&watch->state) == OWNER_STOLEN)
		return error;
	error = thread_start(&watch->thread, owner_watch_thread, watch);
	watch->has_thread = error == 0;
	if (error != 0)
		*why = (struct nfsio_failure){ .phase = NFSIO_OPEN, .error = error };
	return error;
}

int owner_watch_may_write(void *context)
{
	struct owner_watch *watch = context;

	if (atomic_load(&watch->state) == OWNER_STOLEN)
		return -EIO;
	if (boottime_ms() < atomic_load(&watch->permitted_until_ms))
		return 0;
	/* after the machine has slept, the thread may sleep on for long: wake it. A missed signal is sent again */
	atomic_store(&watch->asked, true);
	pthread_cond_signal(&watch->wake);
	return -EAGAIN;
}

void owner_watch_destroy(struct owner_watch *watch)
{
	pthread_mutex_lock(&watch->lock);
	watch->stop = true;
	pthread_cond_signal(&watch->wake);
	pthread_mutex_unlock(&watch->lock);
	if (watch->has_thread)
		pthread_join(watch->thread, NULL);
	pthread_cond_destroy(&watch->wake);
	pthread_mutex_destroy(&watch->lock);
	free(watch->path);
	free(watch->identity);
	free(watch);
}
