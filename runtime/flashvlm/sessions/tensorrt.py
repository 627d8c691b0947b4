"""TensorRT and TensorRT-RTX: compiled engines on device memory, decoding captured in a CUDA graph.

What crosses between host and device: pixels, embeddings of text and positions on the way in; kept, is_top, scores and
logits on the way out. Image features, kept embeddings and the KV cache stay on the device. The session's logic is
tested against a stand-in of both libraries that runs the graphs on the CPU; it has not run on a GPU yet.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np

from flashvlm.bundle import Bundle
from flashvlm.dtypes import NUMPY_DTYPES
from flashvlm.engines import Target, import_target, matching_engines
from flashvlm.errors import FlashVLMError
from flashvlm.graph_io import DECODER, token_specs
from flashvlm.sessions import Array, Backend, ImageFeatures, Limits, Segment, Selected, check_batch
from flashvlm.sessions.contract import (
    features_of,
    select_inputs,
    selected_of,
    shape_of,
    with_streams,
)
from flashvlm.sessions.cuda import Cuda, DeviceArray, stack
from flashvlm.sessions.engine import Context, Engine, Scratch, load_plugins
from flashvlm.sessions.kv_cache import KvCache, KvMemory, Step

F = TypeVar("F", bound=Callable[..., Any])


def _one_at_a_time(method: F) -> F:
    """Execution contexts and their scratch memory serve one thread at a time; the stream keeps the order of calls."""

    @functools.wraps(method)
    def alone(self: TensorRTSession, *args: Any, **kwargs: Any) -> Any:
        with self._lock:
            return method(self, *args, **kwargs)

    return cast(F, alone)


class TensorRTSession:
    """Engines load when first used: answers at one budget never load the select engine of another.

    Args:
        target: which of the two libraries.
        device: number of the GPU.
        verify: check the SHA-256 of an engine before it is loaded.
        plugins: the plugin library the engines were built with, if they were.
        engine_code: take version-compatible engines, which carry a TensorRT runtime that is loaded as code.

    Raises:
        FlashVLMError: the library, the driver, the GPU or engines that fit them are missing.
    """

    def __init__(
        self,
        bundle: Bundle,
        target: Target,
        device: int = 0,
        verify: bool = True,
        plugins: Path | None = None,
        engine_code: bool = False,
    ) -> None:
        self._trt = import_target(target)
        self._cuda = Cuda(device)
        self._bundle = bundle
        self._verify = verify
        self._engines = matching_engines(bundle, target, self._trt.__version__, self._cuda.capability)
        flags = self._engines.manifest.flags
        if flags.version_compatible and not engine_code:
            raise FlashVLMError(
                f"{self._engines.folder} is version-compatible: its engines carry a TensorRT runtime that is loaded as "
                f"code; if you built them yourself, allow it with --engine-code"
            )
        load_plugins(self._trt, self._engines, plugins)
        self._token_specs = token_specs(bundle.manifest.model)
        max_seq = min(flags.max_seq, bundle.manifest.model.max_seq)
        self.limits = Limits(max_seq, flags.max_batch, flags.max_seq, "these engines hold", self._larger)
        where = f"cuda:{device} {self._cuda.name}, compute capability {self._cuda.capability}"
        self.backend = Backend(target, self._trt.__version__, where)
        self._lock = threading.Lock()
        self._loaded: dict[str, Engine] = {}
        self._contexts: dict[str, Context] = {}
        self._scratch = Scratch(self._cuda)
        self._spare: list[tuple[KvMemory, Step]] = []  # of answers that are over

    @_one_at_a_time
    def prepare(self, graphs: Sequence[str]) -> None:
        for name in graphs:
            self._context(name)

    @_one_at_a_time
    def vision(self, graph: str, pixel_values: np.ndarray, order: np.ndarray | None = None) -> list[ImageFeatures]:
        inputs = {"pixel_values": self._upload(pixel_values)}
        if order is not None:
            inputs["order"] = self._upload(order)
        out = self._run(graph, inputs, {"batch": len(pixel_values)})
        self._cuda.synchronize()  # nothing needs it, but the time of this stage is told apart from the next one's
        return features_of(out, DeviceArray.row)

    @_one_at_a_time
    def select(
        self,
        graph: str,
        images: Sequence[ImageFeatures],
        valid: np.ndarray,
        query_embeds: np.ndarray,
        query_mask: np.ndarray,
    ) -> list[Selected]:
        question = {"valid": valid, "query_embeds": query_embeds, "query_mask": query_mask}
        inputs = select_inputs(images, valid, functools.partial(stack, self._cuda), DeviceArray.rows)
        inputs |= {name: self._upload(array) for name, array in question.items()}
        out = self._run(graph, inputs, {"batch": len(valid), "units": len(valid)})
        host = {name: self._cuda.download(out[name]) for name in ("kept", "is_top", "scores")}
        self._cuda.synchronize()
        return selected_of(out | host, [*images[0].streams], len(images), DeviceArray.row)

    @_one_at_a_time
    def assemble(self, rows: Sequence[Sequence[Segment]]) -> dict[str, DeviceArray]:
        lengths = [sum(map(len, row)) for row in rows]
        sizes = {"batch": len(rows), "sequence": max(lengths)}
        return {
            spec.name: self._assembled(spec.name, rows, shape_of(spec, sizes), NUMPY_DTYPES[spec.dtype])
            for spec in self._token_specs
        }

    def _assembled(
        self, name: str, rows: Sequence[Sequence[Segment]], shape: tuple[int, ...], dtype: Any
    ) -> DeviceArray:
        """One tensor [B,S,width] of the segments that have it, zeros elsewhere."""
        whole = self._cuda.empty(dtype, *shape)
        for b, row in enumerate(rows):
            at = 0
            for segment in filter(len, row):
                place = whole.row(b).rows(at, at + len(segment))
                tensor = segment.tensors.get(name)
                if tensor is None:
                    self._cuda.zero(place)
                elif isinstance(tensor, DeviceArray):
                    self._cuda.copy(tensor.rows(segment.start, segment.stop), place)
                else:
                    self._cuda.upload(np.ascontiguousarray(tensor[segment.start : segment.stop]), place)
                at += len(segment)
            # Padding is never attended to, but what is masked has to be finite all the same.
            self._cuda.zero(whole.row(b).rows(at, shape[1]))
        return whole

    @_one_at_a_time
    def new_cache(self, batch: int, capacity: int) -> KvCache:
        """Of the engines' own capacity, whatever is asked for: TensorRT takes no other."""
        check_batch(batch, self.limits)
        if self._spare and self._spare[-1][0].batch == batch:
            memory, step = self._spare.pop()
            memory.clear()
        else:
            self._spare.clear()  # of another batch: that memory is wanted now
            memory = KvMemory(self._cuda, self._bundle, batch, self._engines.manifest.flags.max_seq)
            # Scratch memory of its own: the graph replays its address.
            context = self._engine(DECODER).context(Scratch(self._cuda), fixed_shapes=True)
            step = Step(self._cuda, self._bundle, context, memory)
        cache = KvCache(memory, step)
        weakref.finalize(cache, self._spare.append, (memory, step)).atexit = False
        return cache

    @_one_at_a_time
    def decode(
        self,
        tensors: Mapping[str, Array],
        position_ids: np.ndarray,
        cache_position: np.ndarray,
        num_tokens: np.ndarray,
        cache: KvCache,
    ) -> np.ndarray:
        memory = cache.memory
        inputs = {"position_ids": position_ids, "cache_position": cache_position, "num_tokens": num_tokens}
        length = tensors["inputs_embeds"].shape[1]
        end = int((cache_position + num_tokens).max())
        if end > self.limits.max_seq:
            more = self._larger(max_seq=end)
            raise FlashVLMError(f"{end} tokens: these engines hold {self.limits.max_seq}; ask for fewer, or {more}")
        memory.reserve(cache_position, length)
        tensors = with_streams(tensors, self._token_specs)
        if length == 1 and not any(isinstance(tensor, DeviceArray) for tensor in tensors.values()):
            return cache.step.run(tensors | inputs, cache_position)
        device = {
            name: tensor if isinstance(tensor, DeviceArray) else self._upload(tensor)
            for name, tensor in (tensors | inputs).items()
        }
        sizes = {"batch": memory.batch, "sequence": length, "capacity": self.limits.max_seq}
        present = memory.present(length)
        out = self._run(DECODER, device | memory.past, sizes, present)
        memory.place(present, cache_position)
        logits = self._cuda.download(out["logits"])
        self._cuda.synchronize()
        return logits

    def close(self) -> None:
        self._spare.clear()
        self._contexts.clear()
        self._loaded.clear()
        self._cuda.close()

    def _run(
        self,
        name: str,
        inputs: dict[str, DeviceArray],
        sizes: dict[str, int],
        given: dict[str, DeviceArray] | None = None,
    ) -> dict[str, DeviceArray]:
        """Runs a graph into new memory, but for the outputs that are ``given``."""
        context = self._context(name)
        outputs = {
            spec.name: self._cuda.empty(NUMPY_DTYPES[spec.dtype], *shape_of(spec, sizes))
            for spec in self._bundle.graph(name).outputs
            if given is None or spec.name not in given
        }
        context.bind(inputs | outputs | (given or {}))
        context.enqueue()
        return outputs

    def _upload(self, array: np.ndarray) -> DeviceArray:
        return self._cuda.upload(np.ascontiguousarray(array))

    def _engine(self, name: str) -> Engine:
        if name not in self._loaded:
            self._loaded[name] = Engine(self._trt, self._cuda, self._bundle, self._engines, name, self._verify)
        return self._loaded[name]

    def _context(self, name: str) -> Context:
        if name not in self._contexts:
            self._contexts[name] = self._engine(name).context(self._scratch)
        return self._contexts[name]

    def _larger(self, **sizes: int) -> str:
        exported = self._bundle.manifest.model.max_seq
        if sizes.get("max_seq", 0) > exported:
            return f"export with --max-seq {sizes['max_seq']}"
        flags = self._engines.manifest.flags
        wanted = {name: max(size, getattr(flags, name)) for name, size in sizes.items()}
        return f"build larger ones with: {self._engines.rebuild(**wanted)}"
