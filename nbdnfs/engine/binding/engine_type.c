/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* nbdnfs.engine.Engine */
#include "binding/binding.h"

#include "nbd/loop.h"

#include <string.h>

struct engine_object {
	PyObject_HEAD
	struct engine *engine;  /* NULL once closed; guarded by the GIL */
	Py_ssize_t users;       /* calls that run without the GIL; guarded by it */
};

static int parse_transport(const char *name, enum nfsio_transport *transport)
{
	if (strcmp(name, "wire") != 0 && strcmp(name, "libnfs") != 0) {
		PyErr_SetString(PyExc_ValueError, "transport must be 'wire' or 'libnfs'");
		return -1;
	}
	*transport = strcmp(name, "wire") == 0 ? NFSIO_OVER_WIRE : NFSIO_OVER_LIBNFS;
	return 0;
}

/* Without a name, the fastest for this processor. */
static int parse_cipher(bool encrypt, const char *name, enum region_version *version)
{
	bool is_aes = name[0] == '\0' ? cipher_best() == CIPHER_AES : strcmp(name, "aes") == 0;

	if (name[0] != '\0' && !is_aes && strcmp(name, "xchacha20") != 0) {
		PyErr_SetString(PyExc_ValueError, "cipher must be 'aes' or 'xchacha20'");
		return -1;
	}
	*version = !encrypt ? REGION_PLAIN : is_aes ? REGION_AES : REGION_XCHACHA20;
	return 0;
}

/* Returns 0 and *options, or -1 and an exception. The texts in *options are the arguments' own. */
static int parse_options(PyObject *args, PyObject *kwargs, struct engine_options *options)
{
	static char *names[] = { "url", "address", "region_fd", "region_pages", "connections", "stable_writes",
				 "read_ahead_pages", "connect_timeout_s", "soft_limit_ms", "gone_limit_ms",
				 "silence_ms", "owner_path", "owner_identity", "owner_refresh_ms",
				 "exit_status_when_stolen", "transport", "encrypt", "clear_bytes", "cipher", NULL };
	struct nfsio_options *nfs = &options->nfs;
	struct owner_options *owner = &options->owner;
	const char *transport = "wire", *cipher = "";
	int stable_writes = 0, encrypt = 0;
	unsigned clear_bytes = SLOT_BYTES;

	*options = (struct engine_options){
		.nfs = { .connect_timeout_s = CONNECT_TIMEOUT_S, .gone_limit_ms = GONE_LIMIT_MS },
		.region_fd = -1,
		.region_pages = 4096,
		.connections = 1,
		.read_ahead_pages = 64,
		.owner = { .refresh_ms = OWNER_REFRESH_MS },
	};
	if (!PyArg_ParseTupleAndKeywords(args, kwargs, "ss|$iIIpIIIIIzzIispIs", names, &nfs->url, &nfs->address,
					 &options->region_fd, &options->region_pages, &options->connections,
					 &stable_writes, &options->read_ahead_pages, &nfs->connect_timeout_s,
					 &nfs->soft_limit_ms, &nfs->gone_limit_ms, &nfs->silence_ms, &owner->path,
					 &owner->identity, &owner->refresh_ms, &options->exit_status_when_stolen,
					 &transport, &encrypt, &clear_bytes, &cipher))
		return -1;
	options->stable_writes = stable_writes;
	options->clear_bytes = clear_bytes;
	if (parse_transport(transport, &nfs->transport) < 0 ||
	    parse_cipher(encrypt, cipher, &options->region_version) < 0)
		return -1;
	if (options->region_pages < ENGINE_REGION_PAGES_MIN || options->connections < 1 ||
	    options->connections > ENGINE_CONNECTIONS_MAX) {
		PyErr_SetString(PyExc_ValueError, "region_pages must be 256 or more, connections 1 to 16");
		return -1;
	}
	if (clear_bytes % SLOT_BYTES != 0) {
		PyErr_SetString(PyExc_ValueError, "clear_bytes must be a multiple of 4096");
		return -1;
	}
	if ((owner->path == NULL) != (owner->identity == NULL) || owner->refresh_ms == 0) {
		PyErr_SetString(PyExc_ValueError, "owner_path and owner_identity must be given together, and "
						  "owner_refresh_ms must not be 0");
		return -1;
	}
	return 0;
}

