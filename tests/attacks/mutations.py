"""Ways to turn something valid into something hostile; all randomness is that of the generator passed in."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from flashvlm.files import sha256

VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 3, 7, 255, 2**31 - 1, 2**31, -(2**31), 2**63, 10**5, 10**9, 10**12, 10**18),
    *(0.5, -0.5, 1e-300, 1e300, float("1e5")),
    *("", " ", "x", "../x", "/etc/passwd", "a/../../b", "nul\0", "\x1b[31m", "\u202e", "\ud800", "é", "a" * 10_000),
    *(
        "vision",
        "decoder.data",
        "<image>",
        "</s>",
        "{{ x }}",
        "(a+)+$",
        "(a|a)*b",
        "a{1,99999}",
        "[",
        "\\p{L}+",
        "(?=a)*",
    ),
    *([], {}, [[]], [0], ["x"], {"a": 1}, {"type": "Sequence"}, {"auto_map": {"AutoTokenizer": "x.Y"}}),
    *({"String": ""}, {"Regex": "(a+)+$"}, {"Regex": "(?:a?){50}a{50}"}, {"id": 10**9, "content": "y"}),
]

IMAGE_KINDS = ("PNG", "JPEG", "GIF", "BMP", "PPM", "WEBP", "TIFF", "TGA", "ICO", "EPS", "PDF", "JPEG2000")
OPERATORS = ("Loop", "If", "Scan", "Tile", "Pad", "Resize", "NonZero", "Einsum", "RandomNormal", "Expand", "MatMul")
LOCATIONS = ("../x", "/etc/passwd", "", "-1", "9" * 30, "0", "vision.data", "decoder.data", "bundle.json")

SNIPPETS = [
    "{% for i in range(N) %}{% for j in range(N) %}x{% endfor %}{% endfor %}",
    "{% set s = 'a' * N %}{{ s }}",
    "{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
    "{% set ns = namespace(s=['ab']) %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}",
    "{{ 10 ** N }}",
    "{{ lipsum(n=N) }}",
    "{{ '%Nd' % 1 }}",
    "{{ '{:>N}'.format(1) }}",
    "{{ 'x'.ljust(N) }}{{ 'x' | center(N) }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(N) }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ messages | tojson(indent=N) }}",
    "{{ ('a' * 1000) | replace('a', 'a' * N) }}",
    "{{ ('x,' * N).split(',') | join('y' * N) }}",
    "{{ raise_exception('\x1b[31m' ~ 'no' * N) }}",
    "{{ strftime_now('%Y' * N) }}",
    "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "{{ ((((((((((1)))))))))) }}" + "{% if 1 %}" * 30 + "{% endif %}" * 30,
    "{{ messages[N]['content'] }}{{ bos_token[::N] }}",
    "{% set x %}{{ bos_token }}{% for i in range(N) %}{{ bos_token }}{% endfor %}{% endset %}{{ x * N }}",
    "{{ range(N) | sum }}{{ range(N) | list | length }}{{ [1] * N }}",
    "{{ dict(a=N).items() | list }}{{ 'x' | indent(N) }}{{ 'a b' | wordwrap(N) }}",
    "{% if messages is divisibleby 0 %}{% endif %}{{ 1 // 0 }}",
    "{{ self }}{{ varargs }}{{ caller() }}",
    "{% include 'x' %}{% import 'y' as z %}",
]


def prepare() -> None:
    """Loads what the mutations need, before any fork."""
    import onnx  # noqa: F401

    PIL.Image.init()


def list_file(bundle: Path, name: str) -> None:
    """Makes the manifest agree with a file, as someone would who forges a bundle."""
    content = json.loads((bundle / "bundle.json").read_text())
    path = bundle / name
    content["files"][name] = {"size": path.stat().st_size, "sha256": sha256(path)}
    (bundle / "bundle.json").write_text(json.dumps(content))


# --- JSON ----------------------------------------------------------------------------------------------------------


def edit_json(path: Path, rng: random.Random) -> None:
    """A few changes anywhere in a JSON file; now and then to its text."""
    text = path.read_text(encoding="utf-8")
    value = json.loads(text)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        value = _edited(value, rng)
    text = json.dumps(value)
    if rng.random() < 0.03:
        text = rng.choice(
            ("[" * 60_000, '{"a":' * 60_000, text[: len(text) // 2], text + text, "NaN", "", "\x00" + text)
        )
    path.write_text(text, encoding="utf-8")


def _edited(value: Any, rng: random.Random) -> Any:
    """The value with one thing changed, at any depth: large lists and tables are as likely as small ones."""
    places = list(_containers(value))
    if not places:
        return rng.choice(VALUES)
    holder = rng.choice(places)
    keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
    if not keys:
        return value
    key = rng.choice(keys)
    change = rng.randrange(8)
    if change == 0:
        del holder[key]
    elif change == 1 and isinstance(holder, dict):
        holder[str(rng.choice(VALUES))[:300]] = holder.pop(key)
    elif change == 2:
        holder[key] = [holder[key]] * rng.choice((2, 3, 100))
    elif change == 3:
        other = rng.choice(places)
        holder[key] = json.loads(json.dumps(other if other is not holder else None))
    elif change == 4:
        nested: Any = holder[key]
        for _ in range(rng.choice((2, 70, 250))):  # json itself gives up at 1,000
            nested = [nested] if rng.random() < 0.5 else {"type": "Sequence", "a": nested}
        holder[key] = nested
    elif change == 5 and isinstance(holder[key], (int, float)):
        holder[key] = holder[key] * rng.choice((-1, 0, 2, 10, 10**6, 0.5))
    else:
        holder[key] = rng.choice(VALUES)
    return value


def _containers(value: Any) -> list[Any]:
    found, left = [], [value]
    while left and len(found) < 3000:
        item = left.pop()
        if isinstance(item, (dict, list)) and item:
            found.append(item)
            children = item.values() if isinstance(item, dict) else item
            left.extend(child for child in list(children)[:50] if isinstance(child, (dict, list)))
    return found


# --- text and bytes ------------------------------------------------------------------------------------------------


def template(text: str, rng: random.Random) -> str:
    """A chat template with something added, cut, or put in another place."""
    change = rng.randrange(5)
    if change < 3:
        number = rng.choice(("0", "-1", "3", "1000", "100000", "10**9", "999999999999"))
        added = "".join(rng.choice(SNIPPETS).replace("N", number) for _ in range(rng.choice((1, 1, 2))))
        at = rng.choice((0, len(text), text.find("%}") + 2))
        return text[:at] + added + text[at:]
    if change == 3:
        at = rng.randrange(len(text))
        return text[:at] + text[at + rng.randrange(1, 20) :]
    return (
        text * rng.choice((0, 2, 50)) if rng.random() < 0.3 else text.replace("content", rng.choice(("role", "x", "")))
    )


def bytes_of(content: bytes, rng: random.Random) -> bytes:
    """Bits flipped, bytes overwritten, cut out, doubled or put in."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        size = len(changed)
        at = rng.randrange(size) if size and rng.random() < 0.5 else rng.randrange(min(size, 512)) if size else 0
        length = rng.choice((1, 4, 64, 4096))
        change = rng.randrange(6)
        if change == 0 and size:
            changed[at] ^= 1 << rng.randrange(8)
        elif change == 1:
            changed[at : at + length] = bytes([rng.choice((0, 0x7F, 0x80, 0xFF))]) * min(length, size - at)
        elif change == 2:
            del changed[at : at + length]
        elif change == 3:
            changed[at:at] = changed[at : at + length]
        elif change == 4:
            changed[at:at] = rng.randbytes(length)
        else:
            del changed[at:]
    return bytes(changed)


