"""All tokens."""

from __future__ import annotations

import torch

from flashvlm_export.selection.method import Method, Nodes, Selection, SelectionInputs, SelectionParams


def none(inputs: SelectionInputs, budget: int, params: SelectionParams, nodes: Nodes) -> Selection:
    """All N tokens as they are, whatever the budget."""
    projected, valid = inputs.projected, inputs.valid
    kept = torch.arange(valid.shape[1], device=valid.device).expand_as(valid).contiguous()
    nothing = torch.zeros_like(inputs.saliency, dtype=torch.float32)
    return Selection(projected.clone(), kept, torch.zeros_like(valid), nothing)


METHOD = Method("none", none, "all tokens", keeps_all=True)
