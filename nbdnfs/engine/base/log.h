/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef NBDNFS_LOG_H
#define NBDNFS_LOG_H

/* One line on stderr, without stdio's buffers and allocations: it may be written while memory is short. */
__attribute__((format(printf, 1, 2))) void log_line(const char *format, ...);

#endif
