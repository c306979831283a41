/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Starts programs in a thread of its own, for programs.py. Limited API of CPython 3.11.
 *
 * posix_spawn(3) returns when the kernel has opened the program, and the one that loads it. On a root whose server does
 * not answer, that is when it does. Only the calling thread waits for it (clone(2), CLONE_VFORK), and this one has no
 * GIL to hold. One thread for all programs, which lives as long as the process: the kernel sends a child its
 * parent-death signal when the thread that has started it ends (kernel/exit.c: forget_original_parent).
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <spawn.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#define STACK_BYTES (128 * 1024) /* less is refused on arm64: PTHREAD_STACK_MIN */
#define MOVES_MAX 8

/* A program to start. Made by submit(), then the thread's. */
struct request {
	struct request *next;
	char *program;
	char **argv;
	char **environment;
	int answer;  /* the other end of the caller's socket */
	int moves;
	struct {
		int from; /* a copy of the caller's descriptor */
		int to;
	} move[MOVES_MAX];
	bool new_session;
	bool ordinary_priority;
};

static struct {
	pthread_mutex_t lock; /* of all that follows */
	pthread_cond_t work;
	bool started;
	struct request *first, **end;
} spawner = { PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, false, NULL, &spawner.first };

static void free_strings(char **strings)
{
	if (strings == NULL)
		return;
	for (char **one = strings; *one != NULL; one++)
		free(*one);
	free(strings);
}

static void close_moves(struct request *request)
{
	for (int i = 0; i < request->moves; i++)
		close(request->move[i].from);
	request->moves = 0;
}

static void free_request(struct request *request)
{
	close_moves(request);
	if (request->answer >= 0)
		close(request->answer);
	free(request->program);
	free_strings(request->argv);
	free_strings(request->environment);
	free(request);
}

/* Whether the caller has closed its end: the program is not wanted any more. */
static bool is_cancelled(const struct request *request)
{
	struct pollfd other = { .fd = request->answer, .events = POLLRDHUP };

	return poll(&other, 1, 0) == 1 && (other.revents & (POLLRDHUP | POLLHUP | POLLERR)) != 0;
}

/*
 * The descriptors that the program gets, and no other one. They are closed here rather than by exec: until the program
 * is open, which may be long, the child would have copies of sockets whose other end waits for them to be closed.
 */
static int set_descriptors(posix_spawn_file_actions_t *actions, const struct request *request)
{
	int error = 0, last = 2;

	for (int i = 0; error == 0 && i < request->moves; i++) {
		error = posix_spawn_file_actions_adddup2(actions, request->move[i].from, request->move[i].to);
		last = request->move[i].to > last ? request->move[i].to : last;
	}
	for (int fd = 3; error == 0 && fd < last; fd++) {
		bool is_target = false;

		for (int i = 0; i < request->moves; i++)
			is_target = is_target || request->move[i].to == fd;
		if (!is_target)
			error = posix_spawn_file_actions_addclose(actions, fd);
	}
	return error != 0 ? error : posix_spawn_file_actions_addclosefrom_np(actions, last + 1);
}

/* No signal is blocked or ignored in the program. CPython ignores SIGPIPE. */
static int set_attributes(posix_spawnattr_t *attributes, const struct request *request)
{
	short flags = POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF;
	struct sched_param priority = { 0 };
	sigset_t none, all;
	int error;

	sigemptyset(&none);
	sigfillset(&all);
	flags |= request->new_session ? POSIX_SPAWN_SETSID : 0;
	flags |= request->ordinary_priority ? POSIX_SPAWN_SETSCHEDULER : 0;
	error = posix_spawnattr_setsigmask(attributes, &none);
	error = error != 0 ? error : posix_spawnattr_setsigdefault(attributes, &all);
	error = error != 0 ? error : posix_spawnattr_setschedpolicy(attributes, SCHED_OTHER);
	error = error != 0 ? error : posix_spawnattr_setschedparam(attributes, &priority);
	return error != 0 ? error : posix_spawnattr_setflags(attributes, flags);
}

/* The program's pid, or minus an errno. */
static int32_t spawn(const struct request *request)
{
	posix_spawn_file_actions_t actions;
	posix_spawnattr_t attributes;
	pid_t pid = 0;
	int error = posix_spawn_file_actions_init(&actions);

	if (error != 0)
		return -error;
	error = posix_spawnattr_init(&attributes);
	if (error == 0) {
		error = set_descriptors(&actions, request);
		error = error != 0 ? error : set_attributes(&attributes, request);
		if (error == 0)
			error = posix_spawn(&pid, request->program, &actions, &attributes, request->argv,
					    request->environment);
		posix_spawnattr_destroy(&attributes);
	}
	posix_spawn_file_actions_destroy(&actions);
	return error != 0 ? -error : pid;
}

static void serve(struct request *request)
{
	if (!is_cancelled(request)) {
		int32_t result = spawn(request);
		bool is_taken;

		close_moves(request); /* first: the caller may then wait for the other end of one to be closed */
		is_taken = send(request->answer, &result, sizeof(result), MSG_NOSIGNAL) == sizeof(result);
		if (!is_taken && result > 0) { /* cancelled meanwhile */
			kill(result, SIGKILL);
			waitpid(result, NULL, 0);
		}
	}
	free_request(request);
}

