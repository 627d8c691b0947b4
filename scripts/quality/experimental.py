"""Candidates for a better selection, each a relevance and a rest: `idf+merge` scores by `idf` and rests by `merge`.

Methods in the sense of flashvlm_export.selection, static-shape and without the width of tokens in any loop. They live
here until one earns its place: ``register`` adds them to the exporter's table within this process only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from flashvlm_export.selection import flashvlm as selection
from flashvlm_export.selection.baselines import cdpruner, deduplicate
from flashvlm_export.selection.flashvlm import similarity_to_centroids
from flashvlm_export.selection.ops import (
    LOW,
    TINY,
    ScoreFn,
    Selection,
    SelectionInputs,
    SelectionParams,
    best_of,
    contrast_similarity,
    finish,
    first_largest,
    fuse,
    gram,
    mask_of,
    members_at,
    one_hot,
    pooled_similarity,
    take,
    top_k,
    unit,
    word_contrast,
)

PEAK = 0.02  # softness of a question token's votes over image tokens, in cosine
NEIGHBOUR = 0.5  # weight of the 3 x 3 neighbourhood in `local`


def register(embedding: np.ndarray) -> None:
    """Makes every combination known to the exporter, in this process.

    Args:
        embedding: [V,D], the model's token embeddings, whose mean the null prompt of `debias` and `centred` is.
    """
    table = torch.from_numpy(embedding.astype(np.float32))
    known = table[table.abs().sum(1) > 0]  # padding of the table is zero
    mean = {"debias": unit(known).mean(0), "centred": known.mean(0)}  # [D]
    for name, relevance in RELEVANCE.items():
        function = partial(relevance, mean=mean[name]) if name in mean else relevance
        for rest_name, rest in REST.items():
            selection.METHODS[f"{name}+{rest_name}"] = partial(_method, relevance=function, rest=rest)


Relevance = Callable[..., Tensor]
Rest = Callable[[SelectionInputs, Tensor, int, SelectionParams], Selection]


def _method(
    inputs: SelectionInputs, budget: int, params: SelectionParams, score: ScoreFn, relevance: Relevance, rest: Rest
) -> Selection:
    """The fusion of text_guided_score with another relevance, then another use of the scores."""
    found = relevance(inputs, params)  # [B, N]
    scores = fuse(found, inputs.saliency, inputs.valid, params.eta, params.temperature, params.eps)
    return rest(inputs, scores, budget, params)


# --- relevance: (inputs, params) -> [B, N], in units of params.temperature -----------------------------------------


def _pooled(inputs: SelectionInputs, params: SelectionParams) -> Tensor:
    """As flashvlm."""
    return pooled_similarity(inputs.projected, inputs.query, inputs.query_mask, params.pool_temperature)


def _similarity(inputs: SelectionInputs) -> Tensor:
    return unit(inputs.projected) @ unit(inputs.query).transpose(1, 2)  # [B, N, L]


def _contrast_of_words(inputs: SelectionInputs) -> Tensor:
    return word_contrast(inputs.projected, inputs.query, inputs.query_mask, inputs.valid)  # [B, N, L]


def _pool(inputs: SelectionInputs, values: Tensor, params: SelectionParams) -> Tensor:
    """The softmax pooling of flashvlm over other values than cosines: [B, N, L] -> [B, N]."""
    asked = inputs.query_mask[:, None, :]
    weights = torch.where(asked, values / params.pool_temperature, LOW).softmax(2)
    return torch.where(asked, weights * values, 0.0).sum(2)


def _rare(inputs: SelectionInputs, params: SelectionParams) -> Tensor:
    """Pools similarities less each question token's mean: a word as close to every token says nothing."""
    return _pool(inputs, _contrast_of_words(inputs), params)


def _idf(inputs: SelectionInputs, params: SelectionParams) -> Tensor:
    """A sum over the question weighted by how much each word's similarities spread: words must agree on a token."""
    centred = _contrast_of_words(inputs)
    count = inputs.valid.float().sum(1, keepdim=True).clamp_min(1)  # [B, 1]
    spread = (centred.square().sum(1) / count).sqrt()  # [B, L]
    weight = spread / spread.sum(1, keepdim=True).clamp_min(TINY)
    return (centred * weight[:, None, :]).sum(2)