static PyObject *engine_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
	struct engine_options options;
	struct nfsio_failure why;
	struct engine *engine = NULL;
	struct engine_object *self;
	int error;

	if (parse_options(args, kwargs, &options) < 0)
		return NULL;
	Py_BEGIN_ALLOW_THREADS
	error = engine_create(&options, &engine, &why);
	Py_END_ALLOW_THREADS
	if (error != 0)
		return raise_failure(&why);
	self = (struct engine_object *)((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0);
	if (self == NULL)
		engine_destroy(engine);
	else
		self->engine = engine;
	return (PyObject *)self;
}

static PyObject *engine_close(struct engine_object *self, PyObject *unused)
{
	struct engine *engine = self->engine;

	if (self->users > 0) {
		PyErr_SetString(PyExc_RuntimeError, "requests are still running");
		return NULL;
	}
	self->engine = NULL;
	if (engine != NULL) {
		Py_BEGIN_ALLOW_THREADS
		engine_destroy(engine);
		Py_END_ALLOW_THREADS
	}
	Py_RETURN_NONE;
}

static void engine_dealloc(struct engine_object *self)
{
	PyTypeObject *type = Py_TYPE((PyObject *)self);

	Py_XDECREF(engine_close(self, NULL));
	((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
	Py_DECREF(type);
}

/* clang-format off */
/* Make a request: keeps the thread's PyThreadState, and drops the GIL during `call`. */
#define CALL_WITHOUT_GIL(self, error, call)                     \
	do {                                                    \
		keep_thread_state();                            \
		(self)->users++;                                \
		Py_BEGIN_ALLOW_THREADS                          \
		(error) = (call);                               \
		Py_END_ALLOW_THREADS                            \
		(self)->users--;                                \
	} while (0)
/* clang-format on */

static PyObject *engine_pread(struct engine_object *self, PyObject *args)
{
	unsigned long long offset;
	Py_buffer buffer;
	int error;

	if (!PyArg_ParseTuple(args, "w*O&", &buffer, parse_u64, &offset))
		return NULL;
	if (self->engine == NULL) {
		PyBuffer_Release(&buffer);
		return closed();
	}
	CALL_WITHOUT_GIL(self, error, engine_read(self->engine, buffer.buf, offset, (uint64_t)buffer.len));
	PyBuffer_Release(&buffer);
	return none_or_errno(error);
}

static PyObject *engine_pwrite(struct engine_object *self, PyObject *args)
{
	unsigned long long offset;
	Py_buffer buffer;
	int error, fua = 0;

	if (!PyArg_ParseTuple(args, "y*O&|p", &buffer, parse_u64, &offset, &fua))
		return NULL;
	if (self->engine == NULL) {
		PyBuffer_Release(&buffer);
		return closed();
	}
	CALL_WITHOUT_GIL(self, error, engine_write(self->engine, buffer.buf, offset, (uint64_t)buffer.len, fua));
	PyBuffer_Release(&buffer);
	return none_or_errno(error);
}

static PyObject *engine_flush_method(struct engine_object *self, PyObject *unused)
{
	int error;

	if (self->engine == NULL)
		return closed();
	CALL_WITHOUT_GIL(self, error, engine_flush(self->engine));
	return none_or_errno(error);
}

static PyObject *engine_trim_method(struct engine_object *self, PyObject *args)
{
	unsigned long long length, offset;
	int error;

	if (!PyArg_ParseTuple(args, "O&O&", parse_u64, &length, parse_u64, &offset))
		return NULL;
	if (self->engine == NULL)
		return closed();
	CALL_WITHOUT_GIL(self, error, engine_trim(self->engine, offset, length));
	return none_or_errno(error);
}

/* Create, run and destroy: without the GIL. */
static int serve(struct engine *engine, int fd, unsigned tick_ms)
{
	struct nbd_loop *loop;
	int error = nbd_loop_create(engine, fd, tick_ms, &loop);

	if (error != 0)
		return error;
	error = nbd_loop_run(loop);
	nbd_loop_destroy(loop);
	return error;
}

static PyObject *engine_serve_method(struct engine_object *self, PyObject *args)
{
	unsigned tick_ms = NBD_LOOP_TICK_MS;
	int fd, error;

	if (!PyArg_ParseTuple(args, "i|I", &fd, &tick_ms))
		return NULL;
	if (self->engine == NULL)
		return closed();
	CALL_WITHOUT_GIL(self, error, serve(self->engine, fd, tick_ms));
	return none_or_errno(error);
}

static PyObject *engine_get_size(struct engine_object *self, void *unused)
{
	if (self->engine == NULL)
		return closed();
	return PyLong_FromUnsignedLongLong(engine_size_bytes(self->engine));
}

static PyObject *engine_get_encrypted(struct engine_object *self, void *unused)
{
	if (self->engine == NULL)
		return closed();
	return PyBool_FromLong(engine_is_encrypted(self->engine));
}

static PyObject *engine_counters(struct engine_object *self, PyObject *unused)
{
	if (self->engine == NULL)
		return closed();
	return counters_dict(engine_region(self->engine));
}

static PyMethodDef engine_methods[] = {
	{ "pread", (PyCFunction)engine_pread, METH_VARARGS, "pread(buffer, offset): fill the buffer from the device" },
	{ "pwrite", (PyCFunction)engine_pwrite, METH_VARARGS,
	  "pwrite(buffer, offset, fua=False): in the region when it returns, with fua on the NAS" },
	{ "flush", (PyCFunction)engine_flush_method, METH_NOARGS,
	  "flush(): everything that was written is on the NAS when it returns" },
	{ "trim", (PyCFunction)engine_trim_method, METH_VARARGS, "trim(length, offset): the bytes may be forgotten" },
	{ "serve", (PyCFunction)engine_serve_method, METH_VARARGS,
	  "serve(fd, tick_ms=2000): serve one NBD client on a socket until it disconnects; by one thread at a time" },
	{ "counters", (PyCFunction)engine_counters, METH_NOARGS, "counters() -> the region's counters and histograms" },
	{ "close", (PyCFunction)engine_close, METH_NOARGS, "close(): disconnect; no request may be running" },
	{ NULL, NULL, 0, NULL },
};

static PyGetSetDef engine_getset[] = {
	{ "size_bytes", (getter)engine_get_size, NULL, "the device's size", NULL },
	{ "is_encrypted", (getter)engine_get_encrypted, NULL, "whether pages are encrypted on the server", NULL },
	{ NULL, NULL, NULL, NULL, NULL },
};

static PyType_Slot engine_slots[] = {
	{ Py_tp_new, engine_new },
	{ Py_tp_dealloc, engine_dealloc },
	{ Py_tp_methods, engine_methods },
	{ Py_tp_getset, engine_getset },
	{ Py_tp_doc,
	  (void *)"Engine(url, address, *, region_fd=-1, region_pages=4096, connections=1, stable_writes=False, "
		  "read_ahead_pages=64, connect_timeout_s=15, soft_limit_ms=0, gone_limit_ms=300000, "
		  "silence_ms=15000, owner_path=None, owner_identity=None, owner_refresh_ms=10000, "
		  "exit_status_when_stolen=0, transport='wire', encrypt=False, clear_bytes=4096, cipher=''): "
		  "a block device over a file on an NFS server" },
	{ 0, NULL },
};

PyType_Spec engine_spec = {
	.name = "nbdnfs.engine.Engine",
	.basicsize = sizeof(struct engine_object),
	.flags = Py_TPFLAGS_DEFAULT,
	.slots = engine_slots,
};
