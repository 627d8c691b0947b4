"""Checkpoint -> bundle: the whole export, in the order it happens."""

from __future__ import annotations

import importlib.metadata
import json
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Protocol

import onnx_ir as ir
import torch
from torch import nn

from flashvlm import __version__
from flashvlm.bundle import MANIFEST
from flashvlm.errors import CheckpointError, FlashVLMError, SelectionError
from flashvlm.files import atomic_folder, sha256
from flashvlm.graph_check import check_graph
from flashvlm.graph_io import DialectName, prefill_graph, select_graph
from flashvlm.manifest import (
    EMBEDDINGS,
    PROCESSOR,
    FileSpec,
    GraphSpec,
    Manifest,
    ModelSpec,
    SelectionSpec,
)
from flashvlm_export.checkpoint import Checkpoint, StoredTensor, describes_a_model, open_checkpoint
from flashvlm_export.families import family_of
from flashvlm_export.graph import modules as graphs
from flashvlm_export.graph.dialects import DIALECTS
from flashvlm_export.graph.trace import TracedGraph, fake_weights, trace
from flashvlm_export.output import check_apart, check_out, check_space
from flashvlm_export.processor_files import load_processor, read_by_the_runtime, stop_tokens
from flashvlm_export.selection.flashvlm import METHODS, SelectionParams
from flashvlm_export.weights import stream as weights

PACKAGES = ("torch", "transformers", "onnx-ir", "onnxscript")
SAFETENSORS_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


class Progress(Protocol):
    """Receives the stages of an export; ``start`` returns a function to call with the amount done since."""

    def start(self, stage: str, total: int) -> Callable[[int], None]: ...


class NoProgress:
    def start(self, stage: str, total: int) -> Callable[[int], None]:
        return lambda _: None


@dataclass(frozen=True)
class ExportOptions:
    """What ``flashvlm-export`` takes. ``budgets`` may be empty: every bundle answers with all tokens too."""

    model: str
    out: Path
    budgets: tuple[int, ...] = (64,)
    method: str = "flashvlm"
    params: SelectionParams = field(default_factory=SelectionParams)
    query: Literal["question", "prompt"] = "question"
    positions: Literal["renumber", "keep"] = "renumber"
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    max_seq: int | None = None
    layout: Literal["split", "fused"] = "split"
    dialect: DialectName = "modern"
    revision: str | None = None
    force: bool = False


@dataclass(frozen=True)
class ExportReport:
    """What was written: files with sizes in bytes, wall seconds, and this process's peak resident memory in bytes."""

    out: Path
    manifest: Manifest
    seconds: float
    trace_seconds: float
    peak_rss: int


