/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A new connection: a libnfs context that is not published yet mounts, opens the file and checks its handle. The I/O
 * thread waits for each call (`step`), and meanwhile fails requests that have waited too long.
 */
#include "nfs/internal.h"

#include "base/log.h"

#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

/* How long to wait for an answer to a SYN before a new attempt: the kernel's own pauses between repetitions double. */
#define SYN_LIMIT_MS 2500
#define FIRST_SYN_LIMIT_MS 15000
/* An attempt that takes so long is logged before it has failed. */
#define LOG_AFTER_MS 2000

/* The kernel notices a peer that has vanished; there is no limit on how slow a server may be. */
#define KEEPALIVE_IDLE_S 5
#define KEEPALIVE_INTERVAL_S 5
#define KEEPALIVE_PROBES 4
#define UNACKED_LIMIT_MS 25000

void step_done(int error, struct nfs_context *nfs, void *data, void *arg)
{
	struct step *step = arg;

	step->done = true;
	step->error = error;
	step->data = error == 0 ? data : NULL;
}

static void step_stat_done(int error, struct nfs_context *nfs, void *data, void *arg)
{
	struct step *step = arg;

	step_done(error, nfs, NULL, arg);
	if (error == 0)
		copy_stat(&step->st, data);
}

static void step_getattr3_done(struct rpc_context *rpc, int status, void *data, void *arg)
{
	struct step *step = arg;
	GETATTR3res *res = data;

	step->done = true;
	step->error = -EIO;
	if (status == RPC_STATUS_SUCCESS && res->status == NFS3_OK) {
		step->error = 0;
		step->fileid = res->GETATTR3res_u.resok.obj_attributes.fileid;
	}
}

struct step *new_step(struct nfsio *io)
{
	io->step = (struct step){ 0 };
	return &io->step;
}

/* Log why there is no connection: once for each condition, until there is one again. For the I/O thread. */
void log_down(struct nfsio *io, enum nfsio_condition condition, const char *reason)
{
	static const char *const gone[] = {
		[NFSIO_FILE_DELETED] = "the file was deleted on the server",
		[NFSIO_FILE_REPLACED] = "the file was replaced by another on the server",
	};

	if (io->logged[condition] || io->options.quiet)
		return;
	io->logged[condition] = true;
	if (condition == NFSIO_LINK_DOWN)
		log_line("server %s: no connection (%s), waiting for one", io->address, reason);
	else
		log_line("server %s: %s: writing nothing, waiting for the old file", io->address, gone[condition]);
}

/* While there is no connection: fail requests that have waited too long. Without the lock. */
void tend_waiting(struct nfsio *io)
{
	bool logged = io->logged[NFSIO_LINK_DOWN] || io->logged[NFSIO_FILE_DELETED] || io->logged[NFSIO_FILE_REPLACED];

	if (io->opened_once && !logged && now_ms() - io->away_since_ms >= LOG_AFTER_MS)
		log_down(io, NFSIO_LINK_DOWN, "no answer");
	pthread_mutex_lock(&io->lock);
	fail_hopeless(io);
	fail_late_names(io);
	give_back(io);
	pthread_mutex_unlock(&io->lock);
}

static void tune_socket(int fd)
{
	int on = 1, idle_s = KEEPALIVE_IDLE_S, interval_s = KEEPALIVE_INTERVAL_S, probes = KEEPALIVE_PROBES;
	unsigned unacked_ms = UNACKED_LIMIT_MS;

	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
	setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof(on));
	setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle_s, sizeof(idle_s));
	setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &interval_s, sizeof(interval_s));
	setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &probes, sizeof(probes));
	setsockopt(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &unacked_ms, sizeof(unacked_ms));
}

/* Has the peer not even acknowledged the SYN? */
static bool is_unanswered(int fd)
{
	struct tcp_info info;
	socklen_t length = sizeof(info);

	return getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &length) == 0 && info.tcpi_state == TCP_SYN_SENT;
}

