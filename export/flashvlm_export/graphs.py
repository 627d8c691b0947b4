"""The nn.Modules that become ONNX graphs, built around transformers' own layers, and their named inputs and outputs.

Transformers computes; three seams make its modules export as we want, and all are its own extension points:
the attention registry (one ONNX Attention node), a cache object (in-place TensorScatter), and the norm's forward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from flashvlm.bundle import DType, ModelSpec, TensorSpec
from flashvlm_export.selection import METHODS, SelectionParams, select

OPSET = 24
DOMAIN = "flashvlm"
ATTENTION = "onnx"
SCORE_OP = "TextGuidedScore"

TORCH_DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "int32": torch.int32,
    "bool": torch.bool,
}


@dataclass(frozen=True)
class Graph:
    """A module and the contract of its inputs and outputs, in the order of ``forward``."""

    name: str
    module: nn.Module
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


# --- seams ---------------------------------------------------------------------------------------------------------


def onnx_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attention as one ONNX node. Shapes: query [B,H,S,d], key and value [B,Hkv,C,d], additive mask [B,1,S,C].

    Returns the output [B,S,H,d] and, in the place of attention weights, the row of the first query alone:
    [B,H,1,C] float32. For a CLIP tower that row is CLS, its saliency; elsewhere nobody reads it and it is pruned.
    """
    inputs = (query, key, value) if mask is None else (query, key, value, mask)
    output = torch.onnx.ops.symbolic(
        "Attention", inputs, {"scale": float(scaling)}, dtype=query.dtype, shape=query.shape, version=OPSET
    )
    if mask is not None:
        return output.transpose(1, 2), output
    scores = query[:, :, :1].float() @ key.float().transpose(-1, -2)  # [B,H,1,C]
    return output.transpose(1, 2), torch.softmax(scores * scaling, dim=-1)


AttentionInterface.register(ATTENTION, onnx_attention)


class ScatterCache:
    """The cache object transformers' attention layers call: writes new rows into a fixed-capacity tensor.

    past: key and value of each layer in turn, [B,Hkv,C,d]; cache_position [B]: the slot of this chunk's first token.
    TensorScatter runs in place where past and present are bound to one buffer.
    """

    def __init__(self, past: Sequence[Tensor], cache_position: Tensor) -> None:
        self.present = list(past)
        self.cache_position = cache_position

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        at = 2 * layer_idx
        self.present[at] = self._scatter(self.present[at], key)
        self.present[at + 1] = self._scatter(self.present[at + 1], value)
        return self.present[at], self.present[at + 1]

    def _scatter(self, past: Tensor, new: Tensor) -> Tensor:
        return torch.onnx.ops.symbolic(
            "TensorScatter",
            (past, new, self.cache_position),
            {"axis": 2},
            dtype=past.dtype,
            shape=past.shape,
            version=OPSET,
        )

    def get_seq_length(self, *_: Any) -> int:
        return 0


@contextmanager
def onnx_rms_norm(model: nn.Module) -> Iterator[None]:
    """Within the context every RMSNorm of the model is one RMSNormalization node, float32 inside as in transformers."""
    norms = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]

    def bind(norm: Any) -> None:
        def forward(x: Tensor) -> Tensor:
            attributes = {"axis": -1, "epsilon": float(norm.variance_epsilon), "stash_type": 1}
            return torch.onnx.ops.symbolic(
                "RMSNormalization", (x, norm.weight), attributes, dtype=x.dtype, shape=x.shape, version=23
            )

        norm.forward = forward

    for norm in norms:
        bind(norm)
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward


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


# --- modules -------------------------------------------------------------------------------------------------------


class Select(nn.Module):
    """image_tokens [B,N,D], features [B,N,Dv], saliency [B,N], valid [B,N], query_embeds [B,L,D], query_mask [B,L]
    -> visual_embeds [B,K,D], kept [B,K], is_top [B,K], scores [B,N]."""

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
    ) -> tuple[Tensor, ...]:
        return tuple(
            select(
                image_tokens,
                features,
                saliency,
                query_embeds,
                query_mask,
                valid,
                method=self.method,
                budget=self.budget,
                params=self.params,
                score=onnx_score,
            )
        )


