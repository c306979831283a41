/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * System calls that memlock.py needs and Python does not have. No policy, no messages. Limited API of CPython 3.11.
 * Each function raises OSError where the kernel or glibc refuses.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <errno.h>
#include <fcntl.h>
#include <link.h>
#include <linux/capability.h>
#include <locale.h>
#include <malloc.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef PR_SET_IO_FLUSHER
#define PR_SET_IO_FLUSHER 57 /* Linux 5.6 */
#define PR_GET_IO_FLUSHER 58
#endif
#ifndef SYS_memfd_secret
#define SYS_memfd_secret 447 /* Linux 5.14, on all architectures that have it */
#endif
#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22 /* Linux 5.14 */
#endif
#ifndef MADV_DONTNEED_LOCKED
#define MADV_DONTNEED_LOCKED 24 /* Linux 5.18 */
#endif

#define NEVER_TRIM_BYTES (1 << 30)

static PyObject *none_or_errno(int error)
{
	if (error == 0)
		Py_RETURN_NONE;
	errno = error;
	return PyErr_SetFromErrno(PyExc_OSError);
}

static PyObject *lock_on_fault(PyObject *module, PyObject *unused)
{
	return none_or_errno(mlockall(MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT) == 0 ? 0 : errno);
}

static PyObject *use_locale_c(PyObject *module, PyObject *unused)
{
	return none_or_errno(setlocale(LC_ALL, "C") != NULL ? 0 : EINVAL);
}

static PyObject *tune_malloc(PyObject *module, PyObject *args)
{
	unsigned top_pad_bytes;

	if (!PyArg_ParseTuple(args, "I", &top_pad_bytes))
		return NULL;
	if (mallopt(M_ARENA_MAX, 1) != 1 || mallopt(M_MMAP_MAX, 0) != 1 ||
	    mallopt(M_TRIM_THRESHOLD, NEVER_TRIM_BYTES) != 1 || mallopt(M_TOP_PAD, (int)top_pad_bytes) != 1)
		return none_or_errno(EINVAL);
	Py_RETURN_NONE;
}

/* Allocate `bytes`, touch them, free them: after tune_malloc() they stay in the heap, faulted in. */
static PyObject *extend_heap(PyObject *module, PyObject *args)
{
	unsigned long long bytes, page_bytes = (unsigned long long)sysconf(_SC_PAGE_SIZE);
	volatile char *block;

	if (!PyArg_ParseTuple(args, "K", &bytes))
		return NULL;
	block = malloc(bytes);
	if (block == NULL)
		return PyErr_NoMemory();
	for (unsigned long long at = 0; at < bytes; at += page_bytes)
		block[at] = 1;
	if (bytes > 0)
		block[bytes - 1] = 1; /* the block begins somewhere in a page, and ends in one more */
	free((void *)block);
	Py_RETURN_NONE;
}

/* For threads that nbdkit starts: glibc takes its default from RLIMIT_STACK at exec. */
static PyObject *set_default_stack(PyObject *module, PyObject *args)
{
	unsigned long long bytes;
	pthread_attr_t attributes;
	int error;

	if (!PyArg_ParseTuple(args, "K", &bytes))
		return NULL;
	error = pthread_attr_init(&attributes);
	if (error == 0) {
		error = pthread_attr_setstacksize(&attributes, bytes);
		if (error == 0)
			error = pthread_setattr_default_np(&attributes);
		pthread_attr_destroy(&attributes);
	}
	return none_or_errno(error);
}

static PyObject *get_default_stack(PyObject *module, PyObject *unused)
{
	pthread_attr_t attributes;
	size_t bytes = 0;
	int error = pthread_getattr_default_np(&attributes);

	if (error == 0) {
		error = pthread_attr_getstacksize(&attributes, &bytes);
		pthread_attr_destroy(&attributes);
	}
	return error == 0 ? PyLong_FromSize_t(bytes) : none_or_errno(error);
}

