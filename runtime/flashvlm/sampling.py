"""Logits -> the next token of every row: greedy, or drawn within temperature, top-k, top-p and min-p."""

from __future__ import annotations

import contextlib
import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import SupportsIndex, TypedDict

import numpy as np

from flashvlm.errors import FlashVLMError, PromptError, brief
from flashvlm.stopping import parse_stop

MAX_LOGPROBS = 20  # alternatives a token, as OpenAI's
_PENALTIES = (0.01, 100.0)  # wide of every use, and no half-precision logit overflows by them

Number = float | np.floating | np.integer


class SamplingOptions(TypedDict, total=False):
    """The options by name, for ``**options``. Their meaning, range and default: ``SamplingParams``."""

    max_new_tokens: SupportsIndex
    temperature: Number
    top_p: Number
    top_k: SupportsIndex
    min_p: Number
    repetition_penalty: Number
    stop: str | Sequence[str] | None
    seed: SupportsIndex | None
    logprobs: SupportsIndex | None


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How an answer is generated. The defaults are greedy decoding.

    max_new_tokens      >= 1
    temperature         >= 0; 0 is greedy, and top_p, top_k, min_p and seed then have no effect
    top_p               0..1; only the smallest set of tokens whose probability reaches p; 1 is no limit
    top_k               >= 0; only the k most likely tokens (and ties of the k-th) may be drawn; 0 is no limit
    min_p               0..1; only tokens at least min_p times as probable as the likeliest; 0 is no limit
    repetition_penalty  0.01..100; above 1, tokens of the prompt and the answer become less likely; 1 is none
    stop                strings that end the answer and are not part of it; one string or up to 16 of them
    seed                >= 0; None draws differently in every run
    logprobs            0..20: how many alternatives to report with each token's log probability (0: its own alone);
                        None reports nothing

    The order of operations is transformers': penalty, temperature, top_k, top_p, min_p, each within what the one before
    left. numpy's numbers are taken, and stored as Python's.

    Raises:
        PromptError: a value is out of range or of another type.

    Example:
        >>> SamplingParams(temperature=0.7, top_p=0.9, seed=0, stop="USER:").stop
        ('USER:',)
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        low, high = _PENALTIES
        checked = {
            "max_new_tokens": _integer("max_new_tokens", self.max_new_tokens, 1),
            "temperature": _number("temperature", self.temperature, 0, math.inf),
            "top_p": _number("top_p", self.top_p, 0, 1),
            "top_k": _integer("top_k", self.top_k, 0),
            "min_p": _number("min_p", self.min_p, 0, 1),
            "repetition_penalty": _number("repetition_penalty", self.repetition_penalty, low, high),
            "stop": parse_stop(self.stop),
            "seed": None if self.seed is None else _integer("seed", self.seed, 0),
            "logprobs": None if self.logprobs is None else _integer("logprobs", self.logprobs, 0, MAX_LOGPROBS),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @classmethod
    def from_options(cls, options: Mapping[str, object]) -> SamplingParams:
        """Params from options by name, whoever they are from.

        Raises:
            PromptError: an option is unknown, or as for a field.

        Example:
            >>> SamplingParams.from_options({"temperature": 0.7}).temperature
            0.7
        """
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, n=1)
                remedy = f"did you mean {near[0]}?" if near else "leave it out"
                raise PromptError(f"expected the options {', '.join(known)}, found {brief(name)}; {remedy}")
        return cls(**options)  # type: ignore[arg-type]  # each field checks its own


