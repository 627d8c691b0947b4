"""The selection methods FlashVLM is compared with, from their papers, for the same inputs and outputs.

Each is a method in the sense of selection.py: (inputs, budget, params, score) -> Selection. The sequential
ones are unrolled, with a number of steps fixed by N and the budget. Correctness first: these are yardsticks.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from flashvlm_export.selection.ops import (
    HIGH,
    LOW,
    ScoreFn,
    Selection,
    SelectionInputs,
    SelectionParams,
    best_of,
    finish,
    first_largest,
    gram,
    holds,
    log_saliency,
    members_at,
    one_hot,
    take,
    top_k,
    unit,
)

MERGE_STEP = 8  # tokens dropped per step of the bipartite deduplication
PUBLISHED_TEMPERATURE = 0.01 / 2.5  # softmax(r / 0.01) ** 2.5, see text_guided_score
PUBLISHED_POOL = 0.05
GAIN_FLOOR = 1e-6  # a DPP gain below this is float32 rounding: the kernel has no rank left


def flashvlm_published(inputs: SelectionInputs, budget: int, params: SelectionParams, score: ScoreFn) -> Selection:
    """FlashVLM as its authors' code has it (arXiv 2512.20561): half by score, the rest by deduplication.

    Their 0.995-quantile step multiplies the sharpened relevance of the top 0.5 % of tokens by ten. Pass the
    whole prompt as query to match them. The temperatures are theirs, whatever params say.
    """
    projected, _, saliency, query, query_mask, valid = inputs
    scores = score(
        projected, query, query_mask, saliency, valid,
        params.eta, PUBLISHED_TEMPERATURE, PUBLISHED_POOL, params.eps,
    )  # fmt: skip
    bonus = _most_relevant(_relevance(inputs, score), query_mask, valid)
    scores = scores + params.eta * math.log(10.0) * bonus.float()
    return _top_and_deduplicated(inputs, scores, budget)


def vispruner(inputs: SelectionInputs, budget: int, params: SelectionParams, score: ScoreFn) -> Selection:
    """VisPruner (arXiv 2412.01818): half by saliency, the rest by deduplication. No question is read."""
    return _top_and_deduplicated(inputs, log_saliency(inputs.saliency, inputs.valid, params.eps), budget)


def _relevance(inputs: SelectionInputs, score: ScoreFn) -> Tensor:
    """r - max r, [B, N] float32, from the fused score: no saliency, no sharpening, a floor out of reach."""
    projected, _, saliency, query, query_mask, valid = inputs
    return score(projected, query, query_mask, saliency, valid, 1.0, 1.0, PUBLISHED_POOL, 1e-6)


def _most_relevant(relevance: Tensor, query_mask: Tensor, valid: Tensor) -> Tensor:
    """Mask [B, N] of the most relevant 0.5 % of the valid tokens, rounded up; none in a row without query."""
    tokens = relevance.shape[1]
    order = top_k(torch.where(valid, relevance, LOW), math.ceil(tokens / 200))  # [B, M]
    share = torch.ceil(valid.float().sum(1, keepdim=True) / 200)  # [B, 1]
    share = torch.where(query_mask.any(1, keepdim=True), share, 0.0)
    within = torch.arange(order.shape[1], device=order.device) < share  # [B, M]
    return (one_hot(order, tokens) & within[:, :, None]).any(1)


def _top_and_deduplicated(inputs: SelectionInputs, scores: Tensor, budget: int) -> Selection:
    top = best_of(scores, inputs.valid, budget // 2)
    rest = deduplicate(
        inputs.features, scores, inputs.valid & ~top, scores.shape[1] - budget // 2, budget - budget // 2
    )
    return finish(inputs, top | rest, top, scores, budget)


def deduplicate(features: Tensor, scores: Tensor, free: Tensor, most: int, target: int) -> Tensor:
    """Thin the free tokens down to ``target`` by bipartite matching, MERGE_STEP at a time (arXiv 2412.01818).

    Starting in descending order of score, each step splits the order into even and odd places and drops the
    even tokens with the largest cosine to any odd one; the next order is the kept evens, most duplicated
    first, then the odds. Tokens carry their place in the order instead of being moved, so that each row
    counts its own free tokens and padding changes nothing.

    Args:
        features: [B, N, Dv] float. scores: [B, N] float32. free: [B, N] bool, at most ``most`` true a row.

    Returns:
        [B, N] bool: min(target, free) tokens a row.
    """
    cosine = gram(features)
    place = torch.where(free, _rank(torch.where(free, scores, LOW)), -1.0)  # [B, N], -1 once dropped
    remaining = free.float().sum(1, keepdim=True)  # [B, 1]
    for _ in range(deduplication_steps(most, target)):
        alive = place >= 0
        even = alive & (torch.floor(place / 2) * 2 == place)
        odd = alive & ~even
        duplication = torch.where(odd[:, None, :], cosine, -2.0).amax(2)  # -2: below any cosine
        key = torch.where(even, duplication, torch.where(alive, -3.0 - place, LOW))
        # An even share is all that one step can drop; a row that has reached the target drops none.
        drop = torch.minimum((remaining - target).clamp(0, MERGE_STEP), torch.ceil(remaining / 2))
        place = torch.where(alive, _rank(key) - drop, -1.0)
        remaining = remaining - drop
    return place >= 0


def deduplication_steps(count: int, target: int) -> int:
    """Steps that take ``count`` tokens to ``target``; fewer tokens never take more steps."""
    steps = 0
    while count > target:
        count -= min(MERGE_STEP, count - target, (count + 1) // 2)
        steps += 1
    return steps


def _rank(key: Tensor) -> Tensor:
    """Place of each token in descending order of key, [B, N] float32."""
    tokens = key.shape[1]
    return top_k(-top_k(key, tokens).float(), tokens).float()  # sorting a permutation inverts it


def divprune(inputs: SelectionInputs, budget: int, params: SelectionParams, score: ScoreFn) -> Selection:
    """DivPrune (arXiv 2503.02175): greedy max-min diversity of the projected tokens, distance 1 - cosine.

    The first token is the one whose nearest neighbour is farthest. Reads neither saliency nor the question.
    """
    tokens, valid = inputs.projected.shape[1], inputs.valid
    self_pair = torch.eye(tokens, dtype=torch.bool, device=valid.device)
    distance = 1 - gram(inputs.projected)  # [B, N, N]
    nearest = torch.where(valid[:, None, :] & ~self_pair, distance, HIGH).amin(2)
    # A token at distance LOW from itself leaves the running once chosen, however close the others are.
    distance = torch.where(self_pair, LOW, distance)
    # Two mutual neighbours tie here; from then on only identical tokens do, and a plain argmax will serve.
    first = first_largest(torch.where(valid, nearest, LOW), dim=1).long()  # [B]
    gap = torch.where(valid, _row(distance, first), LOW)  # [B, N], distance to the nearest chosen token
    for _ in range(budget - 1):
        gap = torch.minimum(gap, _row(distance, gap.argmax(1)))
    chosen = valid & (gap == LOW)
    return finish(inputs, chosen, torch.zeros_like(valid), torch.zeros_like(gap), budget)


def _row(matrix: Tensor, index: Tensor) -> Tensor:
    """One row of each batch item: [B, M, N], [B] int64 -> [B, N]."""
    return take(matrix, index[:, None])[:, 0]


def cdpruner(inputs: SelectionInputs, budget: int, params: SelectionParams, score: ScoreFn) -> Selection:
    """CDPruner (arXiv 2506.10967): greedy MAP of a determinantal point process conditioned on the question.

    Kernel diag(q) cos diag(q) over the projected tokens with q the min-max of relevance, 1 where relevance is
    constant. Greedy MAP by incremental Cholesky (Chen et al., arXiv 1709.05135): the gain of a token is what
    is left of its diagonal. Where the kernel runs out of rank, the most relevant of the rest fill the budget.
    """
    valid = inputs.valid
    relevance = _relevance(inputs, score)  # r - max r
    span = -torch.where(valid, relevance, 0.0).amin(1, keepdim=True)
    quality = torch.where(valid, 1 + relevance / span.clamp_min(1.0 / HIGH), 0.0)  # [B, N]
    kernel = quality[:, :, None] * gram(inputs.projected) * quality[:, None, :]  # [B, N, N]

    gain = torch.where(valid, quality * quality, LOW)
    factor = torch.zeros_like(quality)[:, None]  # [B, t, N], rows of the Cholesky factor; the zero row is inert
    for _ in range(budget):
        pick = gain.argmax(1)  # [B]
        picked = one_hot(pick[:, None], gain.shape[1])  # [B, 1, N]
        best = gain.amax(1, keepdim=True)  # [B, 1]
        column = torch.where(picked, factor, 0.0).sum(2, keepdim=True)  # [B, t, 1]
        residual = _row(kernel, pick) - (factor * column).sum(1)
        usable = best > GAIN_FLOOR
        row = torch.where(usable, residual / best.clamp_min(GAIN_FLOOR).sqrt(), 0.0)  # [B, N]
        gain = torch.where(picked[:, 0] & usable, LOW, gain - row * row)
        factor = torch.cat([factor, row[:, None]], 1)
    chosen = valid & (gain == LOW)
    return finish(inputs, chosen, torch.zeros_like(valid), relevance, budget)


def visionzip(inputs: SelectionInputs, budget: int, params: SelectionParams, score: ScoreFn) -> Selection:
    """VisionZip (arXiv 2412.04467): 54/64 of the budget by saliency, the rest merged from all other tokens.

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