static PyObject *populate(PyObject *module, PyObject *args)
{
	unsigned long long start, length;

	if (!PyArg_ParseTuple(args, "KK", &start, &length))
		return NULL;
	return none_or_errno(madvise((void *)(uintptr_t)start, length, MADV_POPULATE_READ) == 0 ? 0 : errno);
}

static PyObject *drop(PyObject *module, PyObject *args)
{
	unsigned long long start, length;

	if (!PyArg_ParseTuple(args, "KK", &start, &length))
		return NULL;
	if (start % (unsigned long long)sysconf(_SC_PAGE_SIZE) != 0)
		return none_or_errno(EINVAL);
	if (madvise((void *)(uintptr_t)start, length, MADV_DONTNEED_LOCKED) == 0)
		Py_RETURN_NONE;
	if (errno != EINVAL)
		return none_or_errno(errno);
	/* an older kernel, which drops nothing that is locked: then it stays */
	if (madvise((void *)(uintptr_t)start, length, MADV_DONTNEED) == 0 || errno == EINVAL)
		Py_RETURN_NONE;
	return none_or_errno(errno);
}

/* Append the whole pages of one table to the list `found`. Returns 0, or -1 with an exception. */
static int add_table(PyObject *found, uintptr_t base, uintptr_t start, uintptr_t bytes)
{
	uintptr_t page_bytes = (uintptr_t)sysconf(_SC_PAGE_SIZE), end;
	PyObject *range;
	int error;

	if (start < base) /* glibc has made it an address, but not in the vdso's section */
		start += base;
	end = (start + bytes) / page_bytes * page_bytes;
	start = (start + page_bytes - 1) / page_bytes * page_bytes;
	if (end <= start)
		return 0;
	range = Py_BuildValue("KK", (unsigned long long)start, (unsigned long long)(end - start));
	error = range != NULL ? PyList_Append(found, range) : -1;
	Py_XDECREF(range);
	return error;
}

/*
 * How functions are unwound: .eh_frame_hdr, and the .eh_frame that it points to (Linux Standard Base, "Exception
 * Frames"). Only C++ and the cancellation of threads read it. Its end is found by its entries.
 */
static int add_unwind_tables(PyObject *found, uintptr_t header, uintptr_t header_bytes, uintptr_t segment_end)
{
	const uint8_t pcrel_sdata4 = 0x1b;
	const uint8_t *head = (const uint8_t *)header;
	int32_t distance;
	uintptr_t at, start;
	uint32_t length;

	if (header == 0 || header_bytes < 8 || head[0] != 1 || head[1] != pcrel_sdata4)
		return 0;
	memcpy(&distance, head + 4, sizeof(distance));
	at = start = header + 4 + (uintptr_t)(intptr_t)distance;
	while (at >= header && at + sizeof(length) <= segment_end) {
		memcpy(&length, (const void *)at, sizeof(length));
		if (length == 0 || length == UINT32_MAX || at + sizeof(length) + length > segment_end)
			break;
		at += sizeof(length) + length;
	}
	if (start < header)
		return 0;
	return add_table(found, 0, header, header_bytes) != 0 || add_table(found, 0, start, at - start) != 0;
}

/*
 * Those of one object, elf(5): relocations, of data and of functions, symbols and their names. The symbols' length is
 * written nowhere; they end where their names or versions begin, whichever comes next.
 */
