"""Choose a fixed budget of visual tokens for the question being asked: FlashVLM and the methods beside it.

    selection = select(projected, features, saliency, query, method="flashvlm", budget=64)

One method is one function of (inputs, budget, params, score); a new one is one more entry of METHODS.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from flashvlm.errors import SelectionError
from flashvlm_export.selection.baselines import (
    cdpruner,
    divprune,
    flashvlm_published,
    none,
    random,
    trim,
    uniform,
    visionzip,
    vispruner,
)
from flashvlm_export.selection.ops import (
    LOW,
    TINY,
    ScoreFn,
    Selection,
    SelectionInputs,
    SelectionParams,
    best_of,
    contrast_similarity,
    fill,
    first_largest,
    fuse,
    gram,
    holds,
    members_at,
    one_hot,
    take,
    text_guided_score,
)

__all__ = [
    "METHODS",
    "READS",
    "Method",
    "ScoreFn",
    "Selection",
    "SelectionInputs",
    "SelectionParams",
    "flashvlm",
    "flashvlm_contrast",
    "masked_lloyd",
    "select",
    "text_guided_score",
]

LloydFn: TypeAlias = Callable[[Tensor, Tensor, Tensor, int, int, int], tuple[Tensor, Tensor]]
Method: TypeAlias = Callable[[SelectionInputs, int, SelectionParams, ScoreFn], Selection]


def flashvlm(
    inputs: SelectionInputs, budget: int, params: SelectionParams, score: ScoreFn, lloyd: LloydFn | None = None
) -> Selection:
    """The best tokens for the question, and representatives of everything else (arXiv 2512.20561).

    floor(budget * top_ratio) tokens by text_guided_score; the rest of the budget by spherical k-means of the
    others, in place of the published bipartite merging, whose choice hangs on the last bit of a float.
    ``lloyd``: masked_lloyd, or a stand-in that emits it as one graph node.
    """
    projected, _, saliency, query, query_mask, valid = inputs
    scores = score(
        projected, query, query_mask, saliency, valid,
        params.eta, params.temperature, params.pool_temperature, params.eps,
    )  # fmt: skip
    return _top_and_representatives(inputs, scores, budget, params, lloyd or masked_lloyd)


def flashvlm_contrast(inputs: SelectionInputs, budget: int, params: SelectionParams, score: ScoreFn) -> Selection:
    """flashvlm with the relevance of contrast_similarity: words weigh as much as they tell the image's tokens apart."""
    projected, _, saliency, query, query_mask, valid = inputs
    relevance = contrast_similarity(projected, query, query_mask, valid)  # [B, N]
    scores = fuse(relevance, saliency, valid, params.eta, params.temperature, params.eps)
    return _top_and_representatives(inputs, scores, budget, params, masked_lloyd)


def _top_and_representatives(
    inputs: SelectionInputs, scores: Tensor, budget: int, params: SelectionParams, lloyd: LloydFn
) -> Selection:
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


METHODS: dict[str, Method] = {
    "flashvlm": flashvlm,
    "flashvlm-contrast": flashvlm_contrast,
    "flashvlm-published": flashvlm_published,
    "vispruner": vispruner,
    "divprune": divprune,
    "cdpruner": cdpruner,
    "visionzip": visionzip,
    "trim": trim,
    "uniform": uniform,
    "random": random,
    "none": none,
}

# Which inputs move a method's choice; projected and valid are read by all.
READS: dict[str, frozenset[str]] = {
    "flashvlm": frozenset({"features", "saliency", "query"}),
    "flashvlm-contrast": frozenset({"features", "saliency", "query"}),
    "flashvlm-published": frozenset({"features", "saliency", "query"}),
    "vispruner": frozenset({"features", "saliency"}),
    "divprune": frozenset(),
    "cdpruner": frozenset({"query"}),
    "visionzip": frozenset({"features", "saliency"}),
    "trim": frozenset({"query"}),
    "uniform": frozenset(),
    "random": frozenset(),
    "none": frozenset(),
}

AXES: dict[str, tuple[str, ...]] = {
    "projected": ("B", "N", "D"),
    "features": ("B", "N", "Dv"),
    "saliency": ("B", "N"),
    "query": ("B", "L", "D"),
    "query_mask": ("B", "L"),
    "valid": ("B", "N"),
}


