"""VisionZip (arXiv 2412.04467): salient tokens, and means of the others."""

from __future__ import annotations

import torch

from flashvlm_export.selection.method import Method, Nodes, Selection, SelectionInputs, SelectionParams
from flashvlm_export.selection.ops import LOW, best_of, finish, first_largest, holds, members_at, one_hot, take, unit
from flashvlm_export.selection.score import log_saliency


def visionzip(inputs: SelectionInputs, budget: int, params: SelectionParams, nodes: Nodes) -> Selection:
    """54/64 of the budget by saliency, the rest merged from all other tokens.

    Contextual tokens sit at a uniform stride among the others; each token that is left joins its most similar
    one (by cosine of features, in the paper of attention keys), and a contextual token's embedding is the
    mean of its group.
    """
    projected, features, saliency, _, _, valid = inputs
    dominant_count = budget * 54 // 64
    contextual_count = budget - dominant_count  # at least one
    scores = log_saliency(saliency, valid, params.eps)
    dominant = best_of(scores, valid, dominant_count)

    others = valid & ~dominant
    stride = torch.floor(others.float().sum(1, keepdim=True) / contextual_count).clamp_min(1)  # [B, 1]
    number = torch.arange(contextual_count, device=valid.device).float()
    target = members_at(others, stride * number)  # [B, N, C]
    contextual = target.any(2)  # [B, N]
    selection = finish(inputs, dominant | contextual, dominant, scores, budget)

    similarity = unit(features) @ (target.float().transpose(1, 2) @ unit(features)).transpose(1, 2)  # [B, N, C]
    similarity = torch.where(target.any(1, keepdim=True), similarity, LOW)  # rows with fewer tokens than targets
    joins = one_hot(first_largest(similarity, dim=2), contextual_count) & (others & ~contextual)[:, :, None]
    group = (joins | target).float().transpose(1, 2)  # [B, C, N]
    mean = group @ projected.float() / group.sum(2, keepdim=True).clamp_min(1)  # [B, C, D]

    which = take(target.float(), selection.kept)  # [B, K, C], the group each kept token stands for
    merged = (which @ mean).to(projected.dtype)
    embeds = torch.where(holds(contextual, selection.kept)[:, :, None], merged, selection.visual_embeds)
    return selection._replace(visual_embeds=embeds)


METHOD = Method(
    "visionzip",
    visionzip,
    "the most salient tokens, and means of the others",
    paper="2412.04467",
    reads=frozenset({"features", "saliency"}),
    params=("eps",),
    score="log",
)
