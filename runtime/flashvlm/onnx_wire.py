"""Reads the messages of an ONNX file from their bytes: strictly, and only the fields that the exporter writes.

The runtime goes without the onnx package. And that package, like every protobuf parser, merges a message that occurs
twice, skips fields it does not know and follows any nesting: what is checked would not be all that is there.
"""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

MAX_REPEATS = 1 << 17  # of one field in one message: reading takes 200 bytes of memory for each
MAX_NAME = 1024  # bytes; names are paths of modules, and inlining puts one before another

Message = memoryview
Fields = dict[str, list[Any]]  # by the name of the field: a number, the bytes of what has a length, None for a float


class GraphError(Exception):
    """What was expected and what was found, without the name of the file."""


def refuse(expected: str, found: object) -> NoReturn:
    raise GraphError(f"expected {expected}, found {found}")


def shown(text: str) -> str:
    """A name of a hostile file in a message: on one line, and not long."""
    return f"{text!r:.100}"


# --- fields, by their numbers in onnx.proto (github.com/onnx/onnx, onnx/onnx.proto, IR version 10) --------------------

_VARINT, _BYTES, _FIXED32 = 0, 2, 5  # wire types: a number, what has a length, a float


class Schema(NamedTuple):
    name: str
    fields: dict[int, tuple[str, bool]]  # tag on the wire -> name, and whether the field may repeat


def _schema(
    message: str,
    once: dict[int, str],
    many: dict[int, str] | None = None,
    number: dict[int, str] | None = None,
    numbers: dict[int, str] | None = None,
    floating: dict[int, str] | None = None,
) -> Schema:
    """From the numbers and names of fields: of bytes, ``once`` or ``many``, of numbers, and of floats."""
    fields = {}
    for names, wire, repeats in (
        (once, _BYTES, False),
        (many, _BYTES, True),
        (number, _VARINT, False),
        (numbers, _VARINT, True),
        (floating, _FIXED32, False),
    ):
        fields.update({key << 3 | wire: (name, repeats) for key, name in (names or {}).items()})
    return Schema(message, fields)


MODEL = _schema(
    "ModelProto",
    once={2: "producer_name", 7: "graph"},
    many={8: "opset_import", 14: "metadata_props", 25: "functions"},
    number={1: "ir_version"},
)
OPSET = _schema("OperatorSetIdProto", once={1: "domain"}, number={2: "version"})
GRAPH = _schema(
    "GraphProto",
    once={2: "name"},
    many={1: "node", 5: "initializer", 11: "input", 12: "output", 13: "value_info", 16: "metadata_props"},
)
FUNCTION = _schema(
    "FunctionProto",
    once={1: "name", 10: "domain"},
    many={
        4: "input",
        5: "output",
        6: "attribute",
        7: "node",
        9: "opset_import",
        12: "value_info",
        14: "metadata_props",
    },
)
NODE = _schema("NodeProto", once={3: "name", 4: "op_type", 7: "domain"}, many={1: "input", 2: "output", 5: "attribute"})
ATTRIBUTE = _schema(
    "AttributeProto",
    once={1: "name", 4: "s", 5: "t", 21: "ref_attr_name"},
    number={3: "i", 20: "type"},
    numbers={8: "ints"},
    floating={2: "f"},
)
TENSOR = _schema(
    "TensorProto",
    once={8: "name", 9: "raw_data"},
    many={13: "external_data"},
    number={2: "data_type", 14: "data_location"},
    numbers={1: "dims"},
)
ENTRY = _schema("StringStringEntryProto", once={1: "key", 2: "value"})
VALUE = _schema("ValueInfoProto", once={1: "name", 2: "type"}, many={4: "metadata_props"})
TYPE = _schema("TypeProto", once={1: "tensor_type"})  # sequences, maps and optionals nest
TENSOR_TYPE = _schema("TypeProto.Tensor", once={2: "shape"}, number={1: "elem_type"})


# --- the wire format (protobuf.dev/programming-guides/encoding) ------------------------------------------------------


def read(message: Message, schema: Schema) -> Fields:
    """The values of every field.

    Raises:
        GraphError: another field or wire type, a field that occurs more often than it may, or bytes that end early.
    """
    fields: Fields = {}
    at, end = 0, len(message)
    try:
        while at < end:
            tag = message[at]
            at += 1
            if tag > 127:
                tag, at = _varint(message, at - 1)
            if tag not in schema.fields:
                refuse(f"fields of {schema.name} that the exporter writes", f"{tag >> 3} of wire type {tag & 7}")
            value: Any = None
            if tag & 7 == _FIXED32:
                at += 4
            else:
                value = message[at]
                at += 1
                if value > 127:
                    value, at = _varint(message, at - 1)
                if tag & 7 == _BYTES:
                    start, at = at, at + value
                    value = message[start:at]
            if at > end:
                break
            name, repeats = schema.fields[tag]
            if name not in fields:
                fields[name] = [value]
            elif repeats and len(fields[name]) < MAX_REPEATS:
                fields[name].append(value)
            else:
                refuse(f"{name} of {schema.name} at most {MAX_REPEATS if repeats else 1} times", "more of them")
    except IndexError:
        at = end + 1
    if at > end:
        refuse(f"a whole {schema.name}", "an end within a field")
    return fields


def _varint(message: Message, at: int) -> tuple[int, int]:
    """A number in groups of seven bits, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        byte = message[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            if value >> 64:
                break
            return value, at
    refuse("numbers of at most 64 bits", "a longer one")


def number(fields: Fields, name: str) -> int:
    """A number of 64 bits without sign; 0 where the field is absent, as in protobuf."""
    return fields[name][0] if name in fields else 0


def signed(value: int) -> int:
    """The number that int64 fields mean."""
    return value - (1 << 64) if value >> 63 else value


def text(fields: Fields, name: str) -> str:
    """A name or other short text; empty where the field is absent."""
    return decoded(fields[name][0]) if name in fields else ""


def decoded(value: Message) -> str:
    if len(value) > MAX_NAME:
        refuse(f"names of at most {MAX_NAME} bytes", len(value))
    try:
        return str(value, "utf-8")
    except UnicodeDecodeError:
        refuse("names in UTF-8", shown(str(value, "latin-1")))