def export(options: ExportOptions, progress: Progress | None = None) -> ExportReport:
    """Writes a bundle folder, whole or not at all.

    Raises:
        FlashVLMError: bad options, a checkpoint that does not fit its model, or an output that cannot be written.
    """
    progress = progress or NoProgress()
    started = time.perf_counter()
    check_out(options.out, options.force)
    if options.method not in METHODS:
        raise SelectionError(f"unknown method {options.method!r}; expected one of {', '.join(METHODS)}")
    if options.layout == "fused" and options.dialect == "legacy":
        raise FlashVLMError("--layout fused needs a cache written in the graph; --dialect legacy has none, use split")
    dialect = DIALECTS[options.dialect]
    checkpoint = open_checkpoint(options.model, options.revision)
    check_apart(options.out, checkpoint.folder)
    family = family_of(checkpoint.config)
    dtype = _dtype(checkpoint) if options.dtype == "auto" else options.dtype
    with describes_a_model(checkpoint.folder / "config.json"):
        config = family.read_config(checkpoint.config)
        config._attn_implementation = dialect.attention
        with torch.device("meta"):
            model = family.build(config, graphs.TORCH_DTYPES[dtype]).eval()
        processor = load_processor(checkpoint)
        spec = family.model_spec(
            config, Path(options.model).name, dtype, _max_seq(options, config), stop_tokens(checkpoint, processor)
        )
    _check_budgets(options, spec)
    with describes_a_model(checkpoint.folder / "preprocessor_config.json"):
        preprocess = family.image_preprocess(processor, config)
    processor_files, text_tokens = read_by_the_runtime(processor, checkpoint.folder, spec)
    _check_capacity(options, spec, text_tokens)
    source = match_tensors(family, model, checkpoint, config)

    with fake_weights(model) as mode:
        parameters = {id(parameter): name for name, parameter in model.named_parameters()}
        wanted = list(_graphs(family, model, config, spec, options))
        step = progress.start("tracing", len(wanted))
        traced: dict[str, TracedGraph] = {}
        for graph in wanted:
            traced[graph.name] = trace(graph, mode, dialect)
            step(1)
        names = {g.name: {local: parameters[id(p)] for local, p in g.module.named_parameters()} for g in wanted}
    trace_seconds = time.perf_counter() - started

    placements = {
        name: weights.place(
            ((w.initializer, source[names[name][w.parameter]], w.transposed) for w in traced[name].weights),
            dtype,
        )
        for name in ("vision", "decoder")
    }
    embedding = weights.place([("weight", source[family.embedding_name()], False)], dtype)
    unused = _unused(family, config, source, [p for group in (*placements.values(), embedding) for p in group])

    with atomic_folder(options.out, options.force) as folder:
        total = sum(p.nbytes for group in (*placements.values(), embedding) for p in group)
        check_space(folder, total)
        files: dict[str, FileSpec] = {}
        step = progress.start("weights", total)
        for name, placed in placements.items():
            files[f"{name}.data"] = weights.write(placed, folder / f"{name}.data", on_bytes=step)
        files[EMBEDDINGS] = weights.write(
            embedding, folder / EMBEDDINGS, _safetensors_header(embedding[0]), on_bytes=step
        )
        for name, result in traced.items():
            _attach(result, name, names[name], placements, source, folder)
            ir.save(result.model, folder / f"{name}.onnx")
        (folder / PROCESSOR).mkdir()
        for name, content in processor_files.items():
            (folder / PROCESSOR / name).write_bytes(content)
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            name = path.relative_to(folder).as_posix()
            files.setdefault(name, FileSpec(size=path.stat().st_size, sha256=sha256(path)))
        for graph in wanted:  # what the runtime would refuse is not written
            spec_of = _graph_spec(graph)
            sizes = {data: files[data].size for data in spec_of.data}
            check_graph((folder / spec_of.file).read_bytes(), spec_of.file, sizes)
        manifest = Manifest(
            created_by={"flashvlm": __version__} | {name: importlib.metadata.version(name) for name in PACKAGES},
            source=options.model,
            dialect=options.dialect,
            layout=options.layout,
            model=spec,
            image=preprocess,
            selection=SelectionSpec(
                method=options.method,
                query=options.query,
                positions=options.positions,
                budgets=options.budgets,
                params=options.params.__dict__,
            ),
            graphs={g.name: _graph_spec(g) for g in wanted},
            files=dict(sorted(files.items())),
            unused_tensors=tuple(sorted(unused)),
        )
        check_out(options.out, options.force)  # again: minutes have passed
        # Last, because a folder without it does not load.
        (folder / MANIFEST).write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return ExportReport(options.out, manifest, time.perf_counter() - started, trace_seconds, peak)


# --- checks before any work ----------------------------------------------------------------------------------------


def _check_budgets(options: ExportOptions, model: ModelSpec) -> None:
    for budget in options.budgets:
        if not 0 < budget <= model.num_image_tokens:
            raise SelectionError(
                f"--budget {budget}: expected 1 to {model.num_image_tokens} (this model's image tokens), or all"
            )
    if options.method == "none" and options.budgets and options.budgets != (model.num_image_tokens,):
        raise SelectionError(f"--method none keeps every token; use --budget all, not {options.budgets[0]}")


def _max_seq(options: ExportOptions, config: Any) -> int | None:
    limit = config.text_config.max_position_embeddings
    if options.max_seq is not None and not 1 < options.max_seq <= limit:
        raise FlashVLMError(f"--max-seq {options.max_seq}: expected 2 to {limit}, the model's max_position_embeddings")
    return options.max_seq


def _check_capacity(options: ExportOptions, model: ModelSpec, text_tokens: int) -> None:
    image_tokens = max(options.budgets, default=model.num_image_tokens)
    if model.max_seq < image_tokens + text_tokens:
        raise FlashVLMError(
            f"--max-seq {model.max_seq} is too small: {image_tokens} image tokens and the shortest question need "
            f"{image_tokens + text_tokens}; raise it, or lower --budget"
        )


def _dtype(checkpoint: Checkpoint) -> Any:
    """The dtype most of the checkpoint's bytes are in."""
    sizes: dict[str, int] = {}
    for tensor in checkpoint.tensors.values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
    return max(sizes, key=sizes.__getitem__)


