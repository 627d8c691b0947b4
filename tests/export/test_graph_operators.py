"""The list of operators that the runtime lets pass is that of the exporter: every method, dialect and bundle."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir
import pytest
from torch import Tensor, nn
from transformers.activations import ACT2FN

from flashvlm.bundle import Bundle
from flashvlm.graph_check import DOMAIN, FUNCTIONS, OPERATORS, OPSETS, check_graph
from flashvlm.graph_io import DialectName, select_io
from flashvlm_export.compile import plugin_nodes
from flashvlm_export.graph import modules as graphs
from flashvlm_export.graph.dialects import DIALECTS, LEGACY_OPERATORS
from flashvlm_export.graph.trace import fake_weights, trace
from flashvlm_export.selection import METHODS, SelectionParams, vispruner
from flashvlm_export.testing.graphs import selection_specs

# Enough tokens that tables of N x N are not folded into constants, as in a real model.
SPECS = selection_specs(tokens=600, hidden=4, features=3)
BUDGET = 2


class EveryMethod(nn.Module):
    """All methods side by side: one trace takes half the time of eleven."""

    def __init__(self) -> None:
        super().__init__()
        short, plain = SelectionParams(iterations=1), SelectionParams()
        params = {name: short if "iterations" in method.params else plain for name, method in METHODS.items()}
        self.methods = nn.ModuleDict({name: graphs.Select(name, BUDGET, params[name]) for name in METHODS})

    def forward(
        self,
        image_tokens: Tensor,
        features: Tensor,
        saliency: Tensor,
        valid: Tensor,
        query_embeds: Tensor,
        query_mask: Tensor,
    ) -> tuple[Tensor, ...]:
        inputs = (image_tokens, features, saliency, valid, query_embeds, query_mask)
        return tuple(output for method in self.methods.values() for output in method(*inputs))


def every_method() -> graphs.Graph:
    outputs = []
    for method in METHODS.values():
        budget = SPECS[1].candidates if method.keeps_all else BUDGET
        for spec in select_io(*SPECS, budget).outputs:
            outputs.append(spec.model_copy(update={"name": f"{spec.name}.{len(outputs)}"}))
    inputs = select_io(*SPECS, BUDGET).inputs
    return graphs.Graph("select", EveryMethod(), inputs, tuple(outputs))


@pytest.mark.parametrize("name", ["modern", pytest.param("legacy", marks=pytest.mark.slow)])
def test_every_method(name: DialectName, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where this fails, the message names an operator: add it to the list, if no graph can do harm with it."""
    monkeypatch.setattr(vispruner, "deduplication_steps", lambda count, target: 1)  # of 75 that are alike
    # All methods, also those that the legacy dialect refuses when they are exported: it may get their operators.
    dialect = dataclasses.replace(DIALECTS[name], operators=None)
    graph = every_method()
    with fake_weights(graph.module) as mode:
        model = ir.to_proto(trace(graph, mode, dialect).model)
    check_graph(model.SerializeToString(), "select.onnx", {})
    assert {function.name for function in model.functions} == FUNCTIONS


@pytest.mark.parametrize(
    "fixture", ["tiny_bundle", "tiny_gqa_bundle", "tiny_gqa_half_bundle", "tiny_gqa_legacy_bundle"]
)
def test_every_graph_of_a_bundle(fixture: str, request: pytest.FixtureRequest) -> None:
    bundle = Bundle(request.getfixturevalue(fixture))
    for graph in bundle.manifest.graphs.values():
        sizes = {data: bundle.manifest.files[data].size for data in graph.data}
        check_graph((bundle.path / graph.file).read_bytes(), graph.file, sizes)


def test_what_the_exporter_states_elsewhere() -> None:
    assert {("", operator) for operator in LEGACY_OPERATORS} <= OPERATORS
    assert (plugin_nodes.DOMAIN, {*plugin_nodes.MASKS}) == (DOMAIN, FUNCTIONS)
    assert all(dialect.opset in OPSETS[""] for dialect in DIALECTS.values())


class EveryActivation(nn.Module):
    """Those of transformers that have no weights; a config.json may name any."""

    def __init__(self) -> None:
        super().__init__()
        made = {name: ACT2FN[name] for name in ACT2FN if name not in ("prelu", "xielu")}
        self.functions = nn.ModuleDict(made)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        return tuple(function(pixel_values) for function in self.functions.values())


def test_every_activation() -> None:
    module = EveryActivation()
    (pixels,) = select_io(*SPECS, BUDGET).inputs[:1]
    outputs = tuple(pixels.model_copy(update={"name": f"scores.{i}"}) for i in range(len(module.functions)))
    with fake_weights(module) as mode:
        traced = trace(graphs.Graph("vision", module, (pixels,), outputs), mode, DIALECTS["modern"])
    check_graph(ir.to_proto(traced.model).SerializeToString(), "vision.onnx", {})