def image(rng: random.Random) -> bytes:
    """A damaged picture of any format, or one whose header promises more than there is."""
    kind = rng.choice([name for name in IMAGE_KINDS if name in PIL.Image.SAVE])
    mode = rng.choice(("RGB", "L", "P", "RGBA", "1", "I;16"))
    pixels = np.frombuffer(rng.randbytes(48 * 40), dtype=np.uint8).reshape(40, 48)
    buffer = io.BytesIO()
    try:
        PIL.Image.fromarray(pixels).convert(mode).save(buffer, format=kind)
    except (OSError, ValueError):  # not every format has every mode
        buffer = io.BytesIO()
        PIL.Image.fromarray(pixels).convert("RGB").save(buffer, format="PNG")
    return bytes_of(buffer.getvalue(), rng)


def safetensors(content: bytes, rng: random.Random) -> bytes:
    """A changed header before the same data, or changed bytes."""
    if rng.random() < 0.3:
        return bytes_of(content, rng)
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    for _ in range(rng.choice((1, 2))):
        header = _edited(header, rng)
    packed = json.dumps(header).encode()
    length = len(packed) if rng.random() < 0.9 else rng.choice((0, 2**63, 2**64 - 1, len(packed) - 1))
    return length.to_bytes(8, "little") + packed + content[end:]


