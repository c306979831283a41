/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * nbd: one NBD client on one socket, served by one thread.
 *
 * The thread polls the client's socket and the NAS's. It takes in what requests there are with one receive, begins all
 * of them in steps (block/engine.h), takes in the NAS's answers, and sends the replies that are ready with one send. No
 * request has a thread of its own. What waits for long, and seldom comes (FLUSH, FUA, a large TRIM, a page that is not
 * what was expected), is done by the *waiters*, three threads beside it.
 *
 * A client that does not receive is never waited for: its replies stay where they are, and once all places for requests
 * are taken, nothing more is received from it.
 */
#ifndef NBDNFS_NBD_LOOP_H
#define NBDNFS_NBD_LOOP_H

#include "block/engine.h"

struct nbd_loop;

/*
 * How often what waits is looked at although nothing has called for it. Nothing needs that: a wake-up that is lost, by
 * a fault in this code, costs so long and no more. Tests set another one, so that they find such a fault.
 */
#define NBD_LOOP_TICK_MS 2000

/*
 * Allocate all that serving needs, and start the waiters. `fd` is a connected stream socket, which stays the caller's.
 * Returns 0 and *loop, or -errno.
 */
int nbd_loop_create(struct engine *engine, int fd, uint32_t tick_ms, struct nbd_loop **loop);
/*
 * Shake hands, and serve until the client disconnects or breaks the protocol, and what it had under way has ended. The
 * calling thread is the engine's attendant meanwhile. Returns 0; -EPROTO: the client broke the protocol.
 */
int nbd_loop_run(struct nbd_loop *loop);
void nbd_loop_destroy(struct nbd_loop *loop);

#endif
