"""ONNX files that are anything but an export are refused by their bytes, before a runtime parses them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graph_files import DATA, Edit, call, constant, edited, external, function, model, node, onnx, refused, valid, value
from onnx import TensorProto, helper

from flashvlm.graph_check import check_graph


def test_the_file_that_is_edited_below_passes(tmp_path: Path) -> None:
    (tmp_path / "vision.data").write_bytes(bytes(DATA["vision.data"]))
    onnx.save(valid(), tmp_path / "vision.onnx")
    onnx.checker.check_model(tmp_path / "vision.onnx")
    check_graph(valid().SerializeToString(), "vision.onnx", DATA)


# --- operators -------------------------------------------------------------------------------------------------------


def loop() -> Any:
    """2^62 rounds of one addition, in 240 bytes."""
    body = helper.make_graph(
        [node("Identity", "on", out="still"), node("Add", "v", "v", out="w")],
        "body",
        [value("round", TensorProto.INT64, []), value("on", TensorProto.BOOL, []), value("v")],
        [value("still", TensorProto.BOOL, []), value("w")],
    )
    initializers = [constant(2**62, "rounds"), constant(True, "go")]
    return model(node("Loop", "rounds", "go", "x", body=body), initializers=initializers)


def branch() -> Any:
    body = helper.make_graph([node("Identity", "x")], "body", [], [value("y")])
    return model(node("If", "go", then_branch=body, else_branch=body), initializers=[constant(True, "go")])


def scan() -> Any:
    body = helper.make_graph([node("Identity", "v", out="w")], "body", [value("v")], [value("w")])
    return model(node("Scan", "x", body=body, num_scan_inputs=1))


def subgraph_of_a_known_operator() -> Any:
    body = helper.make_graph([node("Identity", "x")], "body", [], [value("y")])
    return model(node("Softmax", "x", body=body))


OPERATORS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "loop of 2^62 rounds": (loop(), ("operators that the exporter writes", "found 'Loop'")),
    "if": (branch(), ("found 'If'",)),
    "scan": (scan(), ("found 'Scan'",)),
    "subgraph": (subgraph_of_a_known_operator(), ("fields of AttributeProto", "found 6 of wire type 2")),
    "unknown": (model(node("Reverse\nEverything", "x")), (r"found 'Reverse\nEverything'",)),
    "none": (model(node("", "x")), ("found ''",)),
    "of a contrib domain": (model(node("Attention", "x", domain="com.microsoft")), ("com.microsoft::Attention",)),
    "of a long name": (model(node("A" * 10_000, "x")), ("names of at most 1024 bytes",)),
    "random": (model(node("RandomNormalLike", "x")), ("RandomNormalLike",)),
    "2^40 elements of one": (
        model(node("ConstantOfShape", "n", out="z"), node("Add", "x", "z"), initializers=[constant([2**40], "n")]),
        ("ConstantOfShape",),
    ),
    "graphs in an attribute": (
        model(node("Softmax", "x", bodies=[helper.make_graph([], "g", [], [])])),
        ("AttributeProto", "found 11 of"),
    ),
    "sequence in an attribute": (
        model(node("Softmax", "x", axis=helper.make_sequence_type_proto(value("v").type))),
        ("AttributeProto", "found 14 of"),
    ),
    "tensor in another node": (
        model(node("Softmax", "x", axis=constant([1]))),
        ("tensors in Constant alone", "'axis'"),
    ),
    "text list": (model(node("Softmax", "x", axis=["a"])), ("AttributeProto", "found 9 of")),
}


@pytest.mark.parametrize(("content", "expected"), OPERATORS.values(), ids=OPERATORS)
def test_operator(content: Any, expected: tuple[str, ...]) -> None:
    refused(content.SerializeToString(), *expected)


def test_operator_in_a_function() -> None:
    content = model(call("MaskedLloyd", "x"), functions=[function("MaskedLloyd", node("NonZero", "x"))])
    refused(content.SerializeToString(), "found 'NonZero'")


# --- functions -------------------------------------------------------------------------------------------------------


def test_functions_that_double_27_times() -> None:
    """2^27 nodes in 2.4 kB, once they are inlined."""
    name = "f{}".format
    functions = [function(name(i), call(name(i + 1), "x", out="t"), call(name(i + 1), "t")) for i in range(26)]
    last = function(name(26), node("Add", "x", "x", out="t"), node("Add", "t", "t"))
    content = model(call(name(0), "x"), functions=[*functions, last])
    refused(content.SerializeToString(), "MaskedLloyd and TextGuidedScore of flashvlm", "'flashvlm::f0'")


def nested() -> Any:
    inner = function("MaskedLloyd", node("Add", "x", "x"))
    return model(call("TextGuidedScore", "x"), functions=[inner, function("TextGuidedScore", call("MaskedLloyd", "x"))])


def itself() -> Any:
    return model(call("MaskedLloyd", "x"), functions=[function("MaskedLloyd", call("MaskedLloyd", "x"))])


def many_calls(body: Sequence[Any], calls: int) -> Any:
    nodes = [call("MaskedLloyd", "x", out=f"y{i}") for i in range(calls)]
    return model(*nodes, functions=[function("MaskedLloyd", *body)])


def chain(count: int) -> list[Any]:
    names = ["x", *(f"v{i}" for i in range(count - 1)), "y"]
    return [node("Neg", a, out=b) for a, b in pairwise(names)]


LARGE = [
    node("Constant", out="a", value=constant(np.ones((1 << 12, 1)))),
    node("Constant", out="b", value=constant(np.ones((1, 1 << 12)))),
    node("Add", "a", "b", out="c"),
    node("Add", "x", "c"),
]
FUNCTIONS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "that calls another": (nested(), ("MaskedLloyd to have a body",)),
    "that calls itself": (itself(), ("MaskedLloyd to have a body",)),
    "without a body": (model(call("MaskedLloyd", "x")), ("MaskedLloyd to have a body",)),
    "called too often": (many_calls(chain(500), 200), ("at most 65536 nodes, with those of every call",)),
    "called with its constants": (many_calls(LARGE, 5), ("elements from constants alone",)),
    "called with its bytes": (
        many_calls([node("Gelu", "x", approximate="a" * 1_000_000)], 80),
        ("bytes of functions, with every call",),
    ),
    "on constants": (
        model(
            call("MaskedLloyd", "k"),
            functions=[function("MaskedLloyd", *chain(2))],
            initializers=[constant(1.0, "k")],
        ),
        ("no constant inputs",),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("content", "expected"), FUNCTIONS.values(), ids=FUNCTIONS)
def test_function(content: Any, expected: tuple[str, ...]) -> None:
    refused(content.SerializeToString(), *expected)


EDITS: dict[str, tuple[Edit, tuple[str, ...]]] = {
    "function of another name": (lambda m: setattr(m.functions[0], "name", "Score"), ("'flashvlm::Score'",)),
    "function of another domain": (lambda m: setattr(m.functions[0], "domain", ""), ("'::TextGuidedScore'",)),
    "function twice": (lambda m: m.functions.append(m.functions[0]), ("each once",)),
    "function with an overload": (
        lambda m: setattr(m.functions[0], "overload", "b"),
        ("fields of FunctionProto", "found 13 of"),
    ),
    "function with defaults": (
        lambda m: m.functions[0].attribute_proto.add(name="eta", f=0.5),
        ("FunctionProto", "found 11 of"),
    ),
    "function of another opset": (lambda m: setattr(m.functions[0].opset_import[0], "version", 7), ("opsets",)),
    "function without an opset": (lambda m: m.functions[0].ClearField("opset_import"), ("opset",)),
    "another domain": (lambda m: m.opset_import.add(domain="com.microsoft", version=1), ("'com.microsoft' 1",)),
    "opset of the future": (lambda m: setattr(m.opset_import[0], "version", 99), ("'' 20 to 24", "'' 99")),
    "opset twice": (lambda m: m.opset_import.add(domain="", version=20), ("each once",)),
    "no opset": (lambda m: m.ClearField("opset_import"), ("opset", "found none")),
    "no graph": (lambda m: m.ClearField("graph"), ("expected a graph, found none",)),
    "older IR": (lambda m: setattr(m, "ir_version", 3), ("IR version from 10", "found 3")),
    "training": (lambda m: m.training_info.add(), ("fields of ModelProto", "found 20 of")),
    "devices": (lambda m: m.configuration.add(name="a"), ("ModelProto", "found 26 of")),
    "quantization": (lambda m: m.graph.quantization_annotation.add(tensor_name="x"), ("GraphProto", "found 14 of")),
    "sparse weights": (
        lambda m: m.graph.sparse_initializer.add(dims=[2**40]),
        ("fields of GraphProto", "found 15 of"),
    ),
    "input that is a sequence": (
        lambda m: m.graph.input[0].type.CopyFrom(helper.make_sequence_type_proto(value("v").type)),
        ("fields of TypeProto", "found 4 of"),
    ),
    "value before it is there": (lambda m: m.graph.node.reverse(), ("nodes after those", "'c' used before")),
    "value of nothing": (lambda m: m.graph.node[3].input.__setitem__(0, "?"), ("'?' used before",)),
    "value twice": (lambda m: m.graph.node[1].output.__setitem__(0, "a"), ("each value once", "'a'")),
    "weight that is an input, too": (lambda m: m.graph.input.append(value("weight")), ("each value once", "'weight'")),
    "weight twice": (lambda m: m.graph.initializer.append(m.graph.initializer[0]), ("each value once", "'weight'")),
    "weight without a name": (lambda m: m.graph.initializer[0].ClearField("name"), ("each value once", "''")),
    "attribute twice": (lambda m: m.graph.node[3].attribute.add(name="axis", type=2, i=0), ("each attribute once",)),
    "attribute of two types": (lambda m: setattr(m.graph.node[3].attribute[0], "f", 1), ("value of its type",)),
    "attribute of no type": (lambda m: setattr(m.graph.node[3].attribute[0], "type", 0), ("value of its type",)),
    "attribute of the caller": (
        lambda m: m.functions[0].node[1].attribute.add(name="a", type=2, ref_attr_name="b"),
        ("value of its type", "'a'"),
    ),
    "constant of the caller": (
        lambda m: m.functions[0].node[0].attribute[0].CopyFrom(
            onnx.AttributeProto(name="value", type=4, ref_attr_name="b")
        ),
        ("value of its type", "'value'"),
    ),
    "constant of integers": (
        lambda m: m.functions[0].node[0].attribute[0].CopyFrom(helper.make_attribute("value_ints", [2**40])),
        ("Constant with a tensor or a float", "'value_ints'"),
    ),
    "constant of two values": (
        lambda m: m.functions[0].node[0].attribute.append(helper.make_attribute("value_float", 1.0)),
        ("Constant with a tensor or a float",),
    ),
    "constant of 2 MB": (
        lambda m: m.functions[0].node[0].attribute[0].t.CopyFrom(constant(np.zeros(1 << 19, np.float32))),
        ("constants of at most 1048576 bytes",),
    ),
    "constant in a data file": (
        lambda m: m.functions[0].node[0].attribute[0].t.CopyFrom(external("c")),
        ("the bytes of 'c' in the graph file",),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("edit", "expected"), EDITS.values(), ids=EDITS)
def test_edit(edit: Edit, expected: tuple[str, ...]) -> None:
    refused(edited(edit), *expected)


def test_too_many_nodes() -> None:
    refused(model(*chain((1 << 16) + 1)).SerializeToString(), "at most 65536 nodes", "found 65537")


# --- what a runtime would compute of constants -----------------------------------------------------------------------


def of(*nodes: Any, **constants: Any) -> Any:
    return model(*nodes, initializers=[constant(array, name) for name, array in constants.items()])


ONES = np.ones(1 << 14, np.float32)
DOUBLED = [node("Concat", f"v{i}", f"v{i}", out=f"v{i + 1}", axis=0) for i in range(40)]
CONSTANTS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "expanded": (of(node("Expand", "x", "n"), n=[2**20, 2**20]), ("results of at most", "found 1099511627776")),
    "expanded by one size": (of(node("Expand", "x", "n"), n=[2**40]), ("results of at most",)),
    "expanded by computed sizes": (
        of(node("Mul", "n", "n", out="m"), node("Expand", "x", "m"), n=[2**20]),
        ("sizes that stand in the graph, found 'm'",),
    ),
    "expanded by a Constant": (
        of(node("Constant", out="n", value=constant([2**40])), node("Expand", "x", "n")),
        ("results of at most",),
    ),
    "expanded by weights": (
        model(node("Expand", "x", "weight"), initializers=[external()]),
        ("sizes as at most 8 numbers in the graph, found 'weight'",),
    ),
    "expanded twice": (
        of(node("Expand", "k", "n", out="a"), node("Expand", "a", "m"), k=1.0, n=[2**20, 1], m=[1, 2**20]),
        ("results of at most",),
    ),
    "range": (of(node("Range", "a", "b", "c"), a=0, b=2**40, c=1), ("results of at most",)),
    "range in small steps": (
        of(node("Range", "a", "b", "c"), a=np.float32(0), b=np.float32(1), c=np.float32(1e-12)),
        ("results of at most",),
    ),
    "range without a step": (of(node("Range", "a", "b", "c"), a=0, b=1, c=0), ("results of at most",)),
    "range to NaN": (
        of(node("Range", "a", "b", "c"), a=np.float32(0), b=np.float32("nan"), c=np.float32(1)),
        ("results of at most", "nan"),
    ),
    "doubled 40 times": (of(*DOUBLED, v0=ONES), ("elements from constants alone",)),
    "broadcast": (
        of(node("Add", "a", "b"), a=ONES[:, None], b=ONES[None]),
        ("elements from constants alone", f"found {2**28}"),
    ),
    "gathered": (
        of(node("Gather", "a", "i"), a=np.ones((1, 1 << 14), np.float32), i=np.zeros(1 << 14, np.int64)),
        ("elements from constants alone", f"found {2**28}"),
    ),
    "gathered from no axis": (of(node("Gather", "a", "i", axis=7), a=ONES, i=[0]), ("an axis of 1, found 7")),
    "padded": (of(node("Conv", "a", "k", pads=[2**40] * 4), a=ONES, k=ONES), ("Conv on an input of the run",)),
}  # fmt: skip


@pytest.mark.parametrize(("content", "expected"), CONSTANTS.values(), ids=CONSTANTS)
def test_constants_that_grow(content: Any, expected: tuple[str, ...]) -> None:
    refused(content.SerializeToString(), *([expected] if isinstance(expected, str) else expected))


def test_constants_as_an_export_has_them_pass() -> None:
    content = of(
        node("Gather", "table", "places", axis=0, out="a"),
        node("Range", "from", "to", "step", out="b"),
        node("Expand", "x", "shape", out="c"),
        node("Reshape", "c", "shape"),
        table=np.ones((577, 1024), np.float32), places=np.arange(577)[None],
        shape=[1, 577, 1024], to=577, step=1, **{"from": 0},
    )  # fmt: skip
    check_graph(content.SerializeToString(), "vision.onnx", DATA)
