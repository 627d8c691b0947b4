"""What is inside an exported bundle: graphs, names, weights, and the selection graph of every method."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn

import checkpoints
from flashvlm.bundle import Bundle, ModelSpec
from flashvlm_export import graphs
from flashvlm_export.dialects import DIALECTS
from flashvlm_export.exporter import ExportOptions, export
from flashvlm_export.onnx_export import fake_weights, trace
from flashvlm_export.selection import METHODS, SelectionParams, select

CHAOTIC = ("flashvlm-published", "vispruner")  # bipartite steps: DESIGN section 3


def load(bundle: Path, name: str) -> onnx.ModelProto:
    return onnx.load(bundle / f"{name}.onnx", load_external_data=False)


@pytest.mark.parametrize("name", ["vision", "select-k5", "decoder", "prefill-k5"])
def test_graphs_are_valid_and_named_by_path(tiny_gqa_bundle: Path, name: str) -> None:
    onnx.checker.check_model(str(tiny_gqa_bundle / f"{name}.onnx"))
    model = load(tiny_gqa_bundle, name)
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)
    assert all(n.startswith(f"/{name}/") for n in names)
    assert {o.domain: o.version for o in model.opset_import}[""] == DIALECTS["modern"].opset
    assert model.producer_name == "flashvlm"


def test_the_manifest_states_what_the_graphs_have(tiny_gqa_bundle: Path) -> None:
    bundle = Bundle(tiny_gqa_bundle)
    for name, spec in bundle.manifest.graphs.items():
        graph = load(tiny_gqa_bundle, name).graph
        for tensors, values in ((spec.inputs, graph.input), (spec.outputs, graph.output)):
            for tensor, value in zip(tensors, values, strict=True):
                shape = tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim)
                dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name
                assert (tensor.name, tensor.dtype, tensor.shape) == (value.name, dtype, shape)


def test_attention_cache_and_norm_are_single_nodes(tiny_gqa_bundle: Path) -> None:
    model = Bundle(tiny_gqa_bundle).manifest.model
    decoder = [node.op_type for node in load(tiny_gqa_bundle, "decoder").graph.node]
    assert decoder.count("Attention") == model.num_layers
    assert decoder.count("TensorScatter") == 2 * model.num_layers
    assert decoder.count("RMSNormalization") == 2 * model.num_layers + 1
    # Weights are stored as MatMul reads them.
    graph = load(tiny_gqa_bundle, "decoder").graph
    initializers = {tensor.name for tensor in graph.initializer}
    assert not [n.name for n in graph.node if n.op_type == "Transpose" and n.input[0] in initializers]
    assert "/decoder/language_model/layers.0/self_attn/Attention" in {n.name for n in graph.node}


def test_saliency_reads_one_row_of_one_block(tiny_gqa_bundle: Path) -> None:
    nodes = load(tiny_gqa_bundle, "vision").graph.node
    softmax = [node.name for node in nodes if node.op_type == "Softmax"]
    blocks = [node.name for node in nodes if node.op_type == "Attention"]
    assert len(softmax) == 1  # block -2 alone; its neighbours' rows were pruned
    assert softmax[0].rpartition("/")[0] == blocks[-1].rpartition("/")[0]


def test_the_score_is_a_local_function_with_attributes(tiny_gqa_bundle: Path) -> None:
    model = load(tiny_gqa_bundle, "select-k5")
    (node,) = [n for n in model.graph.node if n.op_type == graphs.SCORE_OP]
    (function,) = model.functions
    assert (node.domain, function.domain, function.name) == (graphs.DOMAIN, graphs.DOMAIN, graphs.SCORE_OP)
    assert sorted(function.attribute) == sorted(a.name for a in node.attribute)
    assert {a.name: pytest.approx(a.f) for a in node.attribute} == {
        "eta": 0.5, "temperature": 0.004, "pool_temperature": 0.05, "eps": 1e-6
    }  # fmt: skip
    references = {a.ref_attr_name for n in function.node for a in n.attribute if a.ref_attr_name}
    assert references == set(function.attribute)


def test_every_tensor_is_used_once_or_listed(tiny_gqa_checkpoint: Path, tiny_gqa_bundle: Path) -> None:
    manifest = Bundle(tiny_gqa_bundle).manifest
    with (tiny_gqa_checkpoint / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__", None)
    stored = {name: int(np.prod(entry["shape"])) for name, entry in header.items()}
    blocks = {name.split("layers.")[1].split(".")[0] for name in stored if "vision" in name and "layers." in name}
    last = f"encoder.layers.{max(map(int, blocks))}."
    assert set(manifest.unused_tensors) == {n for n in stored if "vision" in n and (last in n or "post_layernorm" in n)}
    placed = {}
    for graph in ("vision", "decoder"):
        for tensor in load(tiny_gqa_bundle, graph).graph.initializer:
            if tensor.external_data:
                placed[tensor.name] = int(np.prod(tensor.dims))
    embedding = [name for name in stored if name.endswith("embed_tokens.weight")]
    unused = [*manifest.unused_tensors, *embedding]
    assert len(placed) == len(stored) - len(unused)
    assert sum(placed.values()) == sum(stored.values()) - sum(stored[name] for name in unused)


@pytest.mark.parametrize("naming", ["transformers5", "module"])
def test_every_naming_of_a_checkpoint_gives_the_same_weights(
    tiny_gqa_bundle: Path, tmp_path: Path, naming: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flashvlm_export import exporter
    from flashvlm_export.checkpoint import open_checkpoint
    from flashvlm_export.families import llava

    folder = checkpoints.write_checkpoint("tiny-gqa", tmp_path / naming, dtype="float32", naming=naming).folder
    reference = checkpoints.write_checkpoint("tiny-gqa", tmp_path / "hub", dtype="float32", naming="hub").folder
    found = []
    for path in (folder, reference):
        checkpoint = open_checkpoint(str(path))
        config = llava.read_config(checkpoint.config)
        with torch.device("meta"):
            model = llava.build(config, torch.float32)
        matched = exporter.match_tensors(llava, model, checkpoint, config)
        found.append(
            {name: tensor.file.read_bytes()[tensor.offset :][: tensor.nbytes] for name, tensor in matched.items()}
        )
    assert found[0] == found[1]


def test_two_exports_are_equal_byte_for_byte(tiny_checkpoint: Path, tmp_path: Path) -> None:
    one, two = (
        export(ExportOptions(model=str(tiny_checkpoint), out=tmp_path / name, budgets=(4,))).manifest
        for name in ("one", "two")
    )
    assert one == two


def select_session(method: str, n: int, d: int, dv: int, k: int, folder: Path) -> onnxruntime.InferenceSession:
    """The selection graph as the exporter makes it, function body and folding included."""
    model = ModelSpec(
        name="x", family="llava", dtype="float32", num_image_tokens=n, image_grid=(1, n), hidden_size=d, num_layers=1,
        num_key_value_heads=1, head_dim=2, vocab_size=3, max_seq=4, image_token_id=0, eos_token_ids=(),
    )  # fmt: skip
    module: nn.Module = graphs.Select(method, k, SelectionParams(seed=5))
    with fake_weights(module) as mode:
        traced = trace(graphs.select_graph(module, "select", k, model, dv), mode, DIALECTS["modern"])
    path = folder / f"{method}.onnx"
    ir.save(traced.model, path)
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("method", METHODS)
def test_onnx_selects_what_torch_selects(method: str, tmp_path: Path) -> None:
    n, d, dv = 49, 33, 21
    k = n if method == "none" else 12
    session = select_session(method, n, d, dv, k, tmp_path)
    generator = torch.Generator().manual_seed(11)
    compared = 0
    for length in (1, 2, 5, 19, 40):
        batch = 40
        inputs = {
            "image_tokens": torch.randn(batch, n, d, generator=generator),
            "features": torch.randn(batch, n, dv, generator=generator),
            "saliency": torch.rand(batch, n, generator=generator),
            "valid": torch.rand(batch, n, generator=generator) < 0.9,
            "query_embeds": torch.randn(batch, length, d, generator=generator),
            "query_mask": torch.rand(batch, length, generator=generator) < 0.8,
        }
        names = {i.name for i in session.get_inputs()}
        found = session.run(None, {name: t.numpy() for name, t in inputs.items() if name in names})
        ordered = [inputs[x] for x in ("image_tokens", "features", "saliency", "query_embeds", "query_mask", "valid")]
        expected = select(*ordered, method=method, budget=k, params=SelectionParams(seed=5))
        visual, kept, is_top, scores = (tensor.numpy() for tensor in expected)
        for b in range(batch):
            if method in CHAOTIC:
                assert found[1][b][found[2][b]].tolist() == kept[b][is_top[b]].tolist()
            else:
                assert found[1][b].tolist() == kept[b].tolist()
                assert np.abs(found[0][b] - visual[b]).max() <= 1e-5
            assert len(set(found[1][b].tolist())) == k
            compared += 1
        assert np.abs(found[3] - scores).max() <= 2e-3  # log-scores down to -14; relevance is divided by 0.004
    assert compared >= 200
