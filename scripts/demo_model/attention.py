"""Attention over an image and several conversations that do not see each other, as transformers takes it by name."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

SEPARATE = "separate_conversations"


def separate_conversations(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    scaling: float,
    seen: Tensor,
    number: Tensor,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within the prefix, and from each conversation to the prefix and to what it has said itself.

    A mask over all pairs takes nearly twice the products, and the fused kernel's backward on CPUs (torch 2.13) is slow.

    Args:
        query, key, value: [B,H,P+S*L,d], the prefix first and then S slots of L tokens, several conversations in each.
        seen: bool [B,P], False where the prefix is padded.
        number: int64 [B,S,L], which conversation a token belongs to.

    Returns:
        [B,P+S*L,H,d]
    """
    size, slots = seen.shape[1], number.shape[1:]
    first = [x[:, :, :size] for x in (query, key, value)]  # [B,H,P,d]
    asked, own_key, own_value = (x[:, :, size:].unflatten(2, slots) for x in (query, key, value))  # [B,H,S,L,d]
    told = F.scaled_dot_product_attention(*first, is_causal=True, scale=scaling)
    same = (number[:, :, :, None] == number[:, :, None, :]).tril()  # [B,S,L,L]
    to_prefix = query[:, :, size:] @ first[1].transpose(2, 3) * scaling + _bias(seen, query)[:, None, None]
    to_own = asked @ own_key.transpose(3, 4) * scaling + _bias(same, query)[:, None]  # [B,H,S,L,L]
    scores = torch.cat([to_prefix.unflatten(2, slots), to_own], 4)
    weights = scores.softmax(4, dtype=torch.float32).to(value.dtype)  # [B,H,S,L,P+L]
    said = weights[..., :size].flatten(2, 3) @ first[2] + (weights[..., size:] @ own_value).flatten(2, 3)
    return torch.cat([told, said], 2).transpose(1, 2), None


def _bias(allowed: Tensor, like: Tensor) -> Tensor:
    return torch.zeros(allowed.shape, dtype=like.dtype, device=like.device).masked_fill(~allowed, float("-inf"))


AttentionInterface.register(SEPARATE, separate_conversations)
