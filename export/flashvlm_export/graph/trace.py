"""Graph -> onnx_ir model: traced on fake tensors, folded, named by path, weights left as references.

No weight is in memory at any point: parameters are fake while tracing, and each becomes a ``Weight``, the recipe by
which ``weights`` later streams it from the checkpoint into external data.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import io
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from flashvlm.errors import FlashVLMError
from flashvlm_export.compile.plugin_nodes import DOMAIN, LLOYD_OP, SCORE_OP
from flashvlm_export.graph.dialects import Dialect
from flashvlm_export.graph.modules import TORCH_DTYPES, Graph
from flashvlm_export.selection.flashvlm import masked_lloyd, text_guided_score

# Prime, distinct and above one, so that no two symbolic dimensions and no constant are taken for each other.
EXAMPLE_SIZES = {"batch": 2, "sequence": 5, "query": 7, "prefix": 3, "suffix": 11, "capacity": 37}


@dataclass(frozen=True)
class Weight:
    """One initializer: the parameter it comes from, and whether it is stored transposed."""

    initializer: str
    parameter: str
    transposed: bool


@dataclass(frozen=True)
class TracedGraph:
    model: ir.Model
    weights: tuple[Weight, ...]


@contextlib.contextmanager
def fake_weights(module: nn.Module) -> Iterator[FakeTensorMode]:
    """Gives a module built on the meta device fake parameters and real computed buffers, ready to trace."""
    for owner in module.modules():
        computed = list(owner._non_persistent_buffers_set)
        for name in computed:
            owner._buffers[name] = torch.empty_like(owner._buffers[name], device="cpu")
    for model in _pretrained(module):
        for owner in model.modules():
            if owner._non_persistent_buffers_set:
                model._init_weights(owner)  # transformers' own rule for buffers a checkpoint does not hold
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        for owner in module.modules():
            for name, parameter in owner._parameters.items():
                if parameter is not None:
                    fake = torch.empty(parameter.shape, dtype=parameter.dtype)
                    owner._parameters[name] = nn.Parameter(fake, requires_grad=False)
    yield mode


def _pretrained(module: nn.Module) -> list[Any]:
    """Innermost transformers models: each knows how to initialise its own buffers."""
    from transformers import PreTrainedModel

    found = [m for m in module.modules() if isinstance(m, PreTrainedModel)]
    return [m for m in found if not any(inner is not m and isinstance(inner, PreTrainedModel) for inner in m.modules())]


def trace(graph: Graph, mode: FakeTensorMode, dialect: Dialect) -> TracedGraph:
    """Traces one graph with the names, dtypes and symbolic dimensions of its contract."""
    dims = {name: torch.export.Dim(name, min=1, max=1 << 20) for name in _symbols(graph)}
    with mode:
        examples = tuple(
            torch.zeros(
                [EXAMPLE_SIZES[d] if isinstance(d, str) else d for d in spec.shape],
                dtype=TORCH_DTYPES[spec.dtype],
            )
            for spec in graph.inputs
        )
    shapes = tuple({i: dims[d] for i, d in enumerate(spec.shape) if isinstance(d, str)} for spec in graph.inputs)
    with _quiet():
        with torch.no_grad(), mode, dialect.rms_norm(graph.module):
            program = torch.export.export(
                graph.module, examples, dynamic_shapes=_varargs(graph.module, shapes), strict=False
            )
            model = _to_ir(program, dialect.opset)
        _apply_contract(model.graph, graph)
        weights = _weights(model.graph, dict(graph.module.named_parameters()))
        _fold(model)
        weights = _absorb_transposes(model.graph, weights)
    for node in model.graph:
        if node.domain == DOMAIN:
            function = ir.from_proto(_body(node, dialect.opset))  # a copy of its own: a function belongs to one model
            model.functions[function.identifier()] = function
    _name_nodes(model.graph, graph.name)
    _check_operators(model, dialect)
    model.producer_name, model.producer_version = "flashvlm", None
    return TracedGraph(model, tuple(weights))


def _check_operators(model: ir.Model, dialect: Dialect) -> None:
    nodes = [*model.graph, *(node for function in model.functions.values() for node in function)]
    used = {node.op_type for node in nodes if node.domain == ""}
    if dialect.operators is not None and not used <= dialect.operators:
        found = ", ".join(sorted(used - dialect.operators))
        raise FlashVLMError(f"--dialect {dialect.name} has no operator {found}; use --dialect modern or another method")


def _symbols(graph: Graph) -> list[str]:
    return list(dict.fromkeys(d for spec in graph.inputs for d in spec.shape if isinstance(d, str)))


def _varargs(module: nn.Module, shapes: tuple[Any, ...]) -> tuple[Any, ...]:
    """torch.export wants the shapes of ``*past`` as one nested tuple."""
    code = type(module).forward.__code__
    fixed = code.co_argcount - 1  # without self
    takes_varargs = bool(code.co_flags & 0x04)
    return (*shapes[:fixed], shapes[fixed:]) if takes_varargs else shapes


def _to_ir(program: torch.export.ExportedProgram, opset: int) -> ir.Model:
    exported = torch.onnx.export(program, dynamo=True, optimize=False, opset_version=opset, verbose=False)
    assert exported is not None
    return exported.model


def _apply_contract(model: ir.Graph, graph: Graph) -> None:
    """Gives inputs and outputs their names, and every shape in the graph the contract's symbols."""
    symbols: dict[str | None, str] = {}
    for value, spec in zip(model.inputs, graph.inputs, strict=True):
        value.name = spec.name
        assert value.shape is not None
        symbols |= {
            traced.value: str(d)
            for traced, d in zip(value.shape, spec.shape, strict=True)
            if isinstance(traced, ir.SymbolicDim)
        }
    for value, spec in zip(model.outputs, graph.outputs, strict=True):
        value.name = spec.name
    for value in (*model.inputs, *(output for node in model for output in node.outputs)):
        if value.shape is not None:
            value.shape = ir.Shape(symbols.get(d.value, d) if isinstance(d, ir.SymbolicDim) else d for d in value.shape)
    for value, spec in zip((*model.inputs, *model.outputs), (*graph.inputs, *graph.outputs), strict=True):
        if value.shape != ir.Shape(spec.shape):
            raise AssertionError(
                f"{graph.name}: {spec.name} traced as {value.shape}, its contract says {list(spec.shape)}"
            )


