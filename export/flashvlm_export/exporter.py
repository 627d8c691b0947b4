"""Checkpoint -> bundle: the whole export, in the order it happens."""

from __future__ import annotations

import importlib.metadata
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import onnx_ir as ir

from flashvlm import __version__
from flashvlm.bundle import MANIFEST
from flashvlm.errors import FlashVLMError as FlashVLMError
from flashvlm.files import atomic_folder, sha256
from flashvlm.graph_check import check_graph
from flashvlm.graph_io import DECODER, VISION, prefill_graph, select_graph
from flashvlm.manifest import EMBEDDINGS, PROCESSOR, FileSpec, GraphSpec, Manifest, graphs_of
from flashvlm_export import model_card
from flashvlm_export.checkpoint import StoredTensor
from flashvlm_export.graph import modules as graphs
from flashvlm_export.graph.dialects import DIALECTS
from flashvlm_export.graph.trace import TracedGraph, fake_weights, trace
from flashvlm_export.opening import OpenModel, check_unused, match_tensors, open_model
from flashvlm_export.options import ExportOptions as ExportOptions
from flashvlm_export.output import check_place, check_space
from flashvlm_export.selection import METHODS
from flashvlm_export.weights import stream
from flashvlm_export.weights.layout import Layout, Place, attach, files_of
from flashvlm_export.weights.recipes import plain

PACKAGES = ("torch", "transformers", "onnx-ir", "onnxscript")


class Progress(Protocol):
    """Receives the stages of an export; ``start`` returns a function to call with the amount done since."""

    def start(self, stage: str, total: int) -> Callable[[int], None]: ...


class NoProgress:
    def start(self, stage: str, total: int) -> Callable[[int], None]:
        return lambda _: None


@dataclass(frozen=True)
class ExportReport:
    """What was written: files with sizes in bytes, wall seconds, and this process's peak resident memory in bytes.

    text_tokens: of the shortest question, with its template.
    """

    out: Path
    manifest: Manifest
    seconds: float
    trace_seconds: float
    peak_rss: int
    text_tokens: int


def export(options: ExportOptions, progress: Progress | None = None) -> ExportReport:
    """Writes a bundle folder, whole or not at all.

    Raises:
        FlashVLMError: bad options, a checkpoint that does not fit its model, or an output that cannot be written.

    Example:
        >>> export(ExportOptions("llava-1.5-7b", Path("llava"), budgets=(64, 128)))
    """
    progress = progress or NoProgress()
    started = time.perf_counter()
    check_place(options.out, options.force)
    model = open_model(options)
    source = match_tensors(model.family, model.module, model.checkpoint, model.config)
    traced = _trace(model, source, options, progress)
    trace_seconds = time.perf_counter() - started
    layout, places = _lay_out(model, source, traced)
    unused = check_unused(model, source, layout.sources)
    manifest = _write(model, traced, layout, places, unused, options, progress)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return ExportReport(options.out, manifest, time.perf_counter() - started, trace_seconds, peak, model.text_tokens)


# --- trace -----------------------------------------------------------------------------------------------------------


def _trace(
    model: OpenModel, source: Mapping[str, StoredTensor], options: ExportOptions, progress: Progress
) -> dict[str, TracedGraph]:
    """Every graph of the bundle, by name."""
    traced = {}
    with fake_weights(model.module) as mode:
        parameters = {id(parameter): name for name, parameter in model.module.named_parameters()}
        wanted = _graphs(model, source, options)
        step = progress.start("tracing", len(wanted))
        for graph in wanted:
            traced[graph.name] = trace(graph, mode, DIALECTS[options.dialect], parameters)
            step(1)
    return traced


def _graphs(model: OpenModel, source: Mapping[str, StoredTensor], options: ExportOptions) -> list[graphs.Graph]:
    layers, head = model.family.language(model.module)
    decoder = graphs.Decoder(
        layers, head, DIALECTS[options.dialect], [*model.spec.streams], head_as_table=_head_is_table(model, source)
    )
    modules = {DECODER: decoder}
    for spec in model.visual:
        vision = model.family.vision(model.module, spec)
        if not METHODS[options.method].reads_saliency(options.params):
            vision = graphs.WithoutSaliency(vision)
        modules[spec.graph] = vision
        for budget in options.budgets:
            select = graphs.Select(options.method, spec.select_size(budget)[1], options.params)
            modules[select_graph(spec.graph, budget)] = select
            keep = model.selection.positions == "keep"
            modules[prefill_graph(spec.graph, budget)] = graphs.Prefill(vision, select, decoder, keep)
    contract = graphs_of(model.spec, model.visual, options.budgets, options.layout)
    return [graphs.Graph(name, modules[name], *io) for name, io in contract]


