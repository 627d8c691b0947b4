"""Prefill and decode: embeddings of a batch of prompts in, tokens out."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from numbers import Integral
from typing import Literal

import numpy as np

from flashvlm.embeddings import EmbeddingTable
from flashvlm.errors import PromptError
from flashvlm.sampling import Sampler
from flashvlm.sessions import Array, Limits, Session

CACHE_STEP = 64  # capacities come in few sizes, so that buffers and compiled shapes are reused

StopReason = Literal["stop token", "length"]


@dataclass(frozen=True)
class Row:
    """One prompt as the decoder reads it: segments of embeddings, T in all, and position_ids int64 [T]."""

    segments: tuple[Array, ...]
    position_ids: np.ndarray


def row_with_image(text: np.ndarray, at: int, visual: Array, places: tuple[np.ndarray, int] | None) -> Row:
    """The prompt with an image in place of its placeholder.

    Args:
        text: embeddings [T,D] of the prompt's tokens.
        at: which of them is the placeholder.
        visual: the image's tokens [K,D].
        places: indices int64 [K] of the tokens among those of the whole image, and how many it has, for position ids
            as if all were there; None numbers the tokens as they stand.
    """
    positions = np.arange(len(text) - 1 + len(visual))
    if places is not None:
        kept, every = places
        positions = np.concatenate([np.arange(at), at + kept, at + every + np.arange(len(text) - at - 1)])
    return Row((text[:at], visual, text[at + 1 :]), positions)


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


def check_capacity(rows: list[Row], max_new_tokens: int, limits: Limits) -> int:
    """How many tokens may be generated before the longest row fills the cache.

    Raises:
        PromptError: a prompt does not fit with at least one new token.
    """
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, Integral) or max_new_tokens < 1:
        raise PromptError(f"max_new_tokens: expected an integer >= 1, found {max_new_tokens!r}")
    longest = max(len(row.position_ids) for row in rows)
    if longest > limits.max_seq:
        raise PromptError(
            f"the prompt is {longest} tokens long with its image; {limits.holder} {limits.max_seq}: "
            f"shorten it, use a smaller budget, or {limits.larger(max_seq=longest)}"
        )
    # The last new token is never fed back, so it needs no slot.
    return min(max_new_tokens, limits.max_seq - longest + 1)


def generate_tokens(
    session: Session,
    embedding: EmbeddingTable,
    rows: list[Row],
    sampler: Sampler,
    stop: frozenset[int],
    limit: int,
    timings: Timings,
) -> Iterator[list[int | None]]:
    """Yields, a step at a time, the new token of every row; None for a row that has ended.

    A stop token ends its row and is not yielded. ``limit`` comes from ``check_capacity``.
    """
    lengths = np.array([len(row.position_ids) for row in rows], dtype=np.int64)  # [B]
    longest = int(lengths.max())
    capacity = -(-(longest + limit - 1) // CACHE_STEP) * CACHE_STEP
    cache = session.new_cache(len(rows), capacity)
    positions = np.zeros((len(rows), longest), dtype=np.int64)  # [B,T], right-padded
    for b, row in enumerate(rows):
        positions[b, : lengths[b]] = row.position_ids
    next_position = np.array([row.position_ids[-1] + 1 for row in rows], dtype=np.int64)
    slot = np.zeros(len(rows), dtype=np.int64)

    started = time.perf_counter()
    logits = session.decode(session.assemble([row.segments for row in rows]), positions, slot, lengths, cache)
    timings.prefill = _milliseconds(started)
    slot = lengths.copy()
    ended = np.zeros(len(rows), dtype=bool)
    for step in range(limit):
        tokens = sampler(logits)
        ended |= np.isin(tokens, list(stop))
        if ended.all():
            return
        yield [None if done else int(token) for token, done in zip(tokens, ended, strict=True)]
        if step == limit - 1:
            return
        started = time.perf_counter()
        one = np.ones(len(rows), dtype=np.int64)
        logits = session.decode(embedding[tokens][:, None], next_position[:, None], slot, one, cache)
        timings.decode.append(_milliseconds(started))
        next_position += 1
        slot += 1


def _milliseconds(started: float) -> float:
    return (time.perf_counter() - started) * 1e3
