/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The module nbdnfs.engine._engine. */
#include "binding/binding.h"

#include "base/cipher.h"
#include "base/crc32c.h"
#include "region/region.h"

#include <errno.h>
#ifdef __GLIBC__
#include <nss.h>
#endif

/*
 * libnfs looks up the name of each reserved port that it is about to bind (socket.c: getservbyport), which reads
 * /etc/services at every connection: a file that may have left the page cache, in the process that frees memory. With
 * "dns" for a source, which has no services, glibc opens no file, and no longer checks whether nsswitch.conf has
 * changed (nss/nss_database.c: reload_disabled). libnfs may then take the port of a service for the moment of an open;
 * connections that last have a list of their own (nfs/reserved_port.c).
 */
static PyObject *forget_services(PyObject *module, PyObject *unused)
{
#ifdef __GLIBC__
	if (__nss_configure_lookup("services", "dns") != 0)
		return PyErr_SetFromErrno(PyExc_OSError);
#endif
	Py_RETURN_NONE;
}

static PyObject *warm_cipher(PyObject *module, PyObject *args)
{
	int version, error = 0;

	if (!PyArg_ParseTuple(args, "i", &version))
		return NULL;
	if (version != REGION_AES)
		error = cipher_init(CIPHER_XCHACHA20);
	if (version != REGION_XCHACHA20 && error == 0)
		error = cipher_init(CIPHER_AES);
	return none_or_errno(error);
}

static PyMethodDef module_methods[] = {
	{ "keep_thread_states", keep_thread_states, METH_NOARGS,
	  "keep_thread_states(): keep a state for each thread that Python did not start (nbdkit's)" },
	{ "forget_services", forget_services, METH_NOARGS,
	  "forget_services(): from now on, looking up the name of a port reads no file and finds nothing" },
	{ "warm_cipher", warm_cipher, METH_VARARGS,
	  "warm_cipher(region_version): run all code that encrypting the pages of such a region needs, so that locked"
	  " memory has it; 0: of any" },
	{ NULL, NULL, 0, NULL },
};

static struct PyModuleDef module_def = {
	PyModuleDef_HEAD_INIT,
	.m_name = "nbdnfs.engine._engine",
	.m_doc = "The C core. Use it through nbdnfs.engine.",
	.m_size = -1,
	.m_methods = module_methods,
};

PyMODINIT_FUNC PyInit__engine(void);

PyMODINIT_FUNC PyInit__engine(void)
{
	PyObject *module = PyModule_Create(&module_def);
	PyObject *engine_type = NULL, *file_type = NULL;

	if (module == NULL)
		return NULL;
	if (thread_state_init() < 0)
		goto fail;
	crc32c("", 0); /* its tables: a standby is to touch nothing first when its turn comes */
	nfs_error = PyErr_NewExceptionWithDoc("nbdnfs.engine.NfsError",
					      "An OSError with `phase`: connect, mount, open or name.", PyExc_OSError,
					      NULL);
	engine_type = PyType_FromSpec(&engine_spec);
	file_type = PyType_FromSpec(&file_spec);
	if (nfs_error == NULL || engine_type == NULL || file_type == NULL ||
	    PyModule_AddObjectRef(module, "NfsError", nfs_error) < 0 ||
	    PyModule_AddObjectRef(module, "Engine", engine_type) < 0 ||
	    PyModule_AddObjectRef(module, "NfsFile", file_type) < 0 ||
	    PyModule_AddStringConstant(module, "libnfs_version", LIBNFS_BUILT_WITH) < 0)
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
