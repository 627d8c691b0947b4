"""A bundle that is not exactly what was exported is refused in one line, before anything of it runs."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from flashvlm.cli.run import main
from flashvlm.extras import install, upgrade
from flashvlm.files import sha256
from refusals import assert_refused, copy_of, run

QUESTION = ("--prompt", "What is it?")
Edit = Callable[[Path], object]


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    return copy_of(tiny_bundle, tmp_path, "bundle")


def refused(folder: Path, *expected: str) -> None:
    picture = folder.parent / "picture.png"
    Image.new("RGB", (30, 30)).save(picture)
    assert_refused(run(main, folder, *QUESTION, "--image", picture), *expected)


def manifest(change: Callable[[dict[str, Any]], object]) -> Edit:
    def edit(folder: Path) -> None:
        content = json.loads((folder / "bundle.json").read_text())
        change(content)
        (folder / "bundle.json").write_text(json.dumps(content))

    return edit


def text(content: str) -> Edit:
    return lambda folder: (folder / "bundle.json").write_text(content)


def list_file(folder: Path, name: str) -> None:
    """Makes the manifest agree with a file, as someone would who forges a bundle."""
    path = folder / name
    spec = {"size": path.stat().st_size, "sha256": sha256(path)}
    manifest(lambda m: m["files"].update({name: spec}))(folder)


def rename_tensor(graph: str, old: str, new: str) -> Edit:
    """In the manifest and in the ONNX file, so that they agree with each other."""

    def edit(folder: Path) -> None:
        onnx = pytest.importorskip("onnx")
        model = onnx.load(folder / f"{graph}.onnx", load_external_data=False)
        for value in (*model.graph.input, *model.graph.output):
            value.name = new if value.name == old else value.name
        for node in model.graph.node:
            for names in (node.input, node.output):
                names[:] = [new if name == old else name for name in names]
        onnx.save(model, folder / f"{graph}.onnx")
        list_file(folder, f"{graph}.onnx")
        content = json.loads((folder / "bundle.json").read_text())
        for tensor in (*content["graphs"][graph]["inputs"], *content["graphs"][graph]["outputs"]):
            tensor["name"] = new if tensor["name"] == old else tensor["name"]
        (folder / "bundle.json").write_text(json.dumps(content))

    return edit


def vocabulary(rows: int) -> Edit:
    """Another size, wherever the manifest says it."""

    def change(content: dict[str, Any]) -> None:
        content["model"]["vocab_size"] = rows
        content["graphs"]["decoder"]["outputs"][0]["shape"][1] = rows

    return manifest(change)


def bfloat16(folder: Path) -> None:
    """The manifest of a bfloat16 bundle."""
    path = folder / "bundle.json"
    content = json.loads(path.read_text())
    content["model"]["dtypes"]["activations"] = "bfloat16"
    for graph in content["graphs"].values():
        for tensor in (*graph["inputs"], *graph["outputs"]):
            if tensor["dtype"] == "float32" and tensor["name"] not in ("pixel_values", "saliency", "scores", "logits"):
                tensor["dtype"] = "bfloat16"
    path.write_text(json.dumps(content))


MANIFESTS: dict[str, tuple[Edit, tuple[str, ...]]] = {
    "not JSON": (text("{"), ("bundle.json cannot be read", "export the bundle again")),
    "not UTF-8": (lambda folder: (folder / "bundle.json").write_bytes(b"\xff{}"), ("bundle.json cannot be read",)),
    "nested without end": (text("[" * 100_000), ("bundle.json cannot be read", "nested over 64 deep")),
    "a list": (text("[]"), ("schema_version", "None")),
    "no schema": (manifest(lambda m: m.pop("schema_version")), ("schema_version", "None")),
    "schema of text": (manifest(lambda m: m.update(schema_version="1")), ("schema_version", "'1'")),
    "schema zero": (manifest(lambda m: m.update(schema_version=0)), ("schema_version", "found 0")),
    "older schema": (
        manifest(lambda m: m.update(schema_version=1)),
        ("bundle schema 1", "reads 2", "export the model again"),
    ),
    "newer schema": (
        manifest(lambda m: m.update(schema_version=99)),
        ("bundle schema 99", "reads 2", f"upgrade with: {upgrade()}"),
    ),
    "field missing": (manifest(lambda m: m["model"].pop("max_seq")), ("field model.max_seq", "required")),
    "field extra": (manifest(lambda m: m["model"].update(colour="red")), ("field model.colour", "not permitted")),
    "field of another kind": (manifest(lambda m: m.update(files=[])), ("field files",)),
    "negative size": (manifest(lambda m: m["model"].update(max_seq=-1)), ("field model.max_seq", "greater than 0")),
    "sha256 too short": (manifest(lambda m: m["files"]["vision.onnx"].update(sha256="00")), ("vision.onnx.sha256",)),
    "file not listed": (manifest(lambda m: m["files"].pop("vision.data")), ("uses 'vision.data'", "does not list")),
    "table not listed": (manifest(lambda m: m["files"].pop("embed_tokens.safetensors")), ("embed_tokens.safetensors",)),
    "graph not there": (manifest(lambda m: m["graphs"].pop("decoder")), ("no graph 'decoder'", "it has select-k4")),
    "other names": (
        manifest(lambda m: m["graphs"]["vision"]["inputs"][0].update(name="pixels")),
        ("graph vision does not have the inputs of its contract", "expected pixel_values", "found pixels"),
    ),
    "other names, the graph's too": (
        rename_tensor("vision", "pixel_values", "pixels"),
        ("graph vision does not have the inputs of its contract", "expected pixel_values", "found pixels"),
    ),
    "other vocabulary": (
        manifest(lambda m: m["model"].update(vocab_size=9)),
        ("token id 512 is beyond the table of 9 rows",),
    ),
    "larger vocabulary": (
        vocabulary(1000),
        ("embed_tokens.safetensors", "expected a table of 1000 x 48"),
    ),
    "bfloat16 on a CPU": (
        bfloat16,
        ("is bfloat16", "--dtype float32", install("gpu")),
    ),
    "unknown symbol": (
        manifest(lambda m: m["graphs"]["vision"]["inputs"][0]["shape"].__setitem__(0, "many")),
        ("field graphs.vision.inputs.0.shape.0", "one of batch, sequence", "found 'many'"),
    ),
    "negative dimension": (
        manifest(lambda m: m["graphs"]["vision"]["inputs"][0]["shape"].__setitem__(1, -3)),
        ("field graphs.vision.inputs.0.shape.1", "expected a size from 1", "found -3"),
    ),
    "image token below zero": (
        manifest(lambda m: m["visual"][0].update(placeholder_id=-1)),
        ("field visual.0.placeholder_id", "greater than or equal to 0"),
    ),
    "stop token beyond the table": (
        manifest(lambda m: m["model"].update(eos_token_ids=[10**6])),
        ("field model", "token id 1000000 is beyond the table of 514 rows"),
    ),
    "a grid that does not match": (
        manifest(lambda m: m["visual"][0].update(grid=[4, 5])),
        ("field visual.0", "expected a grid of 16 tokens, found (4, 5)"),
    ),
    "counts of 10^12": (
        manifest(lambda m: m["model"].update(num_layers=10**12)),
        ("field model.num_layers", "less than or equal to 1024"),
    ),
    "shortest edge of 10^9": (
        manifest(lambda m: m["visual"][0]["pixels"].update(size=[10**9, 10**9])),
        ("field visual.0.pixels.single.size.0", "less than or equal to 4096"),
    ),
    "another tiling": (
        manifest(lambda m: m["visual"][0]["pixels"].update(tiling="mosaic")),
        ("field visual.0.pixels", "'single', 'anyres', 'grid', 'longest'"),
    ),
    "more candidates than tiles give": (
        manifest(lambda m: m["visual"][0].update(candidates=17)),
        ("field visual.0", "expected 16 candidates of these tiles, found 17"),
    ),
    "no way to see": (manifest(lambda m: m.update(visual=[])), ("field visual", "at least 1 item")),
    "positions on three axes in one": (
        manifest(lambda m: m["visual"][0].update(positions="mrope")),
        ("positions mrope need 3 position_axes",),
    ),
    "two placeholders of one kind": (
        manifest(lambda m: m["visual"].append({**m["visual"][0], "graph": "vision-2", "placeholder_id": 3})),
        ("expected one placeholder_id and marker for a modality",),
    ),
    "a cache without end": (
        manifest(lambda m: m["model"].update(num_layers=1024, head_dim=65536)),
        ("values in a cache slot",),
    ),
    "a vision graph named twice": (
        manifest(lambda m: m["visual"].append(m["visual"][0])),
        ("expected different vision graphs, found one twice",),
    ),
    "budgets without end": (
        manifest(lambda m: m["selection"].update(budgets=[4, 4])),
        ("expected different budgets up to 16, found (4, 4)",),
    ),
    "a budget without its graph": (
        manifest(lambda m: m["selection"].update(budgets=[4, 7, 9])),
        ("no graph 'select-k9'; it has decoder, select-k4, select-k7, vision",),
    ),
    "a graph without its budget": (
        manifest(lambda m: m["selection"].update(budgets=[4])),
        ("expected the graphs decoder, select-k4, vision for these budgets", "found another set: select-k7"),
    ),
    "not a number": (text('{"schema_version": NaN}'), ("bundle.json cannot be read", "NaN is not JSON")),
    "digits without end": (text('{"schema_version": ' + "9" * 10_000 + "}"), ("bundle.json cannot be read",)),
}


@pytest.mark.parametrize(("edit", "expected"), MANIFESTS.values(), ids=MANIFESTS)
def test_manifest(edit: Edit, expected: tuple[str, ...], bundle: Path) -> None:
    edit(bundle)
    refused(bundle, *expected)


def test_graph_that_takes_other_shapes(bundle: Path) -> None:
    def smaller(content: dict[str, Any]) -> None:
        content["visual"][0]["pixels"].update(size=[28, 28], crop=[28, 28])
        content["graphs"]["vision"]["inputs"][0]["shape"][2:] = [28, 28]

    manifest(smaller)(bundle)
    refused(bundle, "vision.onnx does not have the inputs and outputs its manifest lists")


def test_prompt_beyond_the_capacity(bundle: Path) -> None:
    manifest(lambda m: m["model"].update(max_seq=20))(bundle)
    ran = run(main, bundle, "--prompt", "one two three four five six seven eight nine ten")
    assert_refused(ran, "tokens long with its image; this bundle holds 20", "shorten it", "--max-seq")


# --- no bundle at all ---


def test_nothing_there(tmp_path: Path) -> None:
    refused(tmp_path / "none", "none: expected a bundle folder, found nothing there", "flashvlm-export --model")


def test_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused(tmp_path / "file", "expected a bundle folder, found a file", "flashvlm-export --model")


def test_an_empty_folder(tmp_path: Path) -> None:
    refused(tmp_path, "is not a complete bundle", "no bundle.json", "flashvlm-export --model MODEL")


def test_a_checkpoint(tiny_checkpoint: Path) -> None:
    refused(tiny_checkpoint, "is a checkpoint", f"flashvlm-export --model {tiny_checkpoint}")


# --- files ---

NAMES = [
    "README.md",
    "decoder.data",
    "decoder.onnx",
    "embed_tokens.safetensors",
    "processor/chat_template.jinja",
    "processor/tokenizer.json",
    "processor/tokenizer_config.json",
    "select-k4.onnx",
    "select-k7.onnx",
    "vision.data",
    "vision.onnx",
]


def test_every_file_is_tried_below(tiny_bundle: Path) -> None:
    assert sorted(json.loads((tiny_bundle / "bundle.json").read_text())["files"]) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_damaged_file(name: str, bundle: Path) -> None:
    path = bundle / name
    content = path.read_bytes()
    for at in (0, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        refused(bundle, f"{name} was edited after export", "expected sha256", "export the bundle again")
    path.write_bytes(content + b"x")
    refused(bundle, f"{name} was resized", f"expected {len(content)} bytes, found {len(content) + 1}")
    path.write_bytes(content[:-1])
    refused(bundle, f"{name} was resized", f"found {len(content) - 1}")
    path.unlink()
    refused(bundle, f"{name} is missing", "copy the whole folder")
    path.mkdir()
    refused(bundle, f"{name} is missing")
    path.rmdir()
    os.mkfifo(path)  # would be read without end
    refused(bundle, f"{name} is missing")


# Damage that the checksum cannot tell, because the manifest was made to match.
FORGED: dict[str, tuple[str, bytes, tuple[str, ...]]] = {
    "graph": ("vision.onnx", b"nothing", ("vision.onnx", "expected fields of ModelProto")),
    "empty graph": ("decoder.onnx", b"", ("decoder.onnx", "expected an IR version")),
    "weights cut": ("vision.data", b"1234", ("vision.onnx", "within the 4 bytes of vision.data")),
    "table": ("embed_tokens.safetensors", b"nothing", ("embed_tokens.safetensors", "export the bundle again")),
    "table with an endless header": ("embed_tokens.safetensors", b"\xff" * 64, ("embed_tokens.safetensors", "table")),
    "tokenizer": ("processor/tokenizer.json", b"{}", ("tokenizer.json", "expected a tokenizer")),
    "tokenizer settings": ("processor/tokenizer_config.json", b"[", ("tokenizer_config.json", "expected")),
    "chat template": ("processor/chat_template.jinja", b"{% {", ("chat_template.jinja", "expected a Jinja template")),
    "not text": ("processor/chat_template.jinja", b"\xff", ("chat_template.jinja", "expected UTF-8")),
}


@pytest.mark.parametrize(("name", "content", "expected"), FORGED.values(), ids=FORGED)
def test_forged_file(name: str, content: bytes, expected: tuple[str, ...], bundle: Path) -> None:
    (bundle / name).write_bytes(content)
    list_file(bundle, name)
    refused(bundle, *expected)


# --- files outside ---


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "..", ".", "", "a/../../b", "a\0b"])
def test_listed_file_outside(name: str, bundle: Path) -> None:
    manifest(lambda m: m["files"].update({name: {"size": 1, "sha256": "0" * 64}}))(bundle)
    refused(bundle, "is not the name of a file in the bundle")


@pytest.mark.parametrize("name", ["vision.data", "processor/tokenizer.json", "vision.onnx"])
def test_link_to_a_file_outside(name: str, bundle: Path, tmp_path: Path) -> None:
    shutil.move(bundle / name, tmp_path / "outside")
    (bundle / name).symlink_to(tmp_path / "outside")
    refused(bundle, repr(name), "outside the bundle")


def test_folder_that_links_outside(bundle: Path, tmp_path: Path) -> None:
    shutil.move(bundle / "processor", tmp_path / "outside")
    (bundle / "processor").symlink_to(tmp_path / "outside")
    refused(bundle, "processor/", "outside the bundle")


def test_links_in_a_circle(bundle: Path) -> None:
    (bundle / "vision.data").unlink()
    (bundle / "vision.data").symlink_to("vision.data")
    refused(bundle, "vision.data")
