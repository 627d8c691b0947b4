"""``bundle.json``: what a bundle is, and the bounds of all it may say.

A manifest is untrusted. Names of files become paths and sizes become memory, so each has a pattern or a range here, and
graphs have exactly the inputs and outputs of ``graph_io``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from flashvlm import graph_io
from flashvlm.graph_io import DECODER, VISION, DialectName, FloatType, GraphIO, TensorSpec
from flashvlm.images import ImagePreprocess

SCHEMA_VERSION = 1
EMBEDDINGS = "embed_tokens.safetensors"
PROCESSOR = "processor"
PROCESSOR_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")  # what the runtime reads of it


def _named(pattern: str, what: str) -> AfterValidator:
    """A text that becomes a name in the file system: of this pattern, or refused as no ``what``."""

    def check(name: str) -> str:
        if not re.fullmatch(pattern, name, re.ASCII):
            raise ValueError(f"{name!r} is not {what}")
        return name

    return AfterValidator(check)


# Never absolute, never hidden, never upwards.
FileName = Annotated[
    str,
    _named(
        r"(\w[\w.-]{0,99}/)?\w[\w.-]{0,99}",
        "the name of a file in the bundle (letters, digits, '.', '_', '-'; at most in one folder)",
    ),
]
GraphName = Annotated[
    str,
    _named(r"vision|decoder|(select|prefill)-k[1-9][0-9]{0,6}", "a graph: vision, decoder, select-k64, prefill-k64"),
]
# Beyond every model there is, and small enough that no product of two allocates without end.
Tokens = Annotated[int, Field(gt=0, le=1 << 16)]
Width = Annotated[int, Field(gt=0, le=1 << 16)]
Layers = Annotated[int, Field(gt=0, le=1 << 10)]
Heads = Annotated[int, Field(gt=0, le=1 << 12)]
Vocabulary = Annotated[int, Field(gt=0, le=1 << 22)]
Slots = Annotated[int, Field(gt=0, le=1 << 24)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 22)]
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


class ModelSpec(_Record):
    """What the runtime needs to know of the model; shapes in tokens, heads and channels."""

    name: str
    family: str
    dtype: FloatType
    num_image_tokens: Tokens
    image_grid: tuple[Tokens, Tokens]
    hidden_size: Width
    num_layers: Layers
    num_key_value_heads: Heads
    head_dim: Width
    vocab_size: Vocabulary
    max_seq: Slots
    image_token_id: TokenId
    eos_token_ids: tuple[TokenId, ...] = Field(max_length=64)

    @model_validator(mode="after")
    def _check(self) -> ModelSpec:
        if math.prod(self.image_grid) != self.num_image_tokens:
            raise ValueError(f"expected an image_grid of {self.num_image_tokens} tokens, found {self.image_grid}")
        for token in (self.image_token_id, *self.eos_token_ids):
            if token >= self.vocab_size:
                raise ValueError(f"token id {token} is beyond the table of {self.vocab_size} rows")
        return self


class SelectionSpec(_Record):
    method: str
    query: Literal["question", "prompt"]
    positions: Literal["renumber", "keep"]
    budgets: tuple[Tokens, ...] = Field(max_length=256)
    params: dict[str, float | int | str]


class Manifest(_Record):
    schema_version: int = SCHEMA_VERSION
    created_by: dict[str, str]
    source: str
    dialect: DialectName
    layout: Literal["split", "fused"]
    model: ModelSpec
    image: ImagePreprocess
    selection: SelectionSpec
    graphs: dict[GraphName, GraphSpec]
    files: dict[FileName, FileSpec] = Field(max_length=10_000)
    unused_tensors: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Manifest:
        budgets, model = self.selection.budgets, self.model
        if len(set(budgets)) != len(budgets) or max(budgets, default=0) > model.num_image_tokens:
            raise ValueError(f"expected different budgets up to {model.num_image_tokens}, found {budgets}")
        if self.layout == "fused" and self.dialect == "legacy":
            raise ValueError("the fused layout needs a cache written in place, which the legacy dialect has not")
        self._check_files()
        self._check_graphs()
        return self

    def _check_files(self) -> None:
        needed = [(EMBEDDINGS, "the runtime"), *((f"{PROCESSOR}/{name}", "the runtime") for name in PROCESSOR_FILES)]
        needed += [(file, f"graph {name}") for name, g in self.graphs.items() for file in (g.file, *g.data)]
        for file, user in needed:
            if file not in self.files:
                raise ValueError(f"{user} uses {file!r}, which files does not list")

    def _check_graphs(self) -> None:
        if missing := {VISION, DECODER} - self.graphs.keys():
            raise ValueError(f"no graph {min(missing)!r}; it has {', '.join(sorted(self.graphs))}")
        expected = dict(self._contract())
        if odd := self.graphs.keys() ^ expected.keys():
            raise ValueError(
                f"expected the graphs {', '.join(sorted(expected))} for these budgets, found another set: "
                f"{', '.join(sorted(odd))}"
            )
        for name, (inputs, outputs) in expected.items():
            graph = self.graphs[name]
            for kind, found, wanted in (("input", graph.inputs, inputs), ("output", graph.outputs, outputs)):
                if found != wanted:
                    raise ValueError(f"graph {name} does not have the {kind}s of its contract: {_first(found, wanted)}")

    def _contract(self) -> Iterator[tuple[str, GraphIO]]:
        """Every graph this bundle has to have, with its inputs and outputs. The feature width is vision's own."""
        image = self.image
        size = image.crop or image.size
        outputs = {tensor.name: tensor for tensor in self.graphs[VISION].outputs}
        width = outputs["features"].shape[-1] if "features" in outputs else None
        if not isinstance(width, int):
            raise ValueError("graph vision does not have the outputs of its contract: features [B,N,width] is missing")
        yield VISION, graph_io.vision_io(self.model, size, width)
        yield DECODER, graph_io.decoder_io(self.model, self.dialect)
        for budget in self.selection.budgets:
            yield graph_io.select_graph(budget), graph_io.select_io(self.model, budget, width)
            if self.layout == "fused":
                yield graph_io.prefill_graph(budget), graph_io.prefill_io(self.model, budget, size)


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
