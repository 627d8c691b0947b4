"""The two nodes of the selection that a TensorRT plugin can compute, and their form for TensorRT. Never imports torch.

In a bundle each is a call of an ONNX local function, whose body is standard operators: every runtime runs it. Which
parser takes a plugin for such a node depends on its version (change logs of TensorRT and onnx-tensorrt):

    up to 10.6     the body, whatever plugins there are; a plugin's namespace stands in the attribute plugin_namespace
    from 10.7      a plugin of the registry before a body
    from 10.10     the namespace is also read from the node's domain
    from 10.15     ENABLE_PLUGIN_OVERRIDE, for plugins named like an ONNX operator, which ours are not

A node without a body, with its namespace in the attribute, means the plugin to all of them; so that is what
``flashvlm-compile --plugins`` gives the parser, and one bundle serves with plugins and without.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flashvlm.bundle import Bundle
from flashvlm.engines import MODULES, BuildFlags, PluginSpec
from flashvlm.errors import FlashVLMError
from flashvlm.files import sha256
from flashvlm.graph_check import DOMAIN as DOMAIN  # of the nodes, and the plugins' namespace
from flashvlm.graph_check import LLOYD_OP as LLOYD_OP
from flashvlm.graph_check import SCORE_OP as SCORE_OP

VERSION = "1"  # of the plugins
MAX_QUERY = 512  # tokens of a question, in the kernels
MASKS = {SCORE_OP: (2, 4), LLOYD_OP: (2,)}  # each plugin, and which of its inputs are bool in the graph


def for_plugins(model: Any) -> int:
    """Turns function calls of an onnx.ModelProto into plugin nodes, in place; returns how many there were.

    Masks become int32: TensorRT's headers say that plugins have no bool tensors.
    """
    from onnx import TensorProto, helper

    nodes: list[Any] = []
    cast: set[str] = set()
    count = 0
    for node in model.graph.node:
        if node.domain == DOMAIN and node.op_type in MASKS:
            count += 1
            for i in MASKS[node.op_type]:
                name = node.input[i]
                node.input[i] = f"{name}/int32"
                if name not in cast:
                    cast.add(name)
                    path = f"{node.name}/{name}/Cast"
                    nodes.append(helper.make_node("Cast", [name], [node.input[i]], path, to=TensorProto.INT32))
            for key, value in (("plugin_namespace", DOMAIN), ("plugin_version", VERSION)):
                node.attribute.append(helper.make_attribute(key, value))
        nodes.append(node)
    bodies = [function for function in model.functions if function.domain != DOMAIN or function.name not in MASKS]
    for field, items in ((model.graph.node, nodes), (model.functions, bodies)):
        copies = [type(item).FromString(item.SerializeToString()) for item in items]  # they die with the field
        del field[:]
        field.extend(copies)
    return count


def load(library: Path, bundle: Bundle, flags: BuildFlags, trt: Any) -> PluginSpec:
    """Loads a plugin library into the registry of ``tensorrt``, for the nodes of a bundle.

    Raises:
        FlashVLMError: TensorRT-RTX, no node for a plugin, or a library that does not load or lacks one of them.
    """
    if trt.__name__ == MODULES["tensorrt-rtx"]:
        raise FlashVLMError("--plugins: TensorRT-RTX runs no plugin layers; leave it out")
    selection = bundle.manifest.selection
    if selection.method != "flashvlm" or not selection.budgets:
        what = "no budget but all" if selection.method == "flashvlm" else f"method {selection.method}"
        raise FlashVLMError(f"--plugins: {bundle.path} has {what}, for which there is no plugin; leave it out")
    if flags.max_query > MAX_QUERY:
        raise FlashVLMError(f"--max-query {flags.max_query}: the plugins take questions of up to {MAX_QUERY} tokens")
    register(library, trt)
    return PluginSpec(file=library.name, sha256=sha256(library))


def register(library: Path, trt: Any) -> None:
    """Loads a library into the registry, unless it is there, and checks that it brought both plugins."""
    build = "build it with: cmake -S plugins -B build -DTENSORRT_ROOT=DIR && cmake --build build"
    if not library.is_file():
        raise FlashVLMError(f"--plugins {library}: no such file; {build}")
    registry = trt.get_plugin_registry()
    try:
        loaded = registry.load_library(str(library.resolve()))
    except Exception as error:  # of whichever kind the binding makes of it
        raise FlashVLMError(f"--plugins {library} does not load ({error}); {build}") from None
    missing = [name for name in MASKS if registry.get_creator(name, VERSION, DOMAIN) is None]
    if missing:  # None comes back for a library that is loaded already, too
        reason = f"has no {DOMAIN}::{missing[0]} version {VERSION}" if loaded else "does not load"
        raise FlashVLMError(f"--plugins {library} {reason}; {build}")
