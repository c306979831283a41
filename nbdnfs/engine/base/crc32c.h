/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef NBDNFS_CRC32C_H
#define NBDNFS_CRC32C_H

#include <stddef.h>
#include <stdint.h>

/* CRC-32C (Castagnoli, RFC 3720 B.4) of `length` bytes. By the CPU's instruction where there is one. */
uint32_t crc32c(const void *data, size_t length);

/* The same by table, on every machine: the reference for tests. */
uint32_t crc32c_by_table(const void *data, size_t length);

#endif
