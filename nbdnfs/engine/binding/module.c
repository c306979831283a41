/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The CPython binding (limited API, 3.11): two types over the C core, and nothing else.
 *
 * Every call that may block drops the GIL.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <errno.h>
#ifdef __GLIBC__
#include <nss.h>
#endif
#include <pthread.h>
#include <string.h>
#include <sys/mman.h>

#include "block/engine.h"
#include "nfs/nfsio.h"
#include "base/thread.h"

#define CONNECT_TIMEOUT_S 15
/* As long as a NAS may need to mount the file's disk after it serves the export already. */
#define GONE_LIMIT_MS 300000

static PyObject *nfs_error; /* nbdnfs.engine.NfsError; set once by the module's init */

/* ------------------------------------------------------------------ errors ----------------------------- */

static PyObject *raise_failure(const struct nfsio_failure *why)
{
	static const char *const phases[] = {
		[NFSIO_CONNECT] = "connect",
		[NFSIO_MOUNT] = "mount",
		[NFSIO_OPEN] = "open",
		[NFSIO_NAME] = "name",
	};
	PyObject *message = PyUnicode_DecodeUTF8(why->message, strlen(why->message), "replace");
	PyObject *exception = NULL, *phase = NULL;

	if (message != NULL)
		exception = PyObject_CallFunction(nfs_error, "iO", -why->error, message);
	if (exception != NULL)
		phase = PyUnicode_FromString(phases[why->phase]);
	if (phase != NULL && PyObject_SetAttrString(exception, "phase", phase) == 0)
		PyErr_SetObject(nfs_error, exception);
	Py_XDECREF(phase);
	Py_XDECREF(exception);
	Py_XDECREF(message);
	return NULL;
}

static PyObject *none_or_errno(int error)
{
	if (error == 0)
		Py_RETURN_NONE;
	errno = -error;
	return PyErr_SetFromErrno(PyExc_OSError);
}

/* ------------------------------------------------------------------ thread states ---------------------- */

/*
 * nbdkit's Python plugin makes and drops a PyThreadState around every callback, and CPython maps and unmaps a
 * frame stack for each. A program that calls keep_thread_states() has each thread that CPython did not make
 * itself keep the state of its first request, until the thread ends.
 */
static pthread_key_t kept_state_key; /* made once by the module's init */
static bool keep_states;             /* guarded by the GIL */

/* At thread exit, after the thread's last callback: give the kept state back. */
static void drop_kept_state(void *state)
{
	if (!Py_IsInitialized())
		return;
	PyEval_AcquireThread(state);
	PyThreadState_Clear(state);
	PyEval_ReleaseThread(state);
	PyThreadState_Delete(state);
}

/* Called with the GIL held. */
static void keep_thread_state(void)
{
	if (!keep_states || pthread_getspecific(kept_state_key) != NULL)
		return;
	touch_stack();
	PyGILState_Ensure(); /* never released: its count keeps the state alive between callbacks */
	pthread_setspecific(kept_state_key, PyThreadState_Get());
}

static PyObject *keep_thread_states(PyObject *module, PyObject *unused)
{
	keep_states = true;
	Py_RETURN_NONE;
}

/*
 * libnfs asks for the name of each reserved port that it is about to bind (socket.c: getservbyport), which reads
 * /etc/services at every connection: a file that may have left the page cache, in the process that frees memory. With
 * "dns" for a source, which knows no services, glibc opens nothing, and no longer looks whether nsswitch.conf has
 * changed (nss/nss_database.c: reload_disabled).
 */
static PyObject *forget_services(PyObject *module, PyObject *unused)
{
#ifdef __GLIBC__
	if (__nss_configure_lookup("services", "dns") != 0)
		return PyErr_SetFromErrno(PyExc_OSError);
#endif
	Py_RETURN_NONE;
}

/* ------------------------------------------------------------------ arguments -------------------------- */

