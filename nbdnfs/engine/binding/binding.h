/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What the parts of the CPython binding share (limited API, 3.11): two types over the C core, and nothing else. Every
 * call that may block drops the GIL.
 *
 * errors.c        results into exceptions
 * arguments.c     numbers and paths
 * thread_state.c  keeping a PyThreadState for each of nbdkit's threads
 * counters.c      the region's counters as a dict
 * engine_type.c   nbdnfs.engine.Engine
 * file_type.c     nbdnfs.engine.NfsFile
 * module.c        the module
 */
#ifndef NBDNFS_BINDING_H
#define NBDNFS_BINDING_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "block/engine.h"

#define CONNECT_TIMEOUT_S 15
/* A NAS may export a directory that long before it has mounted the file's disk below it. */
#define GONE_LIMIT_MS 300000

/* errors.c */

extern PyObject *nfs_error; /* nbdnfs.engine.NfsError; set once by the module's init */
PyObject *raise_failure(const struct nfsio_failure *why);
PyObject *none_or_errno(int error);
PyObject *closed(void);

/* arguments.c */

struct path_argument {
	char text[2048];
};

int parse_u64(PyObject *object, void *value);
int parse_path(PyObject *object, void *value);

/* thread_state.c */

void keep_thread_state(void);
PyObject *keep_thread_states(PyObject *module, PyObject *unused);
int thread_state_init(void);

/* counters.c */

PyObject *counters_dict(const struct region_header *header);

extern PyType_Spec engine_spec; /* engine_type.c */
extern PyType_Spec file_spec; /* file_type.c */

#endif
