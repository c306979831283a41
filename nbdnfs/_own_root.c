/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A root for the calling thread in which there is nothing but the kernel's own file systems: for own_root.py.
 * Limited API of CPython 3.11.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stddef.h>
#include <stdio.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

/* The new root is mounted here, for as long as it takes to make it the root. */
#define PLACE "/run"
static const char *const folders[] = { "/dev", "/proc", "/run", "/sys" };
#define FOLDERS (sizeof(folders) / sizeof(folders[0]))

/* A descriptor of a copy of what is mounted at `folder`, alone; -1 with errno set. */
static int copy_mount(const char *folder)
{
	return open_tree(AT_FDCWD, folder, OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC);
}

static int put_at(int mount_fd, const char *folder)
{
	char path[64];

	snprintf(path, sizeof(path), PLACE "%s", folder);
	if (mkdir(path, 0755) < 0)
		return -1;
	return move_mount(mount_fd, "", AT_FDCWD, path, MOVE_MOUNT_F_EMPTY_PATH);
}

/* In a mount namespace of its own: have a small file system with copies of the folders as its root, and nothing else.
 * Returns 0, or -1 with errno set. */
static int change_root(void)
{
	int copies[FOLDERS];
	int result, error;

	for (size_t i = 0; i < FOLDERS; i++)
		copies[i] = -1;
	/* nothing that is mounted here is seen elsewhere, and what is unmounted there is not held here */
	result = mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL);
	for (size_t i = 0; result == 0 && i < FOLDERS; i++) {
		copies[i] = copy_mount(folders[i]);
		result = copies[i] < 0 ? -1 : 0;
	}
	if (result == 0)
		result = mount("nbdnfs", PLACE, "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, "mode=0755,nr_inodes=16");
	for (size_t i = 0; result == 0 && i < FOLDERS; i++)
		result = put_at(copies[i], folders[i]);
	if (result == 0)
		result = chdir(PLACE);
	if (result == 0)
		result = (int)syscall(SYS_pivot_root, ".", "."); /* pivot_root(2): the old root is on top */
	if (result == 0)
		result = umount2(".", MNT_DETACH);
	if (result == 0)
		result = chdir("/");
	error = errno;
	for (size_t i = 0; i < FOLDERS; i++)
		if (copies[i] >= 0)
			close(copies[i]);
	errno = error;
	return result;
}

/* The calling thread's root becomes one with /dev, /proc, /run and /sys alone. Returns a descriptor for leave(). */
static PyObject *enter(PyObject *module, PyObject *unused)
{
	int before = open("/proc/thread-self/ns/mnt", O_RDONLY | O_CLOEXEC);
	int error = 0;

	if (before < 0)
		return PyErr_SetFromErrno(PyExc_OSError);
	if (unshare(CLONE_NEWNS | CLONE_FS) < 0) {
		error = errno;
	} else if (change_root() < 0) {
		error = errno;
		if (setns(before, CLONE_NEWNS) < 0)
			Py_FatalError("nbdnfs: a thread cannot return to its root");
	}
	if (error == 0)
		return PyLong_FromLong(before);
	close(before);
	errno = error;
	return PyErr_SetFromErrno(PyExc_OSError);
}

/* Back to the root that the thread had before enter(). */
static PyObject *leave(PyObject *module, PyObject *args)
{
	int before, result;

	if (!PyArg_ParseTuple(args, "i", &before))
		return NULL;
	result = setns(before, CLONE_NEWNS); /* sets root and current directory, too */
	if (result < 0)
		return PyErr_SetFromErrno(PyExc_OSError);
	close(before);
	Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
	{ "enter", enter, METH_NOARGS, "have a root with /dev, /proc, /run and /sys alone; a descriptor for leave()" },
	{ "leave", leave, METH_VARARGS, "leave(descriptor): have the root from before enter() again" },
	{ NULL, NULL, 0, NULL },
};

static struct PyModuleDef module_def = {
	PyModuleDef_HEAD_INIT,
	.m_name = "nbdnfs._own_root",
	.m_doc = "A root of the kernel's own file systems. Use nbdnfs.own_root.",
	.m_size = -1,
	.m_methods = methods,
};

PyMODINIT_FUNC PyInit__own_root(void);

PyMODINIT_FUNC PyInit__own_root(void)
{
	return PyModule_Create(&module_def);
}
