"""Prefill and decode: rows of a batch in, tokens out."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flashvlm.embeddings import EmbeddingTable
from flashvlm.errors import PromptError
from flashvlm.sampling import RowSampler, draw
from flashvlm.sessions import Limits, Segment, Session

CACHE_STEP = 64  # capacities come in few sizes, so that buffers and compiled shapes are reused


@dataclass(frozen=True, eq=False)
class Row:
    """One prompt as the decoder reads it, T tokens.

    position_ids   int64 [A,T], on A axes
    next_position  of the first new token, on every axis
    keys           int64 [T]: what each token is: its id, or a negative number of its own for a visual token
    """

    segments: tuple[Segment, ...]
    position_ids: np.ndarray
    next_position: int
    keys: np.ndarray

    def __len__(self) -> int:
        return self.position_ids.shape[1]

    def after(self, start: int) -> Row:
        """The row without its first ``start`` tokens."""
        segments, skip = [], start
        for segment in self.segments:
            left = max(0, skip)
            skip -= len(segment)
            if left < len(segment):
                segments.append(Segment(segment.tensors, segment.start + left, segment.stop))
        return Row(tuple(segments), self.position_ids[:, start:], self.next_position, self.keys[start:])


@dataclass
class Timings:
    """Wall milliseconds of each stage; ``vision`` is 0 when the image's features were cached."""

    preprocess: float = 0.0
    vision: float = 0.0
    select: float = 0.0
    prefill: float = 0.0
    decode: list[float] = field(default_factory=list)

    @property
    def total(self) -> float:
        return self.preprocess + self.vision + self.select + self.prefill + sum(self.decode)


@dataclass(eq=False)
class Held:
    """A KV cache kept from one answer to the next, of one row: ``keys`` int64 are the tokens in its slots."""

    cache: Any
    capacity: int
    keys: np.ndarray

    def common(self, row: Row) -> int:
        """How many tokens of the row its first slots hold already; never all of them, as one has to be run."""
        length = min(len(self.keys), len(row) - 1)
        differ = np.flatnonzero(self.keys[:length] != row.keys[:length])
        return int(differ[0]) if len(differ) else length


def check_length(tokens: int, limits: Limits, visuals: int = 1, visual_tokens: int = 0) -> None:
    """Raises PromptError for a prompt of more tokens than the cache has slots; ``visual_tokens`` of ``tokens`` are of
    its ``visuals``."""
    if tokens > limits.max_seq:
        what = f"the {visual_tokens} of {visuals} images or videos" if visuals > 1 else "its image"
        raise PromptError(
            f"the prompt is {tokens} tokens long with {what}; {limits.holder} {limits.max_seq}: "
            f"shorten it, use a smaller budget, or {limits.larger(max_seq=tokens)}"
        )


def check_capacity(rows: list[Row], max_new_tokens: int, limits: Limits) -> int:
    """How many tokens may be generated before the longest row fills the cache.

    Raises:
        PromptError: a prompt does not fit with at least one new token.
    """
    longest = max(map(len, rows))
    check_length(longest, limits)
    # The last new token is never fed back, so it needs no slot.
    return min(max_new_tokens, limits.max_seq - longest + 1)


def capacity_for(tokens: int) -> int:
    """KV slots that are allocated for a row of so many tokens."""
    return -(-tokens // CACHE_STEP) * CACHE_STEP


class Decoding:
    """A batch of rows being answered. Iterating gives, a step at a time, the new token of every row; None for a row
    that has ended.

    A stop token ends its row and is not given. ``limit`` comes from ``check_capacity``.

    ended   bool [B]; whoever iterates may end a row, too
    logits  float32 [B,V] that the last tokens were chosen from
    held    a cache to go on with, of one row; it says afterwards what is in it
    """

    def __init__(
        self,
        session: Session,
        embedding: EmbeddingTable,
        rows: list[Row],
        samplers: list[RowSampler],
        stop: frozenset[int],
        limit: int,
        timings: Timings,
        held: Held | None = None,
    ) -> None:
        self._session, self._embedding, self._rows = session, embedding, rows
        self._samplers, self._stop, self._limit, self._timings = samplers, stop, limit, timings
        self.ended = np.zeros(len(rows), dtype=bool)
        self.logits = np.zeros((0, 0), dtype=np.float32)
        self.held = held

    def __iter__(self) -> Iterator[list[int | None]]:
        session, rows = self._session, self._rows
        filled = 0
        if self.held is not None:
            (row,) = rows
            filled = self.held.common(row)
            cache, rows = self.held.cache, [row.after(filled)]
            self.held.keys = row.keys[:filled]  # until the rest is written
        else:
            cache = session.new_cache(len(rows), capacity_for(max(map(len, rows)) + self._limit - 1))
        lengths = np.array([len(row) for row in rows], dtype=np.int64)  # [B]
        slot = np.full(len(rows), filled, dtype=np.int64)
        started = time.perf_counter()
        chunk = session.assemble([row.segments for row in rows])
        logits = session.decode(chunk, _positions(rows), slot, lengths, cache)
        self._timings.prefill = _milliseconds(started)
        if self.held is not None:
            self.held.keys = self._rows[0].keys
        slot += lengths
        next_position = np.array([row.next_position for row in rows], dtype=np.int64)
        for step in range(self._limit):
            self.logits = logits
            tokens = draw(logits, self._samplers)
            self.ended |= np.isin(tokens, list(self._stop))
            if self.ended.all():
                return
            yield [None if done else int(token) for token, done in zip(tokens, self.ended, strict=True)]
            if step == self._limit - 1 or self.ended.all():
                return
            started = time.perf_counter()
            one = np.ones(len(rows), dtype=np.int64)
            text = {"inputs_embeds": self._embedding[tokens][:, None]}  # [B,1,D]
            logits = session.decode(text, self._at(next_position), slot, one, cache)
            if self.held is not None:
                self.held.keys = np.append(self.held.keys, tokens)
            self._timings.decode.append(_milliseconds(started))
            next_position += 1
            slot += 1

    def _at(self, position: np.ndarray) -> np.ndarray:
        """int64 [B] -> position_ids of one token, [B,1] or [B,A,1]."""
        axes = self._rows[0].position_ids.shape[0]
        return position[:, None] if axes == 1 else np.tile(position[:, None, None], (1, axes, 1))


def _positions(rows: list[Row]) -> np.ndarray:
    """position_ids [B,S], or [B,A,S] of several axes; padded with zeros on the right."""
    axes, longest = rows[0].position_ids.shape[0], max(map(len, rows))
    positions = np.zeros((len(rows), axes, longest), dtype=np.int64)
    for b, row in enumerate(rows):
        positions[b, :, : len(row)] = row.position_ids
    return positions[:, 0] if axes == 1 else positions


def _milliseconds(started: float) -> float:
    return (time.perf_counter() - started) * 1e3