def trim(inputs: SelectionInputs, budget: int, params: SelectionParams, score: ScoreFn) -> Selection:
    """TRIM (arXiv 2409.10994): budget - 1 tokens by relevance, and the mean of all others as the last one.

    The mean takes the index of the most relevant token it stands for, so that indices stay distinct.
    """
    relevance = _relevance(inputs, score)
    top = best_of(relevance, inputs.valid, budget - 1)
    dropped = inputs.valid & ~top
    selection = finish(inputs, top, top, relevance, budget)
    weight = dropped.float()[:, None]  # [B, 1, N]
    mean = weight @ inputs.projected.float() / weight.sum(2, keepdim=True).clamp_min(1)  # [B, 1, D]
    embeds = torch.where(
        holds(dropped, selection.kept)[:, :, None], mean.to(inputs.projected.dtype), selection.visual_embeds
    )
    return selection._replace(visual_embeds=embeds)


def uniform(inputs: SelectionInputs, budget: int, params: SelectionParams, score: ScoreFn) -> Selection:
    """Tokens evenly spaced on the square patch grid, or along the raster where N is no square."""
    valid, tokens = inputs.valid, inputs.valid.shape[1]
    chosen = torch.zeros(tokens, dtype=torch.bool)
    chosen[evenly_spaced(tokens, budget)] = True
    # Should padding hold some of them, their replacements are spread as well: a golden-ratio sequence.
    spare = torch.from_numpy(np.arange(tokens) * 0.6180339887498949 % 1).float()
    nothing = torch.zeros_like(inputs.saliency, dtype=torch.float32)
    return finish(
        inputs,
        chosen.to(valid.device) & valid,
        torch.zeros_like(valid),
        nothing,
        budget,
        spare=nothing + spare.to(valid.device),
    )