def _weights(graph: ir.Graph, parameters: dict[str, Any]) -> list[Weight]:
    """Detaches fake parameters from their initializers, so that nothing tries to read them."""
    weights = []
    for name, value in graph.initializers.items():
        if name in parameters:
            value.const_value = None
            weights.append(Weight(name, name, transposed=False))
    return weights


def _fold(model: ir.Model) -> None:
    """Constant folding, common subexpressions and dead nodes; weights have no value here and stay as they are."""
    from onnxscript import optimizer

    # Not optimizer.optimize: its rewrite rules take a third of the export's tracing time and find nothing here.
    optimizer.fold_constants(model, onnx_shape_inference=False)
    for tidy in (
        passes.RemoveUnusedNodesPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.DeduplicateInitializersPass(),
        passes.CommonSubexpressionEliminationPass(),
    ):
        tidy(model)
    shapes: dict[tuple[int, ...], ir.Value] = {}
    for node in list(model.graph):
        _simplify_reshape(node, shapes)
    passes.IdentityEliminationPass()(model)
    passes.RemoveUnusedNodesPass()(model)
    passes.RemoveUnusedOpsetsPass()(model)


def _simplify_reshape(node: ir.Node, shapes: dict[tuple[int, ...], ir.Value]) -> None:
    """Reshape to a computed shape -> to a constant one, where 0 copies a dimension from the input.

    Shapes such as [batch, sequence, heads * size] otherwise cost a Shape and a Concat node and hide from compilers.
    """
    source, target = (node.inputs[0], node.outputs[0].shape) if node.op_type == "Reshape" else (None, None)
    if source is None or source.shape is None or target is None or _is_constant(node.inputs[1]):
        return
    copies = [i < len(source.shape) and source.shape[i] == d for i, d in enumerate(target)]
    if not all(copied or isinstance(d, int) for copied, d in zip(copies, target, strict=True)):
        return
    new = tuple(d if isinstance(d, int) else 0 for d in target)
    if new not in shapes:
        assert node.graph is not None
        name = "shape_" + "_".join(map(str, new))
        shapes[new] = ir.val(name, const_value=ir.tensor(new, dtype=ir.DataType.INT64, name=name))
        node.graph.register_initializer(shapes[new])
    node.replace_input_with(1, shapes[new])
    node.attributes.pop("allowzero", None)  # torch sets it; then 0 would mean an empty dimension


