/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Starts the heir, for keeper/heir.py. Limited API of CPython 3.11.
 *
 * clone(2) with CLONE_VM: parent and child share all memory, so that mlockall(2) holds for both, nothing is copied, and
 * the child's memory stays when the keeper is killed. The child has a stack of its own, and the thread-local storage of
 * the thread that has made it, which does nothing but wait for its end. Not CLONE_VFORK, with which the kernel counts
 * the waiting thread as work (the load average is one too high for ever).
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "heir.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <semaphore.h>
#include <signal.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#define STACK_BYTES (32 * 1024)
#define THREAD_STACK_BYTES (128 * 1024) /* less is refused on arm64: PTHREAD_STACK_MIN */

static struct heir the_heir; /* the child's own while `alive` */
static char stack[STACK_BYTES] __attribute__((aligned(64)));

static struct {
	atomic_bool alive; /* set by start(), cleared by the thread once the child has been collected */
	sem_t started;	   /* posted by the thread once `result` is there */
	int result;	   /* the child's pid, or minus an errno */
} child;

static int live(void *heir)
{
	_exit(heir_live(heir));
}

static void *start_and_wait(void *unused)
{
	pid_t pid;

	/* threads share root and directory, and the keeper's loop may return to its root only if no other has them:
	 * setns(2) */
	if (unshare(CLONE_FS) < 0)
		pid = -errno;
	else if ((pid = clone(live, stack + STACK_BYTES, CLONE_VM | SIGCHLD, &the_heir)) < 0)
		pid = -errno;
	child.result = pid;
	sem_post(&child.started);
	/* for ever: until it ends. From here on this thread's storage, errno too, is the child's. */
	while (pid > 0 && waitpid(pid, NULL, 0) != pid)
		;
	atomic_store(&child.alive, false);
	return NULL;
}

/* With all signals blocked, in the child too: it ends by itself, or by SIGKILL. 0 or an errno. */
static int start_thread(void)
{
	pthread_attr_t attributes;
	pthread_t thread;
	sigset_t all, before;
	int error = pthread_attr_init(&attributes);

	if (error != 0)
		return error;
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	error = pthread_attr_setstacksize(&attributes, THREAD_STACK_BYTES);
	error = error != 0 ? error : pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
	error = error != 0 ? error : pthread_create(&thread, &attributes, start_and_wait, NULL);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	pthread_attr_destroy(&attributes);
	return error;
}

/* Copy a bytes object; false where it is too long. */
static bool copy(void *into, size_t room, size_t *bytes, const Py_buffer *from)
{
	if (from->len < 0 || (size_t)from->len > room)
		return false;
	memcpy(into, from->buf, (size_t)from->len);
	*bytes = (size_t)from->len;
	return true;
}

static bool fill_in(const int *descriptors, const Py_buffer *texts, unsigned descriptor_at, unsigned long long heap)
{
	size_t unused;

	memset(&the_heir, 0, sizeof(the_heir)); /* also: touches all of it */
	memset(stack, 0, sizeof(stack));
	the_heir.channel = descriptors[0];
	the_heir.keeper = descriptors[1];
	the_heir.netlink = descriptors[2];
	the_heir.lock = descriptors[3];
	the_heir.backend = descriptors[4];
	the_heir.worker = the_heir.standby = the_heir.sock = the_heir.peer = the_heir.pidfd = -1;
	the_heir.request_descriptor_at = descriptor_at;
	the_heir.heap = (uintptr_t)heap;
	return copy(the_heir.backend_text, sizeof(the_heir.backend_text), &the_heir.backend_bytes, &texts[0]) &&
	       copy(the_heir.request, sizeof(the_heir.request), &the_heir.request_bytes, &texts[1]) &&
	       descriptor_at + sizeof(uint32_t) <= the_heir.request_bytes &&
	       copy(the_heir.option, sizeof(the_heir.option), &the_heir.option_bytes, &texts[2]) &&
	       copy(the_heir.command, sizeof(the_heir.command) - 1, &unused, &texts[3]) &&
	       copy(the_heir.label, sizeof(the_heir.label) - 1, &unused, &texts[4]);
}

/* The calling thread must be the one whose root the heir is to have. */
static PyObject *start(PyObject *module, PyObject *args)
{
	int descriptors[5], error = 0;
	unsigned descriptor_at;
	unsigned long long heap;
	Py_buffer texts[5];
	bool was_alive = true;

	if (!PyArg_ParseTuple(args, "(iiiii)y*y*Iy*y*y*K", &descriptors[0], &descriptors[1], &descriptors[2],
			      &descriptors[3], &descriptors[4], &texts[0], &texts[1], &descriptor_at, &texts[2],
			      &texts[3], &texts[4], &heap))
		return NULL;
	was_alive = atomic_exchange(&child.alive, true);
	if (was_alive)
		error = EBUSY;
	else if (!fill_in(descriptors, texts, descriptor_at, heap))
		error = EMSGSIZE;
	else if (sem_init(&child.started, 0, 0) < 0)
		error = errno;
	else
		error = start_thread();
	for (size_t i = 0; i < sizeof(texts) / sizeof(texts[0]); i++)
		PyBuffer_Release(&texts[i]);
	if (error == 0) {
		Py_BEGIN_ALLOW_THREADS
		while (sem_wait(&child.started) != 0) /* for ever: as long as the kernel takes to make a process */
			;
		Py_END_ALLOW_THREADS
		error = child.result < 0 ? -child.result : 0;
		was_alive = true; /* the thread says when it has ended */
	}
	if (error == 0)
		return PyLong_FromLong(child.result);
	if (!was_alive)
		atomic_store(&child.alive, false);
	errno = error;
	return PyErr_SetFromErrno(PyExc_OSError);
}

static PyMethodDef methods[] = {
	{ "start", start, METH_VARARGS,
	  "start((channel, keeper, netlink, lock, backend), backend, request, descriptor_at, option, command, label, "
	  "heap): the heir's pid. EBUSY while the last one lives" },
	{ NULL, NULL, 0, NULL },
};

static struct PyModuleDef module_def = {
	PyModuleDef_HEAD_INIT,
	.m_name = "nbdnfs.heir._heir",
	.m_doc = "The process that goes on when keeper and worker have ended. Use nbdnfs.keeper.heir.",
	.m_size = -1,
	.m_methods = methods,
};

PyMODINIT_FUNC PyInit__heir(void);

PyMODINIT_FUNC PyInit__heir(void)
{
	PyObject *module = PyModule_Create(&module_def);

	if (module != NULL && (PyModule_AddIntConstant(module, "HAS_WORKER", HEIR_HAS_WORKER) != 0 ||
			       PyModule_AddIntConstant(module, "HAS_STANDBY", HEIR_HAS_STANDBY) != 0 ||
			       PyModule_AddIntConstant(module, "END", HEIR_END) != 0))
		Py_CLEAR(module);
	return module;
}
