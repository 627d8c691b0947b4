"""DivPrune (arXiv 2503.02175): the most diverse tokens."""

from __future__ import annotations

import torch

from flashvlm_export.selection.method import Method, Nodes, Selection, SelectionInputs, SelectionParams
from flashvlm_export.selection.ops import HIGH, LOW, finish, first_largest, gram, row_at


def divprune(inputs: SelectionInputs, budget: int, params: SelectionParams, nodes: Nodes) -> Selection:
    """Greedy max-min diversity of the projected tokens, distance 1 - cosine.

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
    gap = torch.where(valid, row_at(distance, first), LOW)  # [B, N], distance to the nearest chosen token
    for _ in range(budget - 1):
        gap = torch.minimum(gap, row_at(distance, gap.argmax(1)))
    chosen = valid & (gap == LOW)
    return finish(inputs, chosen, torch.zeros_like(valid), torch.zeros_like(gap), budget)


METHOD = Method(
    "divprune",
    divprune,
    "the most diverse tokens, greedily by their least distance",
    paper="2503.02175",
    reads=frozenset({"projected"}),
)