def _is_constant(value: ir.Value | None) -> bool:
    return value is not None and ir.convenience.get_const_tensor(value) is not None


def _absorb_transposes(graph: ir.Graph, weights: list[Weight]) -> list[Weight]:
    """Transpose(weight) -> the weight stored transposed, so that no runtime pays for it or folds a copy."""
    result = []
    for weight in weights:
        value = graph.initializers[weight.initializer]
        users = [usage.node for usage in value.uses()]
        if not users:
            graph.initializers.pop(weight.initializer)
            continue
        if value.shape is not None and len(value.shape) == 2 and all(_swaps(node) for node in users):
            rows, columns = value.shape
            value.shape = ir.Shape([columns, rows])
            for node in users:
                ir.convenience.replace_all_uses_with(node.outputs[0], value)
                graph.remove(node, safe=True)
            weight = Weight(weight.initializer, weight.parameter, transposed=True)
        result.append(weight)
    return result


def _swaps(node: ir.Node) -> bool:
    return node.op_type == "Transpose" and list(node.attributes["perm"].as_ints()) == [1, 0]


def _name_nodes(graph: ir.Graph | ir.Function, root: str) -> None:
    """Path-like names such as /decoder/language_model/layers.0/self_attn/Attention, unique by a counter."""
    seen: dict[str, int] = {}
    for node in graph:
        path = "/".join(["", root, *_scope(node), node.op_type])
        count = seen.get(path, 0)
        seen[path] = count + 1
        node.name = f"{path}_{count}" if count else path
        node.metadata_props.clear()


def _scope(node: ir.Node) -> list[str]:
    """The module path torch recorded, with list indices kept on their list: layers.0."""
    scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes")
    if scopes is None:
        return []
    modules = ast.literal_eval(scopes)[:-1]  # the last entry is the torch operator
    parts: list[str] = []
    if modules and modules[-1].startswith("_empty_nn_module_stack"):
        return parts
    for part in (modules[-1] if modules else "").split("."):
        if part.isdigit() and parts:
            parts[-1] += f".{part}"
        elif part:
            parts.append(part)
    return parts


# --- bodies of the selection's two nodes ---------------------------------------------------------------------------


def _body(node: ir.Node, opset: int) -> Any:
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
    with torch.no_grad(), _quiet():
        program = torch.export.export(module, examples, dynamic_shapes=_varargs(module, shapes), strict=False)
        model = _to_ir(program, opset)
    _fold(model)
    return model.graph


def _function(name: str, graph: ir.Graph, attributes: dict[str, ir.AttributeType]) -> ir.Function:
    for key, value in list(graph.initializers.items()):  # functions hold constants as nodes
        constant = ir.node("Constant", [], {"value": value.const_value})
        graph.insert_before(next(iter(graph)), constant)
        ir.convenience.replace_all_uses_with(value, constant.outputs[0])
        graph.initializers.pop(key)
    _name_nodes(graph, name)
    # TensorRT before 10.8 mistakes a value of a body for one outside of that name.
    for number, value in enumerate([*graph.inputs, *(output for node in graph for output in node.outputs)]):
        value.name = f"{name}/{value.name or number}"
    declared = [ir.Attr(key, kind, None) for key, kind in attributes.items()]
    return ir.Function(DOMAIN, name, graph=graph, attributes=declared)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Exporter libraries report on stdout and in warnings what is by design here: initializers without values."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
