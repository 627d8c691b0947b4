"""flashvlm-compile with the real TensorRT-RTX compiler, which builds without a GPU."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import onnx
import pytest

from flashvlm.engines import BuildFlags, read_manifest
from flashvlm.errors import FlashVLMError
from flashvlm.extras import install
from flashvlm.files import sha256
from flashvlm_export.cli.compile import main
from flashvlm_export.compile import builder, engines
from flashvlm_export.compile.engines import CompileOptions, compile_bundle
from flashvlm_export.exporter import ExportOptions, export
from refusals import assert_refused, run

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed; pip install 'flashvlm[tensorrt-rtx]'")

RTX = ("--target", "tensorrt-rtx", "--compute-capability", "8.9", "--max-seq", "128")


def built(bundle: Path, **options: Any) -> Any:
    settings: dict[str, Any] = {"target": "tensorrt-rtx", "compute_capabilities": ("8.9",), "max_seq": 128}
    return compile_bundle(CompileOptions(bundle=bundle, **(settings | options)))


@pytest.fixture
def half(tiny_gqa_half_bundle: Path, tmp_path: Path) -> Path:
    """A float16 bundle of one's own, without engines."""
    return shutil.copytree(tiny_gqa_half_bundle, tmp_path / "bundle")


@pytest.fixture
def legacy(tiny_gqa_legacy_bundle: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_gqa_legacy_bundle, tmp_path / "legacy")


@pytest.mark.parametrize("kind", ["half", "legacy"])  # bfloat16 is in the slow tier
def test_every_graph_becomes_an_engine(kind: str, request: pytest.FixtureRequest) -> None:
    bundle: Path = request.getfixturevalue(kind)
    report = built(bundle, compute_capabilities=("8.0", "8.6", "8.9", "12.0", "12.1"))
    manifest = read_manifest(report.folder)
    assert set(manifest.engines) == set(json.loads((bundle / "bundle.json").read_text())["graphs"])
    for name, spec in manifest.engines.items():
        path = report.folder / spec.file
        assert (path.stat().st_size, sha256(path)) == (spec.size, spec.sha256), name
        assert spec.build_seconds >= 0
        assert spec.peak_rss > 0
    assert report.folder.name.startswith("tensorrt-rtx-")
    assert not [p for p in report.folder.parent.iterdir() if p.name.startswith(".")]


