"""Weights that are not where or what a graph says, and graph files that are not well-formed."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from graph_files import DATA, Edit, edited, external, onnx, refused, valid
from onnx import TensorProto

from flashvlm import graph_check, onnx_wire
from flashvlm.errors import BundleError
from flashvlm.graph_check import check_graph

# --- weights ---------------------------------------------------------------------------------------------------------


def weight(**changes: Any) -> Edit:
    return lambda m: m.graph.initializer[0].CopyFrom(external(**changes))


def stored(tensor: Any) -> Edit:
    return lambda m: m.graph.initializer[1].CopyFrom(tensor)


def tensor(**fields: Any) -> Any:
    return TensorProto(**{"name": "shape", "data_type": TensorProto.INT64, "dims": [2], "raw_data": bytes(16)} | fields)


BEYOND = "'weight' within the 4096 bytes of vision.data"
TENSORS: dict[str, tuple[Edit, tuple[str, ...]]] = {
    "absolute": (weight(location="/etc/passwd"), ("'weight' in vision.data", "found '/etc/passwd'")),
    "above": (weight(location="../vision.data"), ("found '../vision.data'",)),
    "above and back": (weight(location="a/../vision.data"), ("found 'a/../vision.data'",)),
    "here": (weight(location="./vision.data"), ("found './vision.data'",)),
    "backslash": (weight(location=".\\vision.data"), ("vision.data'",)),
    "of another graph": (weight(location="decoder.data"), ("found 'decoder.data'",)),
    "link": (weight(location="link.data"), ("found 'link.data'",)),
    "itself": (weight(location="vision.onnx"), ("found 'vision.onnx'",)),
    "empty": (weight(location=""), ("found ''",)),
    "end of text": (weight(location="vision.data\0"), (r"found 'vision.data\x00'",)),
    "pipe of lines": (weight(location="a\nb"), (r"found 'a\nb'",)),
    "not UTF-8": (
        lambda m: m.graph.initializer[0].CopyFrom(
            TensorProto.FromString(external(location="vision.dat#").SerializeToString().replace(b"#", b"\xff"))
        ),
        ("names in UTF-8",),
    ),
    "offset beyond the file": (weight(offset=4096), (BEYOND, "4096 + 64")),
    "end beyond the file": (weight(offset=4040), (BEYOND, "4040 + 64")),
    "offset of 2^63": (weight(offset=2**63), (BEYOND,)),
    "length of another shape": (weight(length=60), ("'weight' to have 64 bytes", "found 60")),
    "negative offset": (weight(offset=-64), ("a decimal number, found '-64'",)),
    "octal offset": (weight(offset="0100"), ("found '0100'",)),
    "offset of other digits": (weight(offset="\u0661"), ("found '\u0661'",)),
    "offset of 4000 digits": (weight(offset="1" * 4000), ("at most 1024 bytes",)),
    "no length": (
        lambda m: m.graph.initializer[0].external_data.pop(),
        ("'weight' with location, offset and length", "'location, offset'"),
    ),
    "location twice": (
        lambda m: m.graph.initializer[0].external_data.add(key="location", value="/etc/passwd"),
        ("'weight' with location, offset and length",),
    ),
    "checksum": (weight(checksum="0" * 40), ("'weight' with location, offset and length",)),
    "negative size": (weight(dims=(-4, -4), length=64), ("'weight' with at most 8 sizes", "[-4, -4]")),
    "sizes that overflow": (weight(dims=(2**32, 2**32, 4, 4), length=64), ("1099511627776 elements",)),
    "sizes that overflow an empty tensor": (weight(dims=(0, 2**40, 2**40), length=0), ("1099511627776 elements",)),
    "too many sizes": (weight(dims=[1] * 9, length=4), ("at most 8 sizes",)),
    "both places": (
        lambda m: setattr(m.graph.initializer[0], "raw_data", bytes(64)),
        ("the bytes of 'weight' in either",),
    ),
    "neither place": (lambda m: m.graph.initializer[1].ClearField("raw_data"), ("the bytes of 'shape' in either",)),
    "a place that is not used": (
        lambda m: m.graph.initializer[0].ClearField("data_location"),
        ("the bytes of 'weight' in either",),
    ),
    "every byte many times": (
        lambda m: m.graph.initializer.extend(external(f"w{i}", (32, 32)) for i in range(2)),
        ("weights no larger than their data files together",),
    ),
    "bytes missing": (stored(tensor(raw_data=bytes(8))), ("'shape' to have 16 bytes", "found 8")),
    "bytes too many": (stored(tensor(raw_data=bytes(17))), ("'shape' to have 16 bytes", "found 17")),
    "bytes of a large shape": (stored(tensor(dims=[2**30])), ("'shape' to have 8589934592 bytes", "found 16")),
    "negative size of bytes": (stored(tensor(dims=[-2])), ("'shape' with at most 8 sizes", "[-2]")),
    "text": (stored(tensor(data_type=TensorProto.STRING)), ("of a type that the exporter writes", "type 8")),
    "double": (stored(tensor(data_type=TensorProto.DOUBLE)), ("found type 11",)),
    "no type": (stored(tensor(data_type=0)), ("found type 0",)),
    "typed data": (
        stored(TensorProto(name="shape", data_type=TensorProto.INT64, dims=[2], int64_data=[0, 4])),
        ("fields of TensorProto", "found 7 of"),
    ),
    "segment": (stored(tensor(segment=TensorProto.Segment(begin=0, end=1))), ("found 3 of",)),
}


@pytest.mark.parametrize(("edit", "expected"), TENSORS.values(), ids=TENSORS)
def test_tensor(edit: Edit, expected: tuple[str, ...]) -> None:
    refused(edited(edit), *expected)


def test_data_without_a_listed_file() -> None:
    with pytest.raises(BundleError, match=r"'weight' in no data file, found 'vision\.data'"):
        check_graph(valid().SerializeToString(), "select.onnx", {})


# --- bytes -----------------------------------------------------------------------------------------------------------


def varint(number: int) -> bytes:
    groups = [number >> shift & 127 for shift in range(0, max(number.bit_length(), 1), 7)]
    return bytes([*(group | 128 for group in groups[:-1]), groups[-1]])


def field(number: int, content: bytes | int, wire: int = 2) -> bytes:
    tag = varint(number << 3 | wire)
    return tag + (varint(content) if isinstance(content, int) else varint(len(content)) + content)


def deep(number: int, levels: int) -> bytes:
    """A message in a message, all in that field."""
    content = b""
    for _ in range(levels):
        content = field(number, content)
    return content


GRAPH = valid().graph.SerializeToString()
VALID = valid().SerializeToString()
BYTES: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "nothing": (b"", ("IR version",)),
    "text": (b"nothing", ("fields of ModelProto",)),
    "a second graph": (VALID + field(7, GRAPH), ("graph of ModelProto at most 1 times",)),
    "a second graph by another tag": (VALID + b"\xba\x80\x00" + field(7, GRAPH)[1:], ("graph of ModelProto",)),
    "a second, empty graph": (VALID + field(7, b""), ("graph of ModelProto at most 1 times",)),
    "a second IR version": (VALID + field(1, 10, wire=0), ("ir_version of ModelProto at most 1 times",)),
    "a field of the future": (VALID + field(1000, b"x"), ("found 1000 of wire type 2",)),
    "graph as a number": (field(1, 10, wire=0) + field(7, 1, wire=0), ("found 7 of wire type 0",)),
    "a group": (VALID + varint(7 << 3 | 3) + varint(7 << 3 | 4), ("found 7 of wire type 3",)),
    "the end of a group": (VALID + varint(7 << 3 | 4), ("found 7 of wire type 4",)),
    "60,000 groups": (VALID + varint(7 << 3 | 3) * 60_000, ("found 7 of wire type 3",)),
    "a wire type that is not": (VALID + varint(7 << 3 | 7), ("found 7 of wire type 7",)),
    "number without end": (VALID + varint(1 << 3) + b"\xff" * 100, ("numbers of at most 64 bits",)),
    "number that is cut": (VALID + varint(1 << 3) + b"\xff", ("a whole ModelProto",)),
    "number of 70 bits": (varint(1 << 3) + b"\xff" * 9 + b"\x7f", ("numbers of at most 64 bits",)),
    "IR version of 65 bits": (varint(1 << 3) + b"\x8a\x80\x80\x80\x80\x80\x80\x80\x80\x02", ("at most 64 bits",)),
    "tag without end": (VALID + b"\xff" * 20, ("numbers of at most 64 bits",)),
    "length beyond the end": (VALID + varint(7 << 3 | 2) + varint(1 << 40), ("a whole ModelProto",)),
    "length of 2^64 - 1": (varint(8 << 3 | 2) + b"\xff" * 9 + b"\x01", ("a whole ModelProto",)),
    "length beyond the message": (
        field(1, 10, wire=0) + field(8, field(2, 20, wire=0)) + field(7, field(1, b"\x0a\x7f")) + bytes(200),
        ("found 0 of wire type 0",),
    ),
    "60,000 subgraphs": (
        field(1, 10, 0) + field(8, field(2, 20, 0)) + field(7, field(1, field(4, b"If") + field(5, deep(6, 60_000)))),
        ("found 'If'",),
    ),
    "60,000 sequences": (
        field(1, 10, 0) + field(8, field(2, 20, 0))
        + field(7, field(13, field(1, b"x") + field(2, field(4, deep(1, 60_000))))),
        ("fields of TypeProto", "found 4 of"),
    ),
    "too many of them": (field(14, b"") * ((1 << 17) + 1), ("metadata_props of ModelProto at most 131072 times",)),
}  # fmt: skip


@pytest.mark.parametrize(("content", "expected"), BYTES.values(), ids=BYTES)
def test_bytes(content: bytes, expected: tuple[str, ...]) -> None:
    refused(content, *expected)


def test_too_many_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_check, "MAX_FILE", len(VALID) - 1)
    refused(VALID, f"at most {len(VALID) - 1} bytes, found {len(VALID)}")


def test_a_name_of_lines_stays_on_one() -> None:
    with pytest.raises(BundleError) as refusal:
        check_graph(b"", "a\nb", {})
    assert str(refusal.value).startswith(r"'a\nb': expected")


def test_every_beginning_of_a_file() -> None:
    """Each is refused, or is the file without what may be absent."""
    passed = []
    for end in range(len(VALID)):
        try:
            check_graph(VALID[:end], "vision.onnx", DATA)
        except BundleError:
            continue
        passed.append(end)
    assert all(onnx.ModelProto.FromString(VALID[:end]).HasField("graph") for end in passed)
    assert len(passed) < 5


@pytest.mark.graph
def test_no_damage_is_met_by_another_exception(tiny_bundle: Path) -> None:
    content = (tiny_bundle / "select-k4.onnx").read_bytes()
    rng = random.Random(0)
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(rng.choice((1, 1, 4, 50))):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        try:
            check_graph(bytes(damaged), "select-k4.onnx", {})
        except BundleError as refusal:
            assert str(refusal).isprintable()  # noqa: PT017 - it may as well pass


SCHEMAS = [schema for schema in vars(onnx_wire).values() if isinstance(schema, onnx_wire.Schema)]


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.name)
def test_fields_are_those_of_onnx(schema: onnx_wire.Schema) -> None:
    descriptor = onnx.ModelProto.DESCRIPTOR.file.message_types_by_name[schema.name.partition(".")[0]]
    if "." in schema.name:
        descriptor = descriptor.nested_types_by_name[schema.name.partition(".")[2]]
    wires = {"FLOAT": 5, "INT32": 0, "INT64": 0, "ENUM": 0, "STRING": 2, "BYTES": 2, "MESSAGE": 2}
    kinds = {getattr(descriptor.fields[0], f"TYPE_{kind}"): wire for kind, wire in wires.items()}
    for tag, (name, repeats) in schema.fields.items():
        found = descriptor.fields_by_number[tag >> 3]
        assert (found.name, kinds[found.type]) == (name, tag & 7)
        assert repeats == found.is_repeated
