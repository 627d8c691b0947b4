"""Selection methods: which visual tokens a budget keeps. One file a method; ``METHODS`` knows what each reads.

Example:
    >>> import torch
    >>> from flashvlm_export.selection import select
    >>> tokens, features = torch.randn(1, 576, 64), torch.randn(1, 576, 32)
    >>> select(tokens, features, torch.rand(1, 576), torch.randn(1, 9, 64), budget=64).kept.shape
    torch.Size([1, 64])
"""

from flashvlm_export.selection.flashvlm import masked_lloyd
from flashvlm_export.selection.method import (
    LloydFn,
    Method,
    Nodes,
    ScoreFn,
    Selection,
    SelectionInputs,
    SelectionParams,
)
from flashvlm_export.selection.registry import METHODS, TORCH, select
from flashvlm_export.selection.score import text_guided_score

__all__ = [
    "METHODS",
    "TORCH",
    "LloydFn",
    "Method",
    "Nodes",
    "ScoreFn",
    "Selection",
    "SelectionInputs",
    "SelectionParams",
    "masked_lloyd",
    "select",
    "text_guided_score",
]
