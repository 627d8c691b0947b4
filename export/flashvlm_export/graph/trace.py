"""Graph -> onnx_ir model: traced on fake tensors, folded, named by path, weights left as references.

No weight is in memory at any point: parameters are fake while tracing, and each becomes a ``Weight``, by which
``weights`` later streams it from the checkpoint into external data.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from flashvlm.errors import FlashVLMError
from flashvlm_export.compile.plugin_nodes import DOMAIN
from flashvlm_export.dtypes import DTYPES
from flashvlm_export.graph.dialects import Dialect
from flashvlm_export.graph.functions import body
from flashvlm_export.graph.modules import Graph
from flashvlm_export.graph.simplify import absorb_transpose, fold, name_nodes
from flashvlm_export.graph.torch_export import quiet, to_ir

# Prime, distinct and above one, so that no two symbolic dimensions and no constant are taken for each other.
EXAMPLE_SIZES = {"batch": 2, "sequence": 5, "query": 7, "prefix": 3, "suffix": 11, "units": 13, "capacity": 37}


@dataclass(frozen=True)
class Weight:
    """A parameter that a graph reads, and whether it reads it transposed."""

    parameter: str
    transposed: bool


@dataclass(frozen=True)
class TracedGraph:
    """weights: by initializer, which has no value yet."""

    model: ir.Model
    weights: dict[str, Weight]


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


def trace(
    graph: Graph, mode: FakeTensorMode, dialect: Dialect, parameters: Mapping[int, str] | None = None
) -> TracedGraph:
    """Traces one graph with the names, dtypes and symbolic dimensions of its contract.

    ``parameters``: what weights are called, by the ``id`` of the parameter; the graph's own names if left out.
    """
    dims = {name: torch.export.Dim(name, min=1, max=1 << 20) for name in _symbols(graph)}
    with mode:
        examples = tuple(
            torch.zeros(
                [EXAMPLE_SIZES[d] if isinstance(d, str) else d for d in spec.shape],
                dtype=DTYPES[spec.dtype].torch,
            )
            for spec in graph.inputs
        )
    shapes = tuple({i: dims[d] for i, d in enumerate(spec.shape) if isinstance(d, str)} for spec in graph.inputs)
    own = dict(graph.module.named_parameters())
    with quiet():
        with mode, dialect.rms_norm(graph.module):
            model = to_ir(graph.module, examples, shapes, dialect.opset)
        _apply_contract(model.graph, graph)
        for name in own.keys() & model.graph.initializers.keys():
            model.graph.initializers[name].const_value = None  # so that nothing tries to read the fake tensor
        fold(model)
    weights = {}
    for name in [name for name in model.graph.initializers if name in own]:
        value = model.graph.initializers[name]
        if not value.uses():
            model.graph.initializers.pop(name)
            continue
        parameter = name if parameters is None else parameters[id(own[name])]
        weights[name] = Weight(parameter, absorb_transpose(model.graph, value))
    for node in model.graph:
        if node.domain == DOMAIN:
            function = ir.from_proto(body(node, dialect.opset))  # a copy of its own: a function belongs to one model
            model.functions[function.identifier()] = function
    name_nodes(model.graph, graph.name)
    _check_operators(model, dialect)
    model.producer_name, model.producer_version = "flashvlm", None
    return TracedGraph(model, weights)


def _check_operators(model: ir.Model, dialect: Dialect) -> None:
    nodes = [*model.graph, *(node for function in model.functions.values() for node in function)]
    used = {node.op_type for node in nodes if node.domain == ""}
    if dialect.operators is not None and not used <= dialect.operators:
        found = ", ".join(sorted(used - dialect.operators))
        raise FlashVLMError(f"--dialect {dialect.name} has no operator {found}; use --dialect modern or another method")


def _symbols(graph: Graph) -> list[str]:
    return list(dict.fromkeys(d for spec in graph.inputs for d in spec.shape if isinstance(d, str)))


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
