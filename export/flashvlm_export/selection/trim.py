"""TRIM (arXiv 2409.10994): the most relevant tokens, and the mean of the others."""

from __future__ import annotations

import torch

from flashvlm_export.selection.method import Method, Nodes, Selection, SelectionInputs, SelectionParams
from flashvlm_export.selection.ops import best_of, finish, holds
from flashvlm_export.selection.score import relevance


def trim(inputs: SelectionInputs, budget: int, params: SelectionParams, nodes: Nodes) -> Selection:
    """budget - 1 tokens by relevance, and the mean of all others as the last one.

    The mean takes the index of the most relevant token it stands for, so that indices stay distinct.
    """
    found = relevance(inputs, nodes.score)
    top = best_of(found, inputs.valid, budget - 1)
    dropped = inputs.valid & ~top
    selection = finish(inputs, top, top, found, budget)
    weight = dropped.float()[:, None]  # [B, 1, N]
    mean = weight @ inputs.projected.float() / weight.sum(2, keepdim=True).clamp_min(1)  # [B, 1, D]
    embeds = torch.where(
        holds(dropped, selection.kept)[:, :, None], mean.to(inputs.projected.dtype), selection.visual_embeds
    )
    return selection._replace(visual_embeds=embeds)


METHOD = Method(
    "trim",
    trim,
    "the most relevant tokens, and the mean of all others",
    paper="2409.10994",
    reads=frozenset({"projected", "query"}),
    score="cosine",
)
