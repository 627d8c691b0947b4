"""The nn.Modules that become ONNX graphs, built around transformers' own layers.

Transformers computes; ``dialects.py`` says in which operators, and ``flashvlm.graph_io`` names inputs and outputs. The
module of a vision graph is the family's (``families/contract.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flashvlm.graph_io import TensorSpec
from flashvlm_export.compile.plugin_nodes import DOMAIN, LLOYD_OP, SCORE_OP
from flashvlm_export.graph.dialects import Dialect
from flashvlm_export.selection import METHODS, Nodes, SelectionParams, masked_lloyd, select
from flashvlm_export.selection.ops import take


@dataclass(frozen=True)
class Graph:
    """A module and the contract of its inputs and outputs, in the order of ``forward``."""

    name: str
    module: nn.Module
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def onnx_score(
    projected: Tensor,
    query: Tensor,
    query_mask: Tensor,
    saliency: Tensor,
    valid: Tensor,
    eta: float,
    temperature: float,
    pool_temperature: float,
    eps: float,
) -> Tensor:
    """The fused score as one ``flashvlm::TextGuidedScore`` node; its body is a local function of the same file."""
    attributes = {"eta": eta, "temperature": temperature, "pool_temperature": pool_temperature, "eps": eps}
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{SCORE_OP}",
        (projected, query, query_mask, saliency, valid),
        {name: float(value) for name, value in attributes.items()},
        dtype=torch.float32,
        shape=projected.shape[:2],
        version=1,
    )


def onnx_lloyd(
    features: Tensor, scores: Tensor, valid: Tensor, budget: int, top_count: int, iterations: int
) -> tuple[Tensor, Tensor]:
    """``selection.masked_lloyd`` as one ``flashvlm::MaskedLloyd`` node, whose outputs are int32."""
    shape = (features.shape[0], budget)
    kept, is_top = torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::{LLOYD_OP}",
        (features, scores, valid),
        {"budget": budget, "top_count": top_count, "iterations": iterations},
        dtypes=(torch.int32, torch.int32),
        shapes=(shape, shape),
        version=1,
    )
    return kept.long(), is_top.bool()


# --- modules -------------------------------------------------------------------------------------------------------


class WithoutSaliency(nn.Module):
    """A vision module whose saliency, which nothing will read, is zero: what computed it is not traced."""

    def __init__(self, vision: nn.Module) -> None:
        super().__init__()
        self.vision = vision

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        image_tokens, features, _, *streams = self.vision(*inputs)
        # Not zeros_like: that would ask saliency for its shape.
        return image_tokens, features, torch.zeros(image_tokens.shape[:2]), *streams


class Select(nn.Module):
    """image_tokens [B,N,D], features [B,N,Dv], saliency [B,N], valid [B,N], query_embeds [B,L,D], query_mask [B,L],
    streams [B,N,Ds] -> visual_embeds [B,K,D], kept [B,K], is_top [B,K], scores [B,N], streams [B,K,Ds]."""

    def __init__(self, method: str, budget: int, params: SelectionParams) -> None:
        super().__init__()
        self.method, self.budget, self.params = method, budget, params

    def forward(
        self,
        image_tokens: Tensor,
        features: Tensor,
        saliency: Tensor,
        valid: Tensor,
        query_embeds: Tensor,
        query_mask: Tensor,
        *streams: Tensor,
    ) -> tuple[Tensor, ...]:
        selection = select(
            image_tokens,
            features,
            saliency,
            query_embeds,
            query_mask,
            valid,
            method=self.method,
            budget=self.budget,
            params=self.params,
            nodes=Nodes(onnx_score, onnx_lloyd if METHODS[self.method].fused else masked_lloyd),
        )
        return *selection, *(take(stream, selection.kept) for stream in streams)


class Decoder(nn.Module):
    """One chunk of tokens through the language model, for prefill (S tokens) and decode (one) alike.

    inputs_embeds [B,S,D], position_ids [B,S] or [B,3,S], cache_position [B] (slot of the first token), num_tokens [B]
    (how many of the S are real; the rest is right padding, overwritten by the next chunk), streams [B,S,Ds], then past
    [B,Hkv,C,d], key and value a layer. Returns logits [B,V] float32 of each batch item's last real token, and what the
    dialect's cache makes of past and new slots.

    ``head_as_table``: the head's weights stay [V,D], as those of the embedding table, so that both can be one.
    """

    def __init__(
        self,
        language_model: nn.Module,
        lm_head: nn.Module,
        dialect: Dialect,
        streams: Sequence[str] = (),
        head_as_table: bool = False,
    ) -> None:
        super().__init__()
        self.language_model = language_model
        self.lm_head = lm_head
        self.dialect = dialect
        self.streams = tuple(streams)
        self.head_as_table = head_as_table

    def forward(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        cache_position: Tensor,
        num_tokens: Tensor,
        *past: Tensor,
    ) -> tuple[Tensor, ...]:
        streams, past = past[: len(self.streams)], past[len(self.streams) :]
        cache = self.dialect.cache(past, cache_position)
        hidden = self.language_model(
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
            # Explicit and additive: boolean masks and lengths of each item fail or misbehave in TensorRT
            # (docs/design.md).
            attention_mask=cache.mask(inputs_embeds),
            past_key_values=cache,
            use_cache=True,
            **dict(zip(self.streams, streams, strict=True)),
        ).last_hidden_state  # [B,S,D]
        last = (num_tokens - 1)[:, None, None].expand(-1, 1, hidden.shape[-1])
        return self._logits(torch.gather(hidden, 1, last)[:, 0]), *cache.present

    def _logits(self, hidden: Tensor) -> Tensor:
        """[B,D] -> float32 [B,V]."""
        if not self.head_as_table:
            return self.lm_head(hidden).float()
        # The table first: as the second factor ONNX Runtime would copy it, transposed or packed, where this maps it.
        return (self.lm_head.weight @ hidden.t()).float().t()


class Prefill(nn.Module):
    """Vision, selection and decoder in one graph: the whole time to first token, for one engine and one profile.

    prefix_embeds [B,P,D] and suffix_embeds [B,S,D] are the text before and after the image; num_tokens [B] counts real
    suffix tokens. Returns logits [B,V], kept [B,K] and the caches, which hold P + K + num_tokens slots afterwards.
    """

    def __init__(self, vision: nn.Module, select: nn.Module, decoder: nn.Module, keep_positions: bool) -> None:
        super().__init__()
        self.vision, self.select, self.decoder = vision, select, decoder
        self.keep_positions = keep_positions

    def forward(
        self,
        pixel_values: Tensor,
        prefix_embeds: Tensor,
        suffix_embeds: Tensor,
        num_tokens: Tensor,
        query_embeds: Tensor,
        query_mask: Tensor,
        *past: Tensor,
    ) -> tuple[Tensor, ...]:
        image_tokens, features, saliency = self.vision(pixel_values)
        batch, num_image_tokens = image_tokens.shape[:2]
        valid = torch.ones(batch, num_image_tokens, dtype=torch.bool)
        visual, kept, *_ = self.select(image_tokens, features, saliency, valid, query_embeds, query_mask)
        inputs_embeds = torch.cat([prefix_embeds, visual, suffix_embeds], dim=1)
        prefix, budget, suffix = prefix_embeds.shape[1], visual.shape[1], suffix_embeds.shape[1]
        place = kept if self.keep_positions else torch.arange(budget).expand(batch, -1)
        after = prefix + (num_image_tokens if self.keep_positions else budget)
        position_ids = torch.cat(
            [
                torch.arange(prefix).expand(batch, -1),
                prefix + place,
                (after + torch.arange(suffix)).expand(batch, -1),
            ],
            dim=1,
        )
        cache_position = torch.zeros(batch, dtype=torch.int64)
        logits, *present = self.decoder(
            inputs_embeds, position_ids, cache_position, prefix + budget + num_tokens, *past
        )
        return logits, kept, *present