static int add_tables(struct dl_phdr_info *object, size_t size, void *found)
{
	const ElfW(Dyn) *entry = NULL;
	uintptr_t data = 0, data_bytes = 0, functions = 0, functions_bytes = 0, names = 0, names_bytes = 0;
	uintptr_t symbols = 0, versions = UINTPTR_MAX, symbols_end, unwind = 0, unwind_bytes = 0;

	for (int i = 0; i < object->dlpi_phnum; i++) {
		const ElfW(Phdr) *part = &object->dlpi_phdr[i];

		if (part->p_type == PT_DYNAMIC)
			entry = (const void *)(object->dlpi_addr + part->p_vaddr);
		if (part->p_type == PT_GNU_EH_FRAME) {
			unwind = object->dlpi_addr + part->p_vaddr;
			unwind_bytes = part->p_memsz;
		}
	}
	for (int i = 0; i < object->dlpi_phnum; i++) {
		const ElfW(Phdr) *part = &object->dlpi_phdr[i];
		uintptr_t start = object->dlpi_addr + part->p_vaddr, end = start + part->p_memsz;

		if (part->p_type == PT_LOAD && part->p_flags == PF_R && start <= unwind && unwind < end &&
		    add_unwind_tables(found, unwind, unwind_bytes, end) != 0)
			return -1;
	}
	for (; entry != NULL && entry->d_tag != DT_NULL; entry++) {
		switch (entry->d_tag) {
		case DT_REL:
		case DT_RELA: data = entry->d_un.d_ptr; break;
		case DT_RELSZ:
		case DT_RELASZ: data_bytes = entry->d_un.d_val; break;
		case DT_JMPREL: functions = entry->d_un.d_ptr; break;
		case DT_PLTRELSZ: functions_bytes = entry->d_un.d_val; break;
		case DT_STRTAB: names = entry->d_un.d_ptr; break;
		case DT_STRSZ: names_bytes = entry->d_un.d_val; break;
		case DT_SYMTAB: symbols = entry->d_un.d_ptr; break;
		case DT_VERSYM: versions = entry->d_un.d_ptr; break;
		}
	}
	symbols_end = versions > symbols && (names < symbols || versions < names) ? versions : names;
	if (symbols_end > symbols && symbols_end != UINTPTR_MAX &&
	    add_table(found, object->dlpi_addr, symbols, symbols_end - symbols) != 0)
		return -1;
	return add_table(found, object->dlpi_addr, data, data_bytes) != 0 ||
	       add_table(found, object->dlpi_addr, functions, functions_bytes) != 0 ||
	       add_table(found, object->dlpi_addr, names, names_bytes) != 0;
}

static PyObject *linker_tables(PyObject *module, PyObject *unused)
{
	PyObject *found = PyList_New(0);

	if (found != NULL && dl_iterate_phdr(add_tables, found) != 0)
		Py_CLEAR(found);
	return found;
}

static PyObject *set_io_flusher(PyObject *module, PyObject *unused)
{
	return none_or_errno(prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) == 0 ? 0 : errno);
}

/* For the calling thread: the setting is each thread's own (kernel/exit.c: reparent_leader). */
static PyObject *outlive_parent(PyObject *module, PyObject *unused)
{
	return none_or_errno(prctl(PR_SET_PDEATHSIG, 0, 0, 0, 0) == 0 ? 0 : errno);
}

/* Those at which nbdkit ends, in its own time (nbdkit's server/signals.c). */
static const int end_signals[] = { SIGHUP, SIGINT, SIGQUIT, SIGTERM };

static sigset_t set_of_end_signals(void)
{
	sigset_t set;

	sigemptyset(&set);
	for (size_t i = 0; i < sizeof(end_signals) / sizeof(end_signals[0]); i++)
		sigaddset(&set, end_signals[i]);
	return set;
}

static PyObject *hold_end_signals(PyObject *module, PyObject *unused)
{
	sigset_t set = set_of_end_signals();

	return none_or_errno(pthread_sigmask(SIG_BLOCK, &set, NULL));
}

/* One that has come by now ends the process here. */
static PyObject *end_at_once(PyObject *module, PyObject *unused)
{
	struct sigaction end = { .sa_handler = SIG_DFL };
	sigset_t set = set_of_end_signals();

	for (size_t i = 0; i < sizeof(end_signals) / sizeof(end_signals[0]); i++)
		if (sigaction(end_signals[i], &end, NULL) != 0)
			return none_or_errno(errno);
	return none_or_errno(pthread_sigmask(SIG_UNBLOCK, &set, NULL));
}

