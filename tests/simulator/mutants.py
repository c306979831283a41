# SPDX-License-Identifier: LGPL-2.1-or-later
"""Faults put into the engine on purpose, by the promise that they break. Each must be found by the simulator."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Mutant:
    """One fault: replacements in the engine's files, each of a text that is there exactly once."""

    name: str
    promise: str
    edits: tuple[tuple[str, str, str], ...]

    def apply(self, engine: Path) -> dict[str, str]:
        """The texts of the changed files, by their path in the engine's folder. AssertionError: the code has moved on."""
        changed: dict[str, str] = {}
        for path, old, new in self.edits:
            text = changed.get(path, (engine / path).read_text())
            assert text.count(old) == 1, f"{self.name}: {path} has this {text.count(old)} times: {old!r}"
            changed[path] = text.replace(old, new)
        return changed


def one(name: str, promise: str, path: str, old: str, new: str) -> Mutant:
    return Mutant(name, promise, ((path, old, new),))


CACHE, SLOTS, RUNS = "region/cache.c", "region/slots.c", "region/runs.c"
FLUSHER, REQUESTS, ENGINE, READ_AHEAD = "block/flusher.c", "block/requests.c", "block/engine.c", "block/read_ahead.c"
ANSWERS, IO_THREAD, EXCHANGE, QUEUE = "nfs/answers.c", "nfs/io_thread.c", "nfs/exchange.c", "nfs/queue.c"
SILENCE, WATCH, WIRE, NFS_REQUESTS = "nfs/silence.c", "nfs/owner_watch.c", "nfs/transport_wire.c", "nfs/requests.c"

# Faults that the engine had once.
KNOWN = (
    Mutant(
        "lost wake-up",
        "FLUSH",
        (
            (SLOTS, "\twrite->sequence = 0;\n\tcache->changed = true;\n", "\twrite->sequence = 0;\n"),
            (SLOTS, "\tnote_known(cache, cache->slots[index].page);\n\tcache->changed = true;\n", "\tnote_known(cache, cache->slots[index].page);\n"),
            (
                REQUESTS,
                "return !fua && (engine->waiting_for_stable == 0 || cache_page_is_stable(engine->cache, page, UINT64_MAX));",
                "return !fua;",
            ),
        ),
    ),
    Mutant(
        "mixed verifier",
        "verifier",
        (
            (ANSWERS, "!is_first && !req->stable && verifier != req->verifier", "!is_first && !req->stable && !stable && verifier != req->verifier"),
            (ANSWERS, "req->stable = stable && (is_first || req->stable);", "req->stable = stable;"),
        ),
    ),
    Mutant(
        "underflow of batches",
        "waiting",
        (
            (NFS_REQUESTS, "\tassert(count > 0);\n", ""),
            (NFS_REQUESTS, "\tio->batches++;\n", "\tif (count > 0)\n\t\tio->batches++;\n"),
            (NFS_REQUESTS, "\tassert(io->batches > 0);\n", ""),
            (REQUESTS, "\tif (used > 0)\n\t\tnfsio_batch_start(", "\tnfsio_batch_start("),
            (REQUESTS, "\tif (used > 0)\n\t\tnfsio_batch_wait(", "\tnfsio_batch_wait("),
        ),
    ),
    one(
        "a page filled under a READ",
        "checksum",
        REQUESTS,
        "\t\tif (proof == NO_PROOF) /* filled since, perhaps: then the server's bytes cannot be checked, nor decrypted */\n"
        "\t\t\tnewer = cache_read(engine->cache, page, data);\n",
        "",
    ),
    one(
        "JUKEBOX for the directory at the start",
        "adoption",
        "nfs/connect.c",
        "return error == -EAGAIN && io->options.looks ? -EAGAIN : 0;",
        "return 0;",
    ),
)

