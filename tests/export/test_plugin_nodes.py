"""The selection's two nodes as TensorRT plugins: what flashvlm-compile --plugins gives the parser.

TENSORRT_ROOT: folders of TensorRT's headers, separated by colons; the first builds the library for the registry tests.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

from flashvlm.engines import BuildFlags, EngineManifest, PluginSpec
from flashvlm.errors import FlashVLMError
from flashvlm_export.cli.compile import main
from flashvlm_export.compile import plugin_nodes
from flashvlm_export.compile.plugin_nodes import DOMAIN, LLOYD_OP, MASKS, SCORE_OP, VERSION, for_plugins
from refusals import assert_refused, run

PLUGINS = Path(__file__).resolve().parents[2] / "plugins"
KINDS = ("tiny_gqa", "tiny_gqa_legacy", "tiny_gqa_half")


def graph(request: pytest.FixtureRequest, kind: str, name: str = "select-k5") -> onnx.ModelProto:
    return onnx.load(request.getfixturevalue(f"{kind}_bundle") / f"{name}.onnx", load_external_data=False)


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


def fields(source: str) -> dict[str, str]:
    """Attributes a plugin reads, and whether as number or integer, from its C++ source."""
    text = (PLUGINS / "tensorrt" / source).read_text(encoding="utf-8")
    return {name: kind for kind, name in re.findall(r'reader\.(number|integer)\("(\w+)"', text)}


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_selection_is_two_nodes_and_a_gather(kind: str, request: pytest.FixtureRequest) -> None:
    model = graph(request, kind)
    onnx.checker.check_model(model)
    operators = [node.op_type for node in model.graph.node]
    assert operators == [SCORE_OP, LLOYD_OP, "Cast", "Cast", "Unsqueeze", "Expand", "GatherElements"]
    assert {(f.domain, f.name) for f in model.functions} == {(DOMAIN, SCORE_OP), (DOMAIN, LLOYD_OP)}
    # TensorRT before 10.8 mistakes a value of a body for one outside of that name.
    for function in model.functions:
        inner = {*function.input, *(name for node in function.node for name in node.output)}
        assert all(name.startswith(f"{function.name}/") for name in inner)


@pytest.mark.parametrize("kind", KINDS)
def test_plugin_nodes_have_what_the_creators_read(kind: str, request: pytest.FixtureRequest) -> None:
    model = graph(request, kind)
    assert for_plugins(model) == 2
    onnx.checker.check_model(model)
    assert not model.functions
    made = {name: node for node in model.graph.node for name in node.output}
    sources = {SCORE_OP: "text_guided_score.cpp", LLOYD_OP: "masked_lloyd.cpp"}
    nodes = {node.op_type: node for node in model.graph.node if node.domain == DOMAIN}
    assert set(nodes) == set(sources)
    for name, node in nodes.items():
        found = attributes(node)
        assert (found.pop("plugin_namespace"), found.pop("plugin_version")) == (DOMAIN.encode(), VERSION.encode())
        kinds = {float: "number", int: "integer"}
        assert {key: kinds[type(value)] for key, value in found.items()} == fields(sources[name])
        for i in MASKS[name]:
            cast = made[node.input[i]]
            assert (cast.op_type, attributes(cast)["to"]) == ("Cast", onnx.TensorProto.INT32)
    assert attributes(nodes[LLOYD_OP])["budget"] == 5
    assert attributes(nodes[LLOYD_OP])["top_count"] == 2
    # int32 indices and flags become what the bundle's contract has, at the border.
    casts = {node.output[0]: attributes(node)["to"] for node in model.graph.node if node.op_type == "Cast"}
    assert (casts["kept"], casts["is_top"]) == (onnx.TensorProto.INT64, onnx.TensorProto.BOOL)
    names = {*casts, *(i.name for i in model.graph.input)}
    assert {"valid/int32", "query_mask/int32"} <= names


def test_the_fused_graph_has_them_too(request: pytest.FixtureRequest) -> None:
    model = graph(request, "tiny_gqa", "prefill-k5")
    assert for_plugins(model) == 2
    assert not [f for f in model.functions if f.domain == DOMAIN]
    assert for_plugins(graph(request, "tiny_gqa", "decoder")) == 0


def test_a_partition_of_projected_tokens_reads_those() -> None:
    from flashvlm_export.graph.dialects import DIALECTS
    from flashvlm_export.graph.trace import fake_weights, trace
    from flashvlm_export.selection import SelectionParams
    from flashvlm_export.testing.graphs import selection_graph

    select = selection_graph("flashvlm", 5, SelectionParams(partition_space="projected"), 9, 16, 8)
    with fake_weights(select.module) as mode:
        model = trace(select, mode, DIALECTS["legacy"]).model
    (node,) = [node for node in model.graph if node.op_type == LLOYD_OP]
    assert [value.name for value in node.inputs if value] == ["image_tokens", "scores", "valid"]


def test_onnxruntime_runs_the_bodies_and_knows_no_plugin_node(request: pytest.FixtureRequest) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    import torch

    from flashvlm_export.selection import select

    model = graph(request, "tiny_gqa")
    shapes = {i.name: [d.dim_value for d in i.type.tensor_type.shape.dim] for i in model.graph.input}
    generator = np.random.default_rng(0)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for _ in range(20):
        feed = {name: generator.standard_normal([s or 3 for s in shape], np.float32) for name, shape in shapes.items()}
        feed |= {name: feed[name] > -1 for name in ("valid", "query_mask")}
        kept, is_top = session.run(["kept", "is_top"], feed)
        x = {name: torch.from_numpy(value) for name, value in feed.items()}
        wanted = select(
            x["image_tokens"], x["features"], x["saliency"], x["query_embeds"], x["query_mask"], x["valid"], budget=5
        )
        assert np.array_equal(kept, wanted.kept.numpy())
        assert np.array_equal(is_top, wanted.is_top.numpy())
    for_plugins(model)
    with pytest.raises(Exception, match=r"TextGuidedScore|MaskedLloyd"):
        onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


# --- the compiler's side -------------------------------------------------------------------------------------------


def test_a_parser_without_the_plugins_refuses_by_name(tiny_gqa_half_bundle: Path, tmp_path: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    from flashvlm.bundle import Bundle
    from flashvlm_export.compile.builder import build_engine

    bundle = Bundle(tiny_gqa_half_bundle)
    flags = BuildFlags(compute_capabilities=("8.9",), max_seq=128, max_batch=1, max_query=64)
    with pytest.raises(
        FlashVLMError, match=r"cannot take select-k5.onnx: TextGuidedScore \(.*Plugin not found.*Masked"
    ):
        build_engine(trt, bundle, "select-k5", flags, None, tmp_path / "x", lambda *_: lambda _: None, to_plugins=True)
    assert not (tmp_path / "x").exists()


def test_tensorrt_rtx_takes_no_plugins(tiny_gqa_half_bundle: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    rtx = ("--target", "tensorrt-rtx", "--compute-capability", "8.9", "--max-seq", "128")
    assert_refused(run(main, tiny_gqa_half_bundle, *rtx, "--plugins", "x.so"), "TensorRT-RTX runs no plugin layers")
    assert not (tiny_gqa_half_bundle / "engines").exists()


class Registry:
    """Stands in for TensorRT's where it is not installed: knows the plugins it is told of."""

    def __init__(self, *known: str) -> None:
        self.known, self.loaded = known, []

    def load_library(self, path: str) -> object:
        self.loaded.append(path)
        return object() if self.known else None

    def get_creator(self, name: str, version: str, namespace: str) -> object:
        return object() if name in self.known and (version, namespace) == (VERSION, DOMAIN) else None


