/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Keeping a PyThreadState for each of nbdkit's threads. */
#include "binding/binding.h"

#include <pthread.h>
#include <stdbool.h>

#include "base/thread.h"

/*
 * nbdkit's Python plugin makes and drops a PyThreadState around every callback, and CPython maps and unmaps a frame
 * stack for each. After keep_thread_states(), each thread that CPython did not start keeps the state of its first
 * request until the thread ends.
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
void keep_thread_state(void)
{
	if (!keep_states || pthread_getspecific(kept_state_key) != NULL)
		return;
	touch_stack();
	PyGILState_Ensure(); /* never released: its count keeps the state alive between callbacks */
	pthread_setspecific(kept_state_key, PyThreadState_Get());
}

PyObject *keep_thread_states(PyObject *module, PyObject *unused)
{
	keep_states = true;
	Py_RETURN_NONE;
}

int thread_state_init(void)
{
	if (pthread_key_create(&kept_state_key, drop_kept_state) == 0)
		return 0;
	PyErr_NoMemory();
	return -1;
}
