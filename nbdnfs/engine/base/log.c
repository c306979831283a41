/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "base/log.h"

#include <stdarg.h>
#include <stdio.h>
#include <unistd.h>

void log_line(const char *format, ...)
{
	char line[512];
	va_list ap;
	int length = snprintf(line, sizeof(line), "nbdnfs: ");

	va_start(ap, format);
	length += vsnprintf(line + length, sizeof(line) - (size_t)length - 1, format, ap);
	va_end(ap);
	if (length > (int)sizeof(line) - 2)
		length = sizeof(line) - 2;
	line[length++] = '\n';
	(void)!write(STDERR_FILENO, line, (size_t)length);
}