# --- ONNX ----------------------------------------------------------------------------------------------------------


def graph(content: bytes, rng: random.Random) -> bytes:
    """An ONNX model that still parses, with something in it that the exporter would not write."""
    import onnx

    model = onnx.load_from_string(content)
    for _ in range(rng.choice((1, 1, 2))):
        rng.choice(_GRAPH_CHANGES)(model, rng)
    return model.SerializeToString()


def _node(model: Any, rng: random.Random) -> Any:
    return rng.choice(model.graph.node)


def _operator(model: Any, rng: random.Random) -> None:
    names = (
        "Loop",
        "If",
        "Scan",
        "Tile",
        "Pad",
        "Resize",
        "NonZero",
        "Einsum",
        "RandomNormal",
        "Expand",
        "Range",
        "MatMul",
    )
    _node(model, rng).op_type = rng.choice(names)


def _domain(model: Any, rng: random.Random) -> None:
    _node(model, rng).domain = rng.choice(("com.microsoft", "ai.onnx.ml", "flashvlm", "x", "../x"))


def _dimension(model: Any, rng: random.Random) -> None:
    tensor = rng.choice(model.graph.initializer)
    size = rng.choice((0, -1, 1, 2**31, 2**40, 2**62))
    if tensor.dims:
        tensor.dims[rng.randrange(len(tensor.dims))] = size
    else:
        tensor.dims.append(size)


def _external(model: Any, rng: random.Random) -> None:
    tensors = [tensor for tensor in model.graph.initializer if tensor.external_data]
    if tensors:
        entry = rng.choice(rng.choice(tensors).external_data)
        entry.value = rng.choice(LOCATIONS)


def _constant(model: Any, rng: random.Random) -> None:
    """Another number where a shape, an axis or an index may be."""
    tensors = [tensor for tensor in model.graph.initializer if tensor.data_type == 7 and tensor.raw_data]
    if tensors:
        tensor = rng.choice(tensors)
        values = np.frombuffer(tensor.raw_data, dtype=np.int64).copy()
        values[rng.randrange(len(values))] = rng.choice((0, -1, -2, 3, 1 << 20, 1 << 31, 1 << 40, (1 << 63) - 1))
        tensor.raw_data = values.tobytes()


def _wire(model: Any, rng: random.Random) -> None:
    node, other = _node(model, rng), _node(model, rng)
    if node.input and other.output:
        node.input[rng.randrange(len(node.input))] = rng.choice((other.output[0], "", "none such", node.output[0]))


def _attribute(model: Any, rng: random.Random) -> None:
    nodes = [node for node in model.graph.node if node.attribute]
    if nodes:
        attribute = rng.choice(rng.choice(nodes).attribute)
        attribute.i = rng.choice((-(2**63), -1, 0, 2**31, 2**63 - 1))
        attribute.type = rng.choice((1, 2, 7, attribute.type))


def _drop(model: Any, rng: random.Random) -> None:
    nodes = model.graph.node
    del nodes[rng.randrange(len(nodes))]


def _double(model: Any, rng: random.Random) -> None:
    model.graph.node.append(_node(model, rng))
    if model.functions:
        model.functions.append(rng.choice(model.functions))


def _input(model: Any, rng: random.Random) -> None:
    value = rng.choice((*model.graph.input, *model.graph.output))
    shape = value.type.tensor_type.shape
    value.type.tensor_type.elem_type = rng.choice((1, 2, 7, 9, 10, 16, 99))
    if shape.dim:
        rng.choice(shape.dim).dim_value = rng.choice((0, -1, 1, 2**40))


def _function(model: Any, rng: random.Random) -> None:
    """A body that calls itself, or another one."""
    if model.functions:
        function = rng.choice(model.functions)
        call = rng.choice(function.node)
        call.domain, call.op_type = "flashvlm", rng.choice([f.name for f in model.functions])


_GRAPH_CHANGES: list[Callable[[Any, random.Random], None]] = [
    *(
        _operator,
        _domain,
        _dimension,
        _external,
        _constant,
        _constant,
        _wire,
        _attribute,
        _drop,
        _double,
        _input,
        _function,
    )
]
