"""Random inputs of a selection, and what torch, graphs and kernels should make of them, in float64."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch

from flashvlm_export.selection import SelectionInputs, SelectionParams
from flashvlm_export.selection.ops import HIGH, LOW, TIE, TINY

DEFAULTS = SelectionParams()
# Of a cosine to a centroid: what float32 sums may be off by. A decision closer than this is left to rounding.
ROUNDING = 3e-6


def make(
    B: int = 1,
    N: int = 33,
    D: int = 24,
    Dv: int = 16,
    L: int = 5,
    seed: int = 0,
    masks: bool = False,
    dtype: torch.dtype = torch.float32,
) -> SelectionInputs:
    """Tokens in loose clusters, long-tailed saliency, a question that leans on some of the tokens."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(B, N, Dv)) + rng.normal(size=(N, Dv))[rng.integers(0, 1 + N // 5, (B, N))]
    projected = features @ rng.normal(size=(Dv, D)) + rng.normal(size=(B, N, D))
    query = rng.normal(size=(B, L, D)) * 2 + projected[:, rng.integers(0, N, L)] * 0.3
    saliency = rng.lognormal(size=(B, N))
    query_mask, valid = np.ones((B, L), bool), np.ones((B, N), bool)
    if masks:
        query_mask, valid = rng.random((B, L)) > 0.3, rng.random((B, N)) > 0.2
    p, f, s, q = (torch.from_numpy(x).to(dtype) for x in (projected, features, saliency, query))
    return SelectionInputs(p, f, s, q, torch.from_numpy(query_mask), torch.from_numpy(valid))


DEGENERATE = (
    "no query", "all invalid", "one valid", "few valid", "zeros", "no features", "no features, first best",
    "first zero", "half zero", "identical", "almost identical", "pairs", "opposite", "constant saliency", "huge",
    "tiny",
)  # fmt: skip


