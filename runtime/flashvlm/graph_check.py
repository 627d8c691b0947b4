"""What a graph file may hold: what this project's exporter writes, and nothing else.

ONNX Runtime and TensorRT believe the files they parse. A loop of 2^62 rounds, or 27 functions that each call the next
one twice, fits in a kilobyte and runs without end; weights may name any file. So every graph is read here first, by
its bytes alone, as protobuf's own parser merges repeated messages and needs a package that the runtime goes without.

Not covered: what run-time shapes decide. The result of Expand, of Concat of a value with itself, or of a product of
two inputs may be larger than memory, and each such node takes as long as its size says. Shapes in ``value_info`` are
not read, nor are types, which both libraries infer and compare themselves.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from flashvlm import onnx_wire as wire
from flashvlm.errors import BundleError
from flashvlm.onnx_wire import GraphError, refuse, shown

# What the exporter writes for every dialect, layout, dtype and selection method; what it may write for the legacy
# dialect; and the activations that a config.json may name. None has a subgraph, a random number or a file.
_STANDARD = """
    Abs Add And ArgMax Attention Cast CastLike Ceil Clip Concat Constant Conv Cos CumSum Div Equal Erf Exp Expand Floor
    Gather GatherElements Gelu Gemm Greater GreaterOrEqual HardSwish Identity LayerNormalization LeakyRelu Less
    LessOrEqual Log MatMul Max Min Mish Mod Mul Neg Not Or PRelu Pow RMSNormalization Range Reciprocal ReduceL2
    ReduceMax ReduceMean ReduceMin ReduceSum Relu Reshape Shape Sigmoid Sin Slice Softmax Softplus Split Sqrt Squeeze
    Sub Tanh TensorScatter TopK Transpose Unsqueeze Where
    """
DOMAIN = "flashvlm"
SCORE_OP, LLOYD_OP = "TextGuidedScore", "MaskedLloyd"
FUNCTIONS = frozenset({LLOYD_OP, SCORE_OP})  # of DOMAIN, with standard operators in their bodies
OPERATORS = frozenset({*(("", name) for name in _STANDARD.split()), *((DOMAIN, name) for name in FUNCTIONS)})
OPSETS = {"": range(20, 25), DOMAIN: range(1, 2)}
IR_VERSIONS = range(10, 14)

MAX_FILE = 32 << 20  # bytes, with every function as often as it is called; 65,536 nodes of a decoder have 18 MB
MAX_NODES = 1 << 16  # with every function as often as it is called; cdpruner has 27 for each token it keeps
MAX_RANK = 8
MAX_TENSOR = 1 << 40  # elements
MAX_CONSTANT = 1 << 20  # bytes of one constant in a node
MAX_ELEMENTS = 1 << 26  # of all that comes of constants alone, which runtimes compute when they load a graph

# TensorProto.DataType and its bytes: float, uint16 (in divprune from 513 tokens), int32, int64, bool, float16, bfloat16
_TENSOR_TYPES = {1: 4, 4: 2, 6: 4, 7: 8, 9: 1, 10: 2, 16: 2}
_NUMBERS = {1: "f", 6: "i", 7: "q"}  # those read here as sizes, for struct
_ATTRIBUTE_TYPES = {1: "f", 2: "i", 3: "s", 4: "t", 7: "ints"}  # the field that holds the value
_DEFAULT, _EXTERNAL = 0, 1  # TensorProto.DataLocation


# --- the check -------------------------------------------------------------------------------------------------------


def check_graph(model: bytes, name: str, data_sizes: Mapping[str, int]) -> None:
    """Refuses an ONNX file that is anything but what this project's exporter writes.

    Args:
        model: the whole file.
        name: what messages call it.
        data_sizes: bytes of the data files that its weights may lie in, by their names beside it.

    Raises:
        BundleError: another field, operator, function or opset; a value that is used before it is there, or is there
            twice; weights outside of their data file, or not as large as their shape; a constant that would become
            more than a device's memory, in one step or in many.
    """
    try:
        if len(model) > MAX_FILE:
            refuse(f"at most {MAX_FILE} bytes", len(model))
        _check_model(wire.read(memoryview(model), wire.MODEL), data_sizes)
    except GraphError as refusal:
        file = name if name.isprintable() else repr(name)
        raise BundleError(f"{file}: {refusal}; export the bundle again") from None


class _Body(NamedTuple):
    """What a list of nodes amounts to wherever it stands: the graph, or a function with each of its calls."""

    nodes: int
    size: int  # bytes in the file
    elements: int  # of its constants and of what is computed from them alone


def _check_model(model: wire.Fields, data_sizes: Mapping[str, int]) -> None:
    if (version := wire.number(model, "ir_version")) not in IR_VERSIONS:
        refuse(f"an IR version from {IR_VERSIONS[0]} to {IR_VERSIONS[-1]}", version)
    _check_opsets(model)
    if "graph" not in model:
        refuse("a graph", "none")
    functions: dict[str, _Body] = {}
    for message in model.get("functions", ()):
        function = wire.read(message, wire.FUNCTION)
        domain, name = wire.text(function, "domain"), wire.text(function, "name")
        if domain != DOMAIN or name not in FUNCTIONS or name in functions:
            refuse(f"{' and '.join(sorted(FUNCTIONS))} of {DOMAIN}, each once", shown(f"{domain}::{name}"))
        functions[name] = _check_function(function)._replace(size=len(message))
    _check_graph(wire.read(model["graph"][0], wire.GRAPH), functions, data_sizes)


def _check_opsets(owner: wire.Fields) -> None:
    seen = set()
    for message in owner.get("opset_import", ()):
        opset = wire.read(message, wire.OPSET)
        domain, version = wire.text(opset, "domain"), wire.number(opset, "version")
        if domain in seen or version not in OPSETS.get(domain, ()):
            ranges = " and ".join(f"{key!r} {allowed[0]} to {allowed[-1]}" for key, allowed in OPSETS.items())
            refuse(f"opsets {ranges}, each once", f"{shown(domain)} {version}")
        seen.add(domain)
    if "" not in seen:
        refuse("an opset of the standard operators", "none")


def _check_function(function: wire.Fields) -> _Body:
    _check_opsets(function)
    values = _Values()
    for item in function.get("input", ()):
        values.define(wire.decoded(item), None)
    for value in function.get("value_info", ()):
        _check_value(value)
    # With no function to call from here, none of them nests.
    return _check_nodes(function.get("node", ()), values, {})


def _check_graph(graph: wire.Fields, functions: Mapping[str, _Body], data_sizes: Mapping[str, int]) -> None:
    values = _Values()
    for value in graph.get("input", ()):
        values.define(_check_value(value), None)
    for value in (*graph.get("output", ()), *graph.get("value_info", ())):
        _check_value(value)
    room = sum(data_sizes.values())
    for message in graph.get("initializer", ()):
        tensor = _tensor(message, data_sizes)
        values.define(tensor.name, tensor)
        room -= tensor.nbytes if tensor.raw is None else 0
    if room < 0:  # a device would get every byte of the files many times
        refuse("weights no larger than their data files together", f"{-room} bytes more")
    _check_nodes(graph.get("node", ()), values, functions)


def _check_value(message: wire.Message) -> str:
    """The name of a value, which has to be a tensor: other types nest."""
    value = wire.read(message, wire.VALUE)
    for kind in value.get("type", ()):
        for tensor in wire.read(kind, wire.TYPE).get("tensor_type", ()):
            wire.read(tensor, wire.TENSOR_TYPE)
    return wire.text(value, "name")


# --- nodes -----------------------------------------------------------------------------------------------------------


class _Tensor(NamedTuple):
    name: str
    dims: tuple[int, ...]
    data_type: int
    nbytes: int
    raw: memoryview | None  # None where the bytes are in a data file

    def numbers(self) -> tuple[float, ...]:
        """The values of a tensor of sizes, which stands in the graph file itself."""
        if self.raw is None or self.data_type not in _NUMBERS or self.nbytes > 8 * MAX_RANK:
            refuse(f"sizes as at most {MAX_RANK} numbers in the graph", shown(self.name))
        count = self.nbytes // _TENSOR_TYPES[self.data_type]
        return struct.unpack(f"<{count}{_NUMBERS[self.data_type]}", self.raw)


class _Values:
    """The values that nodes may use so far."""

    def __init__(self) -> None:
        self.elements: dict[str, int | None] = {}  # how many, where constants alone decide; None where a run does
        self.tensors: dict[str, _Tensor] = {}  # those that stand in the file

    def define(self, name: str, value: _Tensor | int | None) -> None:
        if name in self.elements or not name:
            refuse("each value once, by a name", shown(name))
        if isinstance(value, _Tensor):
            self.tensors[name] = value
            value = math.prod(value.dims)
        self.elements[name] = value

    def of(self, name: str) -> int | None:
        """The elements of an input."""
        if name not in self.elements:
            refuse("nodes after those whose values they use", f"{shown(name)} used before")
        return self.elements[name]

    def sizes(self, name: str) -> tuple[float, ...] | None:
        """The numbers of an input that says how large a result is; None where a run decides."""
        if self.elements.get(name) is None:
            return None
        if name not in self.tensors:
            refuse("sizes that stand in the graph", f"{shown(name)}, computed from constants")
        return self.tensors[name].numbers()


def _check_nodes(messages: Sequence[wire.Message], values: _Values, functions: Mapping[str, _Body]) -> _Body:
    nodes, size, elements = len(messages), 0, 0
    for message in messages:
        node = wire.read(message, wire.NODE)
        domain, operator, name = (wire.text(node, field) for field in ("domain", "op_type", "name"))
        if (domain, operator) not in OPERATORS:
            found = shown(f"{domain}::{operator}" if domain else operator)
            refuse("operators that the exporter writes", f"{found}, node {shown(name)}")
        attributes = _attributes(node.get("attribute", ()), operator == "Constant")
        inputs = [wire.decoded(item) for item in node.get("input", ())]
        counts = [values.of(item) for item in inputs if item]  # an optional input that is absent has no name
        result: _Tensor | int | None
        if domain == DOMAIN:
            # On constants, a body would be computed when the graph is loaded.
            if operator not in functions or any(count is not None for count in counts):
                refuse(f"{operator} to have a body and no constant inputs", "a call without")
            body, result = functions[operator], None
            nodes, size, elements = nodes + body.nodes, size + body.size, elements + body.elements
        elif operator == "Constant":
            result = _constant(attributes)
        else:
            result = _made(operator, inputs, counts, attributes, values)
        for item in node.get("output", ()):
            if output := wire.decoded(item):
                values.define(output, result)
                elements += values.elements[output] or 0
        if elements > MAX_ELEMENTS:
            refuse(f"at most {MAX_ELEMENTS} elements from constants alone", elements)
        if nodes > MAX_NODES:
            refuse(f"at most {MAX_NODES} nodes, with those of every call", nodes)
        if size > MAX_FILE:
            refuse(f"at most {MAX_FILE} bytes of functions, with every call", size)
    return _Body(nodes, size, elements)


def _attributes(messages: Iterable[wire.Message], of_constant: bool) -> dict[str, wire.Fields]:
    attributes: dict[str, wire.Fields] = {}
    for message in messages:
        attribute = wire.read(message, wire.ATTRIBUTE)
        name = wire.text(attribute, "name")
        held = _ATTRIBUTE_TYPES.get(wire.number(attribute, "type"), "")
        allowed = {"name", "type", held}
        if of_constant and name == "value_float":
            allowed.add("ref_attr_name")  # the number stands in the call of the function
        if name in attributes or not held or (held == "t" and not of_constant) or not attribute.keys() <= allowed:
            refuse("each attribute once, with one value of its type, and tensors in Constant alone", shown(name))
        attributes[name] = attribute
    return attributes


def _constant(attributes: dict[str, wire.Fields]) -> _Tensor | int:
    if attributes.keys() == {"value"} and "t" in attributes["value"]:
        tensor = _tensor(attributes["value"]["t"][0], None)
        if tensor.nbytes > MAX_CONSTANT:
            refuse(f"constants of at most {MAX_CONSTANT} bytes in nodes", tensor.nbytes)
        return tensor
    if attributes.keys() != {"value_float"}:
        refuse("Constant with a tensor or a float", shown(", ".join(attributes)))
    return 1


def _made(
    operator: str,
    inputs: Sequence[str],
    counts: Sequence[int | None],
    attributes: Mapping[str, wire.Fields],
    values: _Values,
) -> int | None:
    """At most how many elements a node makes of constants alone; None where a run decides.

    Operators that take sizes as values may make too many of any input, so those are looked at first.
    """
    known = [count for count in counts if count is not None]
    constant = len(known) == len(counts)
    if operator == "Expand" and len(inputs) == 2:
        shape = values.sizes(inputs[1])
        if shape is not None:
            return _within(math.prod(max(size, 1) for size in shape) * (known[0] if constant else 1), constant)
    elif operator == "Range" and len(inputs) == 3:
        start, limit, delta = (values.sizes(item) for item in inputs)
        if start and limit and delta:
            return _within((limit[0] - start[0]) / delta[0] if delta[0] else math.inf, constant)
    elif operator == "Conv" and constant:
        refuse("Conv on an input of the run", "constants alone")  # its pads may be of any size
    if not constant:
        return None
    data = values.tensors.get(inputs[0]) if inputs else None
    if operator == "Gather" and data is not None and len(known) == 2:
        axis = wire.signed(wire.number(attributes.get("axis", {}), "i"))
        if not -len(data.dims) <= axis < len(data.dims):
            refuse(f"an axis of {len(data.dims)}", axis)
        return known[0] // max(data.dims[axis], 1) * known[1]
    # Broadcasting, products of matrices and other gathers multiply at most, concatenation adds.
    return max(math.prod(known), sum(known))


def _within(elements: float, constant: bool) -> int | None:
    if not elements <= MAX_ELEMENTS:  # NaN is refused, too
        refuse(f"results of at most {MAX_ELEMENTS} elements", elements)
    return max(math.ceil(elements), 0) if constant else None


# --- tensors ---------------------------------------------------------------------------------------------------------


def _tensor(message: wire.Message, data_sizes: Mapping[str, int] | None) -> _Tensor:
    """A tensor with as many bytes as its shape says. ``data_sizes`` None: they have to stand in the message."""
    fields = wire.read(message, wire.TENSOR)
    name, dims = wire.text(fields, "name"), tuple(fields.get("dims", ()))
    # Without sign a negative size is 2^63 and more. An empty tensor may not have any other size either.
    if len(dims) > MAX_RANK or math.prod(size or 1 for size in dims) > MAX_TENSOR:
        found = [wire.signed(size) for size in dims[: MAX_RANK + 1]]
        refuse(f"{shown(name)} with at most {MAX_RANK} sizes and {MAX_TENSOR} elements", found)
    data_type, location = wire.number(fields, "data_type"), wire.number(fields, "data_location")
    if data_type not in _TENSOR_TYPES:
        refuse(f"{shown(name)} of a type that the exporter writes", f"type {data_type}")
    nbytes = math.prod(dims) * _TENSOR_TYPES[data_type]
    raw = fields["raw_data"][0] if "raw_data" in fields else None
    if location == _EXTERNAL and raw is None and data_sizes is not None:
        found_bytes = _external(name, fields.get("external_data", ()), data_sizes)
    elif location == _DEFAULT and raw is not None and "external_data" not in fields:
        found_bytes = len(raw)
    else:
        where = "in the graph file" if data_sizes is None else "in either the graph file or a data file"
        refuse(f"the bytes of {shown(name)} {where}", "them elsewhere")
    if found_bytes != nbytes:
        refuse(f"{shown(name)} to have {nbytes} bytes, as its shape says", found_bytes)
    return _Tensor(name, dims, data_type, nbytes, raw)


def _external(name: str, messages: Sequence[wire.Message], data_sizes: Mapping[str, int]) -> int:
    """How many bytes of a data file a tensor has, with their place checked."""
    entries = [wire.read(message, wire.ENTRY) for message in messages[:4]]
    place = {wire.text(entry, "key"): wire.text(entry, "value") for entry in entries}
    if len(messages) != 3 or place.keys() != {"location", "offset", "length"}:
        refuse(f"{shown(name)} with location, offset and length", shown(", ".join(place)))
    file = place["location"]
    if file not in data_sizes:
        refuse(f"{shown(name)} in {' or '.join(sorted(data_sizes)) or 'no data file'}", shown(file))
    offset, length = _decimal(place["offset"]), _decimal(place["length"])
    if offset + length > data_sizes[file]:
        refuse(f"{shown(name)} within the {data_sizes[file]} bytes of {file}", f"{offset} + {length}")
    return length


def _decimal(digits: str) -> int:
    # Parsers differ on signs, spaces and leading zeros.
    if not (digits.isascii() and digits.isdigit() and len(digits) < 20 and str(int(digits)) == digits):
        refuse("a decimal number", shown(digits))
    return int(digits)