def _peak(inputs: SelectionInputs, params: SelectionParams) -> Tensor:
    """As flashvlm-contrast: like idf, with the squared height of each word's best token above its mean as weight."""
    return contrast_similarity(inputs.projected, inputs.query, inputs.query_mask, inputs.valid)


def _contrast(inputs: SelectionInputs, params: SelectionParams) -> Tensor:
    """peak as a share of its largest, so that no temperature has to know how close words and tokens ever come."""
    found = _peak(inputs, params)
    best = torch.where(inputs.valid, found, LOW).amax(1, keepdim=True)
    return found / best.clamp_min(TINY)


def _votes(inputs: SelectionInputs, params: SelectionParams) -> Tensor:
    """Every word spreads one vote over the tokens it resembles; flat words spread theirs evenly. In cosine."""
    real = inputs.valid[:, :, None] & inputs.query_mask[:, None, :]
    votes = torch.where(real, _similarity(inputs) / PEAK, LOW).softmax(1)  # [B, N, L]
    return PEAK * torch.where(real, votes, 0.0).sum(2).clamp_min(TINY).log()


def _debias(inputs: SelectionInputs, params: SelectionParams, mean: Tensor) -> Tensor:
    """Less each image token's mean similarity to the whole vocabulary: the relevance to a null prompt."""
    return _pooled(inputs, params) - unit(inputs.projected) @ mean.to(inputs.projected.device)


def _centred(inputs: SelectionInputs, params: SelectionParams, mean: Tensor) -> Tensor:
    """Cosines after both sides lost their mean: the direction all image tokens, or all words, share."""
    real = inputs.valid[:, :, None].float()
    tokens = inputs.projected.float()
    common = (tokens * real).sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp_min(1)
    query = inputs.query.float() - mean.to(tokens.device)
    return _pool(inputs, unit(tokens - common) @ unit(query).transpose(1, 2), params)


def _centred_idf(inputs: SelectionInputs, params: SelectionParams) -> Tensor:
    """idf over cosines of image tokens that lost their common direction."""
    real = inputs.valid[:, :, None].float()
    tokens = inputs.projected.float()
    common = (tokens * real).sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp_min(1)
    return _idf(inputs._replace(projected=tokens - common), params)


def _local(inputs: SelectionInputs, params: SelectionParams) -> Tensor:
    """Pooled relevance mixed with its mean over the 3 x 3 neighbourhood: things span neighbouring patches."""
    return _smooth(_pooled(inputs, params))


def _local_idf(inputs: SelectionInputs, params: SelectionParams) -> Tensor:
    return _smooth(_idf(inputs, params))


def _smooth(relevance: Tensor) -> Tensor:
    side = math.isqrt(relevance.shape[1])
    grid = relevance.unflatten(1, (side, side))[:, None]  # [B, 1, side, side]
    around = F.avg_pool2d(grid, 3, stride=1, padding=1, count_include_pad=False)
    return ((1 - NEIGHBOUR) * grid + NEIGHBOUR * around).flatten(1)


RELEVANCE: dict[str, Relevance] = {
    "pooled": _pooled,
    "rare": _rare,
    "idf": _idf,
    "peak": _peak,
    "contrast": _contrast,
    "votes": _votes,
    "debias": _debias,
    "centred": _centred,
    "centred-idf": _centred_idf,
    "local": _local,
    "local-idf": _local_idf,
}

# --- rest: what becomes of the budget that is not the best scores --------------------------------------------------


def _split(inputs: SelectionInputs, scores: Tensor, budget: int, params: SelectionParams) -> tuple[Tensor, Tensor, int]:
    """The best-scored tokens, those that are free, and how many of these to keep."""
    count = math.floor(budget * params.top_ratio + 1e-9)
    top = best_of(scores, inputs.valid, count)
    return top, inputs.valid & ~top, budget - count


def _space(inputs: SelectionInputs, params: SelectionParams) -> Tensor:
    return inputs.features if params.partition_space == "features" else inputs.projected


