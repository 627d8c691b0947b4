"""Logits -> the next token of every row: greedy, or temperature, top-k and top-p with a seed per run."""

import math
from dataclasses import dataclass
from numbers import Integral, Real

import numpy as np

from flashvlm.errors import FlashVLMError, PromptError


@dataclass(frozen=True)
class SamplingParams:
    """How to choose the next token. The defaults are greedy decoding.

    temperature  >= 0; 0 is greedy, and the other fields then have no effect
    top_k        >= 0; only the k most likely tokens (and ties of the k-th) may be drawn; 0 is no limit
    top_p        0..1; only the smallest set of tokens whose probability reaches p; 1 is no limit
    seed         >= 0; None draws differently in every run

    Raises PromptError for a value out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, Real, "a finite number >= 0", math.inf)
        _check("top_k", self.top_k, Integral, "an integer >= 0", math.inf)
        _check("top_p", self.top_p, Real, "a number in 0..1", 1)
        if self.seed is not None:
            _check("seed", self.seed, Integral, "an integer >= 0 or None", math.inf)


class Sampler:
    """Draws one token a row and call. Keep one Sampler for one run, as it holds the random streams.

    Row b of every call draws from stream b, and all streams start from the same seed: a row gets the same
    tokens alone and in a batch. A caller therefore keeps finished rows in their place.

    `vocab_size` hides the ids of a padded vocabulary, those >= vocab_size, from sampling and greedy choice.
    By default nothing is hidden, as in transformers.
    """

    def __init__(self, params: SamplingParams, vocab_size: int | None = None) -> None:
        self.params = params
        self.vocab_size = vocab_size
        self._streams: list[np.random.Generator] = []

    def __call__(self, logits: np.ndarray) -> np.ndarray:
        """logits float32 [B,V] -> token ids int64 [B]. Of equal logits, greedy takes the lowest id.

        Raises FlashVLMError for NaN or +inf logits, and for a row with no finite one.
        """
        logits = logits[:, : self.vocab_size]
        best = logits.argmax(axis=1)  # NaN wins an argmax, so the best value tells of every kind of bad row
        bad = ~np.isfinite(np.take_along_axis(logits, best[:, None], axis=1)[:, 0])
        if bad.any():
            row = int(bad.argmax())
            found = logits[row, best[row]]
            raise FlashVLMError(
                f"logits of row {row}: expected finite values, found {found}; an overflow in half precision? "
                "Export with a wider dtype"
            )
        if self.params.temperature == 0:
            return best.astype(np.int64)
        while len(self._streams) < len(logits):
            self._streams.append(np.random.default_rng(self.params.seed))
        rows = zip(self._streams, logits, strict=False)
        return np.array([_draw(stream, probabilities(row, self.params)) for stream, row in rows], dtype=np.int64)


def probabilities(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """logits [V] -> float64 [V], zero outside the kept set: temperature, then top-k, then top-p."""
    scores = logits.astype(np.float64)
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
    return p


def _draw(stream: np.random.Generator, p: np.ndarray) -> int:
    """Inverse transform: one uniform number a token, so that streams stay in step whatever the vocabulary."""
    cumulative = np.cumsum(p)
    # random() < 1 and side="right" never land on a token of probability zero.
    return int(np.searchsorted(cumulative, stream.random() * cumulative[-1], side="right"))


def _check(name: str, value: object, kind: type, expected: str, high: float) -> None:
    good = isinstance(value, kind) and not isinstance(value, bool)
    # A NaN fails both comparisons.
    if not (good and 0 <= value <= high and value < math.inf):  # type: ignore[operator]
        raise PromptError(f"{name}: expected {expected}, found {value!r}")
