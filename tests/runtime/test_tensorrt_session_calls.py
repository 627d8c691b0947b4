"""Every call of the TensorRT session exists in the installed libraries, and without a GPU it is one line."""

from __future__ import annotations

import ast
import inspect
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from cuda_standin import Driver
from tensorrt_standin import build

import flashvlm.sessions.cuda
import flashvlm.sessions.engine
from flashvlm import FlashVLMError, Pipeline
from flashvlm.cli.run import main
from flashvlm.engines import local_capability
from refusals import assert_refused, run


def driver_calls() -> dict[str, int]:
    """Name of each driver function that cuda.py calls, and with how many arguments."""
    tree = ast.parse(inspect.getsource(flashvlm.sessions.cuda))
    calls = {}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        names = [a.value for a in node.args if isinstance(a, ast.Constant) and str(a.value).startswith("cu")]
        if names and getattr(node.func, "attr", getattr(node.func, "id", "")) == "_call":
            at = next(i for i, a in enumerate(node.args) if isinstance(a, ast.Constant) and a.value == names[0])
            calls[names[0]] = len(node.args) - at - 1
        elif isinstance(node.func, ast.Attribute) and node.func.attr.startswith("cu"):
            calls[node.func.attr] = len(node.args)
    return calls


def test_the_driver_has_every_function_with_these_arguments() -> None:
    driver = pytest.importorskip("cuda.bindings.driver", reason="pip install cuda-bindings")
    calls = driver_calls()
    assert len(calls) > 20
    for name, count in calls.items():
        signature = (getattr(driver, name).__doc__ or "").splitlines()[0]
        match = re.fullmatch(rf"{name}\((.*)\)", signature)
        assert match, f"{name}: {signature}"
        assert len([part for part in match[1].split(",") if part.strip()]) == count, signature
        assert hasattr(Driver, name), f"the stand-in lacks {name}"


def test_the_driver_has_every_type_and_constant() -> None:
    driver = pytest.importorskip("cuda.bindings.driver", reason="pip install cuda-bindings")
    for name in flashvlm.sessions.cuda.COMPUTE_CAPABILITY:
        assert hasattr(driver.CUdevice_attribute, name)
    assert int(driver.CUstream_flags.CU_STREAM_NON_BLOCKING) == 1
    assert hasattr(driver.CUstreamCaptureMode, "CU_STREAM_CAPTURE_MODE_THREAD_LOCAL")
    assert hasattr(driver.CUresult, "CUDA_ERROR_OUT_OF_MEMORY")
    copy = driver.CUDA_MEMCPY2D()
    copy.srcMemoryType = copy.dstMemoryType = driver.CUmemorytype.CU_MEMORYTYPE_DEVICE
    copy.srcDevice, copy.dstDevice, copy.srcPitch, copy.dstPitch = 1 << 40, 2 << 40, 3, 4
    copy.WidthInBytes, copy.Height = 5, 6
    assert (int(copy.srcDevice), copy.dstPitch, copy.Height) == (1 << 40, 4, 6)


def test_tensorrt_rtx_has_every_name() -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="pip install 'flashvlm[tensorrt-rtx]'")
    names: dict[Any, str] = {
        trt: "ILogger Runtime Refitter OnnxParserRefitter TensorIOMode TensorLocation get_plugin_registry",
        trt.ILogger.Severity: "ERROR",
        trt.TensorIOMode: "INPUT OUTPUT",
        trt.TensorLocation: "DEVICE",
        trt.ExecutionContextAllocationStrategy: "USER_MANAGED",
        trt.DynamicShapesKernelSpecializationStrategy: "EAGER",
        trt.Runtime: "deserialize_cuda_engine engine_host_code_allowed logger",
        trt.Refitter: "refit_cuda_engine",
        trt.OnnxParserRefitter: "refit_from_file",
        trt.IRuntimeConfig: "set_execution_context_allocation_strategy dynamic_shapes_kernel_specialization_strategy",
        trt.ICudaEngine: """num_io_tensors get_tensor_name get_tensor_mode get_tensor_dtype get_tensor_shape
            get_tensor_location get_tensor_profile_shape get_aliased_input_tensor create_execution_context
            create_runtime_config device_memory_size_v2 streamable_weights_size weight_streaming_budget_v2
            get_weight_streaming_automatic_budget""",
        trt.IExecutionContext: """set_input_shape set_tensor_address get_tensor_shape infer_shapes set_device_memory
            update_device_memory_size_for_shapes execute_async_v3 is_stream_capturable""",
    }
    listed = {name for words in names.values() for name in words.split()}
    for owner, words in names.items():
        for name in words.split():
            assert hasattr(owner, name), f"{owner} has no {name}"
    for dtype in flashvlm.sessions.engine.DTYPES:
        assert hasattr(trt.DataType, dtype)
    # The list is complete: every attribute that engine.py takes of an engine or a context is in it.
    source = inspect.getsource(flashvlm.sessions.engine)
    used = set(re.findall(r"(?:self\.engine|\bengine|self\._context|_runtime|refitter|parser)\.([a-z_0-9]+)\b", source))
    ours = {"cuda", "inputs", "outputs", "graph", "engines", "path", "messages", "refusal", "scratch_bound"}
    assert used - listed <= ours, used - listed - ours


# --- this machine, without a GPU ---

no_gpu = pytest.mark.skipif(local_capability() is not None, reason="this machine has a GPU")


@no_gpu
def test_no_gpu_is_one_line(tiny_gqa_bundle: Path, tmp_path: Path) -> None:
    """With the real libraries."""
    pytest.importorskip("tensorrt_rtx", reason="pip install 'flashvlm[tensorrt-rtx]'")
    pytest.importorskip("cuda.bindings", reason="pip install cuda-bindings")
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_gqa_bundle, bundle)
    build(bundle, "tensorrt-rtx")
    ran = run(main, bundle, "--prompt", "hi", "--backend", "tensorrt-rtx")
    assert_refused(ran, "no NVIDIA GPU can be used on this machine", "--backend onnxruntime")
    with pytest.raises(FlashVLMError, match="no NVIDIA GPU"):
        Pipeline.from_bundle(bundle, backend="tensorrt-rtx", device=1)


@no_gpu
def test_auto_goes_on_without_and_says_why(tiny_gqa_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="pip install 'flashvlm[tensorrt-rtx]'")
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_gqa_bundle, bundle)
    build(bundle, "tensorrt-rtx")
    ran = run(main, bundle, "--prompt", "hi", "--stats", "--max-new-tokens", "2")
    assert ran.code == 0, ran.stderr
    assert "engines not used: tensorrt-rtx: no NVIDIA GPU" in ran.stderr