class Decoder(nn.Module):
    """One chunk of tokens through the language model, for prefill (S tokens) and decode (one) alike.

    inputs_embeds [B,S,D], position_ids [B,S], cache_position [B] (slot of the first token), num_tokens [B] (how many of
    the S are real; the rest is right padding, overwritten by the next chunk), past [B,Hkv,C,d], key and value a layer.
    Returns logits [B,V] float32 of each row's last real token, and the caches.
    """

    def __init__(self, language_model: nn.Module, lm_head: nn.Module) -> None:
        super().__init__()
        self.language_model = language_model
        self.lm_head = lm_head

    def forward(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        cache_position: Tensor,
        num_tokens: Tensor,
        *past: Tensor,
    ) -> tuple[Tensor, ...]:
        cache = ScatterCache(past, cache_position)
        hidden = self.language_model(
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
            # Explicit and additive: boolean masks and per-row lengths fail or misbehave in TensorRT (docs/design.md).
            attention_mask=causal_mask(cache_position, inputs_embeds, capacity=past[0].shape[2]),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state  # [B,S,D]
        last = (num_tokens - 1)[:, None, None].expand(-1, 1, hidden.shape[-1])
        logits = self.lm_head(torch.gather(hidden, 1, last)[:, 0])  # [B,V]
        return logits.float(), *cache.present


def causal_mask(cache_position: Tensor, like: Tensor, capacity: Any) -> Tensor:
    """0 where a query may look, the dtype's lowest value elsewhere: [B,1,S,C] in the dtype of ``like`` [B,S,D].

    The query at place i of its chunk sits in slot cache_position + i and sees the slots up to its own.
    """
    own = cache_position[:, None] + torch.arange(like.shape[1])  # [B,S]
    visible = torch.arange(capacity) <= own[:, None, :, None]  # [B,1,S,C]
    return torch.where(visible, 0.0, torch.finfo(like.dtype).min).to(like.dtype)


class Prefill(nn.Module):
    """Vision, selection and decoder in one graph: the whole time to first token, for one engine and one profile.

    prefix_embeds [B,P,D] and suffix_embeds [B,S,D] are the text before and after the image; num_tokens [B] counts real
    suffix tokens. Returns logits [B,V], kept [B,K] and the caches, which hold P + K + num_tokens rows afterwards.
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
        visual, kept, _, _ = self.select(image_tokens, features, saliency, valid, query_embeds, query_mask)
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


# --- contracts -----------------------------------------------------------------------------------------------------


def _spec(name: str, dtype: DType, *shape: int | str) -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, shape=shape)


def _cache_specs(prefix: str, model: ModelSpec) -> tuple[TensorSpec, ...]:
    shape = ("batch", model.num_key_value_heads, "capacity", model.head_dim)
    return tuple(
        _spec(f"{prefix}.{layer}.{part}", model.dtype, *shape)
        for layer in range(model.num_layers)
        for part in ("key", "value")
    )


def vision_graph(module: nn.Module, model: ModelSpec, image_size: tuple[int, int], feature_size: int) -> Graph:
    n = model.num_image_tokens
    return Graph(
        "vision",
        module,
        (_spec("pixel_values", "float32", "batch", 3, *image_size),),
        (
            _spec("image_tokens", model.dtype, "batch", n, model.hidden_size),
            _spec("features", model.dtype, "batch", n, feature_size),
            _spec("saliency", "float32", "batch", n),
        ),
    )


def select_graph(module: nn.Module, name: str, budget: int, model: ModelSpec, feature_size: int) -> Graph:
    n = model.num_image_tokens
    return Graph(
        name,
        module,
        (
            _spec("image_tokens", model.dtype, "batch", n, model.hidden_size),
            _spec("features", model.dtype, "batch", n, feature_size),
            _spec("saliency", "float32", "batch", n),
            _spec("valid", "bool", "batch", n),
            _spec("query_embeds", model.dtype, "batch", "query", model.hidden_size),
            _spec("query_mask", "bool", "batch", "query"),
        ),
        (
            _spec("visual_embeds", model.dtype, "batch", budget, model.hidden_size),
            _spec("kept", "int64", "batch", budget),
            _spec("is_top", "bool", "batch", budget),
            _spec("scores", "float32", "batch", n),
        ),
    )


def decoder_graph(module: nn.Module, model: ModelSpec) -> Graph:
    return Graph(
        "decoder",
        module,
        (
            _spec("inputs_embeds", model.dtype, "batch", "sequence", model.hidden_size),
            _spec("position_ids", "int64", "batch", "sequence"),
            _spec("cache_position", "int64", "batch"),
            _spec("num_tokens", "int64", "batch"),
            *_cache_specs("past_key_values", model),
        ),
        (_spec("logits", "float32", "batch", model.vocab_size), *_cache_specs("present", model)),
    )


def prefill_graph(module: nn.Module, name: str, budget: int, model: ModelSpec, image_size: tuple[int, int]) -> Graph:
    return Graph(
        name,
        module,
        (
            _spec("pixel_values", "float32", "batch", 3, *image_size),
            _spec("prefix_embeds", model.dtype, "batch", "prefix", model.hidden_size),
            _spec("suffix_embeds", model.dtype, "batch", "suffix", model.hidden_size),
            _spec("num_tokens", "int64", "batch"),
            _spec("query_embeds", model.dtype, "batch", "query", model.hidden_size),
            _spec("query_mask", "bool", "batch", "query"),
            *_cache_specs("past_key_values", model),
        ),
        (
            _spec("logits", "float32", "batch", model.vocab_size),
            _spec("kept", "int64", "batch", budget),
            *_cache_specs("present", model),
        ),
    )


__all__ = [
    "METHODS",
    "Decoder",
    "Graph",
    "Prefill",
    "Select",
    "decoder_graph",
    "prefill_graph",
    "select_graph",
    "vision_graph",
]
