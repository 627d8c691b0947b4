"""Inputs, a float64 reference, and what agreement of the kernels with the torch code means."""

from __future__ import annotations

import math

import numpy as np
import torch

from flashvlm_export.selection import SelectionInputs, SelectionParams, select, text_guided_score

DEFAULTS = SelectionParams()


def make(B=1, N=33, D=24, Dv=16, L=5, seed=0, masks=False, dtype=torch.float32) -> SelectionInputs:
    """Tokens in loose clusters, long-tailed saliency, a question that leans on some of the tokens."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(B, N, Dv)) + rng.normal(size=(N, Dv))[rng.integers(0, 1 + N // 5, (B, N))]
    projected = features @ rng.normal(size=(Dv, D)) + rng.normal(size=(B, N, D))
    query = rng.normal(size=(B, L, D)) * 2 + projected[:, rng.integers(0, N, L)] * 0.3
    saliency = rng.lognormal(size=(B, N))
    query_mask, valid = np.ones((B, L), bool), np.ones((B, N), bool)
    if masks:
        query_mask, valid = rng.random((B, L)) > 0.3, rng.random((B, N)) > 0.2
    floats = (torch.from_numpy(x).to(dtype) for x in (projected, features, saliency, query))
    return SelectionInputs(*floats, torch.from_numpy(query_mask), torch.from_numpy(valid))


def score64(x: SelectionInputs, params: SelectionParams) -> np.ndarray:
    """text_guided_score in float64, [B, N]; padding is left out of every sum, maximum and minimum."""
    projected, query, saliency = (t.double().numpy() for t in (x.projected, x.query, x.saliency.float()))
    floor = math.log(params.eps)
    scores = np.full(saliency.shape, floor)
    for b, (asked, valid) in enumerate(zip(x.query_mask.numpy(), x.valid.numpy(), strict=True)):
        p, q, s = projected[b][valid], query[b][asked], saliency[b][valid]
        if not len(p):
            continue
        p, q = (t / np.maximum(np.linalg.norm(t, axis=1, keepdims=True), 1e-12) for t in (p, q))
        similarity = p @ q.T
        r = np.zeros(len(p))
        if len(q):
            weight = np.exp((similarity - similarity.max(1, keepdims=True)) / params.pool_temperature)
            r = (weight * similarity).sum(1) / weight.sum(1)
        a = np.log(np.maximum((s - s.min()) / max(s.max() - s.min(), 1e-30), params.eps))
        scores[b, valid] = (1 - params.eta) * a + params.eta * np.maximum((r - r.max()) / params.temperature, floor)
    return scores


def torch_score(x: SelectionInputs, params: SelectionParams) -> torch.Tensor:
    return text_guided_score(
        x.projected, x.query, x.query_mask, x.saliency, x.valid,
        params.eta, params.temperature, params.pool_temperature, params.eps,
    )  # fmt: skip


def check_score(kernels, x: SelectionInputs, params: SelectionParams = DEFAULTS, tolerance=3e-4) -> None:
    """tolerance: of the log-score; 2e-6 of a cosine is 2.5e-4 after division by twice the temperature of 0.004."""
    scores = kernels.score(x, params)
    assert kernels.launches in (None, 3)
    exact = score64(x, params)
    error, torch_error = (np.abs(s.double().numpy() - exact).max() for s in (scores, torch_score(x, params)))
    assert error < tolerance, f"torch itself is off by {torch_error}"


def check_choice(kernels, x: SelectionInputs, budget: int, params: SelectionParams = DEFAULTS) -> None:
    """Index for index, given the same scores."""
    wanted = select(*x, budget=budget, params=params)
    top_count = math.floor(budget * params.top_ratio + 1e-9)
    kept, is_top = kernels.lloyd(x.features, wanted.scores, x.valid, budget, top_count, params.iterations)
    launches = 2 if top_count == budget else 3 if params.iterations == 0 else 2 + 2 * params.iterations
    assert kernels.launches in (None, launches)
    assert torch.equal(kept.long(), wanted.kept)
    assert torch.equal(is_top, wanted.is_top)
