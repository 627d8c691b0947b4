"""An engine against the contract of its graph, whatever varies in it: every graph of a bundle, on the stand-in."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorrt_standin import build, install

from flashvlm.bundle import Bundle
from flashvlm.engines import TITLES, BuildFlags, largest_sizes, matching_engines
from flashvlm.errors import BundleError, FlashVLMError
from flashvlm.graph_io import TensorSpec
from flashvlm.sessions import Backend
from flashvlm.sessions.backends import BACKENDS
from flashvlm.sessions.cuda import Cuda
from flashvlm.sessions.engine import Engine, Scratch

FLAGS = BuildFlags(compute_capabilities=("8.9",), max_seq=64, max_batch=2, max_query=32)


@pytest.fixture
def load(tiny_gqa_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Engine, Cuda]]:
    """load(graph, plan): one engine of a bundle that has every kind of graph."""
    folder = shutil.copytree(tiny_gqa_bundle, tmp_path / "bundle")

    def make(graph: str, **plan: Any) -> tuple[Engine, Cuda]:
        build(folder, plan={graph: plan})
        _, trt = install(monkeypatch)
        bundle, gpu = Bundle(folder, verify=False), Cuda(0)
        engines = matching_engines(bundle, "tensorrt", trt.__version__, "8.9")
        return Engine(trt, gpu, bundle, engines, graph, verify=True), gpu

    return make


@pytest.mark.parametrize("graph", ["vision", "select-k5", "decoder", "prefill-k5"])
def test_every_graph_loads_and_states_its_largest_sizes(graph: str, load: Any) -> None:
    engine, _ = load(graph)
    symbols = {d for spec in (engine.inputs | engine.outputs).values() for d in spec.shape if isinstance(d, str)}
    assert symbols
    assert symbols <= engine.largest.keys()


@pytest.mark.parametrize(("graph", "small"), [("decoder", "max_batch"), ("select-k5", "max_query")])
def test_an_engine_for_smaller_shapes_is_refused(graph: str, small: str, load: Any) -> None:
    with pytest.raises(BundleError, match=r"takes \w+ up to .*, expected .* build it with: flashvlm-compile"):
        load(graph, **{small: 1})


def test_the_parts_of_a_fused_prompt_share_the_capacity(tiny_gqa_bundle: Path) -> None:
    sizes = largest_sizes(Bundle(tiny_gqa_bundle, verify=False), "prefill-k5", FLAGS)
    assert sizes["prefix"] + 5 + sizes["suffix"] == FLAGS.max_seq


def test_a_longer_suffix_than_built_for_is_refused(load: Any) -> None:
    """There is no option for it, so none is named."""
    engine, gpu = load("prefill-k5")
    sizes = engine.largest | {"batch": 1, "suffix": engine.largest["suffix"] + 1}
    context = engine.context(Scratch(gpu))
    with pytest.raises(FlashVLMError, match=rf"suffix of {sizes['suffix']}: .* takes up to \d+; ask for less$"):
        context._check_range(sizes)


def test_a_symbol_without_a_largest_size_is_refused(tiny_gqa_bundle: Path) -> None:
    """A manifest that is validated has none; a graph of a later version may."""
    bundle = Bundle(tiny_gqa_bundle, verify=False)
    graph = bundle.graph("vision")
    odd = TensorSpec.model_construct(name="pixel_values", dtype="float32", shape=("frames", 3))
    graphs = {"vision": graph.model_copy(update={"inputs": (odd,)})}
    bundle.manifest = bundle.manifest.model_copy(update={"graphs": graphs})
    with pytest.raises(FlashVLMError, match=r"vision.onnx: pixel_values varies in frames, .* --backend onnxruntime"):
        largest_sizes(bundle, "vision", FLAGS)


def test_every_backend_has_a_title() -> None:
    assert {*BACKENDS} - {"auto"} == {*TITLES}
    assert str(Backend("tensorrt-rtx", "1.7", "cuda:0")) == "TensorRT-RTX 1.7, cuda:0"
