/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Arguments that PyArg has no letter for. */
#include "binding/binding.h"

#include <errno.h>

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
