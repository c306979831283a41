/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What libnfs makes of a server's answers. */
#include "nfs/libnfs_calls.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* Some of these are also errors that a server may return (libnfs.c, nfs_v4.c). */
bool is_transport_error(int error)
{
	return error == -EFAULT || error == -EINTR || error == -ETIMEDOUT || error == -ENOTCONN || error == -ECONNRESET;
}

enum verdict4 verdict4(struct nfs_context *nfs)
{
	static const struct {
		const char *name;
		enum verdict4 verdict;
	} of[] = {
		{ "NFS4ERR_DELAY", NOT_NOW4 },
		{ "NFS4ERR_GRACE", NOT_NOW4 },
		{ "NFS4ERR_RESOURCE", NOT_NOW4 },
		{ "NFS4ERR_LOCKED", NOT_NOW4 },
		{ "NFS4ERR_DQUOT", OVER_QUOTA4 },
		{ "NFS4ERR_EXPIRED", STATE_FORGOTTEN4 },
		{ "NFS4ERR_STALE", STATE_FORGOTTEN4 }, /* ... _CLIENTID and _STATEID as well */
		{ "NFS4ERR_BAD_STATEID", STATE_FORGOTTEN4 },
		{ "NFS4ERR_OLD_STATEID", STATE_FORGOTTEN4 },
		{ "NFS4ERR_BAD_SEQID", STATE_FORGOTTEN4 },
		{ "NFS4ERR_ADMIN_REVOKED", STATE_FORGOTTEN4 },
		{ "NFS4ERR_FHEXPIRED", STATE_FORGOTTEN4 },
		{ "NFS4ERR_BADHANDLE", STATE_FORGOTTEN4 },
		{ "NFS4ERR_NOFILEHANDLE", STATE_FORGOTTEN4 },
		{ "NFS4ERR_OPENMODE", STATE_FORGOTTEN4 },
		{ "NFS4ERR_MOVED", STATE_FORGOTTEN4 },
		{ "NFS4ERR_CLID_INUSE", STATE_FORGOTTEN4 },
	};
	const char *text = nfs_get_error(nfs);

	for (size_t i = 0; text != NULL && i < sizeof(of) / sizeof(of[0]); i++)
		if (strstr(text, of[i].name) != NULL)
			return of[i].verdict;
	return REFUSED4;
}

void copy_stat(struct nfsio_stat *st, const struct nfs_stat_64 *from)
{
	*st = (struct nfsio_stat){
		.size_bytes = from->nfs_size,
		.used_bytes = from->nfs_used,
		.fileid = from->nfs_ino,
		.nlink = from->nfs_nlink,
		.mtime_us = from->nfs_mtime * 1000000 + from->nfs_mtime_nsec / 1000,
		.mode = (uint32_t)from->nfs_mode,
		.uid = (uint32_t)from->nfs_uid,
		.gid = (uint32_t)from->nfs_gid,
	};
}

uint32_t url_number(const char *url, const char *key, uint32_t otherwise)
{
	for (const char *at = strchr(url, '?'); at != NULL; at = strchr(at + 1, '&'))
		if (strncmp(at + 1, key, strlen(key)) == 0)
			otherwise = (uint32_t)strtoul(at + 1 + strlen(key), NULL, 10);
	return otherwise;
}

void libnfs_ignore(int error, struct nfs_context *nfs, void *data, void *arg)
{
}

void libnfs_destroy(struct nfs_context *nfs, struct nfsfh *fh)
{
	if (fh != NULL)
		nfs_close_async(nfs, fh, libnfs_ignore, NULL);
	nfs_destroy_context(nfs);
}
