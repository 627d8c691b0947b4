"""What agreement of the kernels with the torch code means."""

from __future__ import annotations

import math

import numpy as np
import torch

from flashvlm_export.selection import SelectionInputs, SelectionParams, select, text_guided_score
from flashvlm_export.testing.references import DEFAULTS, score64


def torch_score(x: SelectionInputs, params: SelectionParams) -> torch.Tensor:
    return text_guided_score(
        x.projected, x.query, x.query_mask, x.saliency, x.valid,
        params.eta, params.temperature, params.pool_temperature, params.eps,
    )  # fmt: skip


def check_score(kernels, x: SelectionInputs, params: SelectionParams = DEFAULTS, tolerance=8e-5) -> None:
    """tolerance: of the log-score; 2e-6 of a cosine is 6.3e-5 after division by twice the temperature of 0.016."""
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
