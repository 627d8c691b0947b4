"""The JSON that ``trtexec`` and ``tensorrt_rtx`` write.

The formats are those of TensorRT's own trtexec (samples/common/sampleReporting.cpp, 8.6 to 11.0):

    --exportTimes      [{"computeMs": ..., "latencyMs": ..., ...}, ...], one entry an inference, warm-up left out
    --exportProfile    [{"count": N}, {"name": ..., "averageMs": ..., "medianMs": ..., ...}, ...], one entry a layer
    --exportLayerInfo  {"Layers": [...], "Bindings": [...]}: names alone, or with detailed verbosity objects whose
                       "Metadata" lists the ONNX nodes of a fused layer: "[ONNX Layer: /a]\\x1f[ONNX Layer: /b]"
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from flashvlm.errors import FlashVLMError

T = TypeVar("T")
OUTSIDE = "(no graph path)"  # what TensorRT adds of its own and names after no node
LAYERS = re.compile(r"\.\d+(?=/|$)")


def read_times(path: Path) -> list[float]:
    """Milliseconds of GPU compute of each inference."""
    return _read(path, "--exportTimes", lambda entries: [float(entry["computeMs"]) for entry in entries])


def read_profile(path: Path) -> list[tuple[str, float]]:
    """(layer, milliseconds an inference) in execution order: the median, or in files of old versions the mean."""

    def layers(entries: Any) -> list[tuple[str, float]]:
        named = (entry for entry in entries if "name" in entry)
        return [(entry["name"], float(entry.get("medianMs", entry.get("averageMs")))) for entry in named]

    return _read(path, "--exportProfile", layers)


def read_layer_nodes(path: Path) -> dict[str, list[str]]:
    """The ONNX nodes of each layer, from an engine built with detailed verbosity; empty for any other."""

    def nodes(found: Any) -> dict[str, list[str]]:
        detailed = (layer for layer in found["Layers"] if isinstance(layer, dict))
        return {layer["Name"]: re.findall(r"\[ONNX Layer: ([^\]]+)\]", layer.get("Metadata", "")) for layer in detailed}

    return _read(path, "--exportLayerInfo", nodes)


def _read(path: Path, option: str, parse: Callable[[Any], T]) -> T:
    try:
        # Control characters separate the nodes of a fused layer, and may come unescaped.
        found = json.loads(path.read_text(encoding="utf-8"), strict=False)
        if not found:
            raise ValueError("nothing in it")
        return parse(found)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise FlashVLMError(f"{path}: expected what trtexec {option} writes, found: {error}") from None


def layer_path(name: str, nodes: Iterable[str] = ()) -> str:
    """The module a layer belongs to, as a path: of a fused layer, what all of its nodes have in common.

    ``nodes`` are those the engine itself lists. Without them the layer's name tells: ``/a/b/MatMul + /a/b/Add``,
    ``{ForeignNode[/a/b/MatMul.../a/c/Add]}``, ``Reformatting CopyNode for Input Tensor 0 to /a/b/Conv``.
    """
    listed = [node for node in nodes if node.startswith("/")]
    paths = listed or [part for text in name.split("...") for part in re.findall(r"/[^\s+,()\[\]{}]+", text)]
    if not paths:
        return OUTSIDE
    modules = [path.rpartition("/")[0] or "/" for path in paths]  # the last part is the operator
    return os.path.commonpath(modules)


def sum_by_path(layers: Iterable[tuple[str, float]], nodes: dict[str, list[str]]) -> dict[str, float]:
    """Milliseconds by module path, most first; each layer counts once, so that the values add up to all of them."""
    sums: dict[str, float] = {}
    for name, milliseconds in layers:
        path = layer_path(name, nodes.get(name, ()))
        sums[path] = sums.get(path, 0.0) + milliseconds
    return dict(sorted(sums.items(), key=lambda entry: -entry[1]))


def over_layers(sums: dict[str, float], depth: int) -> dict[str, float]:
    """The same, with all layers of a stack as one (``layers.*``) and paths cut to ``depth`` parts."""
    groups: dict[str, float] = {}
    for path, milliseconds in sums.items():
        group = LAYERS.sub(".*", "/".join(path.split("/")[: depth + 1]))
        groups[group] = groups.get(group, 0.0) + milliseconds
    return dict(sorted(groups.items(), key=lambda entry: -entry[1]))
