"""Which backend runs a bundle, and what is refused with which command."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tensorrt_standin import build, install

from flashvlm import FlashVLMError, Pipeline, engines
from flashvlm.cli.profile import main as profile_main
from flashvlm.cli.run import main
from flashvlm.extras import install as install_extra
from flashvlm.sessions import cuda, providers
from refusals import assert_refused, run

ASK = ("--prompt", "hi", "--max-new-tokens", "2")


@pytest.fixture
def bundle(tiny_gqa_bundle: Path, tmp_path: Path) -> Path:
    """A bundle of one's own, without engines."""
    return Path(shutil.copytree(tiny_gqa_bundle, tmp_path / "bundle"))


# --- auto ---


def test_without_engines_auto_is_onnx_runtime(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("tensorrt", "tensorrt_rtx", "cuda.bindings.driver"):
        monkeypatch.setitem(sys.modules, module, None)  # not even looked for
    backend = Pipeline.from_bundle(bundle).backend
    assert (backend.name, backend.device, backend.passed_over) == ("onnxruntime", "cpu", ())
    assert str(backend).startswith("ONNX Runtime 1.")


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-rtx"])
def test_auto_takes_engines_that_fit(bundle: Path, target: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    build(bundle, target)
    install(monkeypatch, target)
    pipeline = Pipeline.from_bundle(bundle)
    assert pipeline.backend.name == target
    assert str(pipeline.backend).endswith("10.13.0.35, cuda:0 Stand-in GPU, compute capability 8.9")
    # Who names a provider asks for ONNX Runtime.
    assert Pipeline.from_bundle(bundle, provider="cpu").backend.name == "onnxruntime"


def test_auto_prefers_tensorrt(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for target in ("tensorrt", "tensorrt-rtx"):
        build(bundle, target)  # type: ignore[arg-type]
        install(monkeypatch, target)  # type: ignore[arg-type]
    assert Pipeline.from_bundle(bundle).backend.name == "tensorrt"
    assert Pipeline.from_bundle(bundle, backend="tensorrt-rtx").backend.name == "tensorrt-rtx"


def test_auto_passes_over_engines_that_do_not_fit(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(bundle, capabilities=("8.7",))
    install(monkeypatch)
    ran = run(main, bundle, *ASK, "--json")
    assert ran.code == 0, ran.stderr
    backend = json.loads(ran.stdout)["backend"]
    assert backend["name"] == "onnxruntime"
    assert "compute capability 8.7, and this GPU has 8.9" in backend["passed_over"][0]


def test_stats_name_the_backend(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(bundle)
    install(monkeypatch)
    ran = run(main, bundle, *ASK, "--stats")
    assert "TensorRT 10.13.0.35, cuda:0 Stand-in GPU" in ran.stderr


def test_a_profile_runs_on_engines(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(bundle)
    install(monkeypatch)
    flags = ("--backend", "tensorrt", "--runs", "1", "--warm-up", "0", "--new-tokens", "3", "--budget", "5")
    ran = run(profile_main, bundle, *flags, "--out", tmp_path / "report")
    assert ran.code == 0, ran.stderr
    profile = json.loads((tmp_path / "report" / "profile.json").read_text())
    assert profile["backend"].startswith("TensorRT 10.13.0.35, cuda:0")
    model = json.loads((bundle / "bundle.json").read_text())["model"]
    a_row = 2 * 4 * model["num_layers"] * model["num_key_value_heads"] * model["head_dim"]
    assert profile["budgets"][0]["kv_bytes"] == 128 * a_row  # the engines' capacity, not the answer's
    assert_refused(
        run(profile_main, bundle, *flags, "--prompt-tokens", "200"), "these engines hold 128", "--max-seq 207"
    )


# --- what is asked for and absent ---


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--backend", "torch"), ("unknown backend 'torch'", "auto, onnxruntime, tensorrt, tensorrt-rtx")),
        (
            ("--backend", "tensorrt", "--provider", "cuda"),
            ("provider 'cuda' is of ONNX Runtime", "backend onnxruntime"),
        ),
        (("--device", "-1"), ("--device",)),
        (("--device", "1"), ("device 1: the cpu provider has no devices",)),
        (("--provider", "tensorrt"), ("no tensorrt provider", f"{install_extra('gpu')} tensorrt")),
        (("--provider", "tensorrt-rtx"), ("no tensorrt-rtx provider", "onnxruntime-ep-nv-tensorrt-rtx")),
    ],
    ids=lambda value: " ".join(value),
)
def test_flags_are_refused(flags: tuple[str, ...], expected: tuple[str, ...], tiny_bundle: Path) -> None:
    assert_refused(run(main, tiny_bundle, *ASK, *flags), *expected)


@pytest.mark.parametrize(
    ("target", "jetson", "line"),
    [
        ("tensorrt", False, install_extra("tensorrt")),
        ("tensorrt-rtx", False, install_extra("tensorrt-rtx")),
        ("tensorrt", True, "sudo apt install tensorrt python3-libnvinfer"),
    ],
)
def test_a_missing_module(
    target: str, jetson: bool, line: str, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "is_jetson", lambda: jetson)
    monkeypatch.setitem(sys.modules, target.replace("-", "_"), None)
    assert_refused(run(main, tiny_bundle, *ASK, "--backend", target), "cannot be imported", line)


@pytest.mark.parametrize(("jetson", "line"), [(False, "pip install cuda-bindings"), (True, "'cuda-bindings<13'")])
def test_missing_cuda_bindings(jetson: bool, line: str, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = cuda.import_driver
    install(monkeypatch)
    monkeypatch.setattr(cuda, "import_driver", original)
    monkeypatch.setattr(cuda, "is_jetson", lambda: jetson)
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    assert_refused(run(main, tiny_bundle, *ASK, "--backend", "tensorrt"), "cuda-bindings cannot be imported", line)


def test_no_such_gpu(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(bundle)
    driver, _ = install(monkeypatch)
    ask = (bundle, *ASK, "--backend", "tensorrt", "--device")
    assert_refused(run(main, *ask, "1"), "device 1: this machine has 1 NVIDIA GPU(s)")
    driver.gpus = 0
    assert_refused(run(main, *ask, "0"), "no NVIDIA GPU can be used on this machine (CUDA_ERROR_NO_DEVICE)")


# --- engines that do not fit ---


def refusal(bundle: Path, target: Any = "tensorrt") -> str:
    with pytest.raises(FlashVLMError) as caught:
        Pipeline.from_bundle(bundle, backend=target)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_engines_of_another_version_or_gpu(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    command = f"; build them with: flashvlm-compile {bundle} --target tensorrt"
    assert refusal(bundle) == f"{bundle} has no engines for TensorRT{command}"
    folder = build(bundle, version="10.3.0.26", max_seq=96, workspace=1_500_000_000, optimization_level=4)
    sizes = " --max-seq 96 --max-batch 3 --max-query 64 --workspace 1.5 --optimization-level 4"
    reason = "was built by TensorRT 10.3.0.26, and this is 10.13.0.35"
    assert refusal(bundle) == f"{folder} {reason}{command}{sizes}"
    # Of several, the one that comes closest is told.
    folder = build(bundle, capabilities=("8.7",))
    reason = "was built for compute capability 8.7, and this GPU has 8.9"
    assert refusal(bundle) == f"{folder} {reason}{command} --max-seq 128 --max-batch 3 --max-query 64"
    # Engines for the other library are none.
    assert "has no engines for TensorRT-RTX" in _rtx_refusal(bundle, monkeypatch)


def _rtx_refusal(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    install(monkeypatch, "tensorrt-rtx")
    message = refusal(bundle, "tensorrt-rtx")
    assert message.endswith("--target tensorrt-rtx --compute-capability 8.9")
    return message


def test_version_compatible_engines_load_in_later_versions(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(bundle, version="10.3.0.26", version_compatible=True)
    install(monkeypatch)
    with pytest.raises(FlashVLMError, match="loaded as code; if you built them yourself, allow it with --engine-code"):
        Pipeline.from_bundle(bundle, backend="tensorrt")
    assert Pipeline.from_bundle(bundle, engine_code=True).backend.name == "tensorrt"
    install(monkeypatch, version="10.2.0")
    assert "was built by TensorRT 10.3.0.26" in refusal(bundle)


def test_one_folder_serves_several_gpus(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(bundle, "tensorrt-rtx", capabilities=("8.6", "8.9"))
    install(monkeypatch, "tensorrt-rtx", capability="8.6")
    assert Pipeline.from_bundle(bundle).backend.name == "tensorrt-rtx"


def test_engines_of_another_export(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = build(bundle)
    install(monkeypatch)
    manifest = json.loads((folder / "engine.json").read_text())
    for change, expected in (
        ({"onnx_sha256": "0" * 64}, "has no engine of this export's decoder"),
        ({"size": 1}, "holds decoder.engine with"),
    ):
        edited = json.loads(json.dumps(manifest))
        edited["engines"]["decoder"] |= change
        (folder / "engine.json").write_text(json.dumps(edited))
        assert expected in refusal(bundle)
    (folder / "engine.json").write_text("{")
    assert "holds no complete engines" in refusal(bundle)


def test_the_newest_of_several_is_taken(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = build(bundle, capabilities=("8.6", "8.9"), max_seq=64)
    new = build(bundle)
    os.utime(old / "engine.json", ns=(1, 1))
    install(monkeypatch)
    assert Pipeline.from_bundle(bundle).limits.max_seq == 128
    os.utime(new / "engine.json", ns=(0, 0))
    assert Pipeline.from_bundle(bundle).limits.max_seq == 64


def test_engines_with_plugins_ask_for_the_library(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = build(bundle)
    _, trt = install(monkeypatch)
    library, loaded = tmp_path / "libplugins.so", []
    library.write_bytes(b"library")
    trt.get_plugin_registry = lambda: SimpleNamespace(load_library=loaded.append)
    manifest = json.loads((folder / "engine.json").read_text())
    from flashvlm.files import sha256

    manifest["plugins"] = [{"file": library.name, "sha256": sha256(library)}]
    (folder / "engine.json").write_text(json.dumps(manifest))
    ask = (bundle, *ASK, "--backend", "tensorrt")
    assert_refused(run(main, *ask), "was built with libplugins.so", "--plugins PATH")
    ran = run(main, *ask, "--plugins", library)
    assert (ran.code, loaded) == (0, [str(library)]), ran.stderr
    quick = ("--backend", "tensorrt", "--runs", "1", "--warm-up", "0", "--new-tokens", "2", "--budget", "5")
    ran = run(profile_main, bundle, *quick, "--plugins", library)
    assert (ran.code, loaded) == (0, [str(library)] * 2), ran.stderr
    library.write_bytes(b"another")
    assert_refused(run(main, *ask, "--plugins", library), "is not the libplugins.so", "--plugins libplugins.so")


# --- providers of ONNX Runtime ---


def ort(*available: str, devices: int = 0) -> Any:
    found = [SimpleNamespace(ep_name="Nv", number=i) for i in range(devices)]
    registered: list[str] = []
    return SimpleNamespace(
        get_available_providers=lambda: [providers.PROVIDERS[name] for name in available],
        get_ep_devices=lambda: found if registered else [],
        register_execution_provider_library=lambda name, path: registered.append(path),
    )


def test_auto_provider_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "local_capability", lambda device: None)
    assert str(providers.choose(ort("cuda", "cpu"), "auto", 0)) == "cpu"
    monkeypatch.setattr(providers, "local_capability", lambda device: "8.9")
    assert str(providers.choose(ort("cuda", "cpu"), "auto", 1)) == "cuda:1"
    assert str(providers.choose(ort("cpu"), "auto", 0)) == "cpu"


def test_providers_fall_back_in_the_order_onnx_runtime_expects() -> None:
    names = {
        name: providers.choose(ort("cpu", "cuda", "tensorrt", "tensorrt-rtx"), name, 0) for name in providers.PROVIDERS
    }
    order = {name: [p for p, _ in found.arguments(None)["providers"]] for name, found in names.items()}
    assert order["cpu"] == ["CPUExecutionProvider"]
    assert order["cuda"] == ["CUDAExecutionProvider", "CPUExecutionProvider"]
    assert order["tensorrt"] == ["TensorrtExecutionProvider", *order["cuda"]]
    assert order["tensorrt-rtx"] == ["NvTensorRTRTXExecutionProvider", *order["cuda"]]
    second = providers.choose(ort("cuda"), "cuda", 2).arguments(None)["providers"]
    assert second[0] == ("CUDAExecutionProvider", {"device_id": "2", "use_tf32": "0"})


def test_the_rtx_plugin_is_registered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = SimpleNamespace(get_ep_name=lambda: "Nv", get_library_path=lambda: "libnv.so")
    monkeypatch.setitem(sys.modules, providers.RTX_PLUGIN, plugin)
    runtime = ort("cpu", devices=2)
    assert providers.choose(runtime, "tensorrt-rtx", 1).plugin.number == 1
    with pytest.raises(FlashVLMError, match=r"device 2: the tensorrt-rtx provider finds 2 NVIDIA RTX GPU\(s\)"):
        providers.choose(runtime, "tensorrt-rtx", 2)


def test_a_provider_of_one_capacity_answers_the_same(tiny_gqa_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime's TensorRT providers get the cache's capacity fixed; the CPU does not mind."""
    image = np.random.default_rng(1).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    wanted = Pipeline.from_bundle(tiny_gqa_bundle, verify=False).generate(image, "What is it?", max_new_tokens=4)
    monkeypatch.setattr(providers.Provider, "fixed_capacity", True)
    pipeline = Pipeline.from_bundle(tiny_gqa_bundle, verify=False)
    assert pipeline.limits.capacity == pipeline.bundle.manifest.model.max_seq
    assert pipeline.generate(image, "What is it?", max_new_tokens=4).token_ids == wanted.token_ids


def test_a_provider_that_does_not_start_is_refused(tiny_gqa_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime would go on with the CPU."""
    monkeypatch.setattr(providers.Provider, "arguments", lambda self, options: {"providers": ["CPUExecutionProvider"]})
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    ran = run(main, tiny_gqa_bundle, *ASK, "--provider", "cuda")
    assert_refused(ran, "cuda provider does not start on this machine", "--provider cpu")
