"""What is read lies in the bundle, or in the Hub's cache of it, is listed, and is what was verified."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flashvlm import FlashVLMError, Pipeline
from flashvlm.bundle import Bundle
from flashvlm.cli import run as cli
from flashvlm.embeddings import EmbeddingTable
from flashvlm.errors import BundleError
from flashvlm.files import sha256
from refusals import Ran, assert_refused, copy_of, run

QUESTION = ("--prompt", "What is it?", "--max-new-tokens", "2")
IMAGE = np.full((60, 60, 3), 90, dtype=np.uint8)


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    return copy_of(tiny_bundle, tmp_path, "bundle")


def ask(folder: Path) -> Ran:
    picture = folder.parent / "asked.png"
    Image.new("RGB", (30, 30)).save(picture)
    return run(cli.main, folder, *QUESTION, "--image", picture)


def hub_snapshot(bundle: Path, cache: Path, inside: str = "") -> Path:
    """The bundle as huggingface_hub keeps it: every file a link to a blob of its repository."""
    repository = cache / "models--owner--name"
    blobs = repository / "blobs"
    blobs.mkdir(parents=True)
    snapshot = repository / "snapshots" / "0123abcd" / inside
    for path in sorted(p for p in bundle.rglob("*") if p.is_file()):
        link = snapshot / path.relative_to(bundle)
        link.parent.mkdir(parents=True, exist_ok=True)
        blob = blobs / sha256(path)
        shutil.copy(path, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


# --- the Hub's cache ---


@pytest.mark.parametrize("inside", ["", "int4"])
def test_a_snapshot_in_the_hub_cache_answers(inside: str, bundle: Path, tmp_path: Path) -> None:
    snapshot = hub_snapshot(bundle, tmp_path / "hub", inside)
    expected = Pipeline.from_bundle(bundle).generate(IMAGE, "What is it?", max_new_tokens=4)
    found = Pipeline.from_bundle(snapshot).generate(IMAGE, "What is it?", max_new_tokens=4)
    assert found.token_ids == expected.token_ids
    assert (found.kept == expected.kept).all()


def test_a_snapshot_compiles(tiny_gqa_half_bundle: Path, tmp_path: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    from flashvlm_export.compile.builder import _pinned

    snapshot = Bundle(hub_snapshot(tiny_gqa_half_bundle, tmp_path / "hub"))
    logger = trt.Logger(trt.Logger.ERROR)
    network = trt.Builder(logger).create_network(0)
    path = snapshot.graph_file("decoder")
    assert trt.OnnxParser(network, logger).parse(_pinned(path, 64), str(path))


@pytest.mark.parametrize("name", ["vision.data", "bundle.json", "processor/tokenizer.json"])
def test_a_snapshot_with_a_link_elsewhere(name: str, bundle: Path, tmp_path: Path) -> None:
    """Into another repository's blobs, a folder of the blobs, or out of the cache."""
    snapshot = hub_snapshot(bundle, tmp_path / "hub")
    blobs = tmp_path / "hub" / "models--owner--name" / "blobs"
    content = (snapshot / name).read_bytes()
    for place in (tmp_path / "hub" / "models--other--name" / "blobs", blobs / "sub", tmp_path):
        place.mkdir(parents=True, exist_ok=True)
        (place / "blob").write_bytes(content)
        (snapshot / name).unlink()
        (snapshot / name).symlink_to(place / "blob")
        assert_refused(ask(snapshot), "outside the bundle")


def test_blobs_that_are_a_link_themselves(bundle: Path, tmp_path: Path) -> None:
    snapshot = hub_snapshot(bundle, tmp_path / "hub")
    blobs = tmp_path / "hub" / "models--owner--name" / "blobs"
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    assert_refused(ask(snapshot), "outside the bundle")


def test_a_folder_that_only_looks_like_a_snapshot(bundle: Path, tmp_path: Path) -> None:
    """In a folder of any name, ``../../blobs`` may be somebody's own."""
    snapshot = hub_snapshot(bundle, tmp_path / "hub")
    (tmp_path / "hub" / "models--owner--name").rename(tmp_path / "hub" / "downloads")
    assert_refused(ask(tmp_path / "hub" / "downloads" / "snapshots" / snapshot.name), "outside the bundle")


# --- other links, and what is not listed ---


@pytest.mark.parametrize("name", ["bundle.json", "processor/chat_template.jinja", "select-k4.onnx", "vision.data"])
def test_a_link_out_of_the_bundle(name: str, bundle: Path, tmp_path: Path) -> None:
    shutil.move(bundle / name, tmp_path / "outside")
    (bundle / name).symlink_to(tmp_path / "outside")
    assert_refused(ask(bundle), repr(name), "is a link to", "outside the bundle")


def test_a_link_within_the_bundle(bundle: Path) -> None:
    (bundle / "vision.data").rename(bundle / "renamed.data")
    (bundle / "vision.data").symlink_to("renamed.data")
    assert ask(bundle).code == 0


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_a_processor_that_is_not_listed(name: str, bundle: Path) -> None:
    """Or its content would never be verified."""
    content = json.loads((bundle / "bundle.json").read_text())
    del content["files"][f"processor/{name}"]
    (bundle / "bundle.json").write_text(json.dumps(content))
    assert_refused(ask(bundle), f"uses 'processor/{name}', which files does not list")


