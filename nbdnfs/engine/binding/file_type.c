/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* nbdnfs.engine.NfsFile */
#include "binding/binding.h"

#include <stdlib.h>
#include <string.h>

/* read_beside(): what it reads is small, and lies on the stack. */
#define READ_BESIDE_BYTES_MAX 4096
#define READ_BESIDE_LIMIT_MS 60000

struct file_object {
	PyObject_HEAD
	struct nfsio *io;       /* NULL once closed; guarded by the GIL */
	Py_ssize_t users;       /* calls that run without the GIL; guarded by it */
};

static int parse_options(PyObject *args, PyObject *kwargs, struct nfsio_options *options)
{
	static char *names[] = { "url", "address", "create", "exclusive", "mode", "read_only", "connect_timeout_s",
				 "gone_limit_ms", "silence_ms", "names_only", NULL };
	int create = 0, exclusive = 0, read_only = 0, names_only = 0;

	*options = (struct nfsio_options){
		.mode = 0600, .connect_timeout_s = CONNECT_TIMEOUT_S, .gone_limit_ms = GONE_LIMIT_MS
	};
	if (!PyArg_ParseTupleAndKeywords(args, kwargs, "ss|$ppIpIIIp", names, &options->url, &options->address, &create,
					 &exclusive, &options->mode, &read_only, &options->connect_timeout_s,
					 &options->gone_limit_ms, &options->silence_ms, &names_only))
		return -1;
	options->create = create;
	options->exclusive = exclusive;
	options->read_only = read_only;
	options->names_only = names_only;
	return 0;
}

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
	error = nfsio_create(&options, &io, &why);
	Py_END_ALLOW_THREADS
	if (error != 0)
		return raise_failure(&why);
	self = (struct file_object *)((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0);
	if (self == NULL)
		nfsio_destroy(io);
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
		nfsio_destroy(io);
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

/* Move all of `buffer`; a read may stop at the end of the file. Returns the number of bytes. */
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
			     (unsigned long long)st->used_bytes, "mtime_us", (unsigned long long)st->mtime_us,
			     "is_regular", (st->mode & 0170000) == 0100000 ? Py_True : Py_False);
}

/* clang-format off */
/* A name operation: `call` sets `why`. Returns from the caller on an error. */
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
/* clang-format on */

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
	struct path_argument path;
	int error, follow = 1;

	if (!PyArg_ParseTuple(args, "O&|p", parse_path, &path, &follow))
		return NULL;
	NAME_OPERATION(self, error,
		       follow ? nfsio_stat(self->io, path.text, &st, &why)
			      : nfsio_lstat(self->io, path.text, &st, &why));
	return stat_dict(&st);
}

static PyObject *file_link(struct file_object *self, PyObject *args)
{
	struct nfsio_failure why;
	struct path_argument old_path, new_path;
	int error;

	if (!PyArg_ParseTuple(args, "O&O&", parse_path, &old_path, parse_path, &new_path))
		return NULL;
	NAME_OPERATION(self, error, nfsio_link(self->io, old_path.text, new_path.text, &why));
	Py_RETURN_NONE;
}

static PyObject *file_rename(struct file_object *self, PyObject *args)
{
	struct nfsio_failure why;
	struct path_argument old_path, new_path;
	int error;

	if (!PyArg_ParseTuple(args, "O&O&", parse_path, &old_path, parse_path, &new_path))
		return NULL;
	NAME_OPERATION(self, error, nfsio_rename(self->io, old_path.text, new_path.text, &why));
	Py_RETURN_NONE;
}

static PyObject *file_unlink(struct file_object *self, PyObject *args)
{
	struct nfsio_failure why;
	struct path_argument path;
	int error;

	if (!PyArg_ParseTuple(args, "O&", parse_path, &path))
		return NULL;
	NAME_OPERATION(self, error, nfsio_unlink(self->io, path.text, &why));
	Py_RETURN_NONE;
}

static PyObject *file_chmod(struct file_object *self, PyObject *args)
{
	struct nfsio_failure why;
	struct path_argument path;
	unsigned mode;
	int error;

	if (!PyArg_ParseTuple(args, "O&I", parse_path, &path, &mode))
		return NULL;
	NAME_OPERATION(self, error, nfsio_chmod(self->io, path.text, mode & 07777, &why));
	Py_RETURN_NONE;
}

static PyObject *file_space(struct file_object *self, PyObject *unused)
{
	struct nfsio_failure why;
	struct nfsio_space space = { 0 };
	int error;

	NAME_OPERATION(self, error, nfsio_space(self->io, &space, &why));
	return Py_BuildValue("{sKsK}", "total", (unsigned long long)space.total_bytes, "available",
			     (unsigned long long)space.available_bytes);
}

