"""A device on paper: does what plans say to pages of token ids, so that schedules can be tried by the thousand.

A page's rows are the tokens themselves, and the next token is a hash of all rows that a table leads to: any wrong page
gives a wrong token. Leases are judged as the real programs judge them (`glmjax.serving.pages.verdict`).
"""

import zlib

import numpy as np

from glmjax.model.sampling import Logprobs
from glmjax.serving.pages import OK, STALE, UNREADY
from glmjax.serving.programs import Log

VOCAB, STOP = 97, 96


def following(ids):
    """The token after a sequence."""
    return zlib.crc32(np.asarray(ids, np.int32).tobytes()) % VOCAB


def expected(ids, new_tokens):
    """What a request gives."""
    ids, begin = list(ids), len(ids)
    while len(ids) < begin + new_tokens and (len(ids) == begin or ids[-1] != STOP):
        ids.append(following(ids))
    return ids[begin:]


class PaperDevice:
    """Pages, versions and slots.

    Args:
        pages: how many.
        page_size: rows of each.
        slots: how many.
    """

    def __init__(self, pages, page_size, slots):
        self.rows = np.full((pages, page_size), -1)
        self.version, self.ready = np.zeros((2, pages), int)
        self.generation, self.position, self.token = np.zeros(slots, int), np.full(slots, -1), np.zeros(slots, int)
        self.epoch = 0

    def dispatch(self, plan):
        """Run a plan; its log, or None for one without sequences."""
        for sequence in plan.admitted:
            self.generation[sequence.slot], self.position[sequence.slot] = sequence.generation, -1
        retired = plan.batch.retire_Z[plan.batch.retire_Z >= 0]
        self.version[retired] += 1
        self.ready[retired] = 0
        self.rows[retired] = -1
        if plan.shape is None:
            return None
        self.epoch += 1
        batch, width = plan.shape.batch, plan.shape.width
        rounds = 1 if plan.rounds is None else int(plan.rounds)
        length = 1 if plan.chunks is not None else rounds * width
        log = Log(
            tokens_BS=np.full((batch, length), -1, np.int32),
            count_ZB=np.zeros((rounds, batch), np.int32),
            position_B=np.full(batch, -1, np.int32),
            stopped_B=np.zeros(batch, bool),
            fault_B=np.zeros(batch, np.int32),
            rounds=np.int32(rounds),
            epoch=np.int32(self.epoch),
            gap_BS=np.zeros((batch, length), np.float32),
            scores_BS=Logprobs(None, None, None, None),
        )
        for b in range(batch):
            slot = plan.batch.slot_B[b]
            if slot >= 0 and self.generation[slot] == plan.batch.generation_B[b]:
                {"read": self._read, "decode": self._decode, "verify": self._verify}[plan.shape.kind](
                    plan, log, b, slot
                )
        return log

    def _read(self, plan, log, b, slot):
        chunks = plan.chunks
        begin, count = int(chunks.begin_B[b]), int(chunks.count_B[b])
        log.fault_B[b] = self._verdict(plan.batch.table, b, begin)
        if log.fault_B[b] == OK:
            self._write(plan.batch.table, b, begin, chunks.ids_BT[b, :count])
            if chunks.final_B[b]:
                drawn = following(self._ids(plan.batch.table, b, begin + count))
                token = drawn if chunks.first_B[b] < 0 else int(chunks.first_B[b])
                log.gap_BS[b, 0] = float(token != drawn)
                log.tokens_BS[b, 0], log.count_ZB[0, b], log.position_B[b] = token, 1, begin + count
                log.stopped_B[b] = token in plan.batch.stop_BU[b]
                self.position[slot], self.token[slot] = -1 if log.stopped_B[b] else begin + count, token

    def _decode(self, plan, log, b, slot):
        table, begin = plan.batch.table, int(self.position[slot])
        if begin < 0:
            return
        log.fault_B[b] = self._verdict(table, b, begin)
        if log.fault_B[b] != OK:
            return
        capacity = int((table.pages_BM[b] >= 0).sum()) * self.rows.shape[1]
        end, position, stopped = min(int(plan.end_B[b]), capacity), begin, False
        for n in range(int(plan.rounds)):
            accepted = zlib.crc32(np.int32([position, b, n]).tobytes()) % plan.shape.width  # by chance
            for _ in range(min(1 + accepted, end - position)):
                if stopped:
                    break
                self._write(table, b, position, [self.token[slot]])
                token = following(self._ids(table, b, position + 1))
                log.tokens_BS[b, position - begin], self.token[slot] = token, token
                log.count_ZB[n, b] += 1
                position += 1
                stopped = token in plan.batch.stop_BU[b]
        log.position_B[b], log.stopped_B[b] = position, stopped
        self.position[slot] = -1 if stopped else position

    def _verify(self, plan, log, b, slot):
        table, begin = plan.batch.table, int(self.position[slot])
        log.fault_B[b] = self._verdict(table, b, begin)
        if log.fault_B[b] != OK:
            return
        guesses = [int(token) for token in plan.guesses.guess_BT[b] if token >= 0]
        capacity = int((table.pages_BM[b] >= 0).sum()) * self.rows.shape[1]
        room = min(int(plan.end_B[b]), capacity) - begin
        for n in range(min(len(guesses) + 1, room)):
            self._write(table, b, begin + n, [self.token[slot]])
            drawn = following(self._ids(table, b, begin + n + 1))
            token = guesses[n] if n < len(guesses) else drawn
            log.tokens_BS[b, n], log.gap_BS[b, n], self.token[slot] = token, float(token != drawn), token
            log.count_ZB[0, b] += 1
            if token in plan.batch.stop_BU[b]:
                log.stopped_B[b] = True
                break
        log.position_B[b] = begin + log.count_ZB[0, b]
        self.position[slot] = -1 if log.stopped_B[b] else log.position_B[b]

    def garble(self, page):
        """Change what a page holds, with its version and all: what no lease can tell."""
        self.rows[page, 0] += 1

    def _verdict(self, table, b, length):
        granted = table.pages_BM[b] >= 0
        pages = table.pages_BM[b][granted]
        wanted = np.clip(length - np.arange(len(pages)) * self.rows.shape[1], 0, self.rows.shape[1])
        if (self.version[pages] != table.versions_BM[b][granted]).any() or (self.ready[pages] > wanted).any():
            return STALE
        return UNREADY if (self.ready[pages] < wanted).any() or length > wanted.sum() else OK

    def _write(self, table, b, begin, ids):
        for position, token in enumerate(ids, begin):
            page, offset = table.pages_BM[b, position // self.rows.shape[1]], position % self.rows.shape[1]
            self.rows[page, offset], self.ready[page] = token, offset + 1

    def _ids(self, table, b, length):
        pages = table.pages_BM[b, : -(-length // self.rows.shape[1])]
        return self.rows[pages].ravel()[:length]
