/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The path in an NFS URL. libnfs never gets to see it: 4.0 takes %20 for three characters and later versions for a
 * space, and those that decode do so before they look for the "?", so that %3F ends the path.
 */
#include "nfs/connecting.h"

#include <ctype.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

static int hex_value(unsigned char digit)
{
	return isdigit(digit) ? digit - '0' : tolower(digit) - 'a' + 10;
}

/* Replace %XX in `text` by the byte (RFC 3986, 2.1); a percent sign before anything else stays. */
static void decode(char *text)
{
	const unsigned char *from = (const unsigned char *)text;
	char *to = text;

	while (*from != '\0') {
		if (from[0] == '%' && isxdigit(from[1]) && isxdigit(from[2])) {
			*to++ = (char)(hex_value(from[1]) << 4 | hex_value(from[2]));
			from += 3;
		} else {
			*to++ = (char)*from++;
		}
	}
	*to = '\0';
}

int url_take_path(const char *url, char **directory, char **file)
{
	const char *path = strncmp(url, "nfs://", 6) == 0 ? strchr(url + 6, '/') : NULL;
	size_t bytes = path != NULL ? strcspn(path, "?") : 0;
	char *slash;

	*directory = *file = NULL;
	if (bytes < 2 || path[bytes - 1] == '/' || bytes > URL_PATH_BYTES_MAX)
		return -EINVAL;
	*directory = strndup(path, bytes);
	if (*directory == NULL)
		return -ENOMEM;
	slash = strrchr(*directory, '/');
	*file = strdup(slash + 1);
	slash[slash == *directory] = '\0';
	if (*file == NULL)
		return -ENOMEM;
	decode(*directory);
	decode(*file);
	return 0;
}