def evenly_spaced(tokens: int, budget: int) -> list[int]:
    """Ascending indices of ``budget`` cells spread over a square grid, or over a line if N is no square."""
    side = math.isqrt(tokens)
    if side * side != tokens:
        return _centres(tokens, budget)
    rows = round(math.sqrt(budget))
    widths = np.diff([budget * row // rows for row in range(rows + 1)])
    return [
        row * side + column
        for row, width in zip(_centres(side, rows), widths.tolist(), strict=True)
        for column in _centres(side, width)
    ]


def _centres(length: int, count: int) -> list[int]:
    return [(2 * i + 1) * length // (2 * count) for i in range(count)]


def random(inputs: SelectionInputs, budget: int, params: SelectionParams, score: ScoreFn) -> Selection:
    """The head of a seeded permutation, the same for every row and a constant of the graph."""
    valid, tokens = inputs.valid, inputs.valid.shape[1]
    # numpy, not torch: under torch.export a torch generator is traced as a random node.
    order = np.random.default_rng(params.seed).permutation(tokens).astype(np.float32)
    nothing = torch.zeros_like(inputs.saliency, dtype=torch.float32)
    unchosen = torch.zeros_like(valid)
    return finish(inputs, unchosen, unchosen, nothing, budget, spare=nothing + torch.from_numpy(order).to(valid.device))


def none(inputs: SelectionInputs, budget: int, params: SelectionParams, score: ScoreFn) -> Selection:
    """All N tokens as they are, whatever the budget."""
    projected, valid = inputs.projected, inputs.valid
    kept = torch.arange(valid.shape[1], device=valid.device).expand_as(valid).contiguous()
    nothing = torch.zeros_like(inputs.saliency, dtype=torch.float32)
    return Selection(projected.clone(), kept, torch.zeros_like(valid), nothing)