static void *run(void *unused)
{
	for (;;) {
		struct request *request;

		pthread_mutex_lock(&spawner.lock);
		while (spawner.first == NULL)
			pthread_cond_wait(&spawner.work, &spawner.lock); /* for ever: until there is work */
		request = spawner.first;
		spawner.first = request->next;
		if (spawner.first == NULL)
			spawner.end = &spawner.first;
		pthread_mutex_unlock(&spawner.lock);
		serve(request);
	}
	return NULL;
}

/* With all signals blocked: they are for the threads that Python knows. */
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
	error = pthread_attr_setstacksize(&attributes, STACK_BYTES);
	error = error != 0 ? error : pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
	error = error != 0 ? error : pthread_create(&thread, &attributes, run, NULL);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	pthread_attr_destroy(&attributes);
	return error;
}

static PyObject *none_or_errno(int error)
{
	if (error == 0)
		Py_RETURN_NONE;
	errno = error;
	return PyErr_SetFromErrno(PyExc_OSError);
}

/* Once. Until it has been called no program is started. */
static PyObject *prepare(PyObject *module, PyObject *unused)
{
	int error = 0;

	pthread_mutex_lock(&spawner.lock);
	if (!spawner.started)
		error = start_thread();
	spawner.started = spawner.started || error == 0;
	pthread_mutex_unlock(&spawner.lock);
	return none_or_errno(error);
}

/* A copy of a list of bytes objects, which ends with NULL; NULL with an exception set. */
static char **copy_strings(PyObject *list)
{
	Py_ssize_t count = PyList_Size(list);
	char **strings = count < 0 ? NULL : calloc((size_t)count + 1, sizeof(*strings));

	if (strings == NULL)
		return count < 0 ? NULL : (char **)PyErr_NoMemory();
	for (Py_ssize_t i = 0; i < count; i++) {
		char *text = NULL;

		if (PyBytes_AsStringAndSize(PyList_GetItem(list, i), &text, NULL) == 0) {
			strings[i] = strdup(text);
			if (strings[i] == NULL)
				PyErr_NoMemory();
		}
		if (strings[i] == NULL) {
			free_strings(strings);
			return NULL;
		}
	}
	return strings;
}

/* Copies of the descriptors that the program gets; -1 with an exception set. */
static int copy_descriptors(struct request *request, PyObject *moves, int answer)
{
	Py_ssize_t count = PyList_Size(moves);

	if (count < 0)
		return -1;
	if (count > MOVES_MAX) {
		PyErr_SetString(PyExc_ValueError, "too many descriptors");
		return -1;
	}
	for (Py_ssize_t i = 0; i < count; i++) {
		int from, to;

		if (!PyArg_ParseTuple(PyList_GetItem(moves, i), "ii", &from, &to))
			return -1;
		from = fcntl(from, F_DUPFD_CLOEXEC, 3);
		if (from < 0) {
			PyErr_SetFromErrno(PyExc_OSError);
			return -1;
		}
		request->move[request->moves].from = from;
		request->move[request->moves++].to = to;
	}
	request->answer = fcntl(answer, F_DUPFD_CLOEXEC, 3);
	if (request->answer < 0)
		PyErr_SetFromErrno(PyExc_OSError);
	return request->answer < 0 ? -1 : 0;
}

static PyObject *submit(PyObject *module, PyObject *args)
{
	const char *program;
	PyObject *argv, *environment, *moves;
	int answer, new_session, ordinary_priority;
	struct request *request;

	if (!PyArg_ParseTuple(args, "yO!O!O!ipp", &program, &PyList_Type, &argv, &PyList_Type, &environment,
			      &PyList_Type, &moves, &answer, &new_session, &ordinary_priority))
		return NULL;
	request = calloc(1, sizeof(*request));
	if (request == NULL)
		return PyErr_NoMemory();
	request->answer = -1;
	request->new_session = new_session;
	request->ordinary_priority = ordinary_priority;
	request->program = strdup(program);
	if (request->program == NULL)
		PyErr_NoMemory();
	if (request->program == NULL || (request->argv = copy_strings(argv)) == NULL ||
	    (request->environment = copy_strings(environment)) == NULL ||
	    copy_descriptors(request, moves, answer) != 0) {
		free_request(request);
		return NULL;
	}
	pthread_mutex_lock(&spawner.lock);
	*spawner.end = request;
	spawner.end = &request->next;
	pthread_cond_signal(&spawner.work);
	pthread_mutex_unlock(&spawner.lock);
	Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
	{ "prepare", prepare, METH_NOARGS, "start the thread, unless there is one" },
	{ "submit", submit, METH_VARARGS,
	  "submit(program, argv, environment, moves, answer, new_session, ordinary_priority): have it started" },
	{ NULL, NULL, 0, NULL },
};

static struct PyModuleDef module_def = {
	PyModuleDef_HEAD_INIT,
	.m_name = "nbdnfs._spawner",
	.m_doc = "A thread that starts programs. Use nbdnfs.programs.",
	.m_size = -1,
	.m_methods = methods,
};

PyMODINIT_FUNC PyInit__spawner(void);

PyMODINIT_FUNC PyInit__spawner(void)
{
	return PyModule_Create(&module_def);
}
