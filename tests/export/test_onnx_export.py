"""What is inside an exported bundle: graphs, names, weights, and the selection graph of every method."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from flashvlm.bundle import Bundle
from flashvlm_export.exporter import ExportOptions, export
from flashvlm_export.graph import modules as graphs
from flashvlm_export.graph import torch_export
from flashvlm_export.graph.dialects import DIALECTS
from flashvlm_export.selection import SelectionParams
from flashvlm_export.testing import checkpoints


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


@pytest.mark.parametrize(("method", "eta"), [("flashvlm", 1.0), ("divprune", 0.5)])
def test_saliency_that_nothing_reads_is_not_computed(
    method: str, eta: float, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flashvlm_export import exporter

    options = ExportOptions(str(tiny_checkpoint), Path("none"), (4,), method=method, params=SelectionParams(eta=eta))
    whole = exporter._graphs
    monkeypatch.setattr(exporter, "_graphs", lambda *args: [g for g in whole(*args) if g.name == "vision"])
    model = exporter.open_model(options)
    source = exporter.match_tensors(model.family, model.module, model.checkpoint, model.config)
    traced = exporter._trace(model, source, options, exporter.NoProgress())["vision"].model
    assert not [node for node in traced.graph if node.op_type == "Softmax"]
    assert [value.name for value in traced.graph.outputs] == ["image_tokens", "features", "saliency"]


def test_the_score_is_a_local_function_with_attributes(tiny_gqa_bundle: Path) -> None:
    model = load(tiny_gqa_bundle, "select-k5")
    (node,) = [n for n in model.graph.node if n.op_type == graphs.SCORE_OP]
    (function,) = [f for f in model.functions if f.name == graphs.SCORE_OP]
    assert (node.domain, function.domain, function.name) == (graphs.DOMAIN, graphs.DOMAIN, graphs.SCORE_OP)
    assert sorted(function.attribute) == sorted(a.name for a in node.attribute)
    assert {a.name: pytest.approx(a.f) for a in node.attribute} == {
        "eta": 0.5, "temperature": 0.016, "pool_temperature": 1.0, "eps": 1e-6
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


# One selection graph tells as much as two; the slow tier exports all that tiny_bundle has.
@pytest.mark.parametrize("budgets", [(4,), pytest.param((4, 7), marks=pytest.mark.slow)], ids=str)
def test_two_exports_are_equal_byte_for_byte(
    budgets: tuple[int, ...], tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"budgets": budgets, "query": "prompt", "positions": "keep"}  # those of tiny_bundle
    again = export(ExportOptions(model=str(tiny_checkpoint), out=tmp_path / "again", **options)).manifest
    first = Bundle(tiny_bundle).manifest
    if budgets == (4, 7):
        assert again == first
    assert {*first.files} - {*again.files} == {f"select-k{budget}.onnx" for budget in {4, 7} - {*budgets}}
    differ = {name for name, file in again.files.items() if file != first.files[name]}
    assert differ <= {"README.md"}  # which names the budgets


def test_torch_reads_its_operators_once_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where this fails, torch has moved what is private to it, and exports take longer: see torch_export."""
    owner, theirs, _ = torch_export._registry()
    with torch_export._one_registry():
        assert owner().from_torchlib(opset_version=24) is owner().from_torchlib(opset_version=24)
        assert owner.from_torchlib(opset_version=20).opset_version == 20
    assert owner.__dict__["from_torchlib"] is theirs
    monkeypatch.setitem(sys.modules, owner.__module__, None)
    monkeypatch.setattr(torch_export, "_registry", torch_export._registry.__wrapped__)
    with torch_export._one_registry():
        assert owner.__dict__["from_torchlib"] is theirs
