"""Exported graphs in the work folder, each made once: bundles without selection, and selection graphs beside them.

A selection graph depends on shapes and parameters, not on weights, so a variant costs one small trace instead of an
export. It is traced from the same module, with the same contract, as ``flashvlm-export`` traces it.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import onnx_ir as ir

from flashvlm import __version__
from flashvlm.bundle import Bundle
from flashvlm.embeddings import EmbeddingTable
from flashvlm.manifest import EMBEDDINGS
from flashvlm_export.checkpoint import open_checkpoint
from flashvlm_export.exporter import ExportOptions, export
from flashvlm_export.graph import modules as graphs
from flashvlm_export.graph.dialects import DIALECTS
from flashvlm_export.graph.trace import fake_weights, trace
from flashvlm_export.selection import baselines
from flashvlm_export.selection import flashvlm as selection
from flashvlm_export.selection import ops as primitives
from flashvlm_export.selection.flashvlm import SelectionParams
from quality import experimental, resolution
from quality.variants import DOWNSAMPLED, POOLED, Variant

DTYPE = "float32"  # of every graph: what is compared is the selection, and no CPU computes in float16


class Shelf:
    """The graphs of one model. Files are named by what they depend on, so that none is ever stale."""

    def __init__(self, model: str, work: Path) -> None:
        self._checkpoint = open_checkpoint(model).folder
        self._work = work
        weights = [path for path in sorted(self._checkpoint.iterdir()) if path.suffix in (".safetensors", ".json")]
        self.model_key = digest(__version__, DTYPE, *(hashlib.sha256(path.read_bytes()).digest() for path in weights))

    @cached_property
    def base(self) -> Bundle:
        """The bundle of the model as it is."""
        bundle = self._bundle(self._checkpoint, "whole")
        spec = bundle.manifest.model
        table = EmbeddingTable(bundle.file(EMBEDDINGS), spec.vocab_size, spec.hidden_size)
        experimental.register(table[range(spec.vocab_size)])
        selection.METHODS[POOLED], selection.READS[POOLED] = resolution.pooled, frozenset()
        return bundle

    def bundle_path(self, name: str = "whole") -> Path:
        return self._work / "bundles" / f"{name}-{self.model_key}"

    def smaller(self, side: int) -> Bundle:
        """The bundle of the same model on images of ``side`` x ``side`` patches."""
        checkpoint = self._work / "checkpoints" / f"side-{side}-{self.model_key}"
        if not checkpoint.exists():
            partial = checkpoint.with_name(f".{checkpoint.name}.{os.getpid()}")
            resolution.write_downsampled(self._checkpoint, side, partial)
            partial.rename(checkpoint)
        return self._bundle(checkpoint, f"side-{side}")

    def selection_graph(self, variant: Variant, budget: int) -> Path:
        """The ONNX file of a variant at a budget."""
        path = self._work / "select" / f"{budget}-{self.selection_key(variant, budget)}.onnx"
        if path.exists():
            return path
        width = self.base.graph("vision").outputs[1].shape[-1]
        assert isinstance(width, int)
        tokens = variant.tokens(budget)
        module = graphs.Select(variant.method, tokens, SelectionParams(**variant.params))
        graph = graphs.select_graph(module, f"select-k{tokens}", tokens, self.base.manifest.model, width)
        with fake_weights(module) as mode:
            model = trace(graph, mode, DIALECTS["modern"]).model
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        ir.save(model, partial)
        partial.rename(path)
        return path

    def selection_key(self, variant: Variant, budget: int) -> str:
        """Of everything that decides which tokens are kept, the source of the methods included."""
        sources = [SOURCES[module] for module in (selection, baselines, primitives, graphs)]
        if variant.method in (DOWNSAMPLED, POOLED):
            sources.append(SOURCES[resolution])
        elif variant.method not in PUBLISHED:
            sources.append(SOURCES[experimental])
        params = asdict(SelectionParams(**variant.params))
        what = [variant.method, params, variant.query, variant.positions, variant.tokens(budget), self.model_key]
        return digest(json.dumps(what), *sources)

    def _bundle(self, checkpoint: Path, name: str) -> Bundle:
        out = self.bundle_path(name)
        if not out.exists():
            out.parent.mkdir(parents=True, exist_ok=True)
            export(ExportOptions(model=str(checkpoint), out=out, budgets=(), dtype=DTYPE))
        return Bundle(out)


PUBLISHED = frozenset(selection.METHODS)  # before `register` adds to them
# Read once: an edit during a run belongs to the next one.
SOURCES = {m: inspect.getsource(m) for m in (selection, baselines, primitives, graphs, resolution, experimental)}


def digest(*parts: Any) -> str:
    """12 hexadecimal digits of SHA-256."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part if isinstance(part, bytes) else str(part).encode())
        found.update(b"\0")
    return found.hexdigest()[:12]
