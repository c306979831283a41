/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What struct engine must say when no request is under way: nobody waits, nothing is lent. */
#include "block/internal.h"

#include "sim.h"

void check_idle_block(struct engine *engine)
{
	if (engine->waiting != 0 || engine->waiting_for_stable != 0 || engine->waiting_for_slot != 0)
		sim_fail("no request is under way, and the engine counts %u that wait, %u for the NAS, %u for a slot",
			 engine->waiting, engine->waiting_for_stable, engine->waiting_for_slot);
	for (unsigned i = 0; i < engine->io_count; i++) {
		if (engine->lent[i])
			sim_fail("no request is under way, and connection %u is lent", i);
		check_idle_nfs(engine->ios[i], i);
	}
}