def stand_in(*known: str) -> Any:
    registry = Registry(*known)
    return SimpleNamespace(__name__="tensorrt", registry=registry, get_plugin_registry=lambda: registry)


def test_the_library_is_loaded_and_recorded(tiny_gqa_half_bundle: Path, tmp_path: Path) -> None:
    from flashvlm.bundle import Bundle
    from flashvlm.files import sha256

    library = tmp_path / "libflashvlm_plugins.so"
    library.write_bytes(b"a library")
    bundle = Bundle(tiny_gqa_half_bundle)
    flags = BuildFlags(compute_capabilities=("8.7",), max_seq=128, max_batch=1, max_query=64)
    trt = stand_in(SCORE_OP, LLOYD_OP)
    found = plugin_nodes.load(library, bundle, flags, trt)
    assert found == PluginSpec(file=library.name, sha256=sha256(library))
    assert trt.registry.loaded == [str(library)]
    old = EngineManifest(target="tensorrt", version="10.3.0", flags=flags, engines={})
    assert old.plugins == ()
    assert EngineManifest.model_validate_json(old.model_dump_json(exclude={"plugins"})) == old
    for refused, expected in (
        ((library, flags, stand_in()), "does not load"),
        ((library, flags, stand_in(SCORE_OP)), "has no flashvlm::MaskedLloyd version 1"),
        ((tmp_path / "none.so", flags, trt), "no such file; build it with: cmake"),
        ((library, flags.model_copy(update={"max_query": 1024, "max_seq": 2048}), trt), "--max-query 1024"),
    ):
        with pytest.raises(FlashVLMError, match=re.escape(expected)):
            plugin_nodes.load(refused[0], bundle, refused[1], refused[2])
    other = bundle.manifest.selection.model_copy(update={"method": "divprune"})
    bundle.manifest = bundle.manifest.model_copy(update={"selection": other})
    with pytest.raises(FlashVLMError, match="has method divprune, for which there is no plugin"):
        plugin_nodes.load(library, bundle, flags, trt)


