"""Two ways to write the same graphs: which operators stand for attention, the KV cache and the norm.

The seams are transformers' own extension points: its attention registry, the cache object its layers call, and the
norm's forward. A dialect is what it plugs in there, and the opset that goes with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from flashvlm.graph_io import DialectName


class Cache(Protocol):
    """The cache transformers' attention layers call. ``present`` holds key and value of each layer in turn."""

    present: list[Tensor]

    def mask(self, embeds: Tensor) -> Tensor:
        """Additive mask for new tokens [B,S,D], in their dtype: 0 where a query may look, else the lowest value."""

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """New rows [B,Hkv,S,d] of a layer -> the keys and values to attend to."""


@dataclass(frozen=True)
class Dialect:
    """How graphs are written.

    attention        name in transformers' registry
    fused_attention  it is one operator, which holds no scores [B,H,S,C] in memory
    cache_in_place   the cache is written where it is; else new slots come back, for the runtime to place
    operators        all that may occur, None for any of the opset
    """

    name: DialectName
    opset: int
    attention: str
    fused_attention: bool
    cache_in_place: bool
    cache: Callable[[Sequence[Tensor], Tensor], Cache]
    rms_norm: Callable[[nn.Module], AbstractContextManager[None]]
    operators: frozenset[str] | None = None


# --- modern: one operator each -------------------------------------------------------------------------------------


