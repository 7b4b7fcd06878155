"""Batches as the host fills them: views of the packed array that travels, and the decode rows, which are kept between steps.

    Sequence ─RowTable─▶ PackedBatch ─step─▶ StepOutput

A decode row keeps a place as long as its sequence runs.  What does not change meanwhile (slot, sampling parameters, pages
that it has) lies at its place and is written once; a step writes its token and position, and copies the rows together.

Shape letters: G lanes, B rows of the decode batch, J tokens of a lane, C pages per sequence, W words of a packed lane.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import replace

import numpy as np

from serve.engine.output import OutputProcessor
from serve.engine.sequence import Chunk, Sequence
from serve.engine.step import NEWEST, PackedBatch, StepBatch


class IdleBatches:
    """Makes batches of padding, of one number of pages a lane."""

    def __init__(self, pages: int):
        self._pages = pages
        self._of: dict[int, PackedBatch] = {}  # one lane, by its tokens

    def make(self, lanes: int, tokens: int) -> PackedBatch:
        """Returns a new batch for the host to fill."""
        if tokens not in self._of:
            self._of[tokens] = PackedBatch.of(StepBatch.idle(1, tokens, self._pages))
        one = self._of[tokens]
        return replace(one, words_GW=np.repeat(one.words_GW, lanes, axis=0))


class RowTable:
    """The rows of the decode batch, by place."""

    def __init__(self, rows: int, idle: IdleBatches):
        self._idle = idle
        self._packed = idle.make(rows, 1)
        self._padding_W = self._packed.words_GW[0].copy()
        self._fields = self._packed.fields  # views of the same words

    def batch(self, lanes: int, sequences: Rows[Sequence], processors: Rows[OutputProcessor]) -> PackedBatch:
        """Returns the batch of the next token of each of these running sequences, in order, filled up to so many lanes.

        A token that the host has not read is taken on the device (`NEWEST`).
        """
        table, places = self._fields, [s.place for s in sequences]
        for s, processor in zip(sequences, processors, strict=True):
            if s.listed != len(s.pages):
                self._list(s, processor)
        table.token_GJ[places, 0] = [NEWEST if s.pending else s.tokens[s.done] for s in sequences]
        done_B = np.array([s.done for s in sequences], np.int32)
        table.position_GJ[places, 0] = done_B
        table.sampling.position_B[places] = done_B + 1
        words_GW = np.empty((lanes, self._packed.words_GW.shape[1]), np.int32)
        words_GW[: len(places)] = self._packed.words_GW[places]
        words_GW[len(places) :] = self._padding_W
        return replace(self._packed, words_GW=words_GW)

    def _list(self, s: Sequence, processor: OutputProcessor) -> None:
        """Writes what has changed of a row: pages that were added, or all of it where the sequence has just begun to run."""
        table, place = self._fields, s.place
        if s.listed == 0:
            self._packed.words_GW[place] = self._padding_W
            table.slot_G[place] = s.slot
            table.place_G[place] = place
            processor.choose(table, place)
        table.page_GC[place, s.listed : len(s.pages)] = s.pages[s.listed :]
        s.listed = len(s.pages)


def fill_lane(batch: StepBatch, lane: int, chunk: Chunk, processor: OutputProcessor) -> None:
    """Writes a prompt chunk into one lane of an idle batch, and how its token is chosen where it chooses one."""
    sequence, start, count = chunk.sequence, chunk.start, chunk.count
    batch.token_GJ[lane, :count] = sequence.tokens[start : start + count]
    batch.position_GJ[lane, :count] = np.arange(start, start + count)
    batch.slot_G[lane] = sequence.slot
    batch.page_GC[lane, : len(sequence.pages)] = sequence.pages
    batch.last_G[lane] = count - 1
    targets = processor.targets(start, count)
    batch.target_GJ[lane, : len(targets)] = targets
    if chunk.chooses:
        batch.place_G[lane] = sequence.place
        processor.choose(batch, lane)
        batch.sampling.position_B[lane] = start + count