/* A list of str; bytes that are not UTF-8 as in parse_path(). */
static PyObject *list_of(const struct nfsio_names *names)
{
	PyObject *list = PyList_New(0);

	for (size_t at = 0; list != NULL && at < names->length_bytes; at += strlen(names->text + at) + 1) {
		const char *text = names->text + at;
		PyObject *name = PyUnicode_DecodeUTF8(text, (Py_ssize_t)strlen(text), "surrogateescape");

		if (name == NULL || PyList_Append(list, name) < 0) {
			Py_DECREF(list);
			list = NULL;
		}
		Py_XDECREF(name);
	}
	return list;
}

static PyObject *file_names(struct file_object *self, PyObject *unused)
{
	struct nfsio_names names = { 0 };
	struct nfsio_failure why;
	PyObject *list;
	int error;

	NAME_OPERATION(self, error, nfsio_list(self->io, &names, &why));
	list = list_of(&names);
	free(names.text);
	return list;
}

static PyObject *file_read_beside(struct file_object *self, PyObject *args)
{
	struct nfsio_failure why;
	struct path_argument path;
	uint8_t data[READ_BESIDE_BYTES_MAX];
	struct nfsio_look look = { .data = data, .limit_ms = READ_BESIDE_LIMIT_MS };
	unsigned most;
	int error;

	if (!PyArg_ParseTuple(args, "O&I", parse_path, &path, &most))
		return NULL;
	look.room_bytes = most < sizeof(data) ? most : sizeof(data);
	NAME_OPERATION(self, error, nfsio_look(self->io, path.text, &look, &why));
	return PyBytes_FromStringAndSize((const char *)data, look.found_bytes);
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
	{ "pread", (PyCFunction)file_pread, METH_VARARGS,
	  "pread(buffer, offset) -> the number of bytes read, less at the end of the file" },
	{ "pwrite", (PyCFunction)file_pwrite, METH_VARARGS,
	  "pwrite(buffer, offset) -> the number of bytes written, which is all of them; on the NAS, stably" },
	{ "stat", (PyCFunction)file_stat, METH_NOARGS,
	  "stat() -> {size, mode, uid, gid, ino, nlink, used (bytes), mtime_us, is_regular}, from the server. As "
	  "lookup(): sent again where that helps; ETIMEDOUT or ENOTCONN after 4 x silence_ms" },
	{ "lookup", (PyCFunction)file_lookup, METH_VARARGS,
	  "lookup(path, follow=True) -> as stat(), of another name; not follow: of a symbolic link itself" },
	{ "link", (PyCFunction)file_link, METH_VARARGS,
	  "link(old_path, new_path): make a hard link; EEXIST when new_path exists. As rename and unlink: ETIMEDOUT "
	  "when there is no answer within 2 x silence_ms, ECONNRESET when the connection breaks; the server may have "
	  "done it" },
	{ "rename", (PyCFunction)file_rename, METH_VARARGS, "rename(old_path, new_path): replaces new_path" },
	{ "unlink", (PyCFunction)file_unlink, METH_VARARGS, "unlink(path): remove a name" },
	{ "chmod", (PyCFunction)file_chmod, METH_VARARGS,
	  "chmod(path, mode): set permission bits; sent again as stat()" },
	{ "space", (PyCFunction)file_space, METH_NOARGS,
	  "space() -> {total, available} (bytes) of the file system of the URL's directory (FSSTAT); as stat()" },
	{ "names", (PyCFunction)file_names, METH_NOARGS,
	  "names() -> a list of what the URL's directory has, without . and ..; as stat(). EFBIG: more than 64 MiB" },
	{ "read_beside", (PyCFunction)file_read_beside, METH_VARARGS,
	  "read_beside(path, most) -> the first bytes of another file, 4096 at most; ENOTCONN, ECONNRESET or ETIMEDOUT "
	  "where there is no answer" },
	{ "close", (PyCFunction)file_close, METH_NOARGS, "close(): disconnect; no request may be running" },
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
	{ Py_tp_doc,
	  (void *)"NfsFile(url, address, *, create=False, exclusive=False, mode=0o600, read_only=False, "
		  "connect_timeout_s=15, gone_limit_ms=300000, silence_ms=15000, names_only=False): a file on an NFS "
		  "server, and the names beside it; names_only: only these, whatever file the URL names" },
	{ 0, NULL },
};

PyType_Spec file_spec = {
	.name = "nbdnfs.engine.NfsFile",
	.basicsize = sizeof(struct file_object),
	.flags = Py_TPFLAGS_DEFAULT,
	.slots = file_slots,
};
