/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The first connection to a file, by its name: a libnfs context that is not published yet mounts, opens the file and
 * checks its handle. With `transport=libnfs`, and over NFSv4, all connections. The I/O thread waits for each call
 * (`step`), and meanwhile fails requests that have waited too long.
 */
#include "nfs/connecting.h"

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
	step->error = status == RPC_STATUS_SUCCESS && res->status == NFS3ERR_JUKEBOX ? -EAGAIN : -EIO;
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
		else if (now - answered_at_ms >= syn_limit_ms(io))
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
 * libnfs gets a URL with the options only (see url.c). uid and gid are set apart: its atoi() takes no number over
 * 2147483647 where long has 32 bits.
 *
 * Without auto-traverse-mounts=0, libnfs asks MOUNT for a list of all exports, which it parses recursively, and mounts
 * those that lie below ours. A server with thousands of exports would be the end of the process; one that does not
 * answer, or that has an export which we may not mount, the end of each attempt to connect. libnfs 4.0 has no function
 * for it.
 */
static bool set_options(struct nfsio *io, struct nfs_context *nfs)
{
	const char *options = strchr(io->url, '?');
	char text[512];
	struct nfs_url *parsed;

	if (snprintf(text, sizeof(text), "nfs://0.0.0.0/-/-?auto-traverse-mounts=0%s%s", options != NULL ? "&" : "",
		     options != NULL ? options + 1 : "") >= (int)sizeof(text))
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

/* NFS3ERR_JUKEBOX: MOUNT has no such status, and yet servers send it. */
static bool is_jukebox(struct nfs_context *nfs)
{
	const char *text = nfs_get_error(nfs);

	return text != NULL && strstr(text, "(10008)") != NULL;
}

/* What has gone wrong in `step`. libnfs's text says nothing of an answer that did not come. */
static void fail_step(struct nfsio_failure *why, struct nfs_context *nfs, enum nfsio_phase phase, const char *step,
		      int error)
{
	char text[64];

	snprintf(text, sizeof(text), "no answer to the %s", step);
	set_failure(why, is_no_answer(nfs, error) ? NFSIO_CONNECT : phase, error,
		    error == -ETIMEDOUT ? text : nfs_get_error(nfs));
}

/* Cut the last component off `path`; "/" is the last parent, for NFSv3. Returns false when there is none. */
static bool go_up(const struct nfsio *io, char *path)
{
	char *slash = strrchr(path, '/');

	if (slash == NULL || slash[1] == '\0' || (slash == path && io->version != 3))
		return false;
	slash[slash == path] = '\0';
	return true;
}

/*
 * Mount the URL's directory or, where the server exports only a parent of it, the longest parent that it exports.
 * Remember the choice for reconnects. Returns false and *why: that there was no answer, or the first refusal; *nfs may
 * be NULL then.
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
		if (is_jukebox(*nfs))
			error = -EAGAIN;
		if (first || is_no_answer(*nfs, error))
			fail_step(why, *nfs, NFSIO_MOUNT, "mount", error);
		first = false;
		if (is_no_answer(*nfs, error) || chosen || !go_up(io, path))
			return false;
		/* a context that failed to mount cannot be used again */
		nfs_destroy_context(*nfs);
		*nfs = new_context(io, why);
		if (*nfs == NULL)
			return false;
	}
	if (!chosen && !remember_mount(io, strlen(path))) {
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

static void note_place(struct connection *made)
{
	const struct nfs_fh_bytes *bytes = (const struct nfs_fh_bytes *)nfs_get_fh(made->fh);
	struct place *place = &made->place;
	struct server_port *peer = &place->peer;

	peer->address_bytes = sizeof(peer->address);
	if (getpeername(nfs_get_fd(made->nfs), (struct sockaddr *)&peer->address, &peer->address_bytes) < 0)
		peer->address_bytes = 0;
	if (bytes == NULL || bytes->len <= 0 || bytes->len > (int)sizeof(place->handle))
		return; /* without one, every later handle is another */
	place->handle_bytes = (uint32_t)bytes->len;
	memcpy(place->handle, bytes->val, place->handle_bytes);
}

/* The file has been opened: look at it. Returns 0 or -errno. */
static int look_at_file(struct nfsio *io, struct connection *made)
{
	struct step *step = new_step(io);
	int error = -EIO;

	if (nfs_fstat64_async(made->nfs, made->fh, step_stat_done, step) == 0)
		error = pump(io, made->nfs, step, made->deadline_ms);
	made->st = step->st;
	if (error == 0 && !S_ISREG(made->st.mode))
		error = S_ISDIR(made->st.mode) ? -EISDIR : -EINVAL;
	if (error == 0 && io->version == 3)
		error = check_raw_handle(io, made->nfs, made->fh, &made->fh3, made->st.fileid, made->deadline_ms);
	return error;
}

/* For nfsio_options.names_only: there is such a directory. Returns 0 or -errno. */
static int look_at_directory(struct nfsio *io, struct connection *made)
{
	struct step *step = new_step(io);
	int error = -EIO;

	if (nfs_stat64_async(made->nfs, io->prefix[0] != '\0' ? io->prefix : "/", step_stat_done, step) == 0)
		error = pump(io, made->nfs, step, made->deadline_ms);
	made->st = step->st;
	return error != 0 || S_ISDIR(made->st.mode) ? error : -ENOTDIR;
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

/* Mount and open with a new context. Returns true and *made, or false and *why. Without the lock. */
bool connect_to_name(struct nfsio *io, struct connection *made, struct nfsio_failure *why)
{
	int64_t deadline_ms = now_ms() + 1 + io->patience_ms; /* + 1: now_ms() rounds down */
	struct nfs_context *nfs = new_context(io, why);
	char path[4096];
	int error;

	*made = (struct connection){ .deadline_ms = deadline_ms };
	if (nfs == NULL)
		return false;
	if (!mount_directory(io, &nfs, deadline_ms, why))
		goto fail;
	made->nfs = nfs;
	if (io->options.names_only) {
		error = look_at_directory(io, made);
	} else {
		snprintf(path, sizeof(path), "%s/%s", io->prefix, io->url_file);
		error = open_file(io, nfs, path, deadline_ms, &made->fh);
		if (error == 0)
			error = look_at_file(io, made);
	}
	if (error != 0) {
		fail_step(why, nfs, NFSIO_OPEN, "open", error);
		goto fail;
	}
	if (made->fh != NULL)
		note_place(made);
	made->root = copy_handle(nfs_get_rootfh(made->nfs));
	made->read_max_bytes = transfer_limit(nfs_get_readmax(nfs));
	made->write_max_bytes = transfer_limit(nfs_get_writemax(nfs));
	return true;
fail:
	if (nfs != NULL)
		libnfs_destroy(nfs, made->fh);
	made->nfs = NULL;
	return false;
}
