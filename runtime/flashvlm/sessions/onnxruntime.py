"""ONNX Runtime: every provider it has, with the KV cache written in place through I/O binding."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from flashvlm.bundle import Bundle, GraphSpec, TensorSpec, select_graph
from flashvlm.errors import BundleError, FlashVLMError
from flashvlm.sessions import ImageFeatures, Selected

NUMPY_DTYPES: dict[str, Any] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "int64": np.int64,
    "int32": np.int32,
    "bool": np.bool_,
}
BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16; numpy has no such type, so it travels as uint16
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
FATAL_ONLY = 4  # an error comes as an exception, and is told once


class OnnxRuntimeSession:
    """Graphs load when first used: answers at one budget never load the select graph of another.

    Args:
        provider: ``auto`` (CUDA where this build of ONNX Runtime has it, else CPU), ``cpu`` or ``cuda``.
        threads: threads within an operator; None lets ONNX Runtime take every core.
    """

    def __init__(self, bundle: Bundle, provider: str = "auto", threads: int | None = None) -> None:
        self._ort = _import()
        self._bundle = bundle
        self._provider = _choose(self._ort.get_available_providers(), provider)
        self._threads = threads
        self._device = "cuda" if self._provider == PROVIDERS["cuda"] else "cpu"
        self._graphs: dict[str, _Graph] = {}
        self._lock = threading.Lock()
        if bundle.manifest.model.dtype == "bfloat16" and self._device == "cpu":
            raise FlashVLMError(
                f"{bundle.path} is bfloat16, for which ONNX Runtime has no CPU kernels; "
                f"export with --dtype float32, or run on a GPU with: pip install 'flashvlm[gpu]'"
            )

    def prepare(self, budget: int | None) -> None:
        for name in ("vision", "decoder") if budget is None else ("vision", "decoder", select_graph(budget)):
            self._graph(name)

    def vision(self, pixel_values: np.ndarray) -> list[ImageFeatures]:
        out = self._graph("vision").run({"pixel_values": pixel_values})
        return [ImageFeatures(*row) for row in zip(out["image_tokens"], out["features"], out["saliency"], strict=True)]

    def select(
        self, budget: int, images: list[ImageFeatures], query_embeds: np.ndarray, query_mask: np.ndarray
    ) -> Selected:
        saliency = np.stack([image.saliency for image in images])
        inputs = {
            "image_tokens": np.stack([image.image_tokens for image in images]),
            "features": np.stack([image.features for image in images]),
            "saliency": saliency,
            "valid": np.ones(saliency.shape, dtype=np.bool_),
            "query_embeds": query_embeds,
            "query_mask": query_mask,
        }
        return Selected(**self._graph(select_graph(budget)).run(inputs))

    def new_cache(self, batch: int, capacity: int) -> Any:
        """One device tensor each for the keys and values of every layer."""
        cache = {}
        for spec in self._bundle.graph("decoder").inputs:
            if spec.name.startswith("past_key_values."):
                sizes = {"batch": batch, "capacity": capacity}
                shape = [sizes[d] if isinstance(d, str) else d for d in spec.shape]
                zeros = np.zeros(shape, dtype=NUMPY_DTYPES[spec.dtype])
                # The legacy dialect returns new rows, which the host places: its cache stays here.
                cache[spec.name] = zeros if self._bundle.manifest.dialect == "legacy" else self._to_device(zeros)
        return cache

    def decode(
        self,
        inputs_embeds: np.ndarray,
        position_ids: np.ndarray,
        cache_position: np.ndarray,
        num_tokens: np.ndarray,
        cache: Any,
    ) -> np.ndarray:
        graph = self._graph("decoder")
        binding = graph.session.io_binding()
        inputs = {
            "inputs_embeds": inputs_embeds,
            "position_ids": position_ids,
            "cache_position": cache_position,
            "num_tokens": num_tokens,
        }
        for name, array in graph.checked(inputs).items():
            binding.bind_ortvalue_input(name, self._to_device(array))
        in_place = self._bundle.manifest.dialect == "modern"
        for name, rows in cache.items():
            if in_place:
                # The same buffer as input and output: TensorScatter then writes only the new rows.
                binding.bind_ortvalue_input(name, rows)
                binding.bind_ortvalue_output(_present(name), rows)
            else:
                binding.bind_ortvalue_input(name, self._to_device(rows))
                binding.bind_output(_present(name), "cpu")
        binding.bind_output("logits", "cpu")
        graph.call(graph.session.run_with_iobinding, binding)
        *present, logits = binding.get_outputs()
        if not in_place:
            for rows, new in zip(cache.values(), present, strict=True):
                _place(rows, new.numpy(), cache_position)
        return logits.numpy()

    def _to_device(self, array: np.ndarray) -> Any:
        if array.dtype == ml_dtypes.bfloat16:
            raw = array.view(np.uint16)
            return self._ort.OrtValue.ortvalue_from_numpy_with_onnx_type(raw, BFLOAT16)
        return self._ort.OrtValue.ortvalue_from_numpy(array, self._device, 0)

    def _graph(self, name: str) -> _Graph:
        with self._lock:
            if name not in self._graphs:
                spec = self._bundle.graph(name)
                self._graphs[name] = _Graph(spec, self._load(spec))
            return self._graphs[name]

    def _load(self, spec: GraphSpec) -> Any:
        options = self._ort.SessionOptions()
        options.log_severity_level = FATAL_ONLY
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        path = self._bundle.file(spec.file)
        try:
            return self._ort.InferenceSession(path, options, providers=[self._provider])
        except Exception as error:  # ONNX Runtime's exceptions share no public base
            raise BundleError(f"ONNX Runtime cannot load {path}: {str(error).strip()}") from None


def _present(past: str) -> str:
    return past.replace("past_key_values.", "present.")


def _place(rows: np.ndarray, new: np.ndarray, cache_position: np.ndarray) -> None:
    """Copies new [B,Hkv,S,d] into rows [B,Hkv,C,d] at each row's slot, padding included: it is overwritten later."""
    for b, slot in enumerate(cache_position):
        end = min(int(slot) + new.shape[2], rows.shape[2])
        rows[b, :, slot:end] = new[b, :, : end - slot]


