"""``bundle.json``: what a bundle is, and the bounds of all it may say.

A manifest is untrusted. Names of files become paths and sizes become memory, so each has a pattern or a range here, and
graphs have exactly the inputs and outputs of ``graph_io``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from pydantic import Field, ValidationError, model_validator

from flashvlm import graph_io
from flashvlm.fields import (
    MAX_KV_VALUES,
    FileName,
    GraphName,
    Heads,
    Layers,
    Record,
    Sha256,
    Slots,
    StreamName,
    TokenId,
    Tokens,
    Vocabulary,
    Width,
)
from flashvlm.graph_io import DECODER, DialectName, FloatType, GraphIO, TensorSpec
from flashvlm.visual import VisualSpec, unshared

SCHEMA_VERSION = 2
EMBEDDINGS = "embed_tokens.safetensors"
PROCESSOR = "processor"
PROCESSOR_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")  # what the runtime reads of it


class GraphSpec(Record):
    file: FileName
    data: tuple[FileName, ...] = ()
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


class FileSpec(Record):
    size: int = Field(ge=0, lt=1 << 50)
    sha256: Sha256


class Dtypes(Record):
    """activations: of every tensor between graphs and in the cache; weights: as stored; embeddings: of the table."""

    activations: FloatType
    weights: FloatType
    embeddings: FloatType


class ModelSpec(Record):
    """What the runtime needs to know of the language model; sizes in tokens, heads and channels.

    position_axes   1, or 3 for time, height and width
    streams         tensors beside inputs_embeds, zero at text, and their widths
    cache_in_place  the decoder writes new slots into the cache it is given; else it returns them
    """

    name: str
    dtypes: Dtypes
    hidden_size: Width
    num_layers: Layers
    num_key_value_heads: Heads
    head_dim: Width
    vocab_size: Vocabulary
    max_seq: Slots
    eos_token_ids: tuple[TokenId, ...] = Field(max_length=64)
    position_axes: Literal[1, 3] = 1
    streams: dict[StreamName, Width] = Field(default_factory=dict, max_length=8)
    cache_in_place: bool

    @model_validator(mode="after")
    def _check(self) -> ModelSpec:
        if 2 * self.num_layers * self.num_key_value_heads * self.head_dim > MAX_KV_VALUES:
            raise ValueError(f"expected at most {MAX_KV_VALUES:,} values in a cache slot, found more")
        for token in self.eos_token_ids:
            if token >= self.vocab_size:
                raise ValueError(f"token id {token} is beyond the table of {self.vocab_size} rows")
        return self


class SelectionSpec(Record):
    """score: what ``scores`` are: logarithms, cosines less the best one's, or None (zeros). default: the budget of a
    question that names none."""

    method: str
    score: Literal["log", "cosine"] | None = None
    query: Literal["question", "prompt"]
    positions: Literal["renumber", "keep"]
    budgets: tuple[Tokens, ...] = Field(max_length=256)
    default: Tokens | Literal["all"]
    params: dict[str, float | int | str]


class Manifest(Record):
    """source, revision, license: where the weights are from, and under which terms."""

    schema_version: int = SCHEMA_VERSION
    created_by: dict[str, str]
    source: str
    revision: str | None = None
    license: str | None = None
    dialect: DialectName
    layout: Literal["split", "fused"]
    model: ModelSpec
    visual: tuple[VisualSpec, ...] = Field(min_length=1, max_length=64)
    selection: SelectionSpec
    graphs: dict[GraphName, GraphSpec]
    files: dict[FileName, FileSpec] = Field(max_length=10_000)
    unused_tensors: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Manifest:
        budgets, most = self.selection.budgets, self.candidates
        if len(set(budgets)) != len(budgets) or max(budgets, default=0) > most:
            raise ValueError(f"expected different budgets up to {most}, found {budgets}")
        if self.selection.default not in (*budgets, "all"):
            raise ValueError(f"the default budget {self.selection.default} is none of {(*budgets, 'all')}")
        if self.selection.positions == "renumber" and self.model.position_axes > 1:
            raise ValueError("positions on several axes are kept, not numbered anew")
        if self.layout == "fused" and not fits_fused(self.model, self.visual):
            raise ValueError("the fused layout takes one image without tiles, and a cache written in place")
        if len({visual.graph for visual in self.visual}) != len(self.visual):
            raise ValueError("expected different vision graphs, found one twice")
        if len({(each.modality, each.placeholder_id, each.marker) for each in self.visual}) > len(self.placeholders):
            raise ValueError("expected one placeholder_id and marker for a modality, found several")
        for visual in self.visual:
            if visual.placeholder_id >= self.model.vocab_size:
                table = f"the table of {self.model.vocab_size} rows"
                raise ValueError(f"token id {visual.placeholder_id} is beyond {table}")
            if visual.positions == "mrope" and self.model.position_axes != 3:
                raise ValueError("positions mrope need 3 position_axes")
            if (problem := unshared(visual, budgets)) is not None:
                raise ValueError(problem)
        self._check_files()
        self._check_graphs()
        return self

    @property
    def placeholders(self) -> dict[str, int]:
        """The token that stands for a run of visual tokens in a prompt, by modality."""
        return {visual.modality: visual.placeholder_id for visual in self.visual}

    @property
    def markers(self) -> dict[str, str]:
        """What the chat template writes for an item, by modality, where it is not the placeholder."""
        return {visual.modality: visual.marker for visual in self.visual if visual.marker is not None}

    def of(self, modality: str) -> list[VisualSpec]:
        """The sizes that images, or videos, may have."""
        return [visual for visual in self.visual if visual.modality == modality]

    @property
    def candidates(self) -> int:
        """Visual tokens of the largest item."""
        return max(visual.candidates for visual in self.visual)

    def max_units(self, graph: str) -> int:
        """Tiles or frames that a vision or selection graph takes at most; 1 for any other graph."""
        for visual in self.visual:
            selects = (graph_io.select_graph(visual.graph, budget) for budget in self.selection.budgets)
            if graph in (visual.graph, *selects):
                return visual.pixels.max_units
        return 1

    def _check_files(self) -> None:
        needed = [(EMBEDDINGS, "the runtime"), *((f"{PROCESSOR}/{name}", "the runtime") for name in PROCESSOR_FILES)]
        needed += [(file, f"graph {name}") for name, g in self.graphs.items() for file in (g.file, *g.data)]
        for file, user in needed:
            if file not in self.files:
                raise ValueError(f"{user} uses {file!r}, which files does not list")

    def _check_graphs(self) -> None:
        # By their names first: a few numbers may ask for millions of inputs.
        names = list(graph_names(self.visual, self.selection.budgets, self.layout))
        if missing := [name for name in names if name not in self.graphs]:
            raise ValueError(f"no graph {missing[0]!r}; it has {', '.join(sorted(self.graphs))}")
        if odd := self.graphs.keys() - set(names):
            raise ValueError(
                f"expected the graphs {', '.join(sorted(names))} for these budgets, found another set: "
                f"{', '.join(sorted(odd))}"
            )
        for name, (inputs, outputs) in self.contract():
            graph = self.graphs[name]
            for kind, found, wanted in (("input", graph.inputs, inputs), ("output", graph.outputs, outputs)):
                if found != wanted:
                    raise ValueError(f"graph {name} does not have the {kind}s of its contract: {_first(found, wanted)}")

    def contract(self) -> Iterator[tuple[str, GraphIO]]:
        """Every graph this bundle has to have, with its inputs and outputs."""
        yield from graphs_of(self.model, self.visual, self.selection.budgets, self.layout)


def graph_names(
    visual: Sequence[VisualSpec], budgets: Sequence[int], layout: Literal["split", "fused"]
) -> Iterator[str]:
    """Of all graphs of a bundle, in the order of ``graphs_of``."""
    yield from (spec.graph for spec in visual)
    yield DECODER
    for spec in visual:
        for budget in budgets:
            if budget <= spec.candidates:
                yield graph_io.select_graph(spec.graph, budget)
                if layout == "fused":
                    yield graph_io.prefill_graph(spec.graph, budget)


def graphs_of(
    model: ModelSpec, visual: Sequence[VisualSpec], budgets: Sequence[int], layout: Literal["split", "fused"]
) -> Iterator[tuple[str, GraphIO]]:
    """Names of the graphs of a bundle, with their inputs and outputs. A budget at or above an image's tokens keeps
    them all, and has no graph."""
    for spec in visual:
        yield spec.graph, graph_io.vision_io(model, spec)
    yield DECODER, graph_io.decoder_io(model)
    for spec in visual:
        for budget in budgets:
            if budget > spec.candidates:
                continue
            yield graph_io.select_graph(spec.graph, budget), graph_io.select_io(model, spec, budget)
            if layout == "fused":
                yield graph_io.prefill_graph(spec.graph, budget), graph_io.prefill_io(model, spec, budget)


def fits_fused(model: ModelSpec, visual: Sequence[VisualSpec]) -> bool:
    """Whether one graph can have vision, selection and decoder in it (``--layout fused``)."""
    plain = model.cache_in_place and model.position_axes == 1 and not model.streams
    return plain and len(visual) == 1 and not visual[0].tiled


def _first(found: tuple[TensorSpec, ...], wanted: tuple[TensorSpec, ...]) -> str:
    """The first difference between what a graph has and what it should have."""
    for a, b in zip(found, wanted, strict=False):
        if a != b:
            return f"expected {b.name} {b.dtype} {list(b.shape)}, found {a.name} {a.dtype} {list(a.shape)}"
    return f"expected {len(wanted)}, found {len(found)}"


def first_problem(error: ValidationError) -> str:
    """Which field is wrong and why, without pydantic's many lines."""
    first = error.errors()[0]
    place, reason = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
    return f"field {place}: {reason}" if place else reason