def match_tensors(family: ModuleType, model: nn.Module, checkpoint: Checkpoint, config: Any) -> dict[str, StoredTensor]:
    """Pairs every parameter of the model with the checkpoint tensor that holds it, by transformers' module path.

    Raises:
        CheckpointError: a tensor is missing, extra, doubled or of another shape.
    """
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
    found: dict[str, StoredTensor] = {}
    for tensor in checkpoint.tensors.values():
        name = family.canonical_name(tensor.name)
        if name is None:
            continue
        if name not in expected:
            raise CheckpointError(
                f"{checkpoint.name}: tensor {tensor.name} is not part of this model; expected no extra tensors"
            )
        if name in found:
            raise CheckpointError(
                f"{checkpoint.name}: {tensor.name} and {found[name].name} are the same parameter {name}"
            )
        if tensor.shape != expected[name]:
            raise CheckpointError(
                f"{checkpoint.name}: {tensor.name} is {list(tensor.shape)}; config.json says {list(expected[name])}"
            )
        found[name] = tensor
    if config.tie_word_embeddings or config.text_config.tie_word_embeddings:
        found.setdefault("lm_head.weight", found.get(family.embedding_name(), found.get("lm_head.weight")))  # type: ignore[arg-type]
    for name in expected:
        if found.get(name) is None:
            raise CheckpointError(f"{checkpoint.name}: tensor {name} is missing from the checkpoint; download it again")
    return found


def _unused(
    family: ModuleType, config: Any, source: dict[str, StoredTensor], placed: list[weights.Placement]
) -> list[str]:
    """Tensors no graph reads; every one must be one the family says the method does not need."""
    used = {p.source.name for p in placed}
    unused = [(name, tensor.name) for name, tensor in source.items() if tensor.name not in used]
    for name, _ in unused:
        if not family.is_unused(config, name):
            raise AssertionError(f"{name} is in no graph and family {family.NAME} does not list it as unused")
    return [stored for _, stored in unused]


# --- graphs --------------------------------------------------------------------------------------------------------


def _graphs(
    family: ModuleType, model: nn.Module, config: Any, spec: ModelSpec, options: ExportOptions
) -> Iterator[graphs.Graph]:
    size = config.vision_config.image_size
    image_size, width = (size, size), family.feature_size(config)
    vision = family.vision(model)
    layers, head = family.language(model)
    decoder = graphs.Decoder(layers, head, DIALECTS[options.dialect])
    yield graphs.vision_graph(vision, spec, image_size, width)
    yield graphs.decoder_graph(decoder, spec)
    for budget in options.budgets:
        select = graphs.Select(options.method, budget, options.params)
        yield graphs.select_graph(select, select_graph(budget), budget, spec, width)
        if options.layout == "fused":
            prefill = graphs.Prefill(vision, select, decoder, keep_positions=options.positions == "keep")
            yield graphs.prefill_graph(prefill, prefill_graph(budget), budget, spec, image_size)


def _attach(
    traced: TracedGraph,
    name: str,
    names: dict[str, str],
    placements: dict[str, list[weights.Placement]],
    source: dict[str, StoredTensor],
    folder: Path,
) -> None:
    """Points a graph's weights at the data files; a fused graph shares those of vision and decoder."""
    if name in placements:
        weights.reference(traced.model.graph, placements[name], folder / f"{name}.data")
        return
    for owner, placed in placements.items():
        at = {(p.source.name, p.transposed): p for p in placed}
        shared = [
            weights.renamed(at[key], w.initializer)
            for w in traced.weights
            if (key := (source[names[w.parameter]].name, w.transposed)) in at
        ]
        weights.reference(traced.model.graph, shared, folder / f"{owner}.data")


def _graph_spec(graph: graphs.Graph) -> GraphSpec:
    if graph.name in ("vision", "decoder"):
        data: tuple[str, ...] = (f"{graph.name}.data",)
    else:
        data = ("vision.data", "decoder.data") if isinstance(graph.module, graphs.Prefill) else ()
    return GraphSpec(file=f"{graph.name}.onnx", data=data, inputs=graph.inputs, outputs=graph.outputs)


def _safetensors_header(placement: weights.Placement) -> bytes:
    entry = {
        "dtype": SAFETENSORS_DTYPES[placement.dtype],
        "shape": list(placement.shape),
        "data_offsets": [0, placement.nbytes],
    }
    header = json.dumps({placement.initializer: entry}).encode()
    header += b" " * (-(8 + len(header)) % weights.ALIGNMENT)  # the table starts on a page
    return len(header).to_bytes(8, "little") + header
