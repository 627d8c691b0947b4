"""ONNX Runtime: every provider it has, with the KV cache written in place through I/O binding."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from flashvlm.bundle import Bundle
from flashvlm.dtypes import NUMPY_DTYPES
from flashvlm.errors import BundleError, FlashVLMError, brief
from flashvlm.extras import install
from flashvlm.graph_io import DECODER, is_past, present, token_specs
from flashvlm.manifest import GraphSpec
from flashvlm.sessions import Array, Backend, ImageFeatures, Limits, Segment, Selected
from flashvlm.sessions.contract import (
    check,
    features_of,
    select_inputs,
    selected_of,
    shape_of,
    with_streams,
)
from flashvlm.sessions.native import native_call
from flashvlm.sessions.providers import PROVIDERS, choose, import_onnxruntime

BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16; numpy has no such type, so it travels as uint16
FATAL_ONLY = 4  # an error comes as an exception, and is told once
MAX_THREADS = 512
TYPES = {"float32": "float"}  # dtypes that ONNX Runtime calls by another name


class OnnxRuntimeSession:
    """Graphs load when first used: answers at one budget never load the select graph of another.

    Args:
        provider: ``auto`` (CUDA where this build of ONNX Runtime has it, else CPU) or one of ``PROVIDERS``.
        threads: threads within an operator; None lets ONNX Runtime take every core.
        device: number of the GPU.
    """

    def __init__(self, bundle: Bundle, provider: str = "auto", threads: int | None = None, device: int = 0) -> None:
        self._ort = import_onnxruntime()
        self._bundle = bundle
        self._provider = choose(self._ort, provider, device)
        if threads is not None and not (type(threads) is int and 1 <= threads <= MAX_THREADS):
            found = brief(threads)
            raise FlashVLMError(f"threads: expected 1 to {MAX_THREADS}, found {found}; leave it out for every core")
        self._threads = threads
        self._graphs: dict[str, _Graph] = {}
        self._lock = threading.Lock()
        self._in_place = bundle.manifest.model.cache_in_place
        self._token_specs = token_specs(bundle.manifest.model)
        max_seq = bundle.manifest.model.max_seq
        self.limits = Limits(max_seq, capacity=max_seq if self._provider.fixed_capacity else None)
        self.backend = Backend("onnxruntime", self._ort.__version__, str(self._provider))
        if (
            "bfloat16" in (bundle.manifest.model.dtypes.activations, bundle.manifest.model.dtypes.weights)
            and self._provider.name == "cpu"
        ):
            raise FlashVLMError(
                f"{bundle.path} is bfloat16, for which ONNX Runtime has no CPU kernels; "
                f"export with --dtype float32, or run on a GPU with: {install('gpu')}"
            )

    def prepare(self, graphs: Sequence[str]) -> None:
        for name in graphs:
            self._graph(name)

    def vision(self, graph: str, pixel_values: np.ndarray, order: np.ndarray | None = None) -> list[ImageFeatures]:
        inputs = {"pixel_values": pixel_values} if order is None else {"pixel_values": pixel_values, "order": order}
        return features_of(self._graph(graph).run(inputs))

    def select(
        self,
        graph: str,
        images: Sequence[ImageFeatures],
        valid: np.ndarray,
        query_embeds: np.ndarray,
        query_mask: np.ndarray,
    ) -> list[Selected]:
        inputs = select_inputs(images, valid, _stack)
        question = {"valid": valid, "query_embeds": query_embeds, "query_mask": query_mask}
        return selected_of(self._graph(graph).run(inputs | question), [*images[0].streams], len(images))

    def assemble(self, rows: Sequence[Sequence[Segment]]) -> dict[str, np.ndarray]:
        lengths = [sum(map(len, row)) for row in rows]
        sizes = {"batch": len(rows), "sequence": max(lengths)}
        chunk = {spec.name: np.zeros(shape_of(spec, sizes), NUMPY_DTYPES[spec.dtype]) for spec in self._token_specs}
        for b, row in enumerate(rows):
            at = 0
            for segment in row:
                for name, tensor in segment.tensors.items():
                    chunk[name][b, at : at + len(segment)] = tensor[segment.start : segment.stop]
                at += len(segment)
        return chunk

    def new_cache(self, batch: int, capacity: int) -> Any:
        """One device tensor each for the keys and values of every layer."""
        cache = {}
        sizes = {"batch": batch, "capacity": self.limits.capacity or capacity}
        for spec in filter(is_past, self._bundle.graph(DECODER).inputs):
            zeros = np.zeros(shape_of(spec, sizes), dtype=NUMPY_DTYPES[spec.dtype])
            # New slots that come back are placed by the host: such a cache stays here.
            cache[spec.name] = self._to_device(zeros) if self._in_place else zeros
        return cache

    def decode(
        self,
        tensors: Mapping[str, Array],
        position_ids: np.ndarray,
        cache_position: np.ndarray,
        num_tokens: np.ndarray,
        cache: Any,
    ) -> np.ndarray:
        graph = self._graph(DECODER)
        binding = graph.session.io_binding()
        inputs = {
            **with_streams(tensors, self._token_specs),
            "position_ids": position_ids,
            "cache_position": cache_position,
            "num_tokens": num_tokens,
        }
        for name, array in graph.checked(inputs).items():
            binding.bind_ortvalue_input(name, self._to_device(array))
        for name, rows in cache.items():
            if self._in_place:
                # The same buffer as input and output: TensorScatter then writes only the new rows.
                binding.bind_ortvalue_input(name, rows)
                binding.bind_ortvalue_output(present(name), rows)
            else:
                binding.bind_ortvalue_input(name, self._to_device(rows))
                binding.bind_output(present(name), "cpu")
        binding.bind_output("logits", "cpu")
        graph.call(graph.session.run_with_iobinding, binding)
        *news, logits = binding.get_outputs()
        if not self._in_place:
            for rows, new in zip(cache.values(), news, strict=True):
                _place(rows, new.numpy(), cache_position)
        return logits.numpy()

    def close(self) -> None:
        self._graphs.clear()

    def _to_device(self, array: np.ndarray) -> Any:
        where = self._provider.memory, self._provider.device
        if array.dtype == ml_dtypes.bfloat16:
            raw = array.view(np.uint16)
            return self._ort.OrtValue.ortvalue_from_numpy_with_onnx_type(raw, BFLOAT16)
        return self._ort.OrtValue.ortvalue_from_numpy(array, *where)

    def _graph(self, name: str) -> _Graph:
        with self._lock:
            if name not in self._graphs:
                self._graphs[name] = _Graph(self._bundle.graph(name), self._load(name), self.limits.capacity)
            return self._graphs[name]

    def _load(self, name: str) -> Any:
        options = self._ort.SessionOptions()
        options.log_severity_level = FATAL_ONLY
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        if self.limits.capacity is not None:
            options.add_free_dimension_override_by_name("capacity", self.limits.capacity)
        path = self._bundle.graph_file(name)
        try:
            str(path).encode("utf-8")
        except UnicodeEncodeError:
            raise BundleError(f"{path}: ONNX Runtime takes no path that is not UTF-8; rename the folder") from None
        arguments = self._provider.arguments(options)
        try:
            with native_call():
                session = self._ort.InferenceSession(path, options, **arguments)
        except Exception as error:  # ONNX Runtime's exceptions share no public base
            raise BundleError(f"ONNX Runtime cannot load {path}: {str(error).strip()}") from None
        self._bundle.graph_file(name)  # again: it may have changed between the check and the load
        if PROVIDERS[self._provider.name] not in session.get_providers():
            # ONNX Runtime goes on without a provider whose libraries do not load.
            raise FlashVLMError(
                f"ONNX Runtime's {self._provider.name} provider does not start on this machine: its libraries or the "
                f"NVIDIA driver are missing or of another version; run on the CPU with --provider cpu"
            )
        return session


def _stack(arrays: list[np.ndarray]) -> np.ndarray:
    """[...] each -> [B,...]; one array is not copied."""
    return arrays[0][None] if len(arrays) == 1 else np.stack(arrays)


def _place(rows: np.ndarray, new: np.ndarray, cache_position: np.ndarray) -> None:
    """Copies new [B,Hkv,S,d] into rows [B,Hkv,C,d] at each row's slot, padding included: it is overwritten later."""
    for b, slot in enumerate(cache_position):
        end = min(int(slot) + new.shape[2], rows.shape[2])
        rows[b, :, slot:end] = new[b, :, : end - slot]


