/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What is peculiar to libnfs. The only file that includes its headers and depends on its version: all other files of
 * this room use what 4.0 to 7.0 have in common, and the functions below.
 */
#ifndef NBDNFS_NFSIO_LIBNFS_H
#define NBDNFS_NFSIO_LIBNFS_H

#include "nfs/nfsio.h"

#include <nfsc/libnfs.h>
#include <nfsc/libnfs-raw.h>
#include <nfsc/libnfs-raw-nfs.h>

#ifdef LIBNFS_API_V2 /* 6.0 and later: the data of a READ lands in a buffer that comes with the call */
#define DATA_LANDS_IN_PLACE 1
static inline int call_read3(struct rpc_context *rpc, rpc_cb cb, void *data, size_t length, READ3args *args, void *arg)
{
	return rpc_nfs3_read_task(rpc, cb, data, length, args, arg) != NULL ? 0 : -1;
}
static inline int call_write3(struct rpc_context *rpc, rpc_cb cb, WRITE3args *args, void *arg)
{
	return rpc_nfs3_write_task(rpc, cb, args, arg) != NULL ? 0 : -1;
}
static inline int call_commit3(struct rpc_context *rpc, rpc_cb cb, COMMIT3args *args, void *arg)
{
	return rpc_nfs3_commit_task(rpc, cb, args, arg) != NULL ? 0 : -1;
}
static inline int call_getattr3(struct rpc_context *rpc, rpc_cb cb, GETATTR3args *args, void *arg)
{
	return rpc_nfs3_getattr_task(rpc, cb, args, arg) != NULL ? 0 : -1;
}
static inline int call_null(struct rpc_context *rpc, int version, rpc_cb cb, void *arg)
{
	return (version == 3 ? rpc_nfs3_null_task(rpc, cb, arg) : rpc_nfs4_null_task(rpc, cb, arg)) != NULL ? 0 : -1;
}
static inline int call_pread(struct nfs_context *nfs, struct nfsfh *fh, void *data, size_t length, uint64_t offset,
			     nfs_cb cb, void *arg)
{
	return nfs_pread_async(nfs, fh, data, length, offset, cb, arg);
}
static inline int call_pwrite(struct nfs_context *nfs, struct nfsfh *fh, void *data, size_t length, uint64_t offset,
			      nfs_cb cb, void *arg)
{
	return nfs_pwrite_async(nfs, fh, data, length, offset, cb, arg);
}
#else
#define DATA_LANDS_IN_PLACE 0
static inline int call_read3(struct rpc_context *rpc, rpc_cb cb, void *data, size_t length, READ3args *args, void *arg)
{
	return rpc_nfs3_read_async(rpc, cb, args, arg);
}
static inline int call_write3(struct rpc_context *rpc, rpc_cb cb, WRITE3args *args, void *arg)
{
	return rpc_nfs3_write_async(rpc, cb, args, arg);
}
static inline int call_commit3(struct rpc_context *rpc, rpc_cb cb, COMMIT3args *args, void *arg)
{
	return rpc_nfs3_commit_async(rpc, cb, args, arg);
}
static inline int call_getattr3(struct rpc_context *rpc, rpc_cb cb, GETATTR3args *args, void *arg)
{
	return rpc_nfs3_getattr_async(rpc, cb, args, arg);
}
static inline int call_null(struct rpc_context *rpc, int version, rpc_cb cb, void *arg)
{
	return version == 3 ? rpc_nfs3_null_async(rpc, cb, arg) : rpc_nfs4_null_async(rpc, cb, arg);
}
static inline int call_pread(struct nfs_context *nfs, struct nfsfh *fh, void *data, size_t length, uint64_t offset,
			     nfs_cb cb, void *arg)
{
	return nfs_pread_async(nfs, fh, offset, length, cb, arg);
}
static inline int call_pwrite(struct nfs_context *nfs, struct nfsfh *fh, void *data, size_t length, uint64_t offset,
			      nfs_cb cb, void *arg)
{
	return nfs_pwrite_async(nfs, fh, offset, length, data, cb, arg);
}
uint32_t url_number(const char *url, const char *key, uint32_t otherwise);

#endif

/*
 * What nfs_get_fh() points to. libnfs keeps the definition in a private header, the same in 4.0, 5.0, 6.0 and
 * 7.0 (libnfs-private.h, struct nfs_fh). check_raw_handle() checks it with the server.
 */
struct nfs_fh_bytes {
	int len;
	char *val;
};

/* The handle of what is mounted. Every version exports it, and declares it in a private header. */
const struct nfs_fh *nfs_get_rootfh(struct nfs_context *nfs);

/* Does this error of libnfs's file API mean that the connection broke? */
bool is_transport_error(int error);

/*
 * What an NFSv4 server's error means. libnfs translates it with NFSv3's table, mostly to -ERANGE, but its text has the
 * error's name (nfs_v4.c, check_nfs4_error). STATE_FORGOTTEN4: the server does not keep our client or open any more.
 */
enum verdict4 { REFUSED4, NOT_NOW4, STATE_FORGOTTEN4, OVER_QUOTA4 };

/* Of the call whose callback is running. */
enum verdict4 verdict4(struct nfs_context *nfs);

void copy_stat(struct nfsio_stat *st, const struct nfs_stat_64 *from);

/* The callback of calls whose answer does not matter. */
void libnfs_ignore(int error, struct nfs_context *nfs, void *data, void *arg);

/* libnfs keeps no list of open files: what nfs_open() made is freed by nfs_close() only. `fh` may be NULL. */
void libnfs_destroy(struct nfs_context *nfs, struct nfsfh *fh);

/* What an NFS URL says for `key` ("uid="), which libnfs 4.0 does not tell. Like libnfs, take the last of several. */
uint32_t url_number(const char *url, const char *key, uint32_t otherwise);

#endif