static int parse_options(PyObject *args, PyObject *kwargs, struct nfsio_options *options)
{
	static char *names[] = { "url", "address", "create", "exclusive", "mode", "read_only", "connect_timeout_s",
				 "gone_limit_ms", NULL };
	int create = 0, exclusive = 0, read_only = 0;

	*options = (struct nfsio_options){
		.mode = 0600, .connect_timeout_s = CONNECT_TIMEOUT_S, .gone_limit_ms = GONE_LIMIT_MS
	};
	if (!PyArg_ParseTupleAndKeywords(args, kwargs, "ss|$ppIpII", names, &options->url, &options->address, &create,
					 &exclusive, &options->mode, &read_only, &options->connect_timeout_s,
					 &options->gone_limit_ms))
		return -1;
	options->create = create;
	options->exclusive = exclusive;
	options->read_only = read_only;
	return 0;
}

/* PyArg's "O&" for offsets and lengths ("K" drops what is above 64 bits, and the sign). */
static int parse_u64(PyObject *object, void *value)
{
	unsigned long long number = PyLong_AsUnsignedLongLong(object);

	if (number == (unsigned long long)-1 && PyErr_Occurred()) {
		if (PyErr_ExceptionMatches(PyExc_OverflowError)) {
			PyErr_Clear();
			errno = EINVAL; /* outside of every file */
			PyErr_SetFromErrno(PyExc_OSError);
		}
		return 0;
	}
	*(unsigned long long *)value = number;
	return 1;
}

static PyObject *closed(void)
{
	PyErr_SetString(PyExc_ValueError, "it is closed");
	return NULL;
}

/* ------------------------------------------------------------------ counters --------------------------- */

static int add_counter(PyObject *dict, const char *name, uint64_t value)
{
	PyObject *number = PyLong_FromUnsignedLongLong(value);
	int status = number != NULL ? PyDict_SetItemString(dict, name, number) : -1;

	Py_XDECREF(number);
	return status;
}

static int add_histogram(PyObject *dict, const char *name, const _Atomic uint64_t *buckets)
{
	PyObject *list = PyList_New(HISTOGRAM_BUCKETS);
	int status = list != NULL ? 0 : -1;

	for (Py_ssize_t i = 0; status == 0 && i < HISTOGRAM_BUCKETS; i++) {
		PyObject *number = PyLong_FromUnsignedLongLong(atomic_load_explicit(&buckets[i], memory_order_relaxed));

		status = number != NULL ? PyList_SetItem(list, i, number) : -1; /* takes the reference */
	}
	if (status == 0)
		status = PyDict_SetItemString(dict, name, list);
	Py_XDECREF(list);
	return status;
}

