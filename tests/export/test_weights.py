"""Recipes, layout and streaming: what a parameter becomes, where it lies, and that tied tables lie once."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor

from flashvlm.bundle import Bundle
from flashvlm.errors import CheckpointError
from flashvlm.graph_check import check_graph
from flashvlm.graph_io import DECODER, is_past
from flashvlm.manifest import EMBEDDINGS
from flashvlm_export.checkpoint import StoredTensor
from flashvlm_export.exporter import ExportOptions, export
from flashvlm_export.weights import stream
from flashvlm_export.weights.layout import ALIGNMENT, Layout, attach, files_of
from flashvlm_export.weights.recipes import Recipe, Stored, plain


def store(path: Path, values: np.ndarray, name: str = "w") -> StoredTensor:
    """A tensor of a checkpoint, behind other bytes."""
    start = path.stat().st_size if path.exists() else 0
    with path.open("ab") as file:
        file.write(values.tobytes())
    return StoredTensor(name, path, start, str(values.dtype), values.shape)


def written(layout: Layout, folder: Path) -> dict[str, bytes]:
    for name, data in layout.files.items():
        spec = stream.write(data, folder / name)
        assert spec.size == data.size == (folder / name).stat().st_size
    return {name: (folder / name).read_bytes() for name in layout.files}


# --- a recipe of several outputs: one scale a channel, and integers -------------------------------------------------


def scales(source: Tensor, out: Tensor) -> None:
    """[rows, columns] -> [rows]"""
    out.copy_(source.float().abs().amax(dim=1) / 127)


def integers(source: Tensor, out: Tensor) -> None:
    """[rows, columns] -> int8, of which the scales make the values again."""
    out.copy_((source.float() / (source.float().abs().amax(dim=1, keepdim=True) / 127)).round())


def int8_recipe(source: StoredTensor) -> Recipe:
    outputs = Stored("int8", source.shape, integers, ".data"), Stored("float32", source.shape[:1], scales, ".scales")
    return Recipe(source, outputs)


def dequantizing(rows: int, columns: int) -> ir.Model:
    """x [n, columns] -> x @ w^T, with w from its int8 data and scales."""
    x, y = ir.val("x", ir.DataType.FLOAT, ["n", columns]), ir.val("y", ir.DataType.FLOAT, ["n", rows])
    data, scale = ir.val("w.data", ir.DataType.INT8, [rows, columns]), ir.val("w.scales", ir.DataType.FLOAT, [rows])
    weight = ir.node("DequantizeLinear", [data, scale], {"axis": 0})
    turned = ir.node("Transpose", weight.outputs, {"perm": [1, 0]})
    product = ir.node("MatMul", [x, turned.outputs[0]], outputs=[y])
    graph = ir.Graph(
        [x], [y], nodes=[weight, turned, product], initializers=[data, scale], name="toy", opset_imports={"": 21}
    )
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_one_parameter_as_several_tensors_that_a_runtime_uses(dtype: str, tmp_path: Path) -> None:
    rows, columns = 96, 130
    values = np.random.default_rng(0).standard_normal((rows, columns)).astype(dtype)
    other = np.arange(5, dtype=dtype)
    checkpoint = tmp_path / "checkpoint"
    layout = Layout()
    before = layout.add("w.data", {"b": plain(store(checkpoint, other, "b"), "float32")})
    places = layout.add("w.data", {"w": int8_recipe(store(checkpoint, values))})
    assert {name: place.stored.dtype for name, place in places.items()} == {"w.data": "int8", "w.scales": "float32"}
    data = written(layout, tmp_path)["w.data"]
    assert all(place.offset % ALIGNMENT == 0 for place in (*before.values(), *places.values()))

    model = dequantizing(rows, columns)
    attach(model.graph, places, tmp_path)
    ir.save(model, tmp_path / "graph.onnx")
    options = onnxruntime.SessionOptions()
    # As it is written: ONNX Runtime would fuse this into a product that rounds x to integers, too.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(tmp_path / "graph.onnx", options, providers=["CPUExecutionProvider"])
    x = np.random.default_rng(1).standard_normal((3, columns)).astype(np.float32)
    (found,) = session.run(None, {"x": x})
    exact = values.astype(np.float32)
    scale = np.abs(exact).max(axis=1) / np.float32(127)  # [rows]
    rounded = np.round(exact / scale[:, None]).astype(np.int8)
    start = places["w.data"].offset
    assert data[start : start + rounded.size] == rounded.tobytes()
    assert np.abs(found - x @ (rounded * scale[:, None]).T).max() < 1e-4
    # Half a step of each weight, over a sum of 130 of them.
    assert np.abs(found - x @ exact.T).max() <= 0.5 * scale.max() * np.abs(x).sum(axis=1).max()


def test_a_tensor_of_one_recipe_is_stored_once(tmp_path: Path) -> None:
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    source = store(tmp_path / "checkpoint", values)
    layout = Layout()
    table = layout.add_safetensors(EMBEDDINGS, "weight", plain(source, "float32"))
    shared = layout.add("decoder.data", {"lm_head": plain(source, "float32")})
    assert shared == {"lm_head": table}
    assert files_of(shared) == (EMBEDDINGS,)
    turned = layout.add("decoder.data", {"head": plain(source, "float32", transpose=True)})
    narrow = layout.add("decoder.data", {"half": plain(source, "float16")})
    assert files_of(turned | narrow | shared) == ("decoder.data", EMBEDDINGS)
    content = written(layout, tmp_path)
    assert content[EMBEDDINGS][table.offset :] == values.tobytes()
    assert content["decoder.data"][: values.nbytes] == values.T.tobytes()
    assert content["decoder.data"][narrow["half"].offset :] == values.astype(np.float16).tobytes()


def test_values_beyond_the_dtype_are_refused(tmp_path: Path) -> None:
    layout = Layout()
    layout.add("w.data", {"w": plain(store(tmp_path / "checkpoint", np.float32([1, 1e30])), "float16")})
    with pytest.raises(CheckpointError, match="w has values beyond float16; export with --dtype bfloat16 or float32"):
        stream.write(layout.files["w.data"], tmp_path / "w.data")


@pytest.mark.parametrize("kind", ["as stored", "turned", "int8"])
def test_memory_is_that_of_the_largest_tensor(kind: str, tmp_path: Path) -> None:
    """Buffers of Python's own: one to read into, and one to hand over. What torch takes on top is the recipe's."""
    checkpoint, layout = tmp_path / "checkpoint", Layout()
    recipes = {
        "as stored": lambda source: plain(source, "float32"),
        "turned": lambda source: plain(source, "float32", transpose=True),
        "int8": int8_recipe,
    }
    size = 16 << 20
    layout.add(
        "w.data",
        {
            f"w{i}": recipes[kind](store(checkpoint, np.ones((1024, n // 4096), np.float32), f"w{i}"))
            for i, n in enumerate((size >> 2, size, size >> 2, size >> 3))
        },
    )
    tracemalloc.start()
    stream.write(layout.files["w.data"], tmp_path / "w.data")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    limit = {"as stored": 3 * stream.BLOCK, "turned": 2 * size + (size >> 2), "int8": size + (size >> 2) + (size >> 4)}
    assert peak <= limit[kind] + (1 << 20)


# --- tied tables ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tied_checkpoint(tiny_gqa_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The awkward checkpoint with its output head tied to the embedding table, as small models have it."""
    import safetensors.torch

    folder = shutil.copytree(tiny_gqa_checkpoint, tmp_path_factory.mktemp("tied") / "tied")
    config = json.loads((folder / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
    (folder / "config.json").write_text(json.dumps(config))
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    del tensors["language_model.lm_head.weight"]
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    return folder


def test_a_tied_table_is_stored_once_and_gives_transformers_logits(tied_checkpoint: Path, tmp_path: Path) -> None:
    from transformers import LlavaForConditionalGeneration

    export(ExportOptions(str(tied_checkpoint), tmp_path / "tied", budgets=()))
    bundle = Bundle(tmp_path / "tied")
    model, graph = bundle.manifest.model, bundle.graph(DECODER)
    assert graph.data == ("decoder.data", EMBEDDINGS)
    table = model.vocab_size * model.hidden_size * 4
    stored = (tied_checkpoint / "model.safetensors").stat().st_size
    files = bundle.manifest.files
    spare = 1 << 20  # headers, pages, and the vision blocks that feed nothing
    assert sum(files[name].size for name in ("vision.data", "decoder.data", EMBEDDINGS)) < stored + spare
    assert files["decoder.data"].size < stored - table

    session = onnxruntime.InferenceSession(bundle.graph_file(DECODER), providers=["CPUExecutionProvider"])
    reference = LlavaForConditionalGeneration.from_pretrained(tied_checkpoint, dtype=torch.float32)
    assert reference.lm_head.weight is reference.get_input_embeddings().weight
    ids = torch.randint(0, 500, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = reference(input_ids=ids).logits[:, -1].numpy()
        embeds = reference.get_input_embeddings()(ids).numpy()
    inputs = {
        "inputs_embeds": embeds,
        "position_ids": np.tile(np.arange(9), (2, 1)),
        "cache_position": np.zeros(2, np.int64),
        "num_tokens": np.full(2, 9),
    }
    sizes = {"batch": 2, "capacity": 16}
    for spec in filter(is_past, graph.inputs):
        inputs[spec.name] = np.zeros([sizes.get(str(d), d) for d in spec.shape], np.float32)
    (logits,) = session.run(["logits"], inputs)
    assert np.abs(logits - expected).max() <= 2e-4
    assert np.array_equal(logits.argmax(-1), expected.argmax(-1))


@pytest.mark.slow
def test_a_table_in_another_dtype_is_stored_beside_the_head(tied_checkpoint: Path, tmp_path: Path) -> None:
    options = ExportOptions(str(tied_checkpoint), tmp_path / "out", budgets=(), embeddings_dtype="float16")
    manifest = export(options).manifest
    dtypes = manifest.model.dtypes
    assert (dtypes.activations, dtypes.weights, dtypes.embeddings) == ("float32", "float32", "float16")
    assert manifest.graphs[DECODER].data == ("decoder.data",)
    table = manifest.model.vocab_size * manifest.model.hidden_size
    assert manifest.files[EMBEDDINGS].size == ALIGNMENT + 2 * table
    header = (tmp_path / "out" / EMBEDDINGS).read_bytes()[8:ALIGNMENT]
    assert json.loads(header)["weight"]["dtype"] == "F16"
    for graph in manifest.graphs.values():
        sizes = {name: manifest.files[name].size for name in graph.data}
        check_graph((tmp_path / "out" / graph.file).read_bytes(), graph.file, sizes)
