"""CDPruner (arXiv 2506.10967): diverse tokens, given the question."""

from __future__ import annotations

import torch

from flashvlm_export.selection.method import Method, Nodes, Selection, SelectionInputs, SelectionParams
from flashvlm_export.selection.ops import HIGH, LOW, finish, gram, one_hot, row_at
from flashvlm_export.selection.score import relevance

GAIN_FLOOR = 1e-6  # a gain below this is float32 rounding: the kernel has no rank left


def cdpruner(inputs: SelectionInputs, budget: int, params: SelectionParams, nodes: Nodes) -> Selection:
    """Greedy MAP of a determinantal point process conditioned on the question.

    Kernel diag(q) cos diag(q) over the projected tokens with q the min-max of relevance, 1 where relevance is
    constant. Greedy MAP by incremental Cholesky (Chen et al., arXiv 1709.05135): the gain of a token is what
    is left of its diagonal. Where the kernel runs out of rank, the most relevant of the rest fill the budget.
    """
    valid = inputs.valid
    found = relevance(inputs, nodes.score)  # [B, N], r - max r
    span = -torch.where(valid, found, 0.0).amin(1, keepdim=True)
    quality = torch.where(valid, 1 + found / span.clamp_min(1.0 / HIGH), 0.0)  # [B, N]
    kernel = quality[:, :, None] * gram(inputs.projected) * quality[:, None, :]  # [B, N, N]

    gain = torch.where(valid, quality * quality, LOW)
    factor = torch.zeros_like(quality)[:, None]  # [B, t, N], rows of the Cholesky factor; the zero row is inert
    for _ in range(budget):
        pick = gain.argmax(1)  # [B]
        picked = one_hot(pick[:, None], gain.shape[1])  # [B, 1, N]
        best = gain.amax(1, keepdim=True)  # [B, 1]
        column = torch.where(picked, factor, 0.0).sum(2, keepdim=True)  # [B, t, 1]
        residual = row_at(kernel, pick) - (factor * column).sum(1)
        usable = best > GAIN_FLOOR
        row = torch.where(usable, residual / best.clamp_min(GAIN_FLOOR).sqrt(), 0.0)  # [B, N]
        gain = torch.where(picked[:, 0] & usable, LOW, gain - row * row)
        factor = torch.cat([factor, row[:, None]], 1)
    chosen = valid & (gain == LOW)
    return finish(inputs, chosen, torch.zeros_like(valid), found, budget)


METHOD = Method(
    "cdpruner",
    cdpruner,
    "diverse tokens among the relevant, by a determinantal point process",
    paper="2506.10967",
    reads=frozenset({"projected", "query"}),
    score="cosine",
)
