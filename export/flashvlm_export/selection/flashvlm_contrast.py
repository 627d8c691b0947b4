"""FlashVLM with words weighed by how much they tell the tokens of this image apart."""

from __future__ import annotations

from torch import Tensor

from flashvlm_export.selection.flashvlm import top_and_representatives
from flashvlm_export.selection.method import Method, Nodes, Selection, SelectionInputs, SelectionParams
from flashvlm_export.selection.ops import TINY, unit
from flashvlm_export.selection.score import fuse


def flashvlm_contrast(inputs: SelectionInputs, budget: int, params: SelectionParams, nodes: Nodes) -> Selection:
    """flashvlm with the relevance of contrast_similarity: words weigh as much as they tell the image's tokens apart."""
    projected, _, saliency, query, query_mask, valid = inputs
    relevance = contrast_similarity(projected, query, query_mask, valid)  # [B, N]
    scores = fuse(relevance, saliency, valid, params.eta, params.temperature, params.eps)
    return top_and_representatives(inputs, scores, budget, params, nodes.lloyd)


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


METHOD = Method(
    "flashvlm-contrast",
    flashvlm_contrast,
    "as flashvlm, with question words weighed by how much they tell the image's tokens apart",
    paper="2512.20561",
    reads=frozenset({"projected", "features", "saliency", "query"}),
    params=("eta", "temperature", "eps", "top_ratio", "iterations", "partition_space"),
    score="log",
)
