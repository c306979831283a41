/* SPDX-License-Identifier: LGPL-2.1-or-later */
#include "region/last_place.h"

#include "base/assert.h"
#include "base/crc32c.h"

#include <string.h>

static struct last_place *places(const struct region *region)
{
	return (void *)((char *)region->header + LAST_PLACE_OFFSET);
}

static uint32_t crc_of(const struct last_place *place)
{
	return crc32c((const uint8_t *)place + sizeof(place->crc), sizeof(*place) - sizeof(place->crc));
}

static bool is_whole(const struct last_place *place)
{
	return place->number > 0 && place->format == LAST_PLACE_FORMAT && place->crc == crc_of(place);
}

/* The newer of the two, or NULL. */
static struct last_place *newest(const struct region *region)
{
	struct last_place *found = NULL;

	for (struct last_place *place = places(region); place < places(region) + 2; place++)
		if (is_whole(place) && (found == NULL || place->number > found->number))
			found = place;
	return found;
}

void last_place_keep(struct region *region, const void *data, size_t bytes)
{
	struct last_place *now = newest(region);
	struct last_place *other = now == places(region) ? now + 1 : places(region);
	struct last_place next = { .format = LAST_PLACE_FORMAT, .number = now != NULL ? now->number + 1 : 1 };

	assert(bytes <= sizeof(next.data));
	memcpy(next.data, data, bytes);
	if (now != NULL && memcmp(now->data, next.data, sizeof(next.data)) == 0)
		return;
	next.crc = crc_of(&next);
	*other = next;
}

bool last_place_read(const struct region *region, void *data, size_t bytes)
{
	const struct last_place *now = newest(region);

	assert(bytes <= sizeof(now->data));
	memset(data, 0, bytes);
	if (now != NULL)
		memcpy(data, now->data, bytes);
	return now != NULL;
}
