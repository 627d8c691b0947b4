"""Inputs and outputs of every graph: names, dtypes and shapes, stated once for both halves of the project.

The exporter names what it traces by these functions, and a manifest that says anything else is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from flashvlm.manifest import ModelSpec
    from flashvlm.visual import VisualSpec

FloatType = Literal["float32", "float16", "bfloat16"]
DType = Literal["float32", "float16", "bfloat16", "int64", "int32", "bool"]
# Sizes that vary from run to run; capacity: slots of a KV cache; query: tokens of the question; units: tiles or frames;
# prefix and suffix: tokens of text before and after the image, of the fused layout.
Symbol = Literal["batch", "sequence", "capacity", "query", "units", "prefix", "suffix"]
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


def select_graph(vision: str, budget: int) -> str:
    """Name of the selection graph for one budget, behind one vision graph: vision-448x672 -> select-448x672-k64."""
    return f"select{vision.removeprefix(VISION)}-k{budget}"


def prefill_graph(vision: str, budget: int) -> str:
    """Name of the fused vision + select + decoder graph for one budget (``--layout fused``)."""
    return f"prefill{vision.removeprefix(VISION)}-k{budget}"


def is_fused(graph: str) -> bool:
    """Whether a graph is one of ``prefill_graph``."""
    return graph.startswith("prefill")


def visual_stream(name: str) -> str:
    """What a selection graph calls the kept part of a stream: deepstack -> visual_deepstack."""
    return f"visual_{name}"


def vision_io(model: ModelSpec, visual: VisualSpec) -> GraphIO:
    """pixel_values [B,C,H,W] -> image_tokens [B,N,D], features [B,N,Dv], saliency [B,N], each stream [B,N,Ds].

    Where an image is tiled: pixel_values [U,C,H,W] of its U tiles or frames, and order [N], which puts their tokens in
    reading order. 0 in it is the newline or padding, 1 the first token of the first tile. Its outputs have batch 1.
    """
    n, batch = visual.candidates, _batch(visual)
    pixels = _spec("pixel_values", "float32", "units" if visual.tiled else "batch", *visual.pixels.unit_shape)
    return GraphIO(
        (pixels, _spec("order", "int64", n)) if visual.tiled else (pixels,),
        (
            _spec("image_tokens", model.dtypes.activations, batch, n, model.hidden_size),
            _spec("features", model.dtypes.activations, batch, n, visual.feature_size),
            _spec("saliency", "float32", batch, n),
            *_streams(model, lambda name: name, batch, n),
        ),
    )


def select_io(model: ModelSpec, visual: VisualSpec, budget: int) -> GraphIO:
    """What vision gives, valid [B,N] and the question -> visual_embeds [B,K,D], kept [B,K], is_top [B,K],
    scores [B,N], and what is kept of each stream [B,K,Ds].

    Of scope unit, B are the U units of one item, N the tokens of a unit and K what is kept of each.
    """
    (n, kept), dtype = visual.select_size(budget), model.dtypes.activations
    batch: Symbol = "units" if visual.scope == "unit" else "batch"
    return GraphIO(
        (
            _spec("image_tokens", dtype, batch, n, model.hidden_size),
            _spec("features", dtype, batch, n, visual.feature_size),
            _spec("saliency", "float32", batch, n),
            _spec("valid", "bool", batch, n),
            *_question(model, batch),
            *_streams(model, lambda name: name, batch, n),
        ),
        (
            _spec("visual_embeds", dtype, batch, kept, model.hidden_size),
            _spec("kept", "int64", batch, kept),
            _spec("is_top", "bool", batch, kept),
            _spec("scores", "float32", batch, n),
            *_streams(model, visual_stream, batch, kept),
        ),
    )


def decoder_io(model: ModelSpec) -> GraphIO:
    """A chunk of S tokens and the cache -> logits [B,V] of the last real token, and the cache.

    position_ids are [B,S], or [B,3,S] where a model counts time, height and width. A stream is zero at text.
    Without ``cache_in_place`` the new slots alone come back, for the runtime to place.
    """
    axes = () if model.position_axes == 1 else (model.position_axes,)
    embeds, *streams = token_specs(model)
    return GraphIO(
        (
            embeds,
            _spec("position_ids", "int64", "batch", *axes, "sequence"),
            _spec("cache_position", "int64", "batch"),
            _spec("num_tokens", "int64", "batch"),
            *streams,
            *_cache(PAST, model, "capacity"),
        ),
        (
            _spec("logits", "float32", "batch", model.vocab_size),
            *_cache(PRESENT, model, "capacity" if model.cache_in_place else "sequence"),
        ),
    )


def prefill_io(model: ModelSpec, visual: VisualSpec, budget: int) -> GraphIO:
    """Pixels, text before and after the image, the question and an empty cache -> logits [B,V], kept [B,K], cache."""
    dtype = model.dtypes.activations
    return GraphIO(
        (
            _spec("pixel_values", "float32", "batch", *visual.pixels.unit_shape),
            _spec("prefix_embeds", dtype, "batch", "prefix", model.hidden_size),
            _spec("suffix_embeds", dtype, "batch", "suffix", model.hidden_size),
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


def token_specs(model: ModelSpec) -> tuple[TensorSpec, ...]:
    """The decoder's inputs with one value a token: inputs_embeds [B,S,D] and every stream [B,S,Ds]."""
    embeds = _spec("inputs_embeds", model.dtypes.activations, "batch", "sequence", model.hidden_size)
    return embeds, *_streams(model, lambda name: name, "batch", "sequence")


def present(past: str) -> str:
    """The output that follows a cache input: past_key_values.0.key -> present.0.key."""
    return past.replace(f"{PAST}.", f"{PRESENT}.")


def is_past(spec: TensorSpec) -> bool:
    return spec.name.startswith(f"{PAST}.")


def _batch(visual: VisualSpec) -> int | Symbol:
    return 1 if visual.tiled else "batch"


def _question(model: ModelSpec, batch: Symbol = "batch") -> tuple[TensorSpec, ...]:
    return (
        _spec("query_embeds", model.dtypes.activations, batch, "query", model.hidden_size),
        _spec("query_mask", "bool", batch, "query"),
    )


def _streams(model: ModelSpec, named: Callable[[str], str], *shape: int | Symbol) -> tuple[TensorSpec, ...]:
    return tuple(_spec(named(name), model.dtypes.activations, *shape, width) for name, width in model.streams.items())


def _cache(prefix: str, model: ModelSpec, slots: Symbol) -> tuple[TensorSpec, ...]:
    shape: tuple[int | Symbol, ...] = ("batch", model.num_key_value_heads, slots, model.head_dim)
    return tuple(
        _spec(f"{prefix}.{layer}.{part}", model.dtypes.activations, *shape)
        for layer in range(model.num_layers)
        for part in ("key", "value")
    )


def _spec(name: str, dtype: DType, *shape: int | Symbol) -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, shape=shape)