def _head_is_table(model: OpenModel, source: Mapping[str, StoredTensor]) -> bool:
    """Whether the output head's weights are the embedding table, so that the bundle needs it once."""
    head, dtypes = model.family.tied_head(model.config), model.spec.dtypes
    shared = head is not None and source[head] == source[model.family.embedding_name(model.config)]
    return shared and dtypes.embeddings == dtypes.weights


# --- lay out ---------------------------------------------------------------------------------------------------------


def _lay_out(
    model: OpenModel, source: Mapping[str, StoredTensor], traced: Mapping[str, TracedGraph]
) -> tuple[Layout, dict[str, dict[str, Place]]]:
    """Where every weight goes; for each graph, the place of each of its initializers."""
    dtypes, table = model.spec.dtypes, source[model.family.embedding_name(model.config)]
    layout = Layout()
    layout.add_safetensors(EMBEDDINGS, "weight", plain(table, dtypes.embeddings))
    places = {}
    for name, graph in traced.items():
        recipes = {
            initializer: plain(source[weight.parameter], dtypes.weights, weight.transposed)
            for initializer, weight in graph.weights.items()
        }
        # The vision graphs of all sizes read one file; a fused graph finds its weights there and in the decoder's.
        owner = DECODER if name == DECODER else VISION
        places[name] = layout.add(f"{owner}.data", recipes)
    return layout, places


# --- write -----------------------------------------------------------------------------------------------------------


def _write(
    model: OpenModel,
    traced: Mapping[str, TracedGraph],
    layout: Layout,
    places: Mapping[str, Mapping[str, Place]],
    unused: tuple[str, ...],
    options: ExportOptions,
    progress: Progress,
) -> Manifest:
    provenance = model_card.provenance(model.checkpoint)
    with atomic_folder(options.out, options.force) as folder:
        check_space(folder, layout.nbytes)
        files: dict[str, FileSpec] = {}
        step = progress.start("weights", layout.nbytes)
        for name, data in layout.files.items():
            files[name] = stream.write(data, folder / name, on_bytes=step)
        specs = {}
        for name, (inputs, outputs) in graphs_of(model.spec, model.visual, options.budgets, options.layout):
            attach(traced[name].model.graph, places[name], folder)
            ir.save(traced[name].model, folder / f"{name}.onnx")
            data_files = files_of(places[name])
            specs[name] = GraphSpec(file=f"{name}.onnx", data=data_files, inputs=inputs, outputs=outputs)
            # What the runtime would refuse is not written.
            content = (folder / specs[name].file).read_bytes()
            check_graph(content, specs[name].file, {data: files[data].size for data in data_files})
        (folder / PROCESSOR).mkdir()
        for name, content in model.processor_files.items():
            (folder / PROCESSOR / name).write_bytes(content)
        for name, content in provenance.files.items():
            (folder / name).write_bytes(content)
        files |= _file_specs(folder, files)
        manifest = Manifest(
            created_by={"flashvlm": __version__} | {name: importlib.metadata.version(name) for name in PACKAGES},
            source=options.model,
            revision=provenance.revision,
            license=provenance.license,
            dialect=options.dialect,
            layout=options.layout,
            model=model.spec,
            visual=model.visual,
            selection=model.selection,
            graphs=specs,
            files=files,
            unused_tensors=unused,
        )
        (folder / model_card.CARD).write_text(model_card.write(manifest, provenance, options), encoding="utf-8")
        files |= _file_specs(folder, files)
        manifest = manifest.model_copy(update={"files": dict(sorted(files.items()))})
        check_place(options.out, options.force)  # again: minutes have passed
        # Last, because a folder without it does not load.
        (folder / MANIFEST).write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
    return manifest


def _file_specs(folder: Path, known: Mapping[str, FileSpec]) -> dict[str, FileSpec]:
    """Sizes and digests of the files that are not known yet, by their name in the bundle."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {
        name: FileSpec(size=(folder / name).stat().st_size, sha256=sha256(folder / name))
        for name in sorted(names)
        if name not in known
    }