def test_trtexec_is_given_the_library_of_the_engines(tiny_gqa_half_bundle: Path, tmp_path: Path) -> None:
    from flashvlm.bundle import Bundle
    from flashvlm.engines import Engines, EngineSpec
    from flashvlm.profiling.trtexec import Job, Libraries, command

    bundle = Bundle(tiny_gqa_half_bundle)
    flags = BuildFlags(compute_capabilities=("8.7",), max_seq=128, max_batch=1, max_query=64)
    digest = "0" * 64
    spec = EngineSpec(
        file="vision.engine", size=1, sha256=digest, onnx_sha256=digest, data_sha256=(), build_seconds=1, peak_rss=1
    )
    (tmp_path / "vision.engine").touch()
    library = PluginSpec(file="libflashvlm_plugins.so", sha256=digest)
    manifest = EngineManifest(
        target="tensorrt", version="10.13.0", flags=flags, engines={"vision": spec}, plugins=(library,)
    )
    engines = Engines(bundle, tmp_path, manifest, "8.7")
    call = (bundle, Job("vision", "vision", None, "vision", {"batch": 1}), engines, "tensorrt")
    with pytest.raises(FlashVLMError, match=r"calls libflashvlm_plugins.so; name it with: flashvlm-profile --plugins"):
        command(*call, tmp_path, 1)
    assert "--dynamicPlugins=x.so" in command(*call, tmp_path, 1, libraries=Libraries(dynamic=(Path("x.so"),)))


PARSE = """
import sys, onnx, tensorrt_rtx as trt
from pathlib import Path
from flashvlm_export.compile.plugin_nodes import for_plugins, register
register(Path(sys.argv[2]), trt)
model = onnx.load(sys.argv[1])
if sys.argv[3] == "plugins":
    for_plugins(model)
logger = trt.Logger(trt.Logger.INFO)
network = trt.Builder(logger).create_network(0)
print("parsed", trt.OnnxParser(network, logger).parse(model.SerializeToString()), flush=True)
"""


def test_the_real_parser_creates_the_plugins_from_the_nodes(
    tiny_gqa_half_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """TensorRT-RTX's parser finds the creator by our attributes and makes the plugin; then it ends the process, as it
    has no plugin layers. With the bodies in place it takes those, plugins or not."""
    pytest.importorskip("tensorrt_rtx")
    root = os.environ.get("TENSORRT_ROOT", "").split(os.pathsep)[0]
    if not root:
        pytest.skip("TENSORRT_ROOT is not set: no TensorRT headers to compile with")
    if shutil.which("nvcc") is None or shutil.which("cmake") is None:
        pytest.skip("no nvcc or no cmake on PATH")
    build = tmp_path_factory.mktemp("plugins")
    options = (f"-DTENSORRT_ROOT={root}", "-DCMAKE_CUDA_ARCHITECTURES=87")
    for command in (["cmake", "-S", PLUGINS, "-B", build, *options], ["cmake", "--build", build]):
        subprocess.run(command, check=True, capture_output=True)

    def parse(how: str) -> str:
        arguments = (tiny_gqa_half_bundle / "select-k5.onnx", build / "libflashvlm_plugins.so", how)
        done = subprocess.run([sys.executable, "-c", PARSE, *arguments], capture_output=True, text=True, check=False)
        return done.stdout + done.stderr

    said = parse("plugins")
    assert "Successfully created plugin: TextGuidedScore" in said, said
    assert "attribute" not in [line for line in said.splitlines() if "flashvlm::" in line]
    said = parse("bodies")
    assert "parsed True" in said, said
    assert "created plugin" not in said
