"""Tokens at random."""

from __future__ import annotations

import numpy as np
import torch

from flashvlm_export.selection.method import Method, Nodes, Selection, SelectionInputs, SelectionParams
from flashvlm_export.selection.ops import finish


def random(inputs: SelectionInputs, budget: int, params: SelectionParams, nodes: Nodes) -> Selection:
    """The head of a seeded permutation, the same for every row and a constant of the graph."""
    valid, tokens = inputs.valid, inputs.valid.shape[1]
    # numpy, not torch: under torch.export a torch generator is traced as a random node.
    order = np.random.default_rng(params.seed).permutation(tokens).astype(np.float32)
    nothing = torch.zeros_like(inputs.saliency, dtype=torch.float32)
    unchosen = torch.zeros_like(valid)
    return finish(inputs, unchosen, unchosen, nothing, budget, spare=nothing + torch.from_numpy(order).to(valid.device))


METHOD = Method("random", random, "tokens at random, the same ones for every image", params=("seed",))