/* Serve `nfs` until `step` is done. Returns step->error, -ETIMEDOUT, -ENOTCONN or -ECANCELED. */
int pump(struct nfsio *io, struct nfs_context *nfs, struct step *step, int64_t deadline_ms)
{
	int64_t answered_at_ms = now_ms();

	while (!step->done) {
		struct pollfd fds[2] = {
			{ .fd = nfs_get_fd(nfs), .events = (short)nfs_which_events(nfs) },
			{ .fd = io->wake_fd, .events = POLLIN },
		};
		int64_t now = now_ms(), left_ms = deadline_ms - now;
		uint64_t kicks;

		if (atomic_load(&io->stop) && !step->insists)
			return -ECANCELED;
		if (left_ms <= 0)
			return -ETIMEDOUT;
		if (fds[0].fd < 0)
			return -ENOTCONN;
		tune_socket(fds[0].fd); /* each time: libnfs may have made another socket under the same number */
		if (!is_unanswered(fds[0].fd))
			answered_at_ms = now;
		else if (now - answered_at_ms >= (io->opened_once ? SYN_LIMIT_MS : FIRST_SYN_LIMIT_MS))
			return -ENOTCONN;
		if (poll(fds, 2, left_ms > AWAY_TICK_MS ? AWAY_TICK_MS : (int)left_ms) < 0 && errno != EINTR)
			return -errno;
		if (fds[1].revents != 0)
			(void)!read(io->wake_fd, &kicks, sizeof(kicks));
		if (fds[0].revents != 0 && nfs_service(nfs, fds[0].revents) < 0 && !step->done)
			return -ENOTCONN;
		if (!step->insists) /* else the lock is held */
			tend_waiting(io);
	}
	return step->error;
}

/*
 * libnfs gets a URL with the options only. uid and gid are set apart: its atoi() takes no number over 2147483647 where
 * long has 32 bits.
 */
static bool set_options(struct nfsio *io, struct nfs_context *nfs)
{
	const char *options = strchr(io->url, '?');
	char text[512];
	struct nfs_url *parsed;

	if (snprintf(text, sizeof(text), "nfs://server/directory/file%s", options != NULL ? options : "") >=
	    (int)sizeof(text))
		return false;
	parsed = nfs_parse_url_full(nfs, text);
	if (parsed == NULL)
		return false;
	nfs_destroy_url(parsed);
	nfs_set_uid(nfs, (int)url_number(io->url, "uid=", getuid()));
	nfs_set_gid(nfs, (int)url_number(io->url, "gid=", getgid()));
	return true;
}

static struct nfs_context *new_context(struct nfsio *io, struct nfsio_failure *why)
{
	struct nfs_context *nfs = nfs_init_context();
	char host[65] = "", name[160];

	if (nfs == NULL) {
		set_failure(why, NFSIO_CONNECT, -ENOMEM, NULL);
		return NULL;
	}
	if (!set_options(io, nfs)) {
		set_failure(why, NFSIO_CONNECT, -EINVAL, nfs_get_error(nfs));
		nfs_destroy_context(nfs);
		return NULL;
	}
	nfs_set_autoreconnect(nfs, 0);
	nfs_set_timeout(nfs, -1);
	/*
	 * An NFSv4 server knows its clients by name. It takes a second context of the same name for the first one
	 * after a reboot, and forgets its opens. libnfs's default name is the same for all that start within a
	 * second.
	 */
	gethostname(host, sizeof(host) - 1);
	snprintf(name, sizeof(name), "nbdnfs-%s-%ld-%lld-%lx-%u", host, (long)getpid(), (long long)now_ms(),
		 (unsigned long)(uintptr_t)io, io->contexts++);
	nfs4_set_client_name(nfs, name);
	return nfs;
}

