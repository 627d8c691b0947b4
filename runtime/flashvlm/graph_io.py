"""Inputs and outputs of every graph: names, dtypes and shapes, stated once for both halves of the project.

The exporter names what it traces by these functions, and a manifest that says anything else is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from flashvlm.manifest import ModelSpec

FloatType = Literal["float32", "float16", "bfloat16"]
DType = Literal["float32", "float16", "bfloat16", "int64", "int32", "bool"]
# Sizes that vary from run to run; capacity: slots of a KV cache; query: tokens of the question; prefix and suffix:
# tokens of text before and after the image, of the fused layout.
Symbol = Literal["batch", "sequence", "capacity", "query", "prefix", "suffix"]
DialectName = Literal["modern", "legacy"]

VISION, DECODER = "vision", "decoder"
PAST, PRESENT = "past_key_values", "present"


def _check_dimension(dimension: int | str) -> int | str:
    if isinstance(dimension, str) and dimension not in get_args(Symbol):
        raise ValueError(f"expected a size or one of {', '.join(get_args(Symbol))}, found {dimension!r}")
    if isinstance(dimension, int) and not 0 < dimension <= 2**31:
        raise ValueError(f"expected a size from 1 to 2^31, found {dimension}")
    return dimension


class TensorSpec(BaseModel):
    """One input or output of a graph. A dimension is a size, or the name of one that varies from run to run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_.]{0,63}$")]
    dtype: DType
    shape: tuple[Annotated[int | str, AfterValidator(_check_dimension)], ...] = Field(max_length=8)


class GraphIO(NamedTuple):
    """Inputs and outputs in the graph's order."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def select_graph(budget: int) -> str:
    """Name of the selection graph for one budget."""
    return f"select-k{budget}"


def prefill_graph(budget: int) -> str:
    """Name of the fused vision + select + decoder graph for one budget (``--layout fused``)."""
    return f"prefill-k{budget}"


def vision_io(model: ModelSpec, image_size: Sequence[int], feature_size: int) -> GraphIO:
    """pixel_values [B,3,H,W] -> image_tokens [B,N,D], features [B,N,Dv], saliency [B,N]."""
    n = model.num_image_tokens
    return GraphIO(
        (_spec("pixel_values", "float32", "batch", 3, *image_size),),
        (
            _spec("image_tokens", model.dtype, "batch", n, model.hidden_size),
            _spec("features", model.dtype, "batch", n, feature_size),
            _spec("saliency", "float32", "batch", n),
        ),
    )


def select_io(model: ModelSpec, budget: int, feature_size: int) -> GraphIO:
    """What vision gives, valid [B,N] and the question -> visual_embeds [B,K,D], kept [B,K], is_top [B,K],
    scores [B,N]."""
    n = model.num_image_tokens
    return GraphIO(
        (
            _spec("image_tokens", model.dtype, "batch", n, model.hidden_size),
            _spec("features", model.dtype, "batch", n, feature_size),
            _spec("saliency", "float32", "batch", n),
            _spec("valid", "bool", "batch", n),
            *_question(model),
        ),
        (
            _spec("visual_embeds", model.dtype, "batch", budget, model.hidden_size),
            _spec("kept", "int64", "batch", budget),
            _spec("is_top", "bool", "batch", budget),
            _spec("scores", "float32", "batch", n),
        ),
    )


def decoder_io(model: ModelSpec, dialect: DialectName) -> GraphIO:
    """A chunk of S tokens and the cache -> logits [B,V] of the last real token, and the cache.

    The legacy dialect returns the new slots alone, for the runtime to place.
    """
    return GraphIO(
        (
            _spec("inputs_embeds", model.dtype, "batch", "sequence", model.hidden_size),
            _spec("position_ids", "int64", "batch", "sequence"),
            _spec("cache_position", "int64", "batch"),
            _spec("num_tokens", "int64", "batch"),
            *_cache(PAST, model, "capacity"),
        ),
        (
            _spec("logits", "float32", "batch", model.vocab_size),
            *_cache(PRESENT, model, "capacity" if dialect == "modern" else "sequence"),
        ),
    )


def prefill_io(model: ModelSpec, budget: int, image_size: Sequence[int]) -> GraphIO:
    """Pixels, text before and after the image, the question and an empty cache -> logits [B,V], kept [B,K], cache."""
    return GraphIO(
        (
            _spec("pixel_values", "float32", "batch", 3, *image_size),
            _spec("prefix_embeds", model.dtype, "batch", "prefix", model.hidden_size),
            _spec("suffix_embeds", model.dtype, "batch", "suffix", model.hidden_size),
            _spec("num_tokens", "int64", "batch"),
            *_question(model),
            *_cache(PAST, model, "capacity"),
        ),
        (
            _spec("logits", "float32", "batch", model.vocab_size),
            _spec("kept", "int64", "batch", budget),
            *_cache(PRESENT, model, "capacity"),
        ),
    )


def _question(model: ModelSpec) -> tuple[TensorSpec, ...]:
    return (
        _spec("query_embeds", model.dtype, "batch", "query", model.hidden_size),
        _spec("query_mask", "bool", "batch", "query"),
    )


def _cache(prefix: str, model: ModelSpec, slots: Symbol) -> tuple[TensorSpec, ...]:
    return tuple(
        _spec(f"{prefix}.{layer}.{part}", model.dtype, "batch", model.num_key_value_heads, slots, model.head_dim)
        for layer in range(model.num_layers)
        for part in ("key", "value")
    )


def _spec(name: str, dtype: DType, *shape: int | Symbol) -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, shape=shape)
