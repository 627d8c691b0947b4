"""Which visual tokens a tower itself attends to: the row of CLS, or where there is none what each token receives."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from flashvlm_export.graph.dialects import RECEIVED


def of_cls(weights: Tensor) -> Tensor:
    """Attention weights [B,H,1 or T,T] of a block -> saliency [B,T-1], averaged over heads.

    arXiv 2512.20561, section 3. The exported attention gives the first row alone, which is that of CLS.
    """
    return weights.mean(dim=1)[:, 0, 1:]


def of_received(weights: Tensor) -> Tensor:
    """Attention weights [B,H,T,T], or what ``receives`` gives of them [B,1,1,T] -> saliency [B,T]: what each token
    receives, averaged over heads and queries."""
    return weights.mean(dim=(1, 2))


def receives(attention: nn.Module) -> None:
    """Makes one attention layer give what each token receives, [B,1,1,T], in the place of its weights."""
    layer: Any = attention
    if layer.config._attn_implementation.endswith(RECEIVED):
        return  # the tower is traced for several sizes
    layer.config = copy.copy(layer.config)  # of this layer alone: the others share theirs
    layer.config._attn_implementation_internal += RECEIVED


def merged(tokens: Tensor, rows: int, columns: int, factor: int) -> Tensor:
    """Patches [B,rows*columns,D] -> the mean of each factor x factor of them, [B,n,D] in reading order."""
    grid = tokens.unflatten(1, (rows // factor, factor, columns // factor, factor))
    return grid.mean(dim=(2, 4)).flatten(1, 2)
