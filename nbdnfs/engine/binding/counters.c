/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* A region's counters and histograms as a dict. */
#include "binding/binding.h"

static int add_counter(PyObject *dict, const char *name, uint64_t value)
{
	PyObject *number = PyLong_FromUnsignedLongLong(value);
	int status = number != NULL ? PyDict_SetItemString(dict, name, number) : -1;

	Py_XDECREF(number);
	return status;
}

static int add_histogram(PyObject *dict, const char *name, const _Atomic uint64_t *buckets)
{
	PyObject *list = PyList_New(HISTOGRAM_BUCKETS);
	int status = list != NULL ? 0 : -1;

	for (Py_ssize_t i = 0; status == 0 && i < HISTOGRAM_BUCKETS; i++) {
		PyObject *number = PyLong_FromUnsignedLongLong(atomic_load_explicit(&buckets[i], memory_order_relaxed));

		status = number != NULL ? PyList_SetItem(list, i, number) : -1; /* takes the reference */
	}
	if (status == 0)
		status = PyDict_SetItemString(dict, name, list);
	Py_XDECREF(list);
	return status;
}

PyObject *counters_dict(const struct region_header *header)
{
	const struct region_counters *counters = &header->counters;
	PyObject *dict = PyDict_New();

	if (dict == NULL)
		return NULL;
#define X(name)                                                                                            \
	if (add_counter(dict, #name, atomic_load_explicit(&counters->name, memory_order_relaxed)) < 0)     \
		goto fail;
	REGION_COUNTERS(X)
#undef X
#define X(name)                                                        \
	if (add_histogram(dict, #name, counters->name) < 0)            \
		goto fail;
	REGION_HISTOGRAMS(X)
#undef X
	if (add_counter(dict, "slots", header->slot_count) < 0 ||
	    add_counter(dict, "generation", atomic_load(&header->generation)) < 0 ||
	    add_counter(dict, "region_bytes", header->region_bytes) < 0 ||
	    add_counter(dict, "failed_reads", atomic_load(&header->failed_reads)) < 0 ||
	    add_counter(dict, "failed_read_ms", atomic_load(&header->failed_read_ms)) < 0)
		goto fail;
	return dict;
fail:
	Py_DECREF(dict);
	return NULL;
}