def degenerate(kind: str, x: SelectionInputs) -> SelectionInputs:
    """The inputs, spoilt in one of the ways that DEGENERATE names. Float32: some overflow float16."""
    row = torch.arange(x.valid.shape[1])
    changed = {
        "no query": {"query_mask": torch.zeros_like(x.query_mask)},
        "all invalid": {"valid": torch.zeros_like(x.valid)},
        "one valid": {"valid": (row == 3).expand_as(x.valid)},
        "few valid": {"valid": (row % 9 == 4).expand_as(x.valid)},
        "zeros": {name: torch.zeros_like(getattr(x, name)) for name in ("projected", "features", "query", "saliency")},
        "no features": {"features": torch.zeros_like(x.features)},
        "no features, first best": {"features": torch.zeros_like(x.features),
                                    "saliency": x.saliency + 1e6 * (row == 0)[None]},
        "first zero": {"features": x.features * (row > 0)[None, :, None]},
        "half zero": {"features": x.features * (row % 2)[None, :, None]},
        "identical": {"projected": x.projected[:, :1].expand_as(x.projected).contiguous(),
                      "features": x.features[:, :1].expand_as(x.features).contiguous()},
        "almost identical": {"features": x.features[:, :1] + 1e-4 * x.features},
        "pairs": {"features": x.features[:, row // 2 * 2].contiguous()},
        "opposite": {"features": (x.features[:, :1] * (1 - 2 * (row % 2))[None, :, None]).contiguous()},
        "constant saliency": {"saliency": torch.full_like(x.saliency, 3.0)},
        "huge": {"features": x.features * 1e15, "projected": x.projected * 1e15},
        "tiny": {"features": x.features * 1e-9, "projected": x.projected * 1e-9},
    }  # fmt: skip
    return x._replace(**changed[kind])


def score64(x: SelectionInputs, params: SelectionParams = DEFAULTS) -> np.ndarray:
    """text_guided_score in float64, [B, N]; padding is left out of every sum, maximum and minimum."""
    projected, query, saliency = (t.double().numpy() for t in (x.projected, x.query, x.saliency.float()))
    scores = np.full(saliency.shape, math.log(params.eps))
    for b, (asked, valid) in enumerate(zip(x.query_mask.numpy(), x.valid.numpy(), strict=True)):
        if valid.any():
            r = relevance64(projected[b][valid], query[b][asked], params.pool_temperature)
            scores[b, valid] = fused64(r, saliency[b][valid], params)
    return scores


def relevance64(projected: np.ndarray, query: np.ndarray, pool_temperature: float) -> np.ndarray:
    """r of text_guided_score for one item without padding: [N, D], [L, D] -> [N]."""
    if not len(query):
        return np.zeros(len(projected))
    similarity = unit64(projected) @ unit64(query).T  # [N, L]
    weight = np.exp((similarity - similarity.max(1, keepdims=True)) / pool_temperature)
    return (weight * similarity).sum(1) / weight.sum(1)


def fused64(r: np.ndarray, saliency: np.ndarray, params: SelectionParams = DEFAULTS) -> np.ndarray:
    """l of text_guided_score for one item without padding: [N], [N] -> [N]."""
    a = np.log(np.maximum(minmax64(saliency), params.eps))
    return (1 - params.eta) * a + params.eta * np.maximum((r - r.max()) / params.temperature, math.log(params.eps))


def minmax64(x: np.ndarray) -> np.ndarray:
    return (x - x.min()) / max(x.max() - x.min(), 1 / HIGH)


def unit64(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), TINY)


class Choice(NamedTuple):
    """What one item keeps, and how far its closest decision was from the other way, as a cosine."""

    kept: np.ndarray  # [K] ascending
    is_top: np.ndarray  # [K] bool
    margin: float


def choice64(
    features: np.ndarray, scores: np.ndarray, valid: np.ndarray, budget: int, top_count: int, iterations: int
) -> Choice:
    """The choice of masked_lloyd for one item, given its scores: features [N, Dv], scores [N], valid [N]."""
    N = len(scores)
    order = np.argsort(-np.where(valid, scores, LOW), kind="stable")
    top = np.zeros(N, bool)
    top[order[:top_count]] = True
    top &= valid
    chosen, margin = top.copy(), math.inf
    if top_count < budget:
        closest, margin = _representatives64(features.astype(np.float64), valid & ~top, budget - top_count, iterations)
        chosen[closest] = True
    order = np.argsort(-np.where(valid, np.where(chosen, HIGH, scores), LOW), kind="stable")
    kept = np.sort(order[:budget])
    return Choice(kept, top[kept], margin)


def _representatives64(features: np.ndarray, free: np.ndarray, count: int, iterations: int) -> tuple[list[int], float]:
    x = unit64(features)
    cosine = x @ x.T  # [N, N]
    tokens = np.flatnonzero(free)
    # In float32 on purpose: the seeds are part of the method, and theirs is float32 arithmetic.
    places = np.float32(2) * np.arange(count, dtype=np.float32) + np.float32(1)
    places = np.floor(places * np.float32(len(tokens)) / np.float32(2 * count)).astype(int)
    members = np.zeros((len(free), count))  # [N, count]
    inside = places < len(tokens)
    members[tokens[places[inside]], np.flatnonzero(inside)] = 1
    margins = [math.inf]

    def similarity() -> np.ndarray:
        to_sum = cosine @ members
        squares = (members * to_sum).sum(0)
        # Members that cancel each other: whether anything is left of their sum is for rounding to say.
        margins.append(0.0 if ((squares != 0) & (squares < 1e-4)).any() else math.inf)
        return np.where(squares > TINY, to_sum / np.sqrt(np.maximum(squares, TINY)), LOW)

    def first_largest(values: np.ndarray) -> np.ndarray:
        """Along the last dimension."""
        threshold = values.max(-1, keepdims=True) - TIE
        decided = (values > LOW) & (threshold > LOW)
        if decided.any():
            margins.append(float(np.abs(values - threshold)[decided].min()))
        return (values >= threshold).argmax(-1)

    for _ in range(iterations):
        nearest = first_largest(similarity()[tokens])
        members = np.zeros_like(members)
        members[tokens, nearest] = 1
    closest = first_largest(np.where(members > 0, similarity(), LOW).T)  # [count]
    return [int(i) for k, i in enumerate(closest) if members[i, k]], min(margins)
