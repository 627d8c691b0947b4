"""The two nodes of the selection that a plugin can compute, as ONNX local functions: their bodies are the selection's
own functions, traced."""

from __future__ import annotations

import functools
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from flashvlm_export.compile.plugin_nodes import DOMAIN, LLOYD_OP, SCORE_OP
from flashvlm_export.graph.simplify import fold, name_nodes
from flashvlm_export.graph.torch_export import quiet, to_ir
from flashvlm_export.selection import masked_lloyd, text_guided_score


def body(node: ir.Node, opset: int) -> Any:
    """The local function that a node calls, as a FunctionProto."""
    if node.op_type == SCORE_OP:
        return _score_proto(opset)
    features = node.inputs[0]
    assert features is not None
    assert features.shape is not None
    assert features.dtype is not None
    _, tokens, width = features.shape
    dtype = ir.tensor_adapters.to_torch_dtype(features.dtype)
    numbers = [node.attributes[name].as_int() for name in ("budget", "top_count", "iterations")]
    return _lloyd_proto(opset, int(tokens), int(width), dtype, *numbers)  # type: ignore[arg-type]


@functools.cache
def _score_proto(opset: int) -> Any:
    return ir.to_proto(score_function(opset))


@functools.cache
def _lloyd_proto(opset: int, *call: Any) -> Any:
    return ir.to_proto(lloyd_function(opset, *call))


def score_function(opset: int) -> ir.Function:
    """The body of TextGuidedScore: ``selection.text_guided_score`` itself, its four scalars turned into attributes."""

    class Score(nn.Module):
        def forward(self, *inputs: Tensor) -> Tensor:
            return text_guided_score(*inputs)

    dims = {name: torch.export.Dim(name, min=1, max=1 << 20) for name in ("batch", "tokens", "query", "width")}
    b, n, length, d = dims.values()
    # float16 examples, so that the casts to float32 are part of the body; on float32 inputs they do nothing.
    half = torch.float16
    tensors = {
        "projected": torch.zeros(2, 13, 17, dtype=half),
        "query": torch.zeros(2, 7, 17, dtype=half),
        "query_mask": torch.ones(2, 7, dtype=torch.bool),
        "saliency": torch.zeros(2, 13, dtype=half),
        "valid": torch.ones(2, 13, dtype=torch.bool),
    }
    shapes = ({0: b, 1: n, 2: d}, {0: b, 1: length, 2: d}, {0: b, 1: length}, {0: b, 1: n}, {0: b, 1: n})
    attributes = ("eta", "temperature", "pool_temperature", "eps")
    scalars = [torch.tensor(0.5) for _ in attributes]
    graph = _traced(Score(), (*tensors.values(), *scalars), (*shapes, *({} for _ in scalars)), opset)
    for value, name in zip(graph.inputs, [*tensors, *attributes], strict=True):
        value.name = name
    for value in list(graph.inputs)[len(tensors) :]:
        assert value.name is not None
        constant = ir.Node("", "Constant", [], [ir.RefAttr("value_float", value.name, ir.AttributeType.FLOAT)])
        first = next(iter(graph))
        graph.insert_before(first, constant)
        ir.convenience.replace_all_uses_with(value, constant.outputs[0])
        graph.inputs.remove(value)
    graph.outputs[0].name = "scores"
    return _function(SCORE_OP, graph, dict.fromkeys(attributes, ir.AttributeType.FLOAT))


def lloyd_function(
    opset: int, tokens: int, width: int, dtype: torch.dtype, budget: int, top_count: int, iterations: int
) -> ir.Function:
    """The body of MaskedLloyd: ``selection.masked_lloyd`` itself.

    It is of one budget and size, as TopK and the unrolled iterations have them built in; the attributes that say
    so are for a plugin, and the body reads none.
    """

    class Lloyd(nn.Module):
        def forward(self, features: Tensor, scores: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
            kept, is_top = masked_lloyd(features, scores, valid, budget, top_count, iterations)
            return kept.int(), is_top.int()

    batch = torch.export.Dim("batch", min=1, max=1 << 20)
    examples = {
        "features": torch.zeros(2, tokens, width, dtype=dtype),
        "scores": torch.zeros(2, tokens),
        "valid": torch.ones(2, tokens, dtype=torch.bool),
    }
    graph = _traced(Lloyd(), tuple(examples.values()), ({0: batch},) * len(examples), opset)
    for values, names in ((graph.inputs, examples), (graph.outputs, ("kept", "is_top"))):
        for value, name in zip(values, names, strict=True):
            value.name = name
    return _function(LLOYD_OP, graph, dict.fromkeys(("budget", "top_count", "iterations"), ir.AttributeType.INT))


def _traced(module: nn.Module, examples: tuple[Tensor, ...], shapes: tuple[Any, ...], opset: int) -> ir.Graph:
    with quiet():
        model = to_ir(module, examples, shapes, opset)
    fold(model)
    return model.graph


def _function(name: str, graph: ir.Graph, attributes: dict[str, ir.AttributeType]) -> ir.Function:
    for key, value in list(graph.initializers.items()):  # functions hold constants as nodes
        constant = ir.node("Constant", [], {"value": value.const_value})
        graph.insert_before(next(iter(graph)), constant)
        ir.convenience.replace_all_uses_with(value, constant.outputs[0])
        graph.initializers.pop(key)
    name_nodes(graph, name)
    # TensorRT before 10.8 mistakes a value of a body for one outside of that name.
    for number, value in enumerate([*graph.inputs, *(output for node in graph for output in node.outputs)]):
        value.name = f"{name}/{value.name or number}"
    declared = [ir.Attr(key, kind, None) for key, kind in attributes.items()]
    return ir.Function(DOMAIN, name, graph=graph, attributes=declared)