/* Is the error a connection that failed, or "try later", as opposed to a server that refuses? */
static bool is_no_answer(struct nfs_context *nfs, int error)
{
	return is_transport_error(error) || error == -EIO || error == -ECANCELED || error == -EAGAIN ||
	       verdict4(nfs) == NOT_NOW4 || verdict4(nfs) == STATE_FORGOTTEN4;
}

/* Cut the last component off `path`; "/" is the last that is left. Returns false when there is none. */
static bool go_up(char *path)
{
	char *slash = strrchr(path, '/');

	if (slash == NULL || slash[1] == '\0')
		return false;
	slash[slash == path] = '\0';
	return true;
}

/* Remember what was mounted, for reconnects, and what of the directory is below it. */
static bool remember_mount(struct nfsio *io, const char *path)
{
	const char *rest = io->url_directory + (strcmp(path, "/") == 0 ? 0 : strlen(path));

	io->mount_path = strdup(path);
	io->prefix = strdup(strcmp(rest, "/") == 0 ? "" : rest);
	return io->prefix != NULL && io->mount_path != NULL;
}

/*
 * Mount the URL's directory or, where the server exports only a parent of it, the longest parent that it exports.
 * Remember the choice for reconnects. Returns false and *why, of the first refusal; *nfs may be NULL then.
 */
static bool mount_directory(struct nfsio *io, struct nfs_context **nfs, int64_t deadline_ms, struct nfsio_failure *why)
{
	char path[URL_PATH_BYTES_MAX + 1];
	bool chosen = io->mount_path != NULL;
	bool first = true;

	snprintf(path, sizeof(path), "%s", chosen ? io->mount_path : io->url_directory);
	for (;;) {
		struct step *step = new_step(io);
		int error = -EIO;

		if (nfs_mount_async(*nfs, io->address, path, step_done, step) == 0)
			error = pump(io, *nfs, step, deadline_ms);
		if (error == 0)
			break;
		if (first)
			set_failure(why, is_no_answer(*nfs, error) ? NFSIO_CONNECT : NFSIO_MOUNT, error,
				    nfs_get_error(*nfs));
		first = false;
		if (is_no_answer(*nfs, error) || chosen || !go_up(path))
			return false;
		/* a context that failed to mount cannot be used again */
		nfs_destroy_context(*nfs);
		*nfs = new_context(io, why);
		if (*nfs == NULL)
			return false;
	}
	if (!chosen && !remember_mount(io, path)) {
		set_failure(why, NFSIO_MOUNT, -ENOMEM, NULL);
		return false;
	}
	return true;
}

static int open_file(struct nfsio *io, struct nfs_context *nfs, const char *path, int64_t deadline_ms,
		     struct nfsfh **fh)
{
	struct step *step = new_step(io);
	int flags = (io->options.read_only ? O_RDONLY : O_RDWR) | O_SYNC;
	int error;

	/* not on a reconnect: a file that was deleted must not come back empty under live swap */
	bool create = io->options.create && !io->opened_once;

	if (!(create && io->options.exclusive)) {
		if (nfs_open_async(nfs, path, flags, step_done, step) != 0)
			return -EIO;
		error = pump(io, nfs, step, deadline_ms);
		if (error != -ENOENT || !create) {
			*fh = step->data;
			return error;
		}
	}
	step = new_step(io);
	if (nfs_create_async(nfs, path, O_RDWR | O_SYNC | O_EXCL, (int)io->options.mode, step_done, step) != 0)
		return -EIO;
	error = pump(io, nfs, step, deadline_ms);
	*fh = step->data;
	return error;
}

/* Length 0: libnfs has no handle that NFSv3 allows. */
static struct nfsio_handle copy_handle(const struct nfs_fh *opaque)
{
	const struct nfs_fh_bytes *from = (const struct nfs_fh_bytes *)opaque;
	struct nfsio_handle handle = { 0 };

	if (from != NULL && from->val != NULL && from->len > 0 && from->len <= (int)sizeof(handle.bytes)) {
		handle.length_bytes = (uint32_t)from->len;
		memcpy(handle.bytes, from->val, handle.length_bytes);
	}
	return handle;
}

