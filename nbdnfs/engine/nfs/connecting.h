/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What the parts of nfsio share that make a connection, or find and recognise the file over one; nothing else includes
 * it. internal.h says what each part is.
 */
#ifndef NBDNFS_CONNECTING_H
#define NBDNFS_CONNECTING_H

#include "nfs/internal.h"

/*
 * connect_wire.c, for the I/O thread and without the lock. They return 0 or -errno; after an error of the first and the
 * last three, io->wire is closed.
 */
int wire_connect(struct nfsio *io, const struct server_port *peer, int64_t deadline_ms);
int call_and_wait(struct nfsio *io, struct wire_call *call, struct wire_answer *answer, int64_t deadline_ms);
/* TCP and NULL. */
int connect_to_server(struct nfsio *io, const struct server_port *peer, int64_t deadline_ms);
/* The rest, over that: -ESTALE for a handle that the server does not know, -EISDIR for one of no regular file. */
int go_on_to_handle(struct nfsio *io, const struct place *place, struct connection *made);
int connect_to_handle(struct nfsio *io, const struct place *place, struct connection *made, struct nfsio_failure *why);
int read_page_by_wire(struct nfsio *io, const struct connection *made, uint64_t offset_bytes, uint8_t *page,
		      uint32_t page_bytes);
const char *text_of_wire(int error);

/* find_wire.c, for the I/O thread and without the lock. They return 0 or -errno. */

/* Where the NFS server listens, by portmapper. -ENXIO: that does not know. io->wire is closed. */
int find_server(struct nfsio *io, struct server_port *peer, int64_t deadline_ms);
/* The handle of what is mounted, by mountd. io->wire is closed. */
int find_root(struct nfsio *io, const struct server_port *peer, struct nfsio_handle *root, int64_t deadline_ms);
/*
 * Follow `path` from the directory *at, over io->wire, to *at. Symbolic links are followed; absolute ones, where `root`
 * is not NULL, inside what is mounted. The wire is closed after what is not the server's word.
 */
int find_path(struct nfsio *io, const struct nfsio_handle *root, struct nfsio_handle *at, const char *path,
	      int64_t deadline_ms);

/*
 * connect_libnfs.c, all for the I/O thread and without the lock. But it is held for libnfs_destroy() of a published
 * context, and for pump() with a step that insists.
 */
void step_done(int error, struct nfs_context *nfs, void *data, void *arg);
struct step *new_step(struct nfsio *io);
int pump(struct nfsio *io, struct nfs_context *nfs, struct step *step, int64_t deadline_ms);
bool connect_to_name(struct nfsio *io, struct connection *made, struct nfsio_failure *why);

/* url.c */

/* Of an encoded path. libnfs's own limit is PATH_MAX. */
#define URL_PATH_BYTES_MAX 4000

/* The URL's directory ("/" at least) and file, decoded, for free(). Returns 0, -ENOMEM, or -EINVAL: it has none. */
int url_take_path(const char *url, char **directory, char **file);

/* recognise.c, for the I/O thread and without the lock. It waits. */
int is_same_file(struct nfsio *io, const struct connection *made);

/* known.c, before the I/O thread runs, or in it. They return false without memory. */

/* The first `mount_bytes` of the URL's directory are what is mounted, the rest is below it. */
bool remember_mount(struct nfsio *io, size_t mount_bytes);
/* Begin with what nfsio_options.like or .known say of the file. */
bool begin_with(struct nfsio *io, const struct nfsio_options *options);

/* Has the server been asked, and is it the file that is not there, or another one? */
static inline bool is_of_the_file(const struct nfsio_failure *why)
{
	return why->phase == NFSIO_OPEN || why->phase == NFSIO_RECOGNISE;
}

/* connect.c, for the I/O thread and without the lock. */
void connection_close(struct nfsio *io, struct connection *made);
bool connect_once(struct nfsio *io, struct connection *made, struct nfsio_failure *why);

#endif
