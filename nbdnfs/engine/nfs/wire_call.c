/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Open and close, and calls. */
#include "base/assert.h"
#include "nfs/wire_internal.h"

#include <errno.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define MACHINE_NAME "nbdnfs\0" /* with its padding */
#define MACHINE_NAME_BYTES 6u

#define XID_AT 4
#define PROGRAM_AT 16

void wire_init(struct wire *wire)
{
	*wire = (struct wire){ .fd = -1 };
}

static uint32_t first_xid(void)
{
	uint32_t xid;
	struct timespec now;

	/*
	 * A server recognises repeated calls by address, port and xid: a call of an earlier connection from the same
	 * port must not look like one of this connection.
	 */
	if (getrandom(&xid, sizeof(xid), GRND_NONBLOCK) == (ssize_t)sizeof(xid))
		return xid;
	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint32_t)now.tv_nsec ^ (uint32_t)now.tv_sec << 16 ^ (uint32_t)getpid() << 20;
}

void wire_open(struct wire *wire, int fd, uint32_t uid, uint32_t gid)
{
	uint8_t *at = wire->begin;

	assert(fd >= 0);
	wire_init(wire);
	wire->fd = fd;
	wire->next_xid = first_xid();
	wire->read_head_bytes = READ_HEAD_BYTES;
	at = xdr_put32(at, 0); /* the record's mark */
	at = xdr_put32(at, 0); /* xid */
	at = xdr_put32(at, CALL);
	at = xdr_put32(at, RPC_VERSION);
	at = xdr_put32(at, 0); /* program, */
	at = xdr_put32(at, 0); /* version, */
	at = xdr_put32(at, 0); /* and procedure */
	at = xdr_put32(at, AUTH_SYS);
	at = xdr_put32(at, 5 * 4 + xdr_padded(MACHINE_NAME_BYTES));
	at = xdr_put32(at, 0); /* stamp: arbitrary */
	at = xdr_put32(at, MACHINE_NAME_BYTES);
	memcpy(at, MACHINE_NAME, xdr_padded(MACHINE_NAME_BYTES));
	at += xdr_padded(MACHINE_NAME_BYTES);
	at = xdr_put32(at, uid);
	at = xdr_put32(at, gid);
	at = xdr_put32(at, 0); /* no further groups */
	at = xdr_put32(at, AUTH_NONE);
	at = xdr_put32(at, 0);
	wire->begin_bytes = (uint32_t)(at - wire->begin);
	/* the longest arguments: the handle, and offset, count, stability and length of a WRITE */
	assert(wire->begin_bytes + 4 + WIRE_HANDLE_BYTES_MAX + 24 <= WIRE_CALL_BYTES_MAX);
}

void wire_close(struct wire *wire)
{
	if (wire->fd >= 0)
		close(wire->fd);
	wire_init(wire);
}

static void await_answer(struct wire *wire, struct wire_call *call)
{
	call->next = NULL;
	call->prev = wire->last;
	if (wire->last != NULL)
		wire->last->next = call;
	else
		wire->first = call;
	wire->last = call;
}

void wire_forget_call(struct wire *wire, struct wire_call *call)
{
	if (call->prev != NULL)
		call->prev->next = call->next;
	else
		wire->first = call->next;
	if (call->next != NULL)
		call->next->prev = call->prev;
	else
		wire->last = call->prev;
}

struct wire_call *wire_find_call(const struct wire *wire, uint32_t xid)
{
	struct wire_call *call = wire->first;

	while (call != NULL && call->xid != xid)
		call = call->next;
	return call;
}

/* What is left of a part when the first *done_bytes are sent; takes the part's share off *done_bytes. */
static struct iovec rest_of(const void *part, uint32_t bytes, uint32_t *done_bytes)
{
	uint32_t gone_bytes = *done_bytes < bytes ? *done_bytes : bytes;

	*done_bytes -= gone_bytes;
	return (struct iovec){ .iov_base = (uint8_t *)(uintptr_t)part + gone_bytes, .iov_len = bytes - gone_bytes };
}