@pytest.fixture(params=["copied", pytest.param("built", marks=pytest.mark.slow)])
def remembered(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In the fast tier, the engine of each graph is built once and then copied: for tests of which ones are built."""
    if request.param == "built":
        return
    real, made = engines.build_engine, {}

    def build(trt: ModuleType, bundle: Any, name: str, flags: BuildFlags, cache: Any, out: Path, *how: Any) -> Any:
        kept = tmp_path / f"{name}.made"
        if name not in made:
            made[name] = real(trt, bundle, name, flags, cache, out, *how)
            shutil.copy2(out, kept)
        shutil.copy2(kept, out)
        return made[name]

    monkeypatch.setattr(engines, "build_engine", build)


@pytest.mark.usefixtures("remembered")
def test_a_second_run_reuses_what_still_matches(half: Path) -> None:
    first = built(half)
    again = built(half)
    assert (first.reused, set(again.reused)) == ((), {"vision", "decoder", "select-k5", "prefill-k5"})
    assert again.manifest == first.manifest
    assert built(half, max_seq=64).reused == ()  # another capacity is another engine
    engine = again.folder / "vision.engine"
    built(half)
    engine.write_bytes(b"\0" * engine.stat().st_size)
    assert set(built(half).reused) == {"decoder", "select-k5", "prefill-k5"}
    assert built(half, force=True).reused == ()


COMPILE = """
import sys
from flashvlm.files import sha256
from flashvlm_export.cli.compile import main
from flashvlm_export.compile import engines

real, wanted = engines.build_engine, sys.argv.pop(1).split(",")

def build(trt, bundle, name, flags, cache, out, *how):
    if name in wanted:
        return real(trt, bundle, name, flags, cache, out, *how)
    out.touch()
    return 0, sha256(out)

engines.build_engine = build
main()
"""


# One graph shows how two processes share a cache; the slow tier builds all.
@pytest.mark.parametrize(
    "graphs", ["vision", pytest.param("vision,select-k5,decoder,prefill-k5", marks=pytest.mark.slow)]
)
def test_the_timing_cache_survives_two_builds_at_once(graphs: str, half: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache" / "timing"
    other = shutil.copytree(half, tmp_path / "other")
    command = [sys.executable, "-c", COMPILE, graphs, *RTX, "--timing-cache", str(cache)]
    runs = [subprocess.Popen([*command, str(bundle)], stderr=subprocess.PIPE) for bundle in (half, other)]
    assert [process.wait(120) for process in runs] == [0, 0]
    assert cache.stat().st_size > 0
    subprocess.run([*command, str(half), "--force"], check=True, stderr=subprocess.PIPE)
    assert not cache.with_name("timing.partial").exists()


def in_its_own_process(bundle: Path, *flags: str) -> str:
    """What a failing build prints: TensorRT-RTX 1.7 keeps the target of a failed build for later ones of a process."""
    command = [sys.executable, "-m", "flashvlm_export.cli.compile", str(bundle), *RTX, *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert not (bundle / "engines").exists()
    return done.stderr.splitlines()[-1]


def test_turing_has_no_float32_products(half: Path) -> None:
    """The selection scores in float32, for which TensorRT-RTX 1.7 has no product on compute capability 7.5."""
    message = in_its_own_process(half, "--compute-capability", "7.5")
    assert re.search(r"failed to build select-k5.onnx: .*FP32 GEMM is not supported", message)


@pytest.mark.skipif(Path("/proc/driver/nvidia").exists(), reason="with a GPU the compiler strips weights")
def test_stripping_weights_without_a_gpu_is_refused(half: Path) -> None:
    assert "stripping weights needs a GPU" in in_its_own_process(half, "--strip-weights")


def test_compiling_never_imports_torch(half: Path) -> None:
    code = f"""
import sys
sys.argv = ["flashvlm-compile", {str(half)!r}, *{RTX!r}]
from flashvlm_export.cli.compile import main
from flashvlm_export.compile import builder
try:
    main()
except SystemExit as stop:
    assert stop.code == 0
assert not {{"torch", "transformers", "onnxruntime"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "decoder" in done.stdout


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--target", "tensorrt-rtx"), "--compute-capability is needed"),
        (("--target", "tensorrt-rtx", "--compute-capability", "9"), "expected major.minor"),
        (("--target", "tensorrt-rtx", "--compute-capability", "3.5"), "builds for 7.5"),
        ((*RTX, "--max-seq", "1"), "--max-seq 1: expected 2 to"),
        ((*RTX, "--max-seq", "100000"), "the capacity of"),
        ((*RTX, "--max-batch", "0"), "expected 1 to 1024"),
        ((*RTX, "--version-compatible"), "leave that option out"),
        (("--target", "onnx"), "onnx"),
        (("--optimization-level", "9"), "--optimization-level"),
    ],
)
def test_options_are_refused(half: Path, flags: tuple[str, ...], expected: str) -> None:
    assert_refused(run(main, half, *flags), expected)
    assert not (half / "engines").exists()


def test_a_missing_compiler_is_refused_with_its_install_line(half: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert_refused(run(main, half), install("tensorrt"))


def test_float32_attention_is_refused_before_the_build(tiny_gqa_bundle: Path) -> None:
    assert_refused(
        run(main, tiny_gqa_bundle, *RTX), "export with --dtype float16 or bfloat16, or with --dialect legacy"
    )
    assert not (tiny_gqa_bundle / "engines").exists()


def test_a_graph_the_compiler_cannot_take_is_refused_by_operator(half: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as one of ours that an older compiler does not know; the check for those of others comes before it."""
    monkeypatch.setattr("flashvlm.bundle.check_graph", lambda *_: None)
    path = half / "select-k5.onnx"
    model = onnx.load(path)
    node = next(n for n in model.graph.node if n.op_type == "GatherElements")
    node.domain, node.op_type = "elsewhere", "Sorting"
    model.opset_import.append(onnx.helper.make_opsetid("elsewhere", 1))
    onnx.save(model, path)
    manifest = json.loads((half / "bundle.json").read_text())
    manifest["files"][path.name] = {"size": path.stat().st_size, "sha256": sha256(path)}
    (half / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(FlashVLMError, match=r"cannot take select-k5.onnx: .*Sorting"):
        built(half)
    assert not (half / "engines").exists()


def test_engines_do_not_outgrow_their_weights(half: Path) -> None:
    """At these sizes kernels outweigh weights; the real ratio is in the slow tier."""
    report = built(half, max_batch=2)
    assert report.manifest.engines["decoder"].size > os.path.getsize(half / "decoder.data")


# --- by way of Polygraphy ------------------------------------------------------------------------------------------


def as_tensorrt(monkeypatch: pytest.MonkeyPatch, without: str = "") -> Any:
    """``tensorrt``, which is not to be had here: TensorRT-RTX under its name, with a GPU to build for.

    without: a builder flag that this version does not know.
    """
    import tensorrt_rtx

    class Builder(tensorrt_rtx.Builder):
        def create_builder_config(self) -> Any:
            config = super().create_builder_config()
            config.num_compute_capabilities = 1
            config.set_compute_capability(tensorrt_rtx.ComputeCapability.SM89, 0)
            return config

    trt = ModuleType("tensorrt")
    vars(trt).update({name: value for name, value in vars(tensorrt_rtx).items() if not name.startswith("__")})
    flags = {name: flag for name, flag in tensorrt_rtx.BuilderFlag.__members__.items() if name != without}
    vars(trt).update(__version__="11.4.0", Builder=Builder, BuilderFlag=SimpleNamespace(**flags))
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    monkeypatch.setattr("flashvlm_export.compile.engines.local_capability", lambda: "8.9")
    return trt


def configured(trt: Any, **flags: Any) -> tuple[Any, set[str]]:
    """The configuration of a small network, and the names of its flags."""
    given = {"compute_capabilities": ("8.6", "8.9"), "max_seq": 128, "max_batch": 2, "max_query": 64} | flags
    made = trt.Builder(builder.logger(trt))
    network = made.create_network(0)
    shapes = {}
    for name, (size, typical, largest) in {"a": (1, 2, 4), "b.0": (3, 3, 3)}.items():
        network.add_input(name, trt.float32, (-1, size))
        shapes[name] = [(batch, size) for batch in (1, typical, largest)]
    monitor = builder._monitor(trt, "decoder", lambda *_: lambda _: None)
    config = builder._config(trt, made, network, shapes, BuildFlags(**given), monitor)
    assert config.num_optimization_profiles == 1
    assert config.profiling_verbosity == trt.ProfilingVerbosity.DETAILED
    assert config.progress_monitor is not None
    names = {name: getattr(trt.BuilderFlag, name, None) for name in vars(trt.BuilderFlag)}
    return config, {name for name, flag in names.items() if name.isupper() and config.get_flag(flag)}


def test_options_become_flags_of_tensorrt_rtx() -> None:
    import tensorrt_rtx as trt

    config, plain = configured(trt)
    assert plain == {"REQUIRE_USER_ALLOCATION"}  # and no TF32, which is on by default
    targets = [config.get_compute_capability(i) for i in range(config.num_compute_capabilities)]
    assert targets == [trt.ComputeCapability.SM86, trt.ComputeCapability.SM89]
    config, flags = configured(trt, strip_weights=True, weight_streaming=True, workspace=1 << 20)
    assert flags == {"STRIP_PLAN", "REFIT_IDENTICAL", "WEIGHT_STREAMING"}  # streaming allocates while it runs
    assert config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == 1 << 20
    assert [configured(trt, optimization_level=n)[0].builder_optimization_level for n in (0, 5)] == [0, 5]


def test_options_become_flags_of_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    trt = as_tensorrt(monkeypatch)
    plain = configured(trt)[1]
    assert configured(trt, version_compatible=True)[1] - plain == {"VERSION_COMPATIBLE"}


def test_one_process_builds_for_both(legacy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_tensorrt(monkeypatch)
    reports = [built(legacy, target="tensorrt", compute_capabilities=()), built(legacy, weight_streaming=True)]
    assert [report.manifest.target for report in reports] == ["tensorrt", "tensorrt-rtx"]
    assert len({report.folder for report in reports}) == 2
    assert all(report.reused == () for report in reports)


def test_an_option_that_this_version_lacks_is_refused(
    half: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    as_tensorrt(monkeypatch, without="WEIGHT_STREAMING")
    expected = r"weight_streaming .* not available on TensorRT version 11.4.0; leave that option out"
    with pytest.raises(FlashVLMError, match=expected):
        built(half, target="tensorrt", compute_capabilities=(), weight_streaming=True)
    assert "".join(capfd.readouterr()) == ""  # Polygraphy prints what it raises
    assert not (half / "engines").exists()


def test_without_polygraphy_the_refusal_says_how_to_get_it(half: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "polygraphy", None)
    assert_refused(run(main, half, *RTX), "pip install polygraphy")
    assert not (half / "engines").exists()


@pytest.mark.slow
def test_real_sizes(tmp_path: Path) -> None:
    """LLaVA-1.5-7B's layer shapes, cut to two language layers; engines within 1.05 of their weights (DESIGN 5)."""
    from flashvlm_export.testing import checkpoints

    model = checkpoints.write_checkpoint("llava-1.5-7b", tmp_path / "checkpoint", layers=2).folder
    for dtype in ("float16", "bfloat16"):
        out = tmp_path / dtype
        export(ExportOptions(model=str(model), out=out, budgets=(32, 64, 128, 192), dtype=dtype))  # type: ignore[arg-type]
        report = built(out, max_seq=2048, compute_capabilities=("8.0", "8.6", "8.9", "12.0", "12.1"))
        for name in ("vision", "decoder"):
            weights = (out / f"{name}.data").stat().st_size
            assert report.manifest.engines[name].size <= 1.05 * weights
        shutil.rmtree(out)