def _clusters(
    cosine: Tensor, scores: Tensor, free: Tensor, count: int, iterations: int, start: str
) -> tuple[Tensor, Tensor]:
    """Spherical k-means as selection.representatives has it, from a choice of starts.

    Returns:
        members [B, N, count] bool, and closest [B, N, count] bool: the member nearest to each centroid.
    """
    number = torch.arange(count, device=free.device)
    if start == "scored":
        members = one_hot(top_k(torch.where(free, scores, LOW), count), free.shape[1]).transpose(1, 2)
    elif start == "random":
        order = torch.from_numpy(np.random.default_rng(0).random(free.shape[1]).astype(np.float32))
        members = one_hot(top_k(torch.where(free, order, LOW), count), free.shape[1]).transpose(1, 2)
    elif start == "farthest":
        members = _farthest(cosine, scores, free, count)
    else:
        free_count = free.float().sum(1, keepdim=True)  # [B, 1]
        members = members_at(free, torch.floor((2 * number + 1).float() * free_count / (2 * count)))
    members = members & free[:, :, None]
    for _ in range(iterations):
        nearest = first_largest(similarity_to_centroids(cosine, members), dim=2)  # [B, N]
        members = one_hot(nearest, count) & free[:, :, None]
    similarity = torch.where(members, similarity_to_centroids(cosine, members), LOW)
    closest = one_hot(first_largest(similarity, dim=1), free.shape[1]).transpose(1, 2) & members
    return members, closest


def _farthest(cosine: Tensor, scores: Tensor, free: Tensor, count: int) -> Tensor:
    """Farthest-first: the best-scored free token, then always the one least like those before. [B, N, count]."""
    picks = [torch.where(free, scores, LOW).argmax(1, keepdim=True)]  # [B, 1]
    closest = torch.full_like(scores, -2.0)
    for _ in range(count - 1):
        closest = torch.maximum(closest, take(cosine, picks[-1])[:, 0])
        picks.append(torch.where(free, -closest, LOW).argmax(1, keepdim=True))
    return one_hot(torch.cat(picks, 1), scores.shape[1]).transpose(1, 2)


def _lloyd(
    inputs: SelectionInputs, scores: Tensor, budget: int, params: SelectionParams, start: str = "even"
) -> Selection:
    """As flashvlm, from a choice of starts."""
    top, free, count = _split(inputs, scores, budget, params)
    if count == 0:
        return finish(inputs, top, top, scores, budget)
    _, closest = _clusters(gram(_space(inputs, params)), scores, free, count, params.iterations, start)
    return finish(inputs, top | closest.any(2), top, scores, budget)


def _bipartite(inputs: SelectionInputs, scores: Tensor, budget: int, params: SelectionParams) -> Selection:
    """The published deduplication in place of k-means."""
    top, free, count = _split(inputs, scores, budget, params)
    most = scores.shape[1] - (budget - count)
    rest = deduplicate(_space(inputs, params), scores, free, most, count)
    return finish(inputs, top | rest, top, scores, budget)


def _merge(inputs: SelectionInputs, scores: Tensor, budget: int, params: SelectionParams) -> Selection:
    """Every representative becomes the mean of its cluster."""
    top, free, count = _split(inputs, scores, budget, params)
    if count == 0:
        return finish(inputs, top, top, scores, budget)
    members, closest = _clusters(gram(_space(inputs, params)), scores, free, count, params.iterations, "even")
    chosen = finish(inputs, top | closest.any(2), top, scores, budget)
    group = members.float().transpose(1, 2)  # [B, C, N]
    mean = group @ inputs.projected.float() / group.sum(2, keepdim=True).clamp_min(1)
    which = take(closest.float(), chosen.kept)  # [B, K, C], the cluster each kept token stands for
    return _replaced(chosen, which.sum(2) > 0, which @ mean)


def _merge_all(inputs: SelectionInputs, scores: Tensor, budget: int, params: SelectionParams) -> Selection:
    """Every dropped token joins the kept one it resembles most, which becomes their mean, itself half of it."""
    chosen = _lloyd(inputs, scores, budget, params)
    cosine = gram(_space(inputs, params))
    kept = mask_of(chosen.kept, scores.shape[1])  # [B, N]
    to_kept = take(cosine, chosen.kept).transpose(1, 2)  # [B, N, K]
    joins = one_hot(first_largest(to_kept, dim=2), budget) & (inputs.valid & ~kept)[:, :, None]
    group = joins.float().transpose(1, 2)  # [B, K, N]
    size = group.sum(2, keepdim=True)
    mean = group @ inputs.projected.float() / size.clamp_min(1)
    return _replaced(chosen, size[:, :, 0] > 0, (mean + chosen.visual_embeds.float()) / 2)