/* While a descriptor of secret memory is open, and it stays open. Nothing is mapped: it costs an inode. */
static PyObject *forbid_hibernation(PyObject *module, PyObject *unused)
{
	return none_or_errno(syscall(SYS_memfd_secret, O_CLOEXEC) >= 0 ? 0 : errno);
}

/* capset(2) and prctl(PR_SET_NO_NEW_PRIVS): of this thread and those it starts. */
static PyObject *keep_capabilities(PyObject *module, PyObject *args)
{
	unsigned long long permitted, effective;
	struct __user_cap_header_struct header = { .version = _LINUX_CAPABILITY_VERSION_3 };
	struct __user_cap_data_struct found[_LINUX_CAPABILITY_U32S_3];

	if (!PyArg_ParseTuple(args, "KK", &permitted, &effective))
		return NULL;
	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 || syscall(SYS_capget, &header, found) != 0)
		return none_or_errno(errno);
	for (unsigned word = 0; word < _LINUX_CAPABILITY_U32S_3; word++) {
		found[word].permitted &= (__u32)(permitted >> (32 * word));
		found[word].effective = found[word].permitted & (__u32)(effective >> (32 * word));
		found[word].inheritable = 0;
	}
	return none_or_errno(syscall(SYS_capset, &header, found) == 0 ? 0 : errno);
}

static PyMethodDef methods[] = {
	{ "lock_on_fault", lock_on_fault, METH_NOARGS,
	  "mlockall(2): lock all memory, now and later, as soon as it is touched" },
	{ "tune_malloc", tune_malloc, METH_VARARGS,
	  "tune_malloc(top_pad_bytes): one arena, no mmap(2), no trimming" },
	{ "extend_heap", extend_heap, METH_VARARGS, "extend_heap(bytes): fault in that much free heap" },
	{ "set_default_stack", set_default_stack, METH_VARARGS,
	  "set_default_stack(bytes): the stack size of threads that are started from now on" },
	{ "get_default_stack", get_default_stack, METH_NOARGS, "get_default_stack() -> bytes" },
	{ "populate", populate, METH_VARARGS, "populate(start, length): read a mapping's pages in, madvise(2)" },
	{ "use_locale_c", use_locale_c, METH_NOARGS,
	  "use_locale_c(): libc's functions look into no locale's files from here on; before there are threads" },
	{ "drop", drop, METH_VARARGS,
	  "drop(start, length): drop a file mapping's pages, which are read again when touched (locked: Linux 5.18)" },
	{ "linker_tables", linker_tables, METH_NOARGS,
	  "linker_tables() -> [(start, length)]: whole pages that are read only to load a library, or to unwind" },
	{ "set_io_flusher", set_io_flusher, METH_NOARGS,
	  "prctl(PR_SET_IO_FLUSHER): for this thread and those it starts" },
	{ "outlive_parent", outlive_parent, METH_NOARGS,
	  "prctl(PR_SET_PDEATHSIG, 0): no signal when the parent ends" },
	{ "hold_end_signals", hold_end_signals, METH_NOARGS,
	  "keep SIGHUP, SIGINT, SIGQUIT and SIGTERM waiting, in this thread and those it starts" },
	{ "end_at_once", end_at_once, METH_NOARGS, "have these signals end the process, whatever handles them so far" },
	{ "forbid_hibernation", forbid_hibernation, METH_NOARGS,
	  "memfd_secret(2): the kernel does not hibernate while this process lives" },
	{ "keep_capabilities", keep_capabilities, METH_VARARGS,
	  "keep_capabilities(permitted, effective): give up all others, capabilities(7), for good; masks of bits" },
	{ NULL, NULL, 0, NULL },
};

static struct PyModuleDef module_def = {
	PyModuleDef_HEAD_INIT,
	.m_name = "nbdnfs._memlock",
	.m_doc = "Calls for nbdnfs.memlock. Use that.",
	.m_size = -1,
	.m_methods = methods,
};

PyMODINIT_FUNC PyInit__memlock(void);

PyMODINIT_FUNC PyInit__memlock(void)
{
	return PyModule_Create(&module_def);
}