SEEDED = (
    # verifier and COMMIT
    one("COMMIT's verifier is not compared", "verifier", RUNS, "if (slot->verifier == verifier)", "if (true)"),
    one("an UNSTABLE write counts as stable", "verifier", FLUSHER, "else if (req->stable)", "else if (true)"),
    one("pieces of a write may have two verifiers", "verifier", ANSWERS, "!is_first && !req->stable && verifier != req->verifier", "false"),
    one("a stable piece makes all of a write stable", "verifier", ANSWERS, "req->stable = stable && (is_first || req->stable);", "req->stable = stable;"),
    one("an answer of DATA_SYNC counts as FILE_SYNC", "verifier", "nfs/wire_parse.c", "xdr_get32(reader) == FILE_SYNC", "xdr_get32(reader) != UNSTABLE"),
    one("a COMMIT covers what was written after it was sent", "COMMIT", RUNS, "\t\tif (!slot->in_commit)\n\t\t\tcontinue;\n", ""),
    one("a page written again stays in the COMMIT", "COMMIT", SLOTS, "\tslot->in_commit = false;\n\tslot->read_ahead = false;\n\tif (slot->writing)", "\tslot->read_ahead = false;\n\tif (slot->writing)"),
    one("a COMMIT that fails counts as done", "COMMIT", RUNS, "\t\tcache->slots[index].in_commit = false;\n}", "\t\tslot_committed(cache, index);\n}"),
    one("no COMMIT is sent", "COMMIT", FLUSHER, "if (uncommitted == 0 ||", "if (true ||"),
    one("COMMIT's refusal has no pause", "COMMIT", FLUSHER, "engine->commit_refused_until_ms = engine->refused_until_ms;", "engine->commit_refused_until_ms = 0;"),
    one("lost pages are taken for clean", "COMMIT", RUNS, "slot_lost(cache, index);\n\t\t\trewrite++;", "slot_committed(cache, index);"),
    one("a short write counts as whole", "retransmission", ANSWERS, "} else if (req->moved_bytes == req->length_bytes || end_of_file) {", "} else if (true) {"),
    one("the rest of a short write has the wrong place", "retransmission", WIRE, ".offset_bytes = req->offset_bytes + req->moved_bytes,", ".offset_bytes = req->offset_bytes,"),
    one("the rest of a short write has the first bytes", "retransmission", WIRE, ".data = req->data + req->moved_bytes,", ".data = req->data,"),
    one("FILE_SYNC that was answered UNSTABLE counts", "verifier", ANSWERS, "} else if (req->op == NFSIO_WRITE && !stable) {", "} else if (false) {"),
    # hold-back
    one("twins are not held back", "hold-back", FLUSHER, "\tif (req->resent) {\n\t\tuint64_t until_ms = now_ms() + TWIN_MS;", "\tif (false) {\n\t\tuint64_t until_ms = now_ms() + TWIN_MS;"),
    one("a replay is not held back", "hold-back", FLUSHER, "\tif (cache_dirty_count(engine->cache) > 0) {\n\t\tengine->held_until_ms = until_ms;", "\tif (false) {\n\t\tengine->held_until_ms = until_ms;"),
    one("a resent write is not marked", "hold-back", IO_THREAD, "req->resent = req->op == NFSIO_WRITE || req->op == NFSIO_WRITE_UNSTABLE;", "req->resent = false;"),
    one("twins of the last worker are forgotten", "hold-back", FLUSHER, "if (twins_ms > until_ms && twins_ms <= now + TWIN_MS)", "if (false)"),
    one("holds end at once", "hold-back", RUNS, "if (cache->holds[i].until <= now) {", "if (true) {"),
    one("held pages travel with their neighbours", "hold-back", RUNS, "cache->slots[index].list == ON_DIRTY;", "(cache->slots[index].list == ON_DIRTY || cache->slots[index].list == ON_HELD);"),
    one("holds never end", "hold-back", RUNS, "if (cache->all_held_until <= now)\n\t\tcache->all_held_until = 0;", ""),
    # checksum
    one("the proof is not compared", "checksum", "region/proof.c", "return proof_of(region, data) == proof;", "return true;"),
    one("a page that does not match is an error at once", "checksum", REQUESTS, "#define CHECKSUM_TRIES 3", "#define CHECKSUM_TRIES 0"),
    one("read-ahead is not checked", "checksum", READ_AHEAD, "are_right[i] = proof_open(", "are_right[i] = proof_open(&engine->region, 0, NO_PROOF, fetch->data) || proof_open("),
    one("the page table is not written", "checksum", CACHE, "\tset_filled(cache, page, false);\n\tset_entry(cache, page, proof);\n\treturn true;", "\tset_filled(cache, page, false);\n\treturn true;"),
    one("the cache is not asked after a mismatch", "checksum", REQUESTS, "\t\tif (newer == CACHE_HIT)\n\t\t\treturn 0;\n\t\tif (tries", "\t\tif (tries"),
    # permission
    one("writes ask nobody", "permission", EXCHANGE, "\treturn io->options.may_write(io->options.may_write_context);", "\treturn 0;"),
    one("a permission never runs out", "permission", WATCH, "if (boottime_ms() < atomic_load(&watch->permitted_until_ms))", "if (atomic_load(&watch->permitted_until_ms) > 0)"),
    one("a stolen file is not noticed", "permission", WATCH, "\tif (error == 0 && !watch->is_ours) {\n\t\tnote_stolen(watch);\n\t\treturn 0;\n\t}\n", ""),
    one("another's record is taken for ours", "permission", WATCH, "\twatch->is_ours = true;\n\tsnprintf", "\tsnprintf"),
    one("a look that took too long permits", "permission", WATCH, "\tif (boottime_ms() >= until_ms)\n\t\treturn -ETIMEDOUT;\n", "\tuntil_ms = boottime_ms() + 2 * (int64_t)watch->options.refresh_ms;\n"),
    one("the permission goes by a clock that sleeps", "permission", WATCH, "clock_gettime(CLOCK_BOOTTIME, &ts);", "clock_gettime(CLOCK_MONOTONIC, &ts);"),
    one("requests go on with a stolen file", "permission", ENGINE, "\tatomic_store(&engine->stolen, true);\n", ""),
    # order of two writes
    one("two writes of one page are under way", "order of two writes", SLOTS, "\tif (slot->writing) {\n\t\tif (rewritten_of(slot) == 0)\n\t\t\tunstable_add(cache, index, !slot->oldest);\n\t\treturn;\n\t}\n", "\tif (slot->writing) {\n\t\tif (rewritten_of(slot) == 0)\n\t\t\tunstable_add(cache, index, !slot->oldest);\n\t\tif (slot->list == ON_NONE)\n\t\t\tqueue(cache, index);\n\t\treturn;\n\t}\n"),
    one("a page written meanwhile counts as clean", "order of two writes", SLOTS, "\tif (rewritten_of(slot) != 0) {\n\t\t/*", "\tif (false) {\n\t\t/*"),
    one("a slot is published before its bytes", "order of two writes", CACHE, "\tmemcpy(data_of(cache, index), data, SLOT_BYTES);\n\tslot_became_dirty(cache, index);\n", "\tslot_became_dirty(cache, index);\n\tmemcpy(data_of(cache, index), data, SLOT_BYTES);\n"),
    one("a dirty slot is not published", "order of two writes", SLOTS, "\tpublish(cache, index, SLOT_DIRTY);\n", ""),
    one("the copy of a run is that of another slot", "order of two writes", RUNS, "memcpy(data + (size_t)i * SLOT_BYTES, data_of(cache, index), SLOT_BYTES);", "memcpy(data + (size_t)i * SLOT_BYTES, data_of(cache, run->slots[0]), SLOT_BYTES);"),
    one("a fetch overwrites a newer write", "order of two writes", SLOTS, "\tif (slot->fetching)\n\t\tcache->changed = true;\n\tslot->fetching = false;\n}", "}"),
    one("a fetched page may be another fetch's", "order of two writes", "region/fetches.c", " || cache->slots[index].fetch != fetch)", ")"),
    # FLUSH
    one("FLUSH waits for nothing", "FLUSH", REQUESTS, "while (in_time && !cache_is_stable(engine->cache, sequence))", "while (false)"),
    one("FLUSH leaves the filled pages", "FLUSH", REQUESTS, "in_time = materialise(engine, since_ms);", "in_time = true;"),
    one("FLUSH waits for all but the last write", "FLUSH", CACHE, "slot_write(cache, oldest)->sequence > sequence;", "slot_write(cache, oldest)->sequence >= sequence;"),
    one("FUA waits for nothing", "FLUSH", REQUESTS, "if (fua && error == 0)", "if (false)"),
    one("FUA may be filled", "FLUSH", REQUESTS, "return !fua && (", "return ("),
    one("an overtaken page counts as stable", "FLUSH", SLOTS, "bool is_older_unstable = since_of(slot) != 0 && end != WRITE_STABLE;", "bool is_older_unstable = false;"),
    one("an overtaken page is written UNSTABLE for ever", "FLUSH", FLUSHER, "(pages->is_overtaken && engine->waiting_for_stable > 0 && !engine->lacks_file_sync);", "false;"),
    Mutant(
        "a clean page wakes nobody",
        "FLUSH",
        (
            (SLOTS, "\twrite->sequence = 0;\n\tcache->changed = true;\n", "\twrite->sequence = 0;\n"),
            (SLOTS, "\tlist_move(cache, ON_CLEAN, index);\n\tnote_known(cache, slot->page);\n\tcache->changed = true;\n", "\tlist_move(cache, ON_CLEAN, index);\n\tnote_known(cache, slot->page);\n"),
        ),
    ),
    one("waiting for a slot wakes no flusher", "FLUSH", REQUESTS, "\tflusher_call(engine);\n\tif (limit_ms == 0) {", "\tif (limit_ms == 0) {"),
    one("FLUSH ends after a few pages", "FLUSH", CACHE, "\t\tif (done++ == most)\n\t\t\treturn CACHE_MORE;", "\t\tif (done++ == most)\n\t\t\treturn CACHE_MATERIALISED;"),
    # retransmission
    one("what was under way is forgotten with the connection", "retransmission", IO_THREAD, "\treq_list_prepend(&io->pending, &io->inflight);\n", "\tio->inflight.head = io->inflight.tail = NULL;\n"),
    one("a silent connection is not tested", "retransmission", SILENCE, "now - io->silent_since_ms >= io->silence_ms;", "false;"),
    one("an answer that does not come is waited for", "retransmission", SILENCE, "return now >= give_up_at_ms;", "return false;"),
    one("JUKEBOX is an error", "retransmission", ANSWERS, "\tif (status == NFS3ERR_JUKEBOX ||", "\tif (status == NFS3ERR_JUKEBOX)\n\t\treq_finish(&io->inflight, req, -EIO);\n\telse if ("),
    one("what is put off is forgotten", "retransmission", EXCHANGE, "\tif (io->later.head != NULL && now_ms() >= io->later_at_ms)\n\t\treq_list_prepend(&io->pending, &io->later);\n", ""),
    one("a stale handle is an error of the request", "retransmission", ANSWERS, "\tif (status == NFS3ERR_STALE || status == NFS3ERR_BADHANDLE)\n\t\tio->broken = true; /* a new context looks the file up again */\n\telse\n", ""),
    one("a refused write-back is taken for done", "retransmission", FLUSHER, "\tif (error != 0)\n\t\tcache_page_run_failed(engine->cache, &write_back->pages);\n\telse if", "\tif"),
    one("a refused READ is an error at once", "retransmission", ANSWERS, "if (now - req->refused_at_ms < io->options.refused_read_ms)", "if (false)"),
    one("limits of the first connection stay", "retransmission", IO_THREAD, "\tio->write_max_bytes = made->write_max_bytes;\n", "\tio->write_max_bytes = 1u << 20;\n"),
    one("the wire forgets what the socket did not take", "retransmission", "nfs/wire_call.c", "return errno == EAGAIN || errno == EWOULDBLOCK ? 0 : -errno;", "return wire->out_bytes = 0;"),
    one("a fragment's bytes go astray", "retransmission", "nfs/wire_fragments.c", "\twire->data_left_bytes -= bytes;\n}", "\twire->data_left_bytes -= bytes > 1 ? bytes - 1 : bytes;\n}"),
    # adoption
    one("a dirty slot is not taken over", "adoption", CACHE, "if (slot_content(value) != SLOT_DIRTY ||", "if (slot_content(value) != SLOT_FREE ||"),
    one("the filled bit of a taken-over slot stays", "adoption", CACHE, "\t\tset_filled(cache, page, false);\n\t\tset_entry(cache, page, proof_of(region, data_of(cache, index)));", "\t\tset_entry(cache, page, proof_of(region, data_of(cache, index)));"),
    one("the entry of a taken-over slot stays", "adoption", CACHE, "\t\tset_entry(cache, page, proof_of(region, data_of(cache, index)));\n\t\tcache->sequence++;", "\t\tcache->sequence++;"),
    one("a filled page's word comes last", "adoption", CACHE, "\tset_entry(cache, page, word);\n\tset_filled(cache, page, true);\n\tforget(cache, page);", "\tforget(cache, page);\n\tset_filled(cache, page, true);\n\tset_entry(cache, page, word);"),
    Mutant(
        "a slot that is used again is still published",
        "adoption",
        (
            (CACHE, "if (slot_content(value) != SLOT_DIRTY ||", "if (slot_content(value) == SLOT_FREE ||"),
            (SLOTS, "\tassert(!slot->writing && !slot->fetching && since_of(slot) == 0 && rewritten_of(slot) == 0);\n\tpublish(cache, index, SLOT_FREE);\n", ""),
        ),
    ),
    one("a slot that was trimmed is still published", "adoption", SLOTS, "\tif (slot->writing)\n\t\tpublish(cache, index, SLOT_FREE);\n\telse\n\t\trelease", "\tif (!slot->writing)\n\t\trelease"),
)