class _Graph:
    """A loaded graph and its contract."""

    def __init__(self, spec: GraphSpec, session: Any, capacity: int | None) -> None:
        self.session = session
        self._file = spec.file
        self._inputs = {tensor.name: tensor for tensor in spec.inputs}
        self._outputs = [tensor.name for tensor in spec.outputs]
        fixed: dict[Any, Any] = {} if capacity is None else {"capacity": capacity}
        wanted = [
            (t.name, f"tensor({TYPES.get(t.dtype, t.dtype)})", [fixed.get(d, d) for d in t.shape])
            for t in (*spec.inputs, *spec.outputs)
        ]
        if [(t.name, t.type, t.shape) for t in (*session.get_inputs(), *session.get_outputs())] != wanted:
            raise BundleError(
                f"{spec.file} does not have the inputs and outputs its manifest lists; export the bundle again"
            )

    def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        values = self.call(self.session.run, self._outputs, self.checked(inputs))
        return dict(zip(self._outputs, values, strict=True))

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Runs the graph by a method of its session: memory may run out, and a graph may not be what it says."""
        try:
            with native_call():
                return function(*arguments)
        except Exception as error:  # ONNX Runtime's exceptions share no public base
            raise FlashVLMError(f"ONNX Runtime failed in {self._file}: {str(error).strip()}") from None

    def checked(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Inputs as contiguous arrays of the dtype and shape the contract states."""
        symbols: dict[str, int] = {}
        for name, array in inputs.items():
            check(self._inputs[name], array.dtype, array.shape, symbols)
        return {name: np.ascontiguousarray(array) for name, array in inputs.items()}