@dataclass(frozen=True)
class TokenLogprob:
    """A token's natural log probability, and the likeliest tokens in its place: (id, log probability), best first.

    The chosen token is among them if it is that likely. Tokens of probability zero are left out.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class RowSampler:
    """One answer's params, random stream and, for the repetition penalty, the token ids that it must not repeat.

    Keep one for each answer from its first token to its last; ``draw`` takes any of them together. Each has a stream of
    its own from the seed: an answer gets the same tokens alone and in a batch.

    Example:
        >>> draw(np.array([[0.0, 2.0, 1.0]], np.float32), [RowSampler(SamplingParams())])
        array([1])
    """

    def __init__(self, params: SamplingParams, prompt_ids: Iterable[int] | np.ndarray = ()) -> None:
        """``prompt_ids``: of the whole prompt, for the repetition penalty; ids outside the vocabulary have no effect.

        transformers' ids of a prompt have the image placeholders in them. As the penalty is once for each id, however
        often it occurs, that touches nothing but the placeholder's own logit: give the ids with it for the same
        numbers, or without.
        """
        self.params = params
        self._penalised = params.repetition_penalty != 1
        self._seen = {int(i) for i in prompt_ids} if self._penalised else set()
        self._stream = np.random.default_rng(params.seed) if params.temperature > 0 else None


def draw(logits: np.ndarray, rows: Sequence[RowSampler]) -> np.ndarray:
    """logits float32 [B,V] -> token ids int64 [B], one from each row. Of equal logits, greedy takes the lowest id.

    Raises:
        FlashVLMError: a row has NaN or +inf, or nothing finite. No stream has moved then, so that the caller may drop
            the row and go on.
    """
    penalised = [(b, row) for b, row in enumerate(rows) if row._penalised]
    scores = logits.copy() if penalised else logits
    for b, row in penalised:
        _penalise(scores[b], row._seen, row.params.repetition_penalty)
    best = scores.argmax(axis=1)  # NaN wins an argmax, so the best value tells of every kind of bad row
    bad = ~np.isfinite(np.take_along_axis(scores, best[:, None], axis=1)[:, 0])
    if bad.any():
        b = int(bad.argmax())
        raise FlashVLMError(
            f"logits of row {b}: expected finite values, found {scores[b, best[b]]}; an overflow in half precision? "
            "Export with a wider dtype"
        )
    ids = best.astype(np.int64)
    for b, (row, row_scores) in enumerate(zip(rows, scores, strict=True)):
        if row._stream is not None:
            ids[b] = _draw(row._stream, probabilities(row_scores, row.params))
    for b, row in penalised:
        row._seen.add(int(ids[b]))
    return ids


def probabilities(scores: np.ndarray, params: SamplingParams) -> np.ndarray:
    """scores [V], logits after the penalty -> float64 [V], zero outside what may be drawn; temperature > 0."""
    scores = scores.astype(np.float64)
    with np.errstate(over="ignore"):  # a tiny temperature sends all but the best to -inf, as it should
        scores = (scores - scores.max()) / params.temperature
    if 0 < params.top_k < scores.size:
        kth = np.partition(scores, -params.top_k)[-params.top_k]
        scores[scores < kth] = -np.inf
    p = np.exp(scores)
    p /= p.sum()
    if params.top_p < 1:
        kept = np.flatnonzero(p)
        order = kept[np.argsort(p[kept], kind="stable")]  # ascending
        # A token stays if it and all less likely ones hold more than 1 - top_p. The best always stays.
        dropped = order[:-1][np.cumsum(p[order])[:-1] <= 1 - params.top_p]
        p[dropped] = 0
        p /= p.sum()
    if params.min_p > 0:
        p[p < params.min_p * p.max()] = 0
        p /= p.sum()
    return p


def token_logprob(logits: np.ndarray, token_id: int, alternatives: int = 0) -> TokenLogprob:
    """The log probability of a token that was chosen from ``logits`` [V], and of the likeliest ones.

    Of the model's own logits, as OpenAI and vLLM report them: before repetition penalty, temperature and all limits.
    Of equal logits, the lower id comes first.

    Example:
        >>> token_logprob(np.log([0.5, 0.25, 0.25]), 1, alternatives=1)
        TokenLogprob(token_id=1, logprob=-1.3862943611198906, top=((0, -0.6931471805599453),))
    """
    best = logits.max()
    shifted = logits.astype(np.float64) - best
    logprobs = shifted - math.log(np.exp(shifted).sum())
    alternatives = min(alternatives, logits.size)
    top: np.ndarray = np.empty(0, np.int64)
    if alternatives:
        least = np.partition(logprobs, -alternatives)[-alternatives]
        reach = np.flatnonzero(logprobs >= least)  # more than asked for, where the last are equal
        top = reach[np.argsort(-logprobs[reach], kind="stable")][:alternatives]
    likeliest = tuple((int(i), float(logprobs[i])) for i in top if logprobs[i] > -math.inf)
    return TokenLogprob(int(token_id), float(logprobs[token_id]), likeliest)


def _penalise(scores: np.ndarray, seen: set[int], penalty: float) -> None:
    """In place, as transformers' RepetitionPenaltyLogitsProcessor (arXiv 1909.05858, section 4.1), scores [V]."""
    ids = np.fromiter((i for i in seen if 0 <= i < scores.size), np.int64)
    with np.errstate(over="ignore"):  # to infinity, which is refused
        scores[ids] = np.where(scores[ids] < 0, scores[ids] * penalty, scores[ids] / penalty)


def _draw(stream: np.random.Generator, p: np.ndarray) -> int:
    """Inverse transform: one uniform number a token, so that streams stay in step whatever the vocabulary."""
    cumulative = np.cumsum(p)
    # random() < 1 and side="right" never land on a token of probability zero.
    return int(np.searchsorted(cumulative, stream.random() * cumulative[-1], side="right"))


def _integer(name: str, value: object, low: int, high: int | None = None) -> int:
    if isinstance(value, Integral) and not isinstance(value, bool):
        number = int(value)
        if low <= number and (high is None or number <= high):
            return number
    span = f"an integer >= {low}" if high is None else f"an integer in {low}..{high}"
    raise PromptError(f"{name}: expected {span}, found {brief(value)}")


def _number(name: str, value: object, low: float, high: float) -> float:
    if isinstance(value, Real) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):  # of integers beyond all floats
            number = float(value)
            if low <= number <= high and number < math.inf:  # a NaN fails the comparisons
                return number
    span = f"a finite number >= {low}" if high == math.inf else f"a number in {low:g}..{high:g}"
    raise PromptError(f"{name}: expected {span}, found {brief(value)}")
