"""The operations that selection methods are made of.

Everything here is batched in dimension 0, computes in float32 and is traceable: no data-dependent shape, no
scatter, no boolean indexing, so that ONNX Runtime and TensorRT run the same graph and keep the same tokens.
B batch, N visual tokens, D language-model width, Dv vision width, L text tokens, K budget.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashvlm_export.selection.method import Selection, SelectionInputs

# Finite stand-ins for infinity: an actual infinity turns into NaN in the first 0 * inf or inf - inf.
LOW, HIGH = -1e30, 1e30
TINY = 1e-12  # smallest norm that is divided by
TIE = 1e-5  # cosines closer than this count as equal: above float32 rounding, below what means anything


def unit(x: Tensor) -> Tensor:
    """x / ||x|| over the last dimension, in float32; a zero vector stays zero."""
    x = x.float()
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(TINY)


def gram(x: Tensor) -> Tensor:
    """Cosine of every pair of tokens: [B, N, D] -> [B, N, N] float32."""
    x = unit(x)
    return x @ x.transpose(1, 2)


def top_k(key: Tensor, k: int) -> Tensor:
    """Indices [B, k] of the k largest of key [B, N], best first; equal keys in order of index.

    ONNX TopK breaks ties by lower index, torch.topk does not: eager mode sorts, so that both keep the same.
    TensorRT takes a constant k of at most 3840.
    """
    if torch.compiler.is_exporting():
        return torch.topk(key, k, dim=1).indices
    return torch.sort(key, dim=1, descending=True, stable=True).indices[:, :k]


def first_largest(x: Tensor, dim: int) -> Tensor:
    """Index, float32, of the largest along a dimension; the first of those within TIE of it.

    Exact ties are common (both members of a pair are equally close to its centroid) and an argmax would leave
    them to rounding, which differs between torch, ONNX Runtime and TensorRT.
    """
    number = torch.arange(x.shape[dim], dtype=torch.float32, device=x.device)
    number = number.view([-1 if axis == dim else 1 for axis in range(x.dim())])
    return torch.where(x >= x.amax(dim, keepdim=True) - TIE, number, HIGH).amin(dim)


def one_hot(index: Tensor, size: int) -> Tensor:
    """Indices of any dtype [B, M] -> [B, M, size] bool."""
    return index[:, :, None] == torch.arange(size, dtype=index.dtype, device=index.device)


def mask_of(index: Tensor, size: int) -> Tensor:
    """The set of the indices: [B, M] -> [B, size] bool."""
    return one_hot(index, size).any(1)


def best_of(score: Tensor, valid: Tensor, k: int) -> Tensor:
    """Mask [B, N] of the k best-scored valid tokens, of all valid ones where there are fewer."""
    if k == 0:  # no zero-width TopK in the graph
        return torch.zeros_like(valid)
    return mask_of(top_k(torch.where(valid, score, LOW), k), score.shape[1]) & valid


def members_at(mask: Tensor, ranks: Tensor) -> Tensor:
    """One-hot of the ranks[j]-th token of the mask in raster order: [B, N], [B, M] -> [B, N, M] bool."""
    rank = mask.float().cumsum(1) - 1
    return (rank[:, :, None] == ranks[:, None, :]) & mask[:, :, None]


def take(tokens: Tensor, index: Tensor) -> Tensor:
    """Rows of each batch item: [B, N, D], [B, K] int64 -> [B, K, D]."""
    return tokens.gather(1, index[:, :, None].expand(-1, -1, tokens.shape[2]))


def row_at(matrix: Tensor, index: Tensor) -> Tensor:
    """One row of each batch item: [B, M, N], [B] int64 -> [B, N]."""
    return take(matrix, index[:, None])[:, 0]


def holds(mask: Tensor, index: Tensor) -> Tensor:
    """mask at the indices: [B, N] bool, [B, K] int64 -> [B, K] bool."""
    return mask.float().gather(1, index) > 0


def finish(
    inputs: SelectionInputs,
    chosen: Tensor,
    top: Tensor,
    scores: Tensor,
    budget: int,
    spare: Tensor | None = None,
) -> Selection:
    """A selection of what ``fill`` makes of a choice. top: [B, N] bool, those of the chosen that were so by score."""
    kept = fill(inputs.valid, chosen, scores if spare is None else spare, budget)
    return Selection(take(inputs.projected, kept), kept, holds(top, kept), scores)


def fill(valid: Tensor, chosen: Tensor, spare: Tensor, budget: int) -> Tensor:
    """Exactly ``budget`` distinct ascending tokens [B, K] out of a choice of at most that many.

    Where the choice falls short (an empty cluster, a method that ran out of rank), the best spares fill it;
    where there are fewer valid tokens than budget, invalid ones do. Since nothing chosen can be crowded out,
    the chosen need no order among themselves, and every spare keeps the float32 resolution of its score.

    Args:
        valid: [B, N] bool. chosen: [B, N] bool, at most ``budget`` true a row. spare: [B, N] float32, what to fill by.
    """
    key = torch.where(valid, torch.where(chosen, HIGH, spare), LOW)
    kept = top_k(key, budget)
    # Ascending by a float TopK: indices are exact in float32 and TensorRT has no integer sort.
    return (-torch.topk(-kept.float(), budget, dim=1).values).long()
