"""FlashVLM (arXiv 2512.20561): the best tokens for the question, and representatives of everything else."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flashvlm_export.selection.method import LloydFn, Method, Nodes, Selection, SelectionInputs, SelectionParams
from flashvlm_export.selection.ops import (
    LOW,
    TINY,
    best_of,
    fill,
    first_largest,
    gram,
    holds,
    members_at,
    one_hot,
    take,
)


def flashvlm(inputs: SelectionInputs, budget: int, params: SelectionParams, nodes: Nodes) -> Selection:
    """floor(budget * top_ratio) tokens by text_guided_score; the rest of the budget by spherical k-means of the others.

    The clusters are in place of the published bipartite merging, whose choice hangs on the last bit of a float.
    """
    projected, _, saliency, query, query_mask, valid = inputs
    scores = nodes.score(
        projected, query, query_mask, saliency, valid,
        params.eta, params.temperature, params.pool_temperature, params.eps,
    )  # fmt: skip
    return top_and_representatives(inputs, scores, budget, params, nodes.lloyd)


def top_and_representatives(
    inputs: SelectionInputs, scores: Tensor, budget: int, params: SelectionParams, lloyd: LloydFn
) -> Selection:
    """The best of scores [B, N] and what ``lloyd`` finds to stand for the rest, in the space that params name."""
    top_count = math.floor(budget * params.top_ratio + 1e-9)  # 100 * 0.29 is 28.999999999999996
    space = inputs.features if params.partition_space == "features" else inputs.projected
    kept, is_top = lloyd(space, scores, inputs.valid, budget, top_count, params.iterations)
    return Selection(take(inputs.projected, kept), kept, is_top, scores)


def masked_lloyd(
    features: Tensor, scores: Tensor, valid: Tensor, budget: int, top_count: int, iterations: int
) -> tuple[Tensor, Tensor]:
    """The ``top_count`` best-scored tokens, and representatives of the other valid ones.

    Args:
        features: [B, N, Dv] float. scores: [B, N] float32. valid: [B, N] bool.

    Returns:
        kept: [B, K] int64, ascending. is_top: [B, K] bool, which of them are there for their score.
    """
    top = best_of(scores, valid, top_count)
    chosen = top
    if top_count < budget:
        chosen = top | representatives(features, valid & ~top, budget - top_count, iterations)
    kept = fill(valid, chosen, scores, budget)
    return kept, holds(top, kept)


def representatives(tokens: Tensor, free: Tensor, count: int, iterations: int) -> Tensor:
    """Partition the free tokens into ``count`` clusters and keep the token nearest to each centroid.

    Spherical k-means (Dhillon & Modha 2001) by Lloyd's iteration, starting from free tokens evenly spaced.
    The centroid of a cluster is a sum of unit vectors, so its cosine to any token needs only the Gram matrix:
    the loop never sees the width of the tokens.

    Args:
        tokens: [B, N, D] float. free: [B, N] bool.

    Returns:
        [B, N] bool, a subset of free: at most ``count`` tokens, fewer where clusters are empty.
    """
    cosine = gram(tokens)  # [B, N, N]
    number = torch.arange(count, device=tokens.device)
    free_count = free.float().sum(1, keepdim=True)  # [B, 1]
    seed_ranks = torch.floor((2 * number + 1).float() * free_count / (2 * count))  # [B, count]
    members = members_at(free, seed_ranks)  # [B, N, count]
    for _ in range(iterations):
        nearest = first_largest(similarity_to_centroids(cosine, members), dim=2)  # [B, N]
        members = one_hot(nearest, count) & free[:, :, None]
    similarity = torch.where(members, similarity_to_centroids(cosine, members), LOW)
    closest = one_hot(first_largest(similarity, dim=1), tokens.shape[1])  # [B, count, N]
    return (closest & members.transpose(1, 2)).any(1)  # an empty cluster has no member to name


def similarity_to_centroids(cosine: Tensor, members: Tensor) -> Tensor:
    """Cosine of every token to every centroid, [B, N, count]; LOW where a cluster has no centroid."""
    weight = members.float()
    to_sum = cosine @ weight  # [B, N, count], token . sum of members
    squared_norm = (weight * to_sum).sum(1, keepdim=True)  # [B, 1, count], diag of members^T G members
    return torch.where(squared_norm > TINY, to_sum / squared_norm.clamp_min(TINY).sqrt(), LOW)


METHOD = Method(
    "flashvlm",
    flashvlm,
    "the best tokens for the question, and representatives of everything else",
    paper="2512.20561",
    reads=frozenset({"projected", "features", "saliency", "query"}),
    params=("eta", "temperature", "pool_temperature", "eps", "top_ratio", "iterations", "partition_space"),
    score="log",
    fused=True,
)
