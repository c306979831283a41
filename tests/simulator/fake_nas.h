/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What the parts of the fake NAS share: fake_nas.c (disk, power, faults), fake_nas_calls.c (calls and answers). */
#ifndef NBDNFS_SIM_FAKE_NAS_H
#define NBDNFS_SIM_FAKE_NAS_H

#include "sim.h"

#define RECORD_BYTES 512u
#define HANDLE_BYTES_MAX 64u
#define SECTOR_BYTES 512u

enum nas_object { OBJECT_NONE, OBJECT_FILE, OBJECT_RECORD, OBJECT_DIRECTORY, OBJECT_ROOT, OBJECT_OTHER, OBJECT_COUNT };

struct nas {
	bool has_power, is_serving;
	uint32_t epoch;         /* calls that were taken before the last restart are not carried out */
	uint64_t verifier;
	uint32_t generations[OBJECT_COUNT]; /* of its handle */
	uint64_t fsid;
	uint32_t read_max_bytes, write_max_bytes;
	uint32_t refusal;       /* the nfsstat3 of this window of FAULT_refuse */
	bool refuses_reads;
	bool is_replaced;       /* OBJECT_OTHER has the file's name, and the file's handle is stale */
	bool other_has_number;  /* and its number */
	uint8_t other_byte;     /* all that is in it, but for one page that is the file's; UINT32_MAX: not even that */
	uint32_t other_page;
	uint32_t forgotten;     /* how often the file's handle, or what goes with it, has changed */
	uint32_t found;         /* the generation of the file's handle that a look-up was last answered with ... */
	int64_t found_at_ns;    /* ... and when */
	int64_t forgotten_at_ns; /* when the file's handle last changed */
	int64_t used_since_ns;  /* a worker has used the file's handle since then; NEVER: not the one that it has now */
	bool is_handed_on;      /* and the worker that runs has it from another one */
	bool record_is_gone;
	int64_t signed_at_ns;   /* when the last sign of life was written, by the server's clock */
	unsigned missing;       /* so often in a row the record was said to be missing */
	uint8_t record[RECORD_BYTES];
	struct rng calls, faults, power;
};

extern struct nas nas;

/* The disk. FILE_SYNC changes both copies, UNSTABLE the first, COMMIT makes the second like the first. */
uint8_t *disk_current(uint64_t offset_bytes);
void disk_write(uint64_t offset_bytes, const uint8_t *data, uint32_t bytes, bool stably);
void disk_commit(void);
uint64_t disk_bytes(void);
/*
 * Is the READ of this page to be answered wrongly? Not twice in a row, and not more than twice until it is written:
 * where READs are answered in pieces, or others read the page as well, each of the engine's three could have a wrong
 * one.
 */
bool disk_read_is_wrong(uint64_t page);

uint32_t nas_handle(enum nas_object object, uint8_t *handle);
void calls_reset(void);
/* The power is cut: what was taken and not carried out may be half done. */
void calls_cut(void);

#endif
