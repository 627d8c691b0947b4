"""A stand-in for TensorRT and TensorRT-RTX: engines run their ONNX graph on the CPU.

It keeps their rules and asserts them: shapes and addresses are set before a run and lie in live memory, scratch memory
is large enough, present and past are one memory, a graph is captured only after a plain run, and a context is as it was
captured when its graph is launched. What it cannot say is whether the real libraries agree.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from enum import Enum, IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
from cuda_standin import POISON, Driver

from flashvlm.bundle import Bundle
from flashvlm.dtypes import NUMPY_DTYPES
from flashvlm.engines import ENGINE_MANIFEST, ENGINES, BuildFlags, EngineManifest, EngineSpec, Target, folder_name
from flashvlm.files import sha256
from flashvlm.manifest import GraphSpec
from flashvlm.sessions import cuda

DTYPE_NAMES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "int64": "INT64", "int32": "INT32"} | {
    "bool": "BOOL"
}


# --- TensorRT ------------------------------------------------------------------------------------------------------


class Engine:
    """``plan``: what ``build`` wrote into the file of an engine."""

    device_memory_size_v2 = 1 << 16
    streamable_weights_size = 1000
    weight_streaming_budget_v2 = 0

    def __init__(self, trt: Any, driver: Driver, plan: dict[str, Any]) -> None:
        self.trt, self.driver, self.plan = trt, driver, plan
        self.path = Path(plan["onnx"])
        self.spec = GraphSpec.model_validate(plan["graph"])
        self.inputs = {spec.name: spec for spec in self.spec.inputs}
        self.tensors = self.inputs | {spec.name: spec for spec in self.spec.outputs}
        self.fixed = {"capacity": plan.get("capacity", plan["max_seq"])}
        self.largest = self.fixed | {
            "batch": plan["max_batch"],
            "sequence": plan["max_seq"],
            "query": plan["max_query"],
            "units": plan["max_units"],
            "prefix": plan["max_seq"],
            "suffix": plan["max_seq"],
        }
        self.num_io_tensors = len(self.tensors)
        self._session: Any = None

    def get_weight_streaming_automatic_budget(self) -> int:
        return 500

    def run(self, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        if self._session is None:
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 4  # it would say that caches are copied
            self._session = onnxruntime.InferenceSession(self.path, options, providers=["CPUExecutionProvider"])
        return self._session.run([spec.name for spec in self.spec.outputs], feed)

    def get_tensor_name(self, index: int) -> str:
        return [*self.tensors][index]

    def get_tensor_mode(self, name: str) -> Any:
        return self.trt.TensorIOMode.INPUT if name in self.inputs else self.trt.TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name=DTYPE_NAMES[self.tensors[name].dtype])

    def get_tensor_location(self, name: str) -> Any:
        return self.trt.TensorLocation.HOST if name in self.plan.get("host", ()) else self.trt.TensorLocation.DEVICE

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.fixed.get(d, -1) if isinstance(d, str) else d for d in self.tensors[name].shape)

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        top = tuple(self.largest[d] if isinstance(d, str) else d for d in self.tensors[name].shape)
        return [top, top, top]

    def get_aliased_input_tensor(self, name: str) -> str | None:
        past = name.replace("present.", "past_key_values.")
        return past if past != name and self.tensors[name].shape == self.tensors[past].shape else None

    def create_runtime_config(self) -> Any:
        return SimpleNamespace(set_execution_context_allocation_strategy=lambda strategy: None)

    def create_execution_context(self, how: Any) -> Context:
        self.trt.contexts.append((self.path.stem, how))
        return Context(self)


class Context:
    def __init__(self, engine: Engine) -> None:
        self.engine, self.driver = engine, engine.driver
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.memory = (0, 0)
        self.state = 0  # changes with every setting
        self.settled = -1  # the state of the last plain run

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        top = self.engine.get_tensor_profile_shape(name, 0)[2]
        assert len(shape) == len(top)
        assert all(1 <= size <= most for size, most in zip(shape, top, strict=True))
        self.shapes[name], self.state = tuple(shape), self.state + 1
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name], self.state = address, self.state + 1
        return True

    def infer_shapes(self) -> list[str]:
        return [name for name in self.engine.inputs if name not in self.shapes]

    def _sizes(self) -> dict[str, int]:
        sizes: dict[str, int] = {}
        for name, spec in self.engine.inputs.items():
            for dimension, size in zip(spec.shape, self.shapes[name], strict=True):
                if isinstance(dimension, str):
                    assert sizes.setdefault(dimension, size) == size, f"{dimension} of {name}"
        return sizes

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        sizes = self._sizes()
        return tuple(sizes[d] if isinstance(d, str) else d for d in self.engine.tensors[name].shape)

    def update_device_memory_size_for_shapes(self) -> int:
        sizes = self._sizes()
        return 1000 * sizes.get("batch", sizes.get("units", 1)) * sizes.get("sequence", sizes.get("query", 1))

    def set_device_memory(self, address: int, size: int) -> None:
        self.memory, self.state = (address, size), self.state + 1

    def is_stream_capturable(self, stream: int) -> bool:
        return not self.engine.plan.get("uncapturable", False)

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == 7
        assert set(self.addresses) == set(self.engine.tensors)
        for name, address in self.addresses.items():
            past = self.engine.get_aliased_input_tensor(name) if name.startswith("present.") else None
            assert past is None or self.addresses[past] == address, f"{name} is not where {past} is"
        assert self.memory[1] >= self.update_device_memory_size_for_shapes()
        state = self.state
        if self.driver.recording is not None:
            assert self.settled == state, "captured before a plain run with these shapes and addresses"

        def run() -> None:
            assert self.state == state, "the context has changed since its graph was captured"
            self._run()
            self.settled = state

        self.driver.do(run)
        return True

    def _tensor(self, name: str) -> np.ndarray:
        dtype, shape = np.dtype(NUMPY_DTYPES[self.engine.tensors[name].dtype]), self.get_tensor_shape(name)
        return self.driver.view(self.addresses[name], int(np.prod(shape)) * dtype.itemsize).view(dtype).reshape(shape)

    def _run(self) -> None:
        self.driver.view(*self.memory).fill(POISON)
        self.engine.trt.runs[self.engine.path.stem] += 1
        outputs = self.engine.run({name: self._tensor(name).copy() for name in self.engine.inputs})
        for spec, value in zip(self.engine.spec.outputs, outputs, strict=True):
            self._tensor(spec.name)[...] = value


class Logger:
    Severity = IntEnum("Severity", {"INTERNAL_ERROR": 0, "ERROR": 1, "WARNING": 2, "INFO": 3, "VERBOSE": 4})


def standin(driver: Driver, target: Target, version: str) -> Any:
    """A module; ``contexts`` and ``runs`` say what was made and how often each graph ran."""
    trt = SimpleNamespace(
        __name__=target.replace("-", "_"),
        __version__=version,
        ILogger=Logger,
        TensorIOMode=Enum("TensorIOMode", ["INPUT", "OUTPUT"]),
        TensorLocation=Enum("TensorLocation", ["DEVICE", "HOST"]),
        ExecutionContextAllocationStrategy=Enum("Strategy", ["STATIC", "USER_MANAGED"]),
        contexts=[],
        runs=Counter(),
        refits=[],
    )
    if target == "tensorrt-rtx":
        trt.DynamicShapesKernelSpecializationStrategy = Enum("Specialization", ["LAZY", "EAGER"])

    class Runtime:
        engine_host_code_allowed = False

        def __init__(self, logger: Any) -> None:
            self.logger = logger

        def deserialize_cuda_engine(self, plan: Any) -> Engine | None:
            try:
                return Engine(trt, driver, json.loads(bytes(plan)))
            except ValueError:
                self.logger.log(Logger.Severity.ERROR, "magic tag\ndoes not match")
                return None

    class Refitter:
        def __init__(self, engine: Engine, logger: Any) -> None:
            pass

        def refit_cuda_engine(self) -> bool:
            return True

    class OnnxParserRefitter:
        def __init__(self, refitter: Refitter, logger: Any) -> None:
            pass

        def refit_from_file(self, path: str) -> bool:
            trt.refits.append(Path(path).name)
            return Path(path).is_file()

    trt.Runtime, trt.Refitter, trt.OnnxParserRefitter = Runtime, Refitter, OnnxParserRefitter
    return trt


def install(
    monkeypatch: pytest.MonkeyPatch, target: Target = "tensorrt", version: str = "10.13.0.35", capability: str = "8.9"
) -> tuple[Driver, Any]:
    """Puts the stand-ins where the session looks for the libraries."""
    driver = Driver(capability)
    trt = standin(driver, target, version)
    monkeypatch.setitem(sys.modules, trt.__name__, trt)
    monkeypatch.setattr(cuda, "import_driver", lambda: driver)
    return driver, trt


def build(
    bundle: Path,
    target: Target = "tensorrt",
    version: str = "10.13.0.35",
    capabilities: tuple[str, ...] = ("8.9",),
    plan: dict[str, dict[str, Any]] | None = None,
    **flags: Any,
) -> Path:
    """Writes what flashvlm-compile would, with plans for the stand-in; ``plan``: more of some graphs' plans."""
    opened = Bundle(bundle, verify=False)
    sizes = {"max_seq": 128, "max_batch": 3, "max_query": 64} | flags
    built = BuildFlags(compute_capabilities=capabilities, **sizes)
    folder = bundle / ENGINES / folder_name(target, version, capabilities)
    folder.mkdir(parents=True, exist_ok=True)
    engines = {}
    for name, graph in opened.manifest.graphs.items():
        content = {"onnx": str(opened.file(graph.file)), "graph": graph.model_dump(), **sizes}
        content["max_units"] = opened.manifest.max_units(name)
        content |= (plan or {}).get(name, {})
        path = folder / f"{name}.engine"
        path.write_text(json.dumps(content))
        files = opened.manifest.files
        engines[name] = EngineSpec(
            file=path.name,
            size=path.stat().st_size,
            sha256=sha256(path),
            onnx_sha256=files[graph.file].sha256,
            data_sha256=tuple(files[data].sha256 for data in graph.data),
            build_seconds=0,
            peak_rss=0,
        )
    manifest = EngineManifest(target=target, version=version, flags=built, engines=engines)
    (folder / ENGINE_MANIFEST).write_text(manifest.model_dump_json())
    return folder
