/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef NBDNFS_LOG_H
#define NBDNFS_LOG_H

/* Write one line to stderr, without stdio's buffers and allocations: memory may be short. Cut off at 511 bytes. */
__attribute__((format(printf, 1, 2))) void log_line(const char *format, ...);

#endif
