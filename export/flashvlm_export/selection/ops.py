"""What every selection method is made of: its types, the text-guided score and a few static-shape operations.

Everything here is batched in dimension 0, computes in float32 and is traceable: no data-dependent shape, no
scatter, no boolean indexing, so that ONNX Runtime and TensorRT run the same graph and keep the same tokens.
B batch, N visual tokens, D language-model width, Dv vision width, L text tokens, K budget.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from flashvlm.errors import SelectionError

# Finite stand-ins for infinity: an actual infinity turns into NaN in the first 0 * inf or inf - inf.
LOW, HIGH = -1e30, 1e30
TINY = 1e-12  # smallest norm that is divided by
TIE = 1e-5  # cosines closer than this count as equal: above float32 rounding, below what means anything


@dataclass(frozen=True)
class SelectionParams:
    """The constants of a method; they are baked into the exported graph.

    Args:
        eta: weight of the question against saliency, 0 to 1.
        pool_temperature: softness of the pooling of a token's similarities over the question's tokens; the methods
            of other authors have their own.
        temperature: sharpness of relevance when it is fused with saliency; flashvlm-published has its own.
        eps: floor of normalised saliency and of sharpened relevance.
        top_ratio: share of the budget that goes to the best scores; the rest represents the background.
        iterations: Lloyd iterations of the background partition.
        seed: of the method ``random``.
        partition_space: partition the background over ``features`` or over ``projected`` tokens.

    Raises:
        SelectionError: a value is outside its range.
    """

    eta: float = 0.5
    pool_temperature: float = 1.0
    temperature: float = 0.016
    eps: float = 1e-6
    top_ratio: float = 0.5
    iterations: int = 4
    seed: int = 0
    partition_space: str = "features"

    def __post_init__(self) -> None:
        self._check_number("eta", 0.0, 1.0)
        self._check_number("pool_temperature", 1e-6, 1e6)
        self._check_number("temperature", 1e-6, 1e6)
        self._check_number("eps", 1e-30, 0.5)
        self._check_number("top_ratio", 0.0, 1.0)
        self._check_number("iterations", 0, 100)
        self._check_number("seed", 0, 2**63 - 1)
        if self.partition_space not in ("features", "projected"):
            raise SelectionError(f"partition_space: expected 'features' or 'projected', found {self.partition_space!r}")

    def _check_number(self, name: str, low: float, high: float) -> None:
        """An integer range asks for an integer; a float range takes either. NaN fails every comparison."""
        value = getattr(self, name)
        wanted, kind = (int, "an integer") if isinstance(low, int) else ((int, float), "a number")
        if isinstance(value, bool) or not isinstance(value, wanted) or not low <= value <= high:
            raise SelectionError(f"{name}: expected {kind} from {low:g} to {high:g}, found {value!r}")


class SelectionInputs(NamedTuple):
    """What a method chooses from. Any float dtype; masks are bool."""

    projected: Tensor  # [B, N, D] visual tokens in the language model's embedding space
    features: Tensor  # [B, N, Dv] the same tokens in the vision tower
    saliency: Tensor  # [B, N] question-free importance, any scale
    query: Tensor  # [B, L, D] embeddings of the question's tokens
    query_mask: Tensor  # [B, L] bool, False for padding
    valid: Tensor  # [B, N] bool, False for padding


class Selection(NamedTuple):
    """What a method chose."""

    visual_embeds: Tensor  # [B, K, D] in the dtype of projected
    kept: Tensor  # [B, K] int64, ascending, distinct
    is_top: Tensor  # [B, K] bool: chosen by score, not for diversity
    scores: Tensor  # [B, N] float32, finite; zeros where the method has no score


Scalar: TypeAlias = float | Tensor
# text_guided_score or a stand-in with its signature, such as one that emits a single graph node.
ScoreFn: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Scalar, Scalar, Scalar, Scalar], Tensor]


def text_guided_score(
    projected: Tensor,
    query: Tensor,
    query_mask: Tensor,
    saliency: Tensor,
    valid: Tensor,
    eta: Scalar,
    temperature: Scalar,
    pool_temperature: Scalar,
    eps: Scalar,
) -> Tensor:
    """How much each visual token matters for this image and this question (closed form of arXiv 2512.20561).

        S    unit(projected) unit(query)^T
        r_i  sum_j softmax_j(S_ij / pool_temperature) S_ij
        a_i  max(minmax(saliency)_i, eps)
        l_i  (1 - eta) ln a_i + eta max((r_i - max r) / temperature, ln eps)

    The published softmax(r / 0.01) ** 2.5 has the same ranks at temperature 0.01 / 2.5, but underflows.

    A row without query tokens has relevance 0 everywhere and so falls back on saliency; constant saliency
    falls back on relevance. Maxima and minima are over valid tokens; an invalid token scores ln eps, the
    least there is.

    Args:
        projected: [B, N, D] float. query: [B, L, D] float. query_mask: [B, L] bool.
        saliency: [B, N] float. valid: [B, N] bool.
        eta, temperature, pool_temperature, eps: floats, or 0-d float32 tensors when this is traced into the
            body of an ONNX function whose attributes they are.

    Returns:
        [B, N] float32 log-scores, finite for finite inputs.
    """
    relevance = pooled_similarity(projected, query, query_mask, pool_temperature)  # [B, N]
    return fuse(relevance, saliency, valid, eta, temperature, eps)


def fuse(relevance: Tensor, saliency: Tensor, valid: Tensor, eta: Scalar, temperature: Scalar, eps: Scalar) -> Tensor:
    """Relevance r and saliency a, [B, N] each, as one log-score: l of text_guided_score."""
    eta, temperature, eps = (
        torch.as_tensor(value, dtype=torch.float32, device=relevance.device) for value in (eta, temperature, eps)
    )
    floor = torch.log(eps)
    best = torch.where(valid, relevance, LOW).amax(1, keepdim=True)
    sharp = torch.maximum((relevance - best) / temperature, floor)
    fused = (1 - eta) * log_saliency(saliency, valid, eps) + eta * sharp
    return torch.where(valid, fused, floor)


def pooled_similarity(projected: Tensor, query: Tensor, query_mask: Tensor, pool_temperature: Scalar) -> Tensor:
    """Similarity of each visual token to the question, [B, N] float32 in [-1, 1]: r of text_guided_score."""
    similarity = unit(projected) @ unit(query).transpose(1, 2)  # [B, N, L]
    asked = query_mask[:, None, :]
    weights = torch.where(asked, similarity / pool_temperature, LOW).softmax(2)
    # Masked again after the softmax, which is uniform in a row whose query is all padding.
    return torch.where(asked, weights * similarity, 0.0).sum(2)


def contrast_similarity(projected: Tensor, query: Tensor, query_mask: Tensor, valid: Tensor) -> Tensor:
    """How much each visual token stands out in what the question's words single out, [B, N] float32.

        C    S less its mean over the valid visual tokens, with S as in text_guided_score
        h_j  max_i C_ij, by how much the best token of a word stands out
        r_i  sum_j h_j^2 C_ij / sum_j h_j^2

    A word as close to every token (an article, "picture") has no say, and a token that several words agree on
    comes before one that is all of a single word. Zero everywhere in a row without query tokens.
    """
    contrast = word_contrast(projected, query, query_mask, valid)  # [B, N, L]
    weight = contrast.amax(1, keepdim=True).square()  # [B, 1, L]
    return (contrast * (weight / weight.sum(2, keepdim=True).clamp_min(TINY))).sum(2)


def word_contrast(projected: Tensor, query: Tensor, query_mask: Tensor, valid: Tensor) -> Tensor:
    """C of contrast_similarity, [B, N, L] float32; zero where either side is padding."""
    similarity = unit(projected) @ unit(query).transpose(1, 2)  # [B, N, L]
    counts = (valid[:, :, None] & query_mask[:, None, :]).float()
    mean = (similarity * counts).sum(1, keepdim=True) / counts.sum(1, keepdim=True).clamp_min(1)
    return (similarity - mean) * counts


def log_saliency(saliency: Tensor, valid: Tensor, eps: Scalar) -> Tensor:
    """ln max(minmax(saliency), eps) over the valid tokens, [B, N] float32: ln a of text_guided_score."""
    saliency = torch.where(valid, saliency.float().clamp(LOW, HIGH), LOW)  # so an invalid token ends at ln eps
    low = torch.where(valid, saliency, HIGH).amin(1, keepdim=True)
    high = saliency.amax(1, keepdim=True)
    scaled = (saliency - low) / (high - low).clamp_min(1.0 / HIGH)
    return torch.maximum(scaled, torch.as_tensor(eps, dtype=torch.float32, device=scaled.device)).log()


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
