"""A stand-in for the CUDA driver on host memory, for tests of the TensorRT session.

It keeps the driver's rules and asserts them: every copy lies within live memory, captures allocate nothing, wait for
nothing and copy from and to pinned memory only. Fresh and freed memory is poisoned.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable
from enum import Enum, IntEnum
from types import SimpleNamespace
from typing import Any

import numpy as np

from flashvlm.sessions import cuda

POISON = 0xFF  # NaN in every float type


class Status(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_STREAM_CAPTURE_INVALIDATED = 901


class Driver:
    """The calls of cuda.bindings.driver that a session makes, on host memory."""

    CUresult = Status
    CUdevice_attribute = Enum("CUdevice_attribute", cuda.COMPUTE_CAPABILITY)
    CUstream_flags = IntEnum("CUstream_flags", {"CU_STREAM_NON_BLOCKING": 1})
    CUmemorytype = Enum("CUmemorytype", ["CU_MEMORYTYPE_DEVICE"])
    CUstreamCaptureMode = Enum("CUstreamCaptureMode", ["CU_STREAM_CAPTURE_MODE_THREAD_LOCAL"])
    CUDA_MEMCPY2D = SimpleNamespace

    def __init__(self, capability: str = "8.9", gpus: int = 1) -> None:
        self.capability, self.gpus = capability, gpus
        self.memory: dict[int, np.ndarray] = {}  # device allocations by address
        self.host: dict[int, np.ndarray] = {}  # pinned ones
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.downloads: list[int] = []  # sizes
        self.recording: list[Callable[[], None]] | None = None
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.room = 1 << 30
        self.refuse_capture = False

    def view(self, address: int, size: int) -> np.ndarray:
        """Device memory [size], if it lies within one allocation."""
        for start, block in self.memory.items():
            if start <= address and address + size <= start + len(block):
                return block[address - start : address - start + size]
        raise AssertionError(f"{size} bytes at {address} are no device memory")

    def do(self, work: Callable[[], None]) -> tuple[Status]:
        """Now, or when the graph that is being captured is launched."""
        if self.recording is None:
            work()
        else:
            self.recording.append(work)
        return (Status.CUDA_SUCCESS,)

    def _count(self, name: str) -> None:
        self.calls[name] += 1

    # --- device and memory ---

    def cuInit(self, flags: int) -> tuple[Status]:  # noqa: N802
        return (Status.CUDA_SUCCESS if self.gpus else Status.CUDA_ERROR_NO_DEVICE,)

    def cuDeviceGetCount(self) -> tuple[Status, int]:  # noqa: N802
        return Status.CUDA_SUCCESS, self.gpus

    def cuDeviceGet(self, ordinal: int) -> tuple[Status, int]:  # noqa: N802
        return Status.CUDA_SUCCESS, ordinal

    def cuDeviceGetName(self, length: int, device: int) -> tuple[Status, bytes]:  # noqa: N802
        return Status.CUDA_SUCCESS, b"Stand-in GPU" + bytes(length - 12)

    def cuDeviceGetAttribute(self, attribute: Enum, device: int) -> tuple[Status, int]:  # noqa: N802
        return Status.CUDA_SUCCESS, int(self.capability.split(".")[attribute.name.endswith("MINOR")])

    def cuDevicePrimaryCtxRetain(self, device: int) -> tuple[Status, str]:  # noqa: N802
        self._count("retain")
        return Status.CUDA_SUCCESS, "context"

    def cuDevicePrimaryCtxRelease(self, device: int) -> tuple[Status]:  # noqa: N802
        self._count("release")
        return (Status.CUDA_SUCCESS,)

    def cuCtxSetCurrent(self, context: str) -> tuple[Status]:  # noqa: N802
        return (Status.CUDA_SUCCESS,)

    def cuGetErrorString(self, status: Status) -> tuple[Status, bytes]:  # noqa: N802
        return Status.CUDA_SUCCESS, status.name.encode()

    def cuMemGetInfo(self) -> tuple[Status, int, int]:  # noqa: N802
        return Status.CUDA_SUCCESS, self.room, 1 << 30

    def cuMemAlloc(self, size: int) -> tuple[Any, ...]:  # noqa: N802
        assert self.recording is None, "allocation within a capture"
        if size > self.room:
            return (Status.CUDA_ERROR_OUT_OF_MEMORY, None)
        self.room -= size
        self._count("allocate")
        raw = np.full(size + 512, POISON, np.uint8)
        block = raw[-raw.ctypes.data % 512 :][:size]
        self.memory[block.ctypes.data] = block
        return Status.CUDA_SUCCESS, block.ctypes.data

    def cuMemFree(self, address: int) -> tuple[Status]:  # noqa: N802
        assert self.recording is None
        block = self.memory.pop(address)
        block[:] = POISON
        self.room += len(block)
        return (Status.CUDA_SUCCESS,)

    def cuMemAllocHost(self, size: int) -> tuple[Status, int]:  # noqa: N802
        block = np.full(size, POISON, np.uint8)
        self.host[block.ctypes.data] = block
        return Status.CUDA_SUCCESS, block.ctypes.data

    def cuMemFreeHost(self, address: int) -> tuple[Status]:  # noqa: N802
        del self.host[address]
        return (Status.CUDA_SUCCESS,)

    # --- copies ---

    def cuMemcpyHtoDAsync(self, target: int, source: int, size: int, stream: int) -> tuple[Status]:  # noqa: N802
        def copy() -> None:
            self.bytes["to device"] += size
            self.view(target, size)[:] = np.frombuffer(ctypes.string_at(source, size), np.uint8)

        assert self.recording is None or source in self.host, "a capture copies from pageable memory"
        return self.do(copy)

    def cuMemcpyDtoHAsync(self, target: int, source: int, size: int, stream: int) -> tuple[Status]:  # noqa: N802
        def copy() -> None:
            self.bytes["to host"] += size
            self.downloads.append(size)
            ctypes.memmove(target, self.view(source, size).ctypes.data, size)

        assert self.recording is None or target in self.host, "a capture copies to pageable memory"
        return self.do(copy)

    def cuMemcpyDtoDAsync(self, target: int, source: int, size: int, stream: int) -> tuple[Status]:  # noqa: N802
        def copy() -> None:
            self.view(target, size)[:] = self.view(source, size)

        return self.do(copy)

    def cuMemcpy2DAsync(self, copy: Any, stream: int) -> tuple[Status]:  # noqa: N802
        self._count("copy rows")

        def rows() -> None:
            for row in range(copy.Height):
                source = self.view(copy.srcDevice + row * copy.srcPitch, copy.WidthInBytes)
                self.view(copy.dstDevice + row * copy.dstPitch, copy.WidthInBytes)[:] = source

        return self.do(rows)

    def cuMemsetD8Async(self, target: int, value: int, size: int, stream: int) -> tuple[Status]:  # noqa: N802
        return self.do(lambda: self.view(target, size).fill(value))

    def cuMemsetD2D8Async(  # noqa: N802
        self, target: int, pitch: int, value: int, width: int, height: int, stream: int
    ) -> tuple[Status]:
        def rows() -> None:
            for row in range(height):
                self.view(target + row * pitch, width).fill(value)

        return self.do(rows)

    # --- stream and graphs ---

    def cuStreamCreate(self, flags: int) -> tuple[Status, int]:  # noqa: N802
        return Status.CUDA_SUCCESS, 7

    def cuStreamDestroy(self, stream: int) -> tuple[Status]:  # noqa: N802
        return (Status.CUDA_SUCCESS,)

    def cuStreamSynchronize(self, stream: int) -> tuple[Status]:  # noqa: N802
        assert self.recording is None, "waiting within a capture"
        return (Status.CUDA_SUCCESS,)

    def cuStreamBeginCapture(self, stream: int, mode: Enum) -> tuple[Status]:  # noqa: N802
        self.recording = []
        return (Status.CUDA_SUCCESS,)

    def cuStreamEndCapture(self, stream: int) -> tuple[Status, Any]:  # noqa: N802
        recorded, self.recording = self.recording, None
        if self.refuse_capture:
            return Status.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, None
        return Status.CUDA_SUCCESS, recorded

    def cuGraphInstantiate(self, graph: Any, flags: int) -> tuple[Status, int]:  # noqa: N802
        self._count("capture")
        self.graphs[self.calls["capture"]] = graph
        return Status.CUDA_SUCCESS, self.calls["capture"]

    def cuGraphDestroy(self, graph: Any) -> tuple[Status]:  # noqa: N802
        return (Status.CUDA_SUCCESS,)

    def cuGraphExecDestroy(self, executable: int) -> tuple[Status]:  # noqa: N802
        del self.graphs[executable]
        return (Status.CUDA_SUCCESS,)

    def cuGraphLaunch(self, executable: int, stream: int) -> tuple[Status]:  # noqa: N802
        self._count("launch")
        for work in self.graphs[executable]:
            work()
        return (Status.CUDA_SUCCESS,)
