/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The module nbdnfs.engine._engine. */
#include "binding/binding.h"

#include <errno.h>
#ifdef __GLIBC__
#include <nss.h>
#endif

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
	if (thread_state_init() < 0)
		goto fail;
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
