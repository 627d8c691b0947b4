"""ONNX files to attack with: one that passes, what they are made of, and how each is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from flashvlm.errors import BundleError
from flashvlm.graph_check import check_graph

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

DATA = {"vision.data": 4096}
FLOAT = TensorProto.FLOAT
OPSETS = [helper.make_opsetid("", 20), helper.make_opsetid("flashvlm", 1)]
Edit = Callable[[Any], object]


def value(name: str, dtype: int = FLOAT, shape: Sequence[int | str] = ("batch", 4)) -> Any:
    return helper.make_tensor_value_info(name, dtype, shape)


def constant(content: Any, name: str = "") -> Any:
    array = np.asarray(content)
    return numpy_helper.from_array(array.astype(np.float32) if array.dtype == np.float64 else array, name)


def external(name: str = "weight", dims: Sequence[int] = (4, 4), **place: object) -> Any:
    """A float tensor in vision.data."""
    tensor = TensorProto(name=name, data_type=FLOAT, dims=dims, data_location=TensorProto.EXTERNAL)
    defaults = {"location": "vision.data", "offset": 0, "length": 4 * int(np.prod(dims))}
    for key, text in (defaults | place).items():
        tensor.external_data.add(key=key, value=str(text))
    return tensor


def model(*nodes: Any, initializers: Sequence[Any] = (), functions: Sequence[Any] = ()) -> Any:
    """One input x, one output y."""
    graph = helper.make_graph(nodes, "graph", [value("x")], [value("y")], initializers)
    return helper.make_model(graph, opset_imports=OPSETS, functions=functions, ir_version=10)


def node(operator: str, *inputs: str, out: str = "y", **attributes: Any) -> Any:
    return helper.make_node(operator, inputs, [out], **attributes)


def function(name: str, *nodes: Any) -> Any:
    """y from x."""
    return helper.make_function("flashvlm", name, ["x"], ["y"], nodes, OPSETS)


def call(name: str, *inputs: str, out: str = "y") -> Any:
    return node(name, *inputs, out=out, domain="flashvlm")


def valid() -> Any:
    """What an export has: weights in a data file, constants, a function that is called."""
    score = function("TextGuidedScore", node("Constant", out="c", value=constant(2.0)), node("Mul", "x", "c"))
    nodes = (
        node("MatMul", "x", "weight", out="a"),
        call("TextGuidedScore", "a", out="b"),
        node("Reshape", "b", "shape", out="c"),
        node("Softmax", "c", axis=-1),
    )
    return model(*nodes, initializers=[external(), constant([0, 4], "shape")], functions=[score])


def edited(edit: Edit) -> bytes:
    content = valid()
    edit(content)
    return content.SerializeToString()


def refused(content: bytes, *expected: str) -> None:
    with pytest.raises(BundleError) as refusal:
        check_graph(content, "bundle/vision.onnx", DATA)
    message = str(refusal.value)
    assert message.startswith("bundle/vision.onnx: expected ")
    assert message.endswith("; export the bundle again")
    assert message.isprintable()
    assert len(message) < 400
    for part in expected:
        assert part in message, message