def select(
    projected: Tensor,
    features: Tensor,
    saliency: Tensor,
    query: Tensor,
    query_mask: Tensor | None = None,
    valid: Tensor | None = None,
    *,
    method: str = "flashvlm",
    budget: int = 64,
    params: SelectionParams = SelectionParams(),  # noqa: B008 - frozen
    score: ScoreFn = text_guided_score,
) -> Selection:
    """Keep ``budget`` of the visual tokens of each batch item.

    Scores are float32 whatever the inputs are. Exactly ``budget`` distinct tokens come back for every input,
    and a row gives the same answer alone as in a batch. Only where a row has fewer valid tokens than budget
    are invalid ones among them.

    Args:
        projected: [B, N, D] float, visual tokens in the language model's embedding space.
        features: [B, N, Dv] float, the same tokens in the vision tower.
        saliency: [B, N] float, question-free importance, any scale.
        query: [B, L, D] float, embeddings of the question's tokens (whole prompt for flashvlm-published).
        query_mask: [B, L] bool, False for padding; all true when absent.
        valid: [B, N] bool, False for padding; all true when absent.
        method: a name in METHODS.
        budget: tokens to keep, 1 to N; ``none`` keeps all and ignores it.
        params: the constants of the method.
        score: text_guided_score or a stand-in that emits it as one graph node.

    Raises:
        SelectionError: unknown method, impossible budget, or an input of the wrong shape or dtype. Outside an
            export also an input that holds NaN or infinity in float32.
    """
    if method not in METHODS:
        raise SelectionError(f"method: expected one of {', '.join(METHODS)}; found {method!r}")
    given = dict(zip(AXES, (projected, features, saliency, query, query_mask, valid), strict=True))
    _check_shapes({name: tensor for name, tensor in given.items() if tensor is not None})
    if query_mask is None:
        query_mask = torch.ones(query.shape[:2], dtype=torch.bool, device=query.device)
    if valid is None:
        valid = torch.ones(saliency.shape, dtype=torch.bool, device=saliency.device)
    inputs = SelectionInputs(projected, features, saliency, query, query_mask, valid)
    if method != "none":
        _check_budget(budget, saliency.shape[1])
    if not torch.compiler.is_exporting():  # a traced graph has no values to look at
        _check_finite(inputs)
    return METHODS[method](inputs, budget, params, score)


def _check_budget(budget: object, tokens: int) -> None:
    if isinstance(budget, bool) or not isinstance(budget, int) or not 1 <= budget <= tokens:
        raise SelectionError(
            f"budget: expected an integer from 1 to {tokens}, the number of visual tokens, found {budget!r}; "
            "method 'none' keeps all of them"
        )


def _check_shapes(given: dict[str, Tensor]) -> None:
    """One name of an axis stands for one size in all inputs."""
    sizes: dict[str, int] = {}
    for name, tensor in given.items():
        axes = AXES[name]
        named = f"[{', '.join(axes)}]"
        if name in ("query_mask", "valid"):
            if tensor.dtype != torch.bool:
                raise SelectionError(f"{name}: expected torch.bool, found {tensor.dtype}; convert it by .bool()")
        elif not tensor.is_floating_point():
            raise SelectionError(f"{name}: expected a float dtype, found {tensor.dtype}; convert it by .float()")
        if tensor.dim() != len(axes):
            raise SelectionError(
                f"{name}: expected {named}, found {list(tensor.shape)}; add the batch dimension by [None]"
            )
        for axis, size in zip(axes, tensor.shape, strict=True):
            if sizes.setdefault(axis, size) != size:
                raise SelectionError(
                    f"{name}: expected {named} with {axis} = {sizes[axis]} as in the inputs before it, "
                    f"found {list(tensor.shape)}"
                )
    if sizes["N"] == 0:
        raise SelectionError("projected: expected at least one visual token, found none; is the image empty?")


def _check_finite(inputs: SelectionInputs) -> None:
    for name, tensor in inputs._asdict().items():
        if not tensor.float().isfinite().all():
            raise SelectionError(
                f"{name}: expected finite values in float32, found NaN or infinity; "
                "a model that overflows in float16 needs bfloat16 or float32"
            )