int wire_flush(struct wire *wire)
{
	static const uint8_t zeros[3];

	while (wire->out_bytes > 0) {
		uint32_t done_bytes = wire->out_done_bytes;
		struct iovec parts[3];
		struct msghdr message = { .msg_iov = parts, .msg_iovlen = wire->out_data_bytes > 0 ? 3 : 1 };
		ssize_t sent;

		parts[0] = rest_of(wire->out, wire->out_bytes, &done_bytes);
		parts[1] = rest_of(wire->out_data, wire->out_data_bytes, &done_bytes);
		parts[2] = rest_of(zeros, wire->out_pad_bytes, &done_bytes);
		sent = sendmsg(wire->fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
		if (sent < 0 && errno == EINTR)
			continue;
		if (sent < 0)
			return errno == EAGAIN || errno == EWOULDBLOCK ? 0 : -errno;
		wire->out_done_bytes += (uint32_t)sent;
		if (wire->out_done_bytes == wire->out_bytes + wire->out_data_bytes + wire->out_pad_bytes)
			wire->out_bytes = 0;
	}
	return 0;
}

static uint8_t *put_handle(uint8_t *at, const struct wire_call *call)
{
	uint32_t padded_bytes = xdr_padded(call->handle_bytes);

	assert(call->handle_bytes > 0 && call->handle_bytes <= WIRE_HANDLE_BYTES_MAX);
	at = xdr_put32(at, call->handle_bytes);
	memset(at + padded_bytes - 4, 0, 4); /* the padding */
	memcpy(at, call->handle, call->handle_bytes);
	return at + padded_bytes;
}

/* The call's data follows what is in `out`. */
static void put_data(struct wire *wire, const struct wire_call *call)
{
	wire->out_data = call->data;
	wire->out_data_bytes = call->length_bytes;
	wire->out_pad_bytes = xdr_padded(call->length_bytes) - call->length_bytes;
}

static uint8_t *put_procedure(uint8_t *at, enum wire_procedure procedure)
{
	uint32_t program = NFS_PROGRAM, version = NFS_VERSION, number = procedure;

	if (procedure == WIRE_MNT) {
		program = MOUNT_PROGRAM;
		version = MOUNT_VERSION;
		number = 1;
	} else if (procedure == WIRE_GETPORT || procedure == WIRE_GETADDR) {
		program = PORTMAP_PROGRAM;
		version = procedure == WIRE_GETPORT ? 2 : 3;
		number = 3;
	}
	at = xdr_put32(at, program);
	at = xdr_put32(at, version);
	return xdr_put32(at, number);
}

/* Arguments of procedures that have no handle. */
static uint8_t *put_other_arguments(struct wire *wire, uint8_t *at, const struct wire_call *call)
{
	if (call->procedure == WIRE_NULL)
		return at;
	if (call->procedure == WIRE_MNT) {
		assert(call->length_bytes > 0 && call->length_bytes <= WIRE_PATH_BYTES_MAX);
		put_data(wire, call);
		return xdr_put32(at, call->length_bytes);
	}
	at = xdr_put32(at, call->program);
	at = xdr_put32(at, call->version);
	if (call->procedure == WIRE_GETPORT)
		return xdr_put32(xdr_put32(at, TCP), 0); /* any port */
	at = xdr_put32(at, 4);
	memcpy(at, "tcp6", 4);
	return xdr_put32(xdr_put32(at + 4, 0), 0); /* any address and owner */
}

/* Returns the end of the arguments, but for the data. */
static uint8_t *put_arguments(struct wire *wire, uint8_t *at, const struct wire_call *call)
{
	if (call->procedure == WIRE_NULL || call->procedure >= WIRE_MNT)
		return put_other_arguments(wire, at, call);
	at = put_handle(at, call);
	switch (call->procedure) {
	case WIRE_NULL:
	case WIRE_MNT:
	case WIRE_GETPORT:
	case WIRE_GETADDR:
		assert(false);
		break;
	case WIRE_GETATTR:
	case WIRE_READLINK:
	case WIRE_FSINFO:
		break;
	case WIRE_LOOKUP:
		assert(call->length_bytes > 0 && call->length_bytes <= WIRE_NAME_BYTES_MAX);
		at = xdr_put32(at, call->length_bytes);
		put_data(wire, call);
		break;
	case WIRE_READ:
		at = xdr_put64(at, call->offset_bytes);
		at = xdr_put32(at, call->length_bytes);
		break;
	case WIRE_WRITE:
		at = xdr_put64(at, call->offset_bytes);
		at = xdr_put32(at, call->length_bytes);
		at = xdr_put32(at, call->stable ? FILE_SYNC : UNSTABLE);
		at = xdr_put32(at, call->length_bytes);
		put_data(wire, call);
		break;
	case WIRE_COMMIT:
		at = xdr_put64(at, 0); /* the whole file */
		at = xdr_put32(at, 0);
		break;
	}
	return at;
}

int wire_send(struct wire *wire, struct wire_call *call)
{
	uint8_t *at = wire->out;

	if (!wire_has_room(wire))
		return -EBUSY;
	call->xid = wire->next_xid++;
	memcpy(at, wire->begin, wire->begin_bytes);
	xdr_put32(at + XID_AT, call->xid);
	put_procedure(at + PROGRAM_AT, call->procedure);
	wire->out_data = at; /* of no bytes */
	wire->out_data_bytes = wire->out_pad_bytes = 0;
	at = put_arguments(wire, at + wire->begin_bytes, call);
	wire->out_bytes = (uint32_t)(at - wire->out);
	assert(wire->out_bytes <= WIRE_CALL_BYTES_MAX);
	wire->out_done_bytes = 0;
	xdr_put32(wire->out, LAST_FRAGMENT | (wire->out_bytes - 4 + wire->out_data_bytes + wire->out_pad_bytes));
	await_answer(wire, call);
	return wire_flush(wire);
}

int wire_send_null(struct wire *wire)
{
	if (!wire_has_room(wire) || wire_find_call(wire, wire->null.xid) == &wire->null)
		return 0;
	wire->null = (struct wire_call){ .procedure = WIRE_NULL };
	return wire_send(wire, &wire->null);
}