def test_what_is_not_listed_is_not_read(bundle: Path) -> None:
    os.mkfifo(bundle / "processor" / "special_tokens_map.json")  # would be read without end
    assert ask(bundle).code == 0
    with pytest.raises(BundleError, match="is not part of this bundle"):
        Bundle(bundle).read("processor/special_tokens_map.json")


@pytest.mark.parametrize("location", ["../outside.data", "/etc/passwd", "link.data", "decoder.data", ""])
def test_weights_that_the_manifest_does_not_give_to_the_graph(location: str, bundle: Path, tmp_path: Path) -> None:
    """Neither ONNX Runtime nor a parser of TensorRT, which follows any of these, sees such a file."""
    onnx = pytest.importorskip("onnx")
    shutil.copy(bundle / "vision.data", tmp_path / "outside.data")
    (bundle / "link.data").symlink_to(tmp_path / "outside.data")
    model = onnx.load(bundle / "vision.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            entry.value = location if entry.key == "location" else entry.value
    onnx.save(model, bundle / "vision.onnx")
    content = json.loads((bundle / "bundle.json").read_text())
    path = bundle / "vision.onnx"
    content["files"]["vision.onnx"] = {"size": path.stat().st_size, "sha256": sha256(path)}
    (bundle / "bundle.json").write_text(json.dumps(content))
    assert_refused(ask(bundle), "vision.onnx", "export the bundle again")
    with pytest.raises(BundleError, match=r"vision\.onnx"):
        Bundle(bundle).graph_file("vision")


# --- what changes after it was verified ---


def test_a_graph_that_changes_before_it_is_loaded(bundle: Path) -> None:
    """Graphs load when first used: the one of another budget may do so long after the bundle was opened."""
    pipeline = Pipeline.from_bundle(bundle)
    pipeline.generate(IMAGE, "What is it?", budget=4, max_new_tokens=1)
    content = (bundle / "select-k7.onnx").read_bytes()
    (bundle / "select-k7.onnx").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(BundleError, match=r"select-k7\.onnx was edited after export"):
        pipeline.generate(IMAGE, "What is it?", budget=7, max_new_tokens=1)
    (bundle / "select-k7.onnx").write_bytes(content)  # the same again, with other times: verified anew
    assert pipeline.generate(IMAGE, "What is it?", budget=7, max_new_tokens=1).image_tokens == 7


def test_weights_that_change_while_they_are_loaded(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    real = onnxruntime.InferenceSession

    def slow(path: Path, *arguments: object, **more: object) -> object:
        session = real(path, *arguments, **more)
        (bundle / "vision.data").write_bytes(bytes((bundle / "vision.data").stat().st_size))
        return session

    pipeline = Pipeline.from_bundle(bundle)
    monkeypatch.setattr(onnxruntime, "InferenceSession", slow)
    with pytest.raises(BundleError, match=r"vision\.data was edited after export"):
        pipeline.generate(IMAGE, "What is it?", max_new_tokens=1)


def test_a_file_swapped_for_a_link(bundle: Path, tmp_path: Path) -> None:
    pipeline = Pipeline.from_bundle(bundle)
    (bundle / "vision.onnx").rename(tmp_path / "outside")
    (bundle / "vision.onnx").symlink_to(tmp_path / "outside")
    with pytest.raises(BundleError, match="outside the bundle"):
        pipeline.generate(IMAGE, "What is it?", max_new_tokens=1)


def test_a_table_cut_short_while_in_use(bundle: Path) -> None:
    """Of a memory map, this would end the process."""
    pipeline = Pipeline.from_bundle(bundle)
    os.truncate(bundle / "embed_tokens.safetensors", 200)
    with pytest.raises(FlashVLMError, match="ended early: it was cut while in use"):
        pipeline.generate(None, "What is it?", max_new_tokens=1)


def test_rows_of_the_table(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(13, 7)).astype(np.float16)
    header = json.dumps({"weight": {"dtype": "F16", "shape": [13, 7], "data_offsets": [0, values.nbytes]}}).encode()
    path = tmp_path / "table.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + values.tobytes())
    table = EmbeddingTable(path, 13, 7)
    ids = np.array([12, 0, 5, 5])
    assert np.array_equal(table[ids], values[ids])
    assert table[np.array([], dtype=np.int64)].shape == (0, 7)
    for beyond in (13, -1):
        with pytest.raises(BundleError, match="is beyond its 13 rows"):
            table[[beyond]]


@pytest.mark.parametrize("raw", [b"caf\xe9", b"\xff\xfe", b"a\x1b[31mb"], ids=repr)
def test_paths_that_are_no_utf_8(raw: bytes, bundle: Path, tmp_path: Path) -> None:
    place = os.fsdecode(os.fsencode(tmp_path) + b"/" + raw)
    os.rename(bundle, place)
    ran = ask(Path(place))
    assert "\x1b" not in ran.stderr
    if raw.startswith(b"a"):
        assert ran.code == 0, ran
    else:
        assert_refused(ran, "ONNX Runtime takes no path that is not UTF-8", "rename")