/* struct nfs_fh_bytes is libnfs's private layout: check that the handle's bytes name the file that libnfs has open. */
static int check_raw_handle(struct nfsio *io, struct nfs_context *nfs, struct nfsfh *fh, nfs_fh3 *raw,
			    uint64_t fileid, int64_t deadline_ms)
{
	const struct nfs_fh_bytes *bytes = (const struct nfs_fh_bytes *)nfs_get_fh(fh);
	struct step *step = new_step(io);
	GETATTR3args args;
	int error;

	if (bytes == NULL || bytes->len <= 0 || bytes->len > NFS3_FHSIZE || bytes->val == NULL)
		return -EPROTO;
	raw->data.data_len = (unsigned)bytes->len;
	raw->data.data_val = bytes->val;
	args.object = *raw;
	if (call_getattr3(nfs_get_rpc_context(nfs), step_getattr3_done, &args, step) != 0)
		return -EIO;
	error = pump(io, nfs, step, deadline_ms);
	if (error == 0 && step->fileid != fileid)
		error = -EPROTO;
	return error;
}

/*
 * The handle of the directory that the URL's file lies in: that of the mount, or what libnfs opens, which follows
 * symbolic links. Where we may not read it we may write it, or there would be no file beside the one that is open.
 */
static struct nfsio_handle find_directory(struct nfsio *io, struct nfs_context *nfs, int64_t deadline_ms)
{
	static const int flags[] = { O_RDONLY, O_WRONLY };
	struct nfsio_handle found = { 0 };

	if (io->prefix[0] == '\0')
		return copy_handle(nfs_get_rootfh(nfs));
	for (unsigned i = 0; i < 2 && found.length_bytes == 0; i++) {
		struct step *step = new_step(io);

		if (nfs_open_async(nfs, io->prefix, flags[i], step_done, step) != 0 ||
		    pump(io, nfs, step, deadline_ms) != 0)
			continue;
		found = copy_handle(nfs_get_fh(step->data));
		nfs_close_async(nfs, step->data, libnfs_ignore, NULL);
	}
	return found;
}

/* Mount and open with a new context. Returns true and *made, or false and *why. Without the lock. */
bool connect_once(struct nfsio *io, struct connection *made, struct nfsio_failure *why)
{
	int64_t deadline_ms = now_ms() + 1 + io->patience_ms; /* + 1: now_ms() rounds down */
	struct nfs_context *nfs = new_context(io, why);
	struct step *step;
	char path[4096];
	int error;

	*made = (struct connection){ .deadline_ms = deadline_ms };
	if (nfs == NULL)
		return false;
	if (!mount_directory(io, &nfs, deadline_ms, why))
		goto fail;
	snprintf(path, sizeof(path), "%s/%s", io->prefix, io->url_file);
	error = open_file(io, nfs, path, deadline_ms, &made->fh);
	if (error == 0) {
		step = new_step(io);
		error = nfs_fstat64_async(nfs, made->fh, step_stat_done, step) == 0
				? pump(io, nfs, step, deadline_ms)
				: -EIO;
		made->st = step->st;
	}
	if (error == 0 && !S_ISREG(made->st.mode))
		error = S_ISDIR(made->st.mode) ? -EISDIR : -EINVAL;
	if (error == 0 && io->version == 3)
		error = check_raw_handle(io, nfs, made->fh, &made->fh3, made->st.fileid, deadline_ms);
	if (error == 0 && io->version == 3 && io->options.looks)
		made->directory = find_directory(io, nfs, deadline_ms);
	if (error != 0) {
		set_failure(why, is_no_answer(nfs, error) ? NFSIO_CONNECT : NFSIO_OPEN, error, nfs_get_error(nfs));
		goto fail;
	}
	made->nfs = nfs;
	return true;
fail:
	if (nfs != NULL)
		libnfs_destroy(nfs, made->fh);
	return false;
}
