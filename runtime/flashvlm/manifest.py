"""``bundle.json``: what a bundle is, and the bounds of all it may say.

A manifest is untrusted. Names of files become paths and sizes become memory, so each has a pattern or a range here, and
graphs have exactly the inputs and outputs of ``graph_io``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from flashvlm import graph_io
from flashvlm.budget import ALL, Budget, tokens_kept
from flashvlm.graph_io import DECODER, DialectName, FloatType, GraphIO, TensorSpec
from flashvlm.names import FileName, GraphName, VisionName, named
from flashvlm.tilings import AnyRes, Frames, Pixels

SCHEMA_VERSION = 2
EMBEDDINGS = "embed_tokens.safetensors"
PROCESSOR = "processor"
PROCESSOR_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")  # what the runtime reads of it


StreamName = Annotated[str, named(r"[a-z][a-z_]{0,31}", "a stream")]
Pattern = Annotated[str, Field(max_length=256)]
Marker = Annotated[str, Field(min_length=1, max_length=64)]
# Beyond every model there is, and small enough that no product of two allocates without end.
Tokens = Annotated[int, Field(gt=0, le=1 << 16)]
Width = Annotated[int, Field(gt=0, le=1 << 16)]
Layers = Annotated[int, Field(gt=0, le=1 << 10)]
Heads = Annotated[int, Field(gt=0, le=1 << 12)]
Vocabulary = Annotated[int, Field(gt=0, le=1 << 22)]
Slots = Annotated[int, Field(gt=0, le=1 << 24)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 22)]
MAX_PIXEL_VALUES = 1 << 27  # of all tiles of an image, float32: 537 MB
MAX_KV_VALUES = 1 << 24  # of a cache slot, keys and values of all layers: models have 10^4 to 10^6
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class GraphSpec(_Record):
    file: FileName
    data: tuple[FileName, ...] = ()
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


class FileSpec(_Record):
    size: int = Field(ge=0, lt=1 << 50)
    sha256: Sha256


class Dtypes(_Record):
    """activations: of every tensor between graphs and in the cache; weights: as stored; embeddings: of the table."""

    activations: FloatType
    weights: FloatType
    embeddings: FloatType


class ModelSpec(_Record):
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


class TextLayout(_Record):
    """What stands around an item's visual tokens, each run of them a ``{v}``.

    whole     of an item in one piece, or of any item where neither ``tile`` nor ``frame`` is given
    tile      of a tile, in row ``{r}`` and column ``{c}`` from 1; row_end: after each row; last: of the thumbnail
    head, end before and after a video of ``{n}`` frames (``{words}``: in English), ``{hms}`` long (1:02:03)
    frame     of a video's unit ``{i}``, from 1, at ``{mmss}`` (62:03) or ``{seconds}`` (3723.0); join: between them
    """

    whole: Pattern = "{v}"
    tile: Pattern | None = None
    row_end: Pattern = ""
    last: Pattern = ""
    head: Pattern = ""
    frame: Pattern | None = None
    join: Pattern = ""
    end: Pattern = ""

    @model_validator(mode="after")
    def _check(self) -> TextLayout:
        around = (self.row_end, self.head, self.join, self.end)
        if self.whole.count("{v}") != 1 or any("{v}" in text for text in around) or self.last.count("{v}") > 1:
            raise ValueError("expected one {v} for the visual tokens of each unit")
        for name, text in (("tile", self.tile), ("frame", self.frame)):
            if text is not None and text.count("{v}") != 1:
                raise ValueError(f"expected one {{v}} for the visual tokens of a {name}")
        return self


class VisualSpec(_Record):
    """How images, or videos, become visual tokens at one size. One of them is an item.

    graph            of vision; its selection graphs are named after it
    placeholder_id   the token that stands for a run of its visual tokens
    marker           what the chat template writes for an item, where it is not that token
    tokens_per_unit  of a tile or frame, ``grid`` rows by columns (the CLS token that ``skip`` names is beside them)
    candidates       tokens at most, in reading order
    order            of the candidates: raster, tile after tile; or anyres: the thumbnail, then rows over all tiles
                     without their padding, each with a newline
    newline          end: one behind the last token of a video
    positions        sequential; or mrope: time, height and width, time in ``time_scale`` steps a second of video
    skip             cls: the first token of each unit is never selected, and kept in "all"
    scope            of a budget: item, chosen among all tokens; or unit, the same number of each tile or frame
    """

    modality: Literal["image", "video"] = "image"
    graph: VisionName
    placeholder_id: TokenId
    marker: Marker | None = None
    tokens_per_unit: Tokens
    grid: tuple[Tokens, Tokens]
    candidates: Tokens
    feature_size: Width
    pixels: Pixels
    order: Literal["raster", "anyres"] = "raster"
    newline: Literal["none", "end"] = "none"
    text: TextLayout = TextLayout()
    positions: Literal["sequential", "mrope"] = "sequential"
    time_scale: int = Field(default=1, ge=1, le=1 << 16)
    skip: Literal["none", "cls"] = "none"
    scope: Literal["item", "unit"] = "item"

    @property
    def tiled(self) -> bool:
        """Whether an item has several units, and its graph an ``order``."""
        return self.pixels.tiling != "single"

    def select_size(self, budget: int) -> tuple[int, int]:
        """Candidates and budget of one selection: an item's, or of scope unit a unit's, K // the most units."""
        if self.scope == "item":
            return self.candidates, budget
        return self.tokens_per_unit, budget // self.pixels.max_units

    def kept_of(self, count: int, units: int, budget: Budget) -> int:
        """Tokens that a budget keeps of an item of ``count`` tokens in ``units``: ``count`` if nothing is selected."""
        if budget == ALL or self.scope == "item":
            return tokens_kept(budget, count)
        candidates, kept = self.select_size(budget)
        return count if kept >= candidates else units * kept

    @model_validator(mode="after")
    def _check(self) -> VisualSpec:
        cells = math.prod(self.grid) + (self.skip == "cls")
        if cells != self.tokens_per_unit:
            raise ValueError(f"expected a grid of {self.tokens_per_unit} tokens, found {self.grid}")
        if (self.modality == "video") != isinstance(self.pixels, Frames):
            raise ValueError(f"modality {self.modality} does not go with the tiling {self.pixels.tiling}")
        if (self.order == "anyres") != isinstance(self.pixels, AnyRes):
            raise ValueError(f"order {self.order} does not go with the tiling {self.pixels.tiling}")
        if self.scope == "unit" and (not self.tiled or self.order == "anyres"):
            raise ValueError(
                f"a budget for each unit (scope unit) needs tiles or frames one after another, found the tiling "
                f"{self.pixels.tiling}; use scope item"
            )
        if self.candidates != (most := self._most()):
            raise ValueError(f"expected {most} candidates of these tiles, found {self.candidates}")
        if self.newline == "end" and (self.modality != "video" or self.text.frame is not None):
            raise ValueError("a newline at the end goes with a video in one run")
        if (self.text.tile if self.modality == "video" else self.text.frame) is not None:
            raise ValueError(f"text of tiles goes with images and text of frames with videos, found a {self.modality}")
        if self.text.tile is not None:
            if self.order == "anyres":
                raise ValueError("text between tiles does not go with rows over all tiles")
            if self.pixels.may_have_thumbnail and self.text.last.count("{v}") != 1:  # without one it is not read
                raise ValueError("expected one {v} in the text of the thumbnail")
        if (numbers := self.pixels.max_units * math.prod(self.pixels.unit_shape)) > MAX_PIXEL_VALUES:
            raise ValueError(f"expected at most {MAX_PIXEL_VALUES:,} pixel values of an image, found {numbers:,}")
        return self

    def _most(self) -> int:
        """The candidates of the largest item there can be."""
        if not isinstance(self.pixels, AnyRes):
            return self.pixels.max_units * self.tokens_per_unit + (self.newline == "end")
        rows, columns = self.grid
        side = self.pixels.side
        lines = max(h // side * rows * (w // side * columns + 1) for h, w in self.pixels.pinpoints)
        return self.tokens_per_unit + lines


class SelectionSpec(_Record):
    """score: what ``scores`` are: logarithms, cosines less the best one's, or None (zeros). default: the budget of a
    question that names none."""

    method: str
    score: Literal["log", "cosine"] | None = None
    query: Literal["question", "prompt"]
    positions: Literal["renumber", "keep"]
    budgets: tuple[Tokens, ...] = Field(max_length=256)
    default: Tokens | Literal["all"]
    params: dict[str, float | int | str]


class Manifest(_Record):
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


def unshared(visual: VisualSpec, budgets: Sequence[int]) -> str | None:
    """What is wrong with a budget that leaves a tile or frame without a token; None where there is no such budget."""
    units, least = visual.pixels.max_units, min(budgets, default=visual.candidates)
    if visual.select_size(least)[1] > 0:
        return None
    return f"a budget that up to {units} tiles or frames share is at least {units}, found {least}"


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
