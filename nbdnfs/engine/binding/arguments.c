/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Arguments that PyArg has no letter for. */
#include "binding/binding.h"

#include <errno.h>
#include <string.h>

/* PyArg's "O&" for offsets and lengths ("K" drops what is above 64 bits, and the sign). */
int parse_u64(PyObject *object, void *value)
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

/* PyArg's "O&" for paths: a str, in which surrogates stand for the bytes that are not UTF-8 (PEP 383). */
int parse_path(PyObject *object, void *value)
{
	struct path_argument *path = value;
	PyObject *bytes = NULL;
	Py_ssize_t length;
	char *text;

	if (PyUnicode_Check(object))
		bytes = PyUnicode_AsEncodedString(object, "utf-8", "surrogateescape");
	else
		PyErr_SetString(PyExc_TypeError, "a path must be a str");
	if (bytes == NULL)
		return 0;
	if (PyBytes_AsStringAndSize(bytes, &text, &length) == 0) {
		if (memchr(text, '\0', (size_t)length) != NULL || (size_t)length >= sizeof(path->text)) {
			struct nfsio_failure why = {
				.phase = NFSIO_NAME,
				.error = (size_t)length >= sizeof(path->text) ? -ENAMETOOLONG : -EINVAL,
			};

			raise_failure(&why);
		} else {
			memcpy(path->text, text, (size_t)length + 1);
		}
	}
	Py_DECREF(bytes);
	return PyErr_Occurred() == NULL;
}
