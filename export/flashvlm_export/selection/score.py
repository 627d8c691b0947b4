"""The score that several methods share: relevance to the question fused with saliency."""

from __future__ import annotations

import torch
from torch import Tensor

from flashvlm_export.selection.method import Scalar, ScoreFn, SelectionInputs
from flashvlm_export.selection.ops import HIGH, LOW, unit

PUBLISHED_POOL = 0.05  # pooling temperature of FlashVLM as published


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


def log_saliency(saliency: Tensor, valid: Tensor, eps: Scalar) -> Tensor:
    """ln max(minmax(saliency), eps) over the valid tokens, [B, N] float32: ln a of text_guided_score."""
    saliency = torch.where(valid, saliency.float().clamp(LOW, HIGH), LOW)  # so an invalid token ends at ln eps
    low = torch.where(valid, saliency, HIGH).amin(1, keepdim=True)
    high = saliency.amax(1, keepdim=True)
    scaled = (saliency - low) / (high - low).clamp_min(1.0 / HIGH)
    return torch.maximum(scaled, torch.as_tensor(eps, dtype=torch.float32, device=scaled.device)).log()


def relevance(inputs: SelectionInputs, score: ScoreFn) -> Tensor:
    """r - max r, [B, N] float32, from the fused score: no saliency, no sharpening, a floor out of reach."""
    projected, _, saliency, query, query_mask, valid = inputs
    return score(projected, query, query_mask, saliency, valid, 1.0, 1.0, PUBLISHED_POOL, 1e-6)
