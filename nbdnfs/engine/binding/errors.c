/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Errors into exceptions. */
#include "binding/binding.h"

#include <errno.h>
#include <string.h>

PyObject *nfs_error; /* set once, by the module's init */

PyObject *raise_failure(const struct nfsio_failure *why)
{
	static const char *const phases[] = {
		[NFSIO_CONNECT] = "connect",
		[NFSIO_MOUNT] = "mount",
		[NFSIO_OPEN] = "open",
		[NFSIO_RECOGNISE] = "open",
		[NFSIO_NAME] = "name",
	};
	PyObject *message = PyUnicode_DecodeUTF8(why->message, (Py_ssize_t)strlen(why->message), "replace");
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

PyObject *none_or_errno(int error)
{
	if (error == 0)
		Py_RETURN_NONE;
	errno = -error;
	return PyErr_SetFromErrno(PyExc_OSError);
}

PyObject *closed(void)
{
	PyErr_SetString(PyExc_ValueError, "already closed");
	return NULL;
}
