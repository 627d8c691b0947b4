"""The KV cache of one answer in device memory, and the decode step that belongs to it.

A CUDA graph replays addresses: the graph of a step is of one cache, and the next answer takes both over.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flashvlm.bundle import Bundle
from flashvlm.dtypes import NUMPY_DTYPES
from flashvlm.graph_io import DECODER, is_past, present
from flashvlm.sessions.contract import check, shape_of
from flashvlm.sessions.cuda import Cuda, DeviceArray, Graph
from flashvlm.sessions.engine import Context


class KvMemory:
    """Keys and values of every layer, ``past``: [B,Hkv,C,d] each, zeroed.

    Where the cache is written in place, present and past are one memory. Else the decoder returns new slots,
    [B,Hkv,S,d], and ``place`` copies them to where they belong.
    """

    def __init__(self, cuda: Cuda, bundle: Bundle, batch: int, capacity: int) -> None:
        self.batch = batch
        self._cuda, self._capacity = cuda, capacity
        self._in_place = bundle.manifest.model.cache_in_place
        sizes = {"batch": batch, "capacity": capacity}
        self.past = {
            spec.name: cuda.empty(NUMPY_DTYPES[spec.dtype], *shape_of(spec, sizes))
            for spec in bundle.graph(DECODER).inputs
            if is_past(spec)
        }
        self._written = capacity  # rows that may hold something; in new memory, all
        self.clear()

    def clear(self) -> None:
        """Zeros what was written: masked rows still take part as zero times their content, which has to be finite."""
        for array in self.past.values():
            pitch, rows = _heads(array)
            self._cuda.zero_rows(array.address, pitch, pitch // self._capacity * self._written, rows)
        self._written = 0

    def reserve(self, cache_position: np.ndarray, length: int) -> None:
        """Told before a chunk of ``length`` tokens is written at these slots."""
        self._written = max(self._written, min(int(cache_position.max()) + length, self._capacity))

    def present(self, length: int) -> dict[str, DeviceArray]:
        """Where the decoder puts a chunk of ``length`` tokens."""
        if self._in_place:
            return {present(name): array for name, array in self.past.items()}
        new = {}
        for name, array in self.past.items():
            batch, heads, _, size = array.shape
            new[present(name)] = self._cuda.empty(array.dtype, batch, heads, length, size)
        return new

    def place(self, new: dict[str, DeviceArray], cache_position: np.ndarray) -> None:
        """Copies new rows to each row's slot, padding included: it is overwritten later."""
        if self._in_place:
            return
        for name, array in self.past.items():
            source = new[present(name)]
            (pitch, _), (source_pitch, _) = _heads(array), _heads(source)
            token = pitch // self._capacity  # bytes
            for b, slot in enumerate(map(int, cache_position)):
                width = min(source_pitch, (self._capacity - slot) * token)
                at = array.row(b).address + slot * token
                self._cuda.copy_rows(source.row(b).address, source_pitch, at, pitch, width, array.shape[1])


def _heads(array: DeviceArray) -> tuple[int, int]:
    """Of [B,H,S,d]: bytes of one head's [S,d], and how many there are."""
    batch, heads = array.shape[:2]
    return array.nbytes // (batch * heads), batch * heads


class Step:
    """One token a row at fixed shapes and addresses: copies in, network, logits out, as one CUDA graph.

    The first run is not captured: TensorRT settles into its shapes in it.
    """

    def __init__(self, cuda: Cuda, bundle: Bundle, context: Context, memory: KvMemory) -> None:
        self._cuda, self._context, self._memory = cuda, context, memory
        decoder = bundle.graph(DECODER)
        specs = [spec for spec in decoder.inputs if not is_past(spec)]
        logits = next(spec for spec in decoder.outputs if spec.name == "logits")
        self._inputs = specs
        shapes = {s.name: shape_of(s, {"batch": memory.batch, "sequence": 1}) for s in (*specs, logits)}
        dtypes = {s.name: NUMPY_DTYPES[s.dtype] for s in (*specs, logits)}
        self._host = {name: cuda.pinned(dtypes[name], *shape) for name, shape in shapes.items()}
        self._device = {name: cuda.empty(dtypes[name], *shape) for name, shape in shapes.items()}
        self._new = memory.present(1)
        context.bind(self._device | memory.past | self._new)
        self._graph: Graph | None = None
        self._tried = False

    def run(self, inputs: dict[str, np.ndarray], cache_position: np.ndarray) -> np.ndarray:
        """inputs_embeds [B,1,D], streams [B,1,Ds], position_ids [B,1] or [B,3,1], cache_position [B], num_tokens [B]
        -> logits [B,V]."""
        symbols = {"batch": self._memory.batch, "sequence": 1}
        for spec in self._inputs:
            check(spec, inputs[spec.name].dtype, inputs[spec.name].shape, symbols)
            self._host[spec.name][...] = inputs[spec.name]
        if self._graph is not None:
            self._graph.launch()
        else:
            self._work()
        self._memory.place(self._new, cache_position)
        self._cuda.synchronize()
        if not self._tried:
            self._tried = True
            self._graph = self._cuda.capture(self._work) if self._context.is_capturable() else None
        return self._host["logits"].copy()

    def _work(self) -> None:
        for spec in self._inputs:
            self._cuda.upload(self._host[spec.name], self._device[spec.name])
        self._context.enqueue()
        self._cuda.download(self._device["logits"], self._host["logits"])


@dataclass(eq=False)
class KvCache:
    """What an answer holds: a cache's memory and its decode step. When it is gone, another answer may have them."""

    memory: KvMemory
    step: Step
