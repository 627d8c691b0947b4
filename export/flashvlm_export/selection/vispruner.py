"""VisPruner (arXiv 2412.01818): the most salient tokens, and what deduplication leaves of the rest."""

from __future__ import annotations

import torch
from torch import Tensor

from flashvlm_export.selection.method import Method, Nodes, Selection, SelectionInputs, SelectionParams
from flashvlm_export.selection.ops import LOW, best_of, finish, gram, top_k
from flashvlm_export.selection.score import log_saliency

MERGE_STEP = 8  # tokens dropped per step of the bipartite deduplication


def vispruner(inputs: SelectionInputs, budget: int, params: SelectionParams, nodes: Nodes) -> Selection:
    """Half by saliency, the rest by deduplication. No question is read."""
    return top_and_deduplicated(inputs, log_saliency(inputs.saliency, inputs.valid, params.eps), budget)


def top_and_deduplicated(inputs: SelectionInputs, scores: Tensor, budget: int) -> Selection:
    """Half of the budget by scores [B, N], the rest by ``deduplicate`` of the others."""
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


METHOD = Method(
    "vispruner",
    vispruner,
    "the most salient tokens, and what deduplication leaves of the others",
    paper="2412.01818",
    reads=frozenset({"features", "saliency"}),
    params=("eps",),
    score="log",
    stable=False,
)