static PyObject *counters_dict(const struct region_header *header)
{
	const struct region_counters *counters = &header->counters;
	PyObject *dict = PyDict_New();

	if (dict == NULL)
		return NULL;
#define X(name)                                                                                            \
	if (add_counter(dict, #name, atomic_load_explicit(&counters->name, memory_order_relaxed)) < 0)     \
		goto fail;
	REGION_COUNTERS(X)
#undef X
#define X(name)                                                        \
	if (add_histogram(dict, #name, counters->name) < 0)            \
		goto fail;
	REGION_HISTOGRAMS(X)
#undef X
	if (add_counter(dict, "slots", header->slot_count) < 0 ||
	    add_counter(dict, "generation", atomic_load(&header->generation)) < 0 ||
	    add_counter(dict, "region_bytes", header->region_bytes) < 0)
		goto fail;
	return dict;
fail:
	Py_DECREF(dict);
	return NULL;
}

/* ------------------------------------------------------------------ Engine ----------------------------- */

struct engine_object {
	PyObject_HEAD
	struct engine *engine;  /* NULL once closed; guarded by the GIL */
	Py_ssize_t users;       /* calls that run without the GIL; guarded by it */
};

static PyObject *engine_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
	static char *names[] = { "url", "address", "region_fd", "region_pages", "connections", "stable_writes",
				 "read_ahead_pages", "connect_timeout_s", "soft_limit_ms", "gone_limit_ms",
				 "silence_ms", "owner_path", "owner_identity", "owner_refresh_ms",
				 "exit_status_when_lost", "libnfs_transfers", NULL };
	struct engine_options options = {
		.nfs = { .connect_timeout_s = CONNECT_TIMEOUT_S, .gone_limit_ms = GONE_LIMIT_MS },
		.region_fd = -1,
		.region_pages = 4096,
		.connections = 1,
		.read_ahead_pages = 64,
		.owner = { .refresh_ms = OWNER_REFRESH_MS },
	};
	struct nfsio_failure why;
	struct engine *engine = NULL;
	struct engine_object *self;
	int stable_writes = 0, libnfs_transfers = 0, error;

	if (!PyArg_ParseTupleAndKeywords(args, kwargs, "ss|$iIIpIIIIIzzIip", names, &options.nfs.url, &options.nfs.address,
					 &options.region_fd, &options.region_pages, &options.connections, &stable_writes,
					 &options.read_ahead_pages, &options.nfs.connect_timeout_s,
					 &options.nfs.soft_limit_ms, &options.nfs.gone_limit_ms,
					 &options.nfs.silence_ms, &options.owner.path, &options.owner.identity,
					 &options.owner.refresh_ms, &options.exit_status_when_lost, &libnfs_transfers))
		return NULL;
	options.stable_writes = stable_writes;
	options.libnfs_transfers = libnfs_transfers;
	if (options.region_pages < ENGINE_REGION_PAGES_MIN || options.connections < 1 || options.connections > ENGINE_CONNECTIONS_MAX) {
		PyErr_SetString(PyExc_ValueError, "region_pages must be 256 or more, connections 1 to 16");
		return NULL;
	}
	if ((options.owner.path == NULL) != (options.owner.identity == NULL) || options.owner.refresh_ms == 0) {
		PyErr_SetString(PyExc_ValueError, "owner_path and owner_identity come together, and owner_refresh_ms is not 0");
		return NULL;
	}
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

/* One request: `buffer` is NULL for those that move nothing. Keeps the thread's state, drops the GIL. */
#define RUN(self, error, call)                                  \
	do {                                                    \
		keep_thread_state();                            \
		(self)->users++;                                \
		Py_BEGIN_ALLOW_THREADS                          \
		(error) = (call);                               \
		Py_END_ALLOW_THREADS                            \
		(self)->users--;                                \
	} while (0)

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
	RUN(self, error, engine_read(self->engine, buffer.buf, offset, (uint64_t)buffer.len));
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
	RUN(self, error, engine_write(self->engine, buffer.buf, offset, (uint64_t)buffer.len, fua));
	PyBuffer_Release(&buffer);
	return none_or_errno(error);
}

static PyObject *engine_flush_method(struct engine_object *self, PyObject *unused)
{
	int error;

	if (self->engine == NULL)
		return closed();
	RUN(self, error, engine_flush(self->engine));
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
	RUN(self, error, engine_trim(self->engine, offset, length));
	return none_or_errno(error);
}

static PyObject *engine_get_size(struct engine_object *self, void *unused)
{
	if (self->engine == NULL)
		return closed();
	return PyLong_FromUnsignedLongLong(engine_size_bytes(self->engine));
}

static PyObject *engine_counters(struct engine_object *self, PyObject *unused)
{
	if (self->engine == NULL)
		return closed();
	return counters_dict(engine_region(self->engine));
}

static PyMethodDef engine_methods[] = {
	{ "pread", (PyCFunction)engine_pread, METH_VARARGS, "pread(buffer, offset): fill the buffer from the device" },
	{ "pwrite", (PyCFunction)engine_pwrite, METH_VARARGS, "pwrite(buffer, offset, fua=False): in the region on return, with fua on the NAS" },
	{ "flush", (PyCFunction)engine_flush_method, METH_NOARGS, "flush(): all that was written is on the NAS" },
	{ "trim", (PyCFunction)engine_trim_method, METH_VARARGS, "trim(length, offset): the bytes may be forgotten" },
	{ "counters", (PyCFunction)engine_counters, METH_NOARGS, "counters() -> the region's counters and histograms" },
	{ "close", (PyCFunction)engine_close, METH_NOARGS, "close(): leave the server; nothing may be running" },
	{ NULL, NULL, 0, NULL },
};

static PyGetSetDef engine_getset[] = {
	{ "size_bytes", (getter)engine_get_size, NULL, "the device's size", NULL },
	{ NULL, NULL, NULL, NULL, NULL },
};

static PyType_Slot engine_slots[] = {
	{ Py_tp_new, engine_new },
	{ Py_tp_dealloc, engine_dealloc },
	{ Py_tp_methods, engine_methods },
	{ Py_tp_getset, engine_getset },
	{ Py_tp_doc, (void *)"Engine(url, address, *, region_fd=-1, region_pages=4096, connections=1, stable_writes=False, "
			     "read_ahead_pages=64, connect_timeout_s=15, soft_limit_ms=0, gone_limit_ms=300000, "
			     "silence_ms=15000, owner_path=None, owner_identity=None, owner_refresh_ms=10000, "
			     "exit_status_when_lost=0): a block device over a file on an NFS server" },
	{ 0, NULL },
};

static PyType_Spec engine_spec = {
	.name = "nbdnfs.engine.Engine",
	.basicsize = sizeof(struct engine_object),
	.flags = Py_TPFLAGS_DEFAULT,
	.slots = engine_slots,
};

/* ------------------------------------------------------------------ NfsFile ---------------------------- */

struct file_object {
	PyObject_HEAD
	struct nfsio *io;       /* NULL once closed; guarded by the GIL */
	Py_ssize_t users;       /* calls that run without the GIL; guarded by it */
};

static PyObject *file_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
	struct nfsio_options options;
	struct nfsio_failure why;
	struct nfsio *io = NULL;
	struct file_object *self;
	int error;

	if (parse_options(args, kwargs, &options) < 0)
		return NULL;
	Py_BEGIN_ALLOW_THREADS
	error = nfsio_open(&options, &io, &why);
	Py_END_ALLOW_THREADS
	if (error != 0)
		return raise_failure(&why);
	self = (struct file_object *)((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0);
	if (self == NULL)
		nfsio_close(io);
	else
		self->io = io;
	return (PyObject *)self;
}

static PyObject *file_close(struct file_object *self, PyObject *unused)
{
	struct nfsio *io = self->io;

	if (self->users > 0) {
		PyErr_SetString(PyExc_RuntimeError, "requests are still running");
		return NULL;
	}
	self->io = NULL;
	if (io != NULL) {
		Py_BEGIN_ALLOW_THREADS
		nfsio_close(io);
		Py_END_ALLOW_THREADS
	}
	Py_RETURN_NONE;
}

static void file_dealloc(struct file_object *self)
{
	PyTypeObject *type = Py_TYPE((PyObject *)self);

	Py_XDECREF(file_close(self, NULL));
	((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
	Py_DECREF(type);
}

/* Move all of `buffer`; a read may end early, at the end of the file. Returns the number of bytes. */
static PyObject *file_transfer(struct file_object *self, enum nfsio_op op, Py_buffer *buffer, uint64_t offset)
{
	uint64_t moved = 0, length = (uint64_t)buffer->len;
	int error = 0;

	self->users++;
	Py_BEGIN_ALLOW_THREADS
	while (error == 0 && moved < length) {
		uint32_t most = nfsio_max_transfer_bytes(self->io);
		struct nfsio_req req = {
			.op = op,
			.data = (uint8_t *)buffer->buf + moved,
			.offset_bytes = offset + moved,
			.length_bytes = length - moved < most ? (uint32_t)(length - moved) : most,
		};
		error = nfsio_transfer(self->io, &req);
		moved += req.moved_bytes;
		if (req.moved_bytes < req.length_bytes)
			break;
	}
	Py_END_ALLOW_THREADS
	self->users--;
	PyBuffer_Release(buffer);
	if (error != 0)
		return none_or_errno(error);
	return PyLong_FromUnsignedLongLong(moved);
}

static PyObject *file_pread(struct file_object *self, PyObject *args)
{
	unsigned long long offset;
	Py_buffer buffer;

	if (!PyArg_ParseTuple(args, "w*O&", &buffer, parse_u64, &offset))
		return NULL;
	if (self->io == NULL) {
		PyBuffer_Release(&buffer);
		return closed();
	}
	return file_transfer(self, NFSIO_READ, &buffer, offset);
}

static PyObject *file_pwrite(struct file_object *self, PyObject *args)
{
	unsigned long long offset;
	Py_buffer buffer;

	if (!PyArg_ParseTuple(args, "y*O&", &buffer, parse_u64, &offset))
		return NULL;
	if (self->io == NULL) {
		PyBuffer_Release(&buffer);
		return closed();
	}
	return file_transfer(self, NFSIO_WRITE, &buffer, offset);
}

static PyObject *stat_dict(const struct nfsio_stat *st)
{
	return Py_BuildValue("{sKsIsIsIsKsKsKsKsO}", "size", (unsigned long long)st->size_bytes, "mode",
			     (unsigned)(st->mode & 07777), "uid", (unsigned)st->uid, "gid", (unsigned)st->gid, "ino",
			     (unsigned long long)st->fileid, "nlink", (unsigned long long)st->nlink, "used",
			     (unsigned long long)st->used_bytes, "mtime_us", (unsigned long long)st->mtime_us, "is_regular",
			     (st->mode & 0170000) == 0100000 ? Py_True : Py_False);
}

/* A name operation: `call` sees io, paths and why. */
#define NAME_OPERATION(self, error, call)                       \
	do {                                                    \
		if ((self)->io == NULL)                         \
			return closed();                        \
		(self)->users++;                                \
		Py_BEGIN_ALLOW_THREADS                          \
		(error) = (call);                               \
		Py_END_ALLOW_THREADS                            \
		(self)->users--;                                \
		if ((error) != 0)                               \
			return raise_failure(&why);             \
	} while (0)

static PyObject *file_stat(struct file_object *self, PyObject *unused)
{
	struct nfsio_failure why;
	struct nfsio_stat st;
	int error;

	NAME_OPERATION(self, error, nfsio_fstat(self->io, &st, &why));
	return stat_dict(&st);
}

static PyObject *file_lookup(struct file_object *self, PyObject *args)
{
	struct nfsio_failure why;
	struct nfsio_stat st;
	const char *path;
	int error;

	if (!PyArg_ParseTuple(args, "s", &path))
		return NULL;
	NAME_OPERATION(self, error, nfsio_stat(self->io, path, &st, &why));
	return stat_dict(&st);
}

static PyObject *file_link(struct file_object *self, PyObject *args)
{
	struct nfsio_failure why;
	const char *old_path, *new_path;
	int error;

	if (!PyArg_ParseTuple(args, "ss", &old_path, &new_path))
		return NULL;
	NAME_OPERATION(self, error, nfsio_link(self->io, old_path, new_path, &why));
	Py_RETURN_NONE;
}

static PyObject *file_rename(struct file_object *self, PyObject *args)
{
	struct nfsio_failure why;
	const char *old_path, *new_path;
	int error;

	if (!PyArg_ParseTuple(args, "ss", &old_path, &new_path))
		return NULL;
	NAME_OPERATION(self, error, nfsio_rename(self->io, old_path, new_path, &why));
	Py_RETURN_NONE;
}

static PyObject *file_unlink(struct file_object *self, PyObject *args)
{
	struct nfsio_failure why;
	const char *path;
	int error;

	if (!PyArg_ParseTuple(args, "s", &path))
		return NULL;
	NAME_OPERATION(self, error, nfsio_unlink(self->io, path, &why));
	Py_RETURN_NONE;
}

static PyObject *file_get_size(struct file_object *self, void *unused)
{
	struct nfsio_stat st;

	if (self->io == NULL)
		return closed();
	nfsio_opened_stat(self->io, &st);
	return PyLong_FromUnsignedLongLong(st.size_bytes);
}

static PyMethodDef file_methods[] = {
	{ "pread", (PyCFunction)file_pread, METH_VARARGS, "pread(buffer, offset) -> bytes read, less at the end of file" },
	{ "pwrite", (PyCFunction)file_pwrite, METH_VARARGS, "pwrite(buffer, offset) -> bytes written, all of them, stable" },
	{ "stat", (PyCFunction)file_stat, METH_NOARGS,
	  "stat() -> {size, mode, uid, gid, ino, nlink, used (bytes), mtime_us, is_regular}, asked of the server" },
	{ "lookup", (PyCFunction)file_lookup, METH_VARARGS, "lookup(path) -> as stat(), of another name" },
	{ "link", (PyCFunction)file_link, METH_VARARGS, "link(old_path, new_path): a hard link; EEXIST when new_path is there" },
	{ "rename", (PyCFunction)file_rename, METH_VARARGS, "rename(old_path, new_path): replaces new_path" },
	{ "unlink", (PyCFunction)file_unlink, METH_VARARGS, "unlink(path)" },
	{ "close", (PyCFunction)file_close, METH_NOARGS, "close(): leave the server; nothing may be running" },
	{ NULL, NULL, 0, NULL },
};

static PyGetSetDef file_getset[] = {
	{ "size_bytes", (getter)file_get_size, NULL, "the file's size when it was opened", NULL },
	{ NULL, NULL, NULL, NULL, NULL },
};

static PyType_Slot file_slots[] = {
	{ Py_tp_new, file_new },
	{ Py_tp_dealloc, file_dealloc },
	{ Py_tp_methods, file_methods },
	{ Py_tp_getset, file_getset },
	{ Py_tp_doc, (void *)"NfsFile(url, address, *, create=False, exclusive=False, mode=0o600, read_only=False, "
			     "connect_timeout_s=15, gone_limit_ms=300000): a file on an NFS server, and the names beside it" },
	{ 0, NULL },
};

static PyType_Spec file_spec = {
	.name = "nbdnfs.engine.NfsFile",
	.basicsize = sizeof(struct file_object),
	.flags = Py_TPFLAGS_DEFAULT,
	.slots = file_slots,
};

/* ------------------------------------------------------------------ module ----------------------------- */

static PyObject *region_counters(PyObject *module, PyObject *args)
{
	struct region_header *header;
	PyObject *dict;
	int fd;

	if (!PyArg_ParseTuple(args, "i", &fd))
		return NULL;
	header = mmap(NULL, sizeof(*header), PROT_READ, MAP_SHARED, fd, 0);
	if (header == MAP_FAILED)
		return PyErr_SetFromErrno(PyExc_OSError);
	dict = counters_dict(header);
	munmap(header, sizeof(*header));
	return dict;
}

static PyMethodDef module_methods[] = {
	{ "keep_thread_states", keep_thread_states, METH_NOARGS,
	  "keep_thread_states(): for programs whose threads Python did not make, nbdkit above all" },
	{ "forget_services", forget_services, METH_NOARGS,
	  "forget_services(): this process knows no names of ports from now on, and reads no file for them" },
	{ "region_counters", region_counters, METH_VARARGS, "region_counters(fd) -> as Engine.counters(), of a region's fd" },
	{ NULL, NULL, 0, NULL },
};

static struct PyModuleDef module_def = {
	PyModuleDef_HEAD_INIT,
	.m_name = "nbdnfs.engine._engine",
	.m_doc = "The C core. Use it through nbdnfs.engine.",
	.m_size = -1,
	.m_methods = module_methods,
};

PyMODINIT_FUNC PyInit__engine(void)
{
	PyObject *module = PyModule_Create(&module_def);
	PyObject *engine_type = NULL, *file_type = NULL;

	if (module == NULL)
		return NULL;
	if (pthread_key_create(&kept_state_key, drop_kept_state) != 0) {
		PyErr_NoMemory();
		goto fail;
	}
	nfs_error = PyErr_NewExceptionWithDoc("nbdnfs.engine.NfsError",
					      "An OSError with `phase`: connect, mount, open or name.", PyExc_OSError, NULL);
	engine_type = PyType_FromSpec(&engine_spec);
	file_type = PyType_FromSpec(&file_spec);
	if (nfs_error == NULL || engine_type == NULL || file_type == NULL ||
	    PyModule_AddObjectRef(module, "NfsError", nfs_error) < 0 ||
	    PyModule_AddObjectRef(module, "Engine", engine_type) < 0 ||
	    PyModule_AddObjectRef(module, "NfsFile", file_type) < 0 ||
	    PyModule_AddStringConstant(module, "libnfs_version", LIBNFS_BUILT_WITH) < 0 ||
	    PyModule_AddIntConstant(module, "region_version", REGION_VERSION) < 0 ||
	    /* a keeper looks at this one every second, and is not to map or allocate for it */
	    PyModule_AddIntConstant(module, "disconnected_offset",
				    offsetof(struct region_header, counters.disconnected)) < 0)
		goto fail;
	Py_DECREF(engine_type);
	Py_DECREF(file_type);
	return module;
fail:
	Py_XDECREF(engine_type);
	Py_XDECREF(file_type);
	Py_DECREF(module);
	return NULL;
}