def attention_node(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attention as one ONNX node. Shapes: query [B,H,S,d], key and value [B,Hkv,C,d], additive mask [B,1,S,C].

    Returns the output [B,S,H,d] and, in the place of attention weights, the row of the first query alone:
    [B,H,1,C] float32. For a CLIP tower that row is CLS, its saliency; elsewhere nobody reads it and it is pruned.
    """
    inputs = (query, key, value) if attention_mask is None else (query, key, value, attention_mask)
    output = torch.onnx.ops.symbolic(
        "Attention", inputs, {"scale": float(scaling)}, dtype=query.dtype, shape=query.shape, version=24
    )
    if attention_mask is not None:
        return output.transpose(1, 2), output
    # A product and a sum, not a MatMul: TensorRT-RTX has no float32 GEMM for Turing.
    scores = (query[:, :, :1].float() * key.float()).sum(-1) * scaling  # [B,H,C]
    return output.transpose(1, 2), torch.softmax(scores, dim=-1)[:, :, None]


class ScatterCache:
    """Writes new rows into the fixed-capacity tensors past [B,Hkv,C,d], at cache_position [B].

    TensorScatter runs in place where past and present are bound to one buffer.
    """

    def __init__(self, past: Sequence[Tensor], cache_position: Tensor) -> None:
        self.present = list(past)
        self.cache_position = cache_position

    def mask(self, embeds: Tensor) -> Tensor:
        """[B,1,S,C]: the query at place i of its chunk sits in slot cache_position + i and sees up to its own."""
        own = self.cache_position[:, None] + torch.arange(embeds.shape[1])  # [B,S]
        return additive(torch.arange(self.present[0].shape[2]) <= own[:, None, :, None], embeds.dtype)

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        at = 2 * layer_idx
        self.present[at] = self._scatter(self.present[at], key)
        self.present[at + 1] = self._scatter(self.present[at + 1], value)
        return self.present[at], self.present[at + 1]

    def _scatter(self, past: Tensor, new: Tensor) -> Tensor:
        inputs = (past, new, self.cache_position)
        return torch.onnx.ops.symbolic(
            "TensorScatter", inputs, {"axis": 2}, dtype=past.dtype, shape=past.shape, version=24
        )

    def get_seq_length(self, *_: Any) -> int:
        return 0


@contextmanager
def rms_norm_node(model: nn.Module) -> Iterator[None]:
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


# --- legacy: primitives --------------------------------------------------------------------------------------------


def attention_primitives(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """The same shapes as ``attention_node``, in MatMul and Softmax; softmax in float32, as in transformers.

    Grouped queries multiply their shared keys by broadcasting: no repeated copy of the cache.
    """
    batch, heads, length, size = query.shape
    groups = heads // key.shape[1]
    query = query.reshape(batch, key.shape[1], groups, length, size)
    scores = query @ key[:, :, None].transpose(-1, -2) * scaling  # [B,Hkv,g,S,C]
    if attention_mask is not None:
        scores = scores + attention_mask[:, :, None]
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32)
    output = (weights.to(value.dtype) @ value[:, :, None]).reshape(batch, heads, length, size)
    return output.transpose(1, 2), weights.reshape(batch, heads, length, -1)[:, :, :1]


class AppendCache:
    """Attends to past and new rows side by side, and returns the new rows [B,Hkv,S,d] for the runtime to place.

    TensorRT 10.3 has no cache operator, and ScatterND would copy the whole cache a layer and step.
    """

    def __init__(self, past: Sequence[Tensor], cache_position: Tensor) -> None:
        self.past = past
        self.present = list(past)
        self.cache_position = cache_position

    def mask(self, embeds: Tensor) -> Tensor:
        """[B,1,S,C+S]: the filled slots of the past, then the new tokens up to the query itself."""
        batch, length = embeds.shape[:2]
        filled = torch.arange(self.past[0].shape[2]) < self.cache_position[:, None, None, None]  # [B,1,1,C]
        new = torch.arange(length) <= torch.arange(length)[:, None]  # [S,S]
        visible = [filled.expand(-1, -1, length, -1), new[None, None].expand(batch, -1, -1, -1)]
        return torch.cat([additive(part, embeds.dtype) for part in visible], dim=-1)

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        at = 2 * layer_idx
        self.present[at], self.present[at + 1] = key, value
        return torch.cat([self.past[at], key], dim=2), torch.cat([self.past[at + 1], value], dim=2)

    def get_seq_length(self, *_: Any) -> int:
        return 0


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.where(visible, 0.0, torch.finfo(dtype).min).to(dtype)


# What our graphs use of the operators the parser of TensorRT 10.0 and later lists for opset 20 and below:
# github.com/onnx/onnx-tensorrt, docs/operators.md, branch 10.1-GA. Local functions are taken since TensorRT 9.0.
LEGACY_OPERATORS = frozenset(
    """
    Abs Add And ArgMax Cast CastLike Clip Concat Constant Conv Cos CumSum Div Equal Exp Expand Floor Gather
    GatherElements Gelu Gemm Greater GreaterOrEqual Identity LayerNormalization Less LessOrEqual Log MatMul Max Min Mod
    Mul Neg Not Or Pow Range Reciprocal ReduceL2 ReduceMax ReduceMean ReduceMin ReduceSum Reshape Shape Sigmoid Sin
    Slice Softmax Split Sqrt Squeeze Sub Tanh TopK Transpose Unsqueeze Where
    """.split()  # noqa: SIM905 - as a list literal it is fifty lines long
)

# --- saliency without a CLS token ------------------------------------------------------------------------------------

RECEIVED = "_received"  # behind the name of an attention: with it the weights are ``received``
CHUNK = 256  # queries at a time


def received(query: Tensor, key: Tensor, scaling: float, chunk: int = CHUNK) -> Tensor:
    """Attention that each token receives from all others, averaged over them and over heads.

    query and key [B,H,T,d] -> float32 [B,T], which sums to one. T is known; no more than ``chunk`` rows of the T x T
    map of a head are there at once.
    """
    heads, tokens = query.shape[1:3]
    total = None
    for start in range(0, tokens, chunk):
        scores = (query[:, :, start : start + chunk] * scaling) @ key.transpose(-1, -2)  # [B,H,chunk,T]
        part = torch.softmax(scores, dim=-1, dtype=torch.float32).sum(dim=(1, 2))
        total = part if total is None else total + part
    assert total is not None
    return total / (heads * tokens)


def receiving(attention: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """The same attention, with what each token receives, [B,1,1,T], in the place of its weights."""

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float,
        **more: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        output, _ = attention(module, query, key, value, attention_mask, scaling, **more)
        return output, received(query, key, scaling)[:, None, None]

    return attend


for _name, _attention in (("onnx_node", attention_node), ("onnx_primitives", attention_primitives)):
    AttentionInterface.register(_name, _attention)
    AttentionInterface.register(_name + RECEIVED, receiving(_attention))

DIALECTS: dict[DialectName, Dialect] = {
    "modern": Dialect("modern", 24, "onnx_node", True, True, ScatterCache, rms_norm_node),
    "legacy": Dialect(
        "legacy", 20, "onnx_primitives", False, False, AppendCache, lambda _: nullcontext(), LEGACY_OPERATORS
    ),
}