class _Graph:
    """A loaded graph and its contract."""

    def __init__(self, spec: GraphSpec, session: Any) -> None:
        self.session = session
        self._file = spec.file
        self._inputs = {tensor.name: tensor for tensor in spec.inputs}
        self._outputs = [tensor.name for tensor in spec.outputs]
        found = ([i.name for i in session.get_inputs()], [o.name for o in session.get_outputs()])
        if found != ([*self._inputs], self._outputs):
            raise BundleError(
                f"{spec.file} does not have the inputs and outputs its manifest lists; export the bundle again"
            )

    def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        values = self.call(self.session.run, self._outputs, self.checked(inputs))
        return dict(zip(self._outputs, values, strict=True))

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Runs the graph by a method of its session: memory may run out, and a graph may not be what it says."""
        try:
            return function(*arguments)
        except Exception as error:  # ONNX Runtime's exceptions share no public base
            raise FlashVLMError(f"ONNX Runtime failed in {self._file}: {str(error).strip()}") from None

    def checked(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Inputs as contiguous arrays of the dtype and shape the contract states."""
        symbols: dict[str, int] = {}
        return {name: _checked(array, self._inputs[name], symbols) for name, array in inputs.items()}


def _checked(array: np.ndarray, spec: TensorSpec, symbols: dict[str, int]) -> np.ndarray:
    def fits(dimension: int | str, size: int) -> bool:
        return size == (symbols.setdefault(dimension, size) if isinstance(dimension, str) else dimension)

    same_rank = len(array.shape) == len(spec.shape)
    if array.dtype != NUMPY_DTYPES[spec.dtype] or not same_rank or not all(map(fits, spec.shape, array.shape)):
        raise FlashVLMError(
            f"{spec.name}: expected {spec.dtype} {list(spec.shape)}, found {array.dtype} {list(array.shape)}"
        )
    return np.ascontiguousarray(array)


def _import() -> Any:
    # ONNX Runtime 1.31 sends usage data and keeps a database in the home directory unless told not to beforehand.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
    except ImportError as error:  # also a broken install, hence the reason
        raise FlashVLMError(
            f"ONNX Runtime is not installed or does not import ({error}); "
            f"install it with: pip install 'flashvlm[cpu]' (NVIDIA GPU: 'flashvlm[gpu]')"
        ) from None
    return onnxruntime


def _choose(available: list[str], provider: str) -> str:
    if provider == "auto":
        return PROVIDERS["cuda"] if PROVIDERS["cuda"] in available else PROVIDERS["cpu"]
    if provider not in PROVIDERS:
        raise FlashVLMError(f"unknown provider {provider!r}; expected auto, {' or '.join(PROVIDERS)}")
    if PROVIDERS[provider] not in available:
        raise FlashVLMError(
            f"this ONNX Runtime has no {provider} provider; install it with: "
            f"pip uninstall onnxruntime && pip install 'flashvlm[gpu]'"
        )
    return PROVIDERS[provider]
