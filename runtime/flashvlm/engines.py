"""Compiled engines inside a bundle: ``engines/<target>-<version>-<sm>/`` and the manifest beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flashvlm.bundle import Bundle
from flashvlm.errors import BundleError

ENGINES = "engines"
ENGINE_MANIFEST = "engine.json"

Target = Literal["tensorrt", "tensorrt-rtx"]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BuildFlags(_Record):
    """What decides an engine besides its graph: a change of any of these is another engine.

    max_seq and max_batch bound the shapes; workspace is in bytes, None for the compiler's default.
    """

    compute_capabilities: tuple[str, ...]
    max_seq: int = Field(gt=1)
    max_batch: int = Field(gt=0)
    max_query: int = Field(gt=0)
    workspace: int | None = None
    optimization_level: int | None = None
    weight_streaming: bool = False
    strip_weights: bool = False
    version_compatible: bool = False


class EngineSpec(_Record):
    """One engine: the graph it was built from, and what building it took."""

    file: str
    size: int
    sha256: str
    onnx_sha256: str
    data_sha256: tuple[str, ...]
    build_seconds: float
    peak_rss: int


class EngineManifest(_Record):
    target: Target
    version: str
    flags: BuildFlags
    engines: dict[str, EngineSpec]


def folder_name(target: Target, version: str, compute_capabilities: tuple[str, ...]) -> str:
    """``tensorrt-rtx-1.7.1.116-sm89``; several capabilities share one folder: ``-sm86-sm89``."""
    return "-".join([target, version, *("sm" + c.replace(".", "") for c in compute_capabilities)])


def read_manifest(folder: Path) -> EngineManifest:
    """Raises BundleError if the folder holds no readable engine manifest."""
    try:
        return EngineManifest.model_validate(json.loads((folder / ENGINE_MANIFEST).read_text(encoding="utf-8")))
    except (OSError, ValueError, ValidationError):
        raise BundleError(f"{folder} holds no complete engines; build them with: flashvlm-compile") from None


def built_from(spec: EngineSpec, bundle: Bundle, graph: str) -> bool:
    """Whether an engine was built from the graph and weights the bundle has now."""
    files, source = bundle.manifest.files, bundle.graph(graph)
    same_data = spec.data_sha256 == tuple(files[name].sha256 for name in source.data)
    return same_data and spec.onnx_sha256 == files[source.file].sha256
