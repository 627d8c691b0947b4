"""FlashVLM as its authors' code has it (arXiv 2512.20561)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flashvlm_export.selection.method import Method, Nodes, Selection, SelectionInputs, SelectionParams
from flashvlm_export.selection.ops import LOW, one_hot, top_k
from flashvlm_export.selection.score import PUBLISHED_POOL, relevance
from flashvlm_export.selection.vispruner import top_and_deduplicated

PUBLISHED_TEMPERATURE = 0.01 / 2.5  # softmax(r / 0.01) ** 2.5, see text_guided_score


def flashvlm_published(inputs: SelectionInputs, budget: int, params: SelectionParams, nodes: Nodes) -> Selection:
    """Half by score, the rest by deduplication.

    Their 0.995-quantile step multiplies the sharpened relevance of the top 0.5 % of tokens by ten. Pass the
    whole prompt as query to match them. The temperatures are theirs, whatever params say.
    """
    projected, _, saliency, query, query_mask, valid = inputs
    scores = nodes.score(
        projected, query, query_mask, saliency, valid,
        params.eta, PUBLISHED_TEMPERATURE, PUBLISHED_POOL, params.eps,
    )  # fmt: skip
    bonus = _most_relevant(relevance(inputs, nodes.score), query_mask, valid)
    scores = scores + params.eta * math.log(10.0) * bonus.float()
    return top_and_deduplicated(inputs, scores, budget)


def _most_relevant(found: Tensor, query_mask: Tensor, valid: Tensor) -> Tensor:
    """Mask [B, N] of the most relevant 0.5 % of the valid tokens, rounded up; none in a row without query.

    Args:
        found: [B, N] float32, the relevance of each token.
    """
    tokens = found.shape[1]
    order = top_k(torch.where(valid, found, LOW), math.ceil(tokens / 200))  # [B, M]
    share = torch.ceil(valid.float().sum(1, keepdim=True) / 200)  # [B, 1]
    share = torch.where(query_mask.any(1, keepdim=True), share, 0.0)
    within = torch.arange(order.shape[1], device=order.device) < share  # [B, M]
    return (one_hot(order, tokens) & within[:, :, None]).any(1)


METHOD = Method(
    "flashvlm-published",
    flashvlm_published,
    "FlashVLM as its authors' code has it",
    paper="2512.20561",
    reads=frozenset({"projected", "features", "saliency", "query"}),
    params=("eta", "eps"),
    score="log",
    stable=False,
)