def _replaced(chosen: Selection, where: Tensor, embeds: Tensor) -> Selection:
    new = torch.where(where[:, :, None], embeds.to(chosen.visual_embeds.dtype), chosen.visual_embeds)
    return chosen._replace(visual_embeds=new)


def _spread(inputs: SelectionInputs, scores: Tensor, budget: int, params: SelectionParams) -> Selection:
    """The whole budget by score in units of its spread, less the cosine to any better-scored token; one pass."""
    cosine = gram(_space(inputs, params))
    better = (scores[:, None, :] > scores[:, :, None]) & inputs.valid[:, None, :]  # [B, N, N]
    like = torch.where(better, cosine, -1.0).amax(2)  # [B, N]
    real = inputs.valid.float()
    count = real.sum(1, keepdim=True).clamp_min(1)
    mean = (scores * real).sum(1, keepdim=True) / count
    deviation = ((scores - mean).square() * real).sum(1, keepdim=True).div(count).clamp_min(TINY).sqrt()
    chosen = best_of((scores - mean) / deviation - 2 * like, inputs.valid, budget)
    return finish(inputs, chosen, chosen, scores, budget)


def _coverage(inputs: SelectionInputs, scores: Tensor, budget: int, params: SelectionParams) -> Selection:
    """Facility location in place of k-means: greedily the token that makes most of the free ones better covered."""
    top, free, count = _split(inputs, scores, budget, params)
    cosine = gram(_space(inputs, params))
    covered = torch.where(top[:, None, :], cosine, 0.0).amax(2)  # [B, N]
    open_ = free
    for _ in range(count):
        gain = ((cosine - covered[:, None, :]).clamp_min(0) * free[:, None, :].float()).sum(2)
        pick = torch.where(open_, gain, LOW).argmax(1, keepdim=True)  # [B, 1]
        covered = torch.maximum(covered, take(cosine, pick)[:, 0])
        open_ = open_ & ~mask_of(pick, scores.shape[1])
    return finish(inputs, top | (free & ~open_), top, scores, budget)


def _quota(inputs: SelectionInputs, scores: Tensor, budget: int, params: SelectionParams) -> Selection:
    """The top by each question token in turn instead of by the pooled score, so that no word takes it all."""
    _, _, count = _split(inputs, scores, budget, params)
    wanted = budget - count
    centred = _contrast_of_words(inputs)  # [B, N, L]
    real = inputs.valid[:, :, None] & inputs.query_mask[:, None, :]
    # Between a word's own scale, on which all words weigh the same, and cosines, on which flat words weigh nothing.
    height = centred.amax(1, keepdim=True).clamp_min(TINY)
    place = torch.where(real, centred / height.sqrt(), LOW).amax(2)  # [B, N]
    top = best_of(place, inputs.valid, wanted)
    if count == 0:
        return finish(inputs, top, top, scores, budget)
    free = inputs.valid & ~top
    _, closest = _clusters(gram(_space(inputs, params)), scores, free, count, params.iterations, "even")
    return finish(inputs, top | closest.any(2), top, scores, budget)


def _dpp(inputs: SelectionInputs, scores: Tensor, budget: int, params: SelectionParams) -> Selection:
    """The whole budget as cdpruner does, by these scores."""
    best = torch.where(inputs.valid, scores, LOW).amax(1, keepdim=True)
    return cdpruner(inputs, budget, params, lambda *_: scores - best)


REST: dict[str, Rest] = {
    "lloyd": _lloyd,
    "lloyd-random": partial(_lloyd, start="random"),
    "lloyd-scored": partial(_lloyd, start="scored"),
    "lloyd-farthest": partial(_lloyd, start="farthest"),
    "bipartite": _bipartite,
    "merge": _merge,
    "merge-all": _merge_all,
    "spread": _spread,
    "coverage": _coverage,
    "quota": _quota,
    "dpp": _dpp,
}
