"""The CUDA of a session: one GPU, one stream, memory, copies, graphs. Through the driver API of NVIDIA's cuda-bindings.

All work goes through one stream, in order: memory that is handed back may be handed out again at once, and nothing here
waits but ``synchronize`` and what says so. Written against cuda-bindings 13 and 12; it has not run on a GPU yet.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flashvlm.engines import is_jetson
from flashvlm.errors import FlashVLMError
from flashvlm.sizes import format_size

log = logging.getLogger(__name__)

ALIGNMENT = 512  # bytes; what TensorRT asks of scratch memory is 256
COMPUTE_CAPABILITY = ("CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR", "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR")


class Buffer:
    """Device memory. Goes back to its GPU's pool with the last reference to it."""

    def __init__(self, address: int, size: int, release: Callable[[int, int], None]) -> None:
        self.address, self.size = address, size
        weakref.finalize(self, release, address, size).atexit = False


@dataclass(frozen=True, eq=False)
class DeviceArray:
    """A contiguous tensor in device memory: whole buffers, or rows of them."""

    buffer: Buffer
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int = 0  # bytes

    @property
    def address(self) -> int:
        return self.buffer.address + self.offset

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def row(self, index: int) -> DeviceArray:
        """[index] of the first dimension."""
        one = DeviceArray(self.buffer, self.dtype, self.shape[1:])
        return DeviceArray(self.buffer, self.dtype, self.shape[1:], self.offset + index * one.nbytes)

    def rows(self, start: int, end: int) -> DeviceArray:
        """[start:end] of the first dimension."""
        return DeviceArray(self.buffer, self.dtype, (end - start, *self.shape[1:]), self.row(start).offset)

    def reshape(self, *shape: int) -> DeviceArray:
        return DeviceArray(self.buffer, self.dtype, shape, self.offset)


class Cuda:
    """One GPU of this process, by number.

    Raises:
        FlashVLMError: cuda-bindings, the driver or the GPU are missing.
    """

    def __init__(self, device: int = 0) -> None:
        self._driver = _open()
        count = self._call("cuDeviceGetCount")
        if not 0 <= device < count:
            raise FlashVLMError(f"device {device}: this machine has {count} NVIDIA GPU(s), numbered from 0")
        handle = self._call("cuDeviceGet", device)
        kinds = self._driver.CUdevice_attribute
        major, minor = (self._call("cuDeviceGetAttribute", getattr(kinds, name), handle) for name in COMPUTE_CAPABILITY)
        self.capability = f"{major}.{minor}"
        self.name = _text(self._call("cuDeviceGetName", 128, handle))
        # TensorRT works in the primary context of a device, as everything made with the runtime API does.
        self._context = self._call("cuDevicePrimaryCtxRetain", handle)
        self.activate()
        self._stream = self._call("cuStreamCreate", int(self._driver.CUstream_flags.CU_STREAM_NON_BLOCKING))
        self.stream = int(self._stream)
        self._free: dict[int, list[int]] = {}  # size -> addresses
        self._sources: list[np.ndarray] = []  # of copies that may still be under way
        self._held = _Held(self._driver, handle, self._context, self._stream)
        self.close = weakref.finalize(self, self._held.free)
        self.close.atexit = False  # the driver may be gone by then, and takes everything with it

    def activate(self) -> None:
        """Makes this GPU the calling thread's, before any other call."""
        self._call("cuCtxSetCurrent", self._context)

    # --- memory ---

    def allocate(self, size: int) -> Buffer:
        """At least ``size`` bytes, of unknown content."""
        # Size classes at most an eighth apart: prompts of any length share buffers.
        step = max(ALIGNMENT, 1 << max(size.bit_length() - 4, 0))
        size = max(-(-size // step), 1) * step
        free = self._free.get(size)
        address = free.pop() if free else self._reserve(size)
        return Buffer(address, size, self._release)

    def empty(self, dtype: Any, *shape: int) -> DeviceArray:
        dtype = np.dtype(dtype)
        return DeviceArray(self.allocate(math.prod(shape) * dtype.itemsize), dtype, shape)

    def _release(self, address: int, size: int) -> None:
        self._free.setdefault(size, []).append(address)

    def _reserve(self, size: int) -> int:
        try:
            return self._held.allocate(size)
        except OutOfMemoryError:
            self.trim()
        try:
            return self._held.allocate(size)
        except OutOfMemoryError as error:
            free, total = self._call("cuMemGetInfo")
            raise OutOfMemoryError(
                f"{error}: {format_size(size)} wanted, {format_size(free)} of {format_size(total)} free on "
                f"{self.name}; build engines with a smaller --max-seq or --max-batch, or free memory of other programs"
            ) from None

    def trim(self) -> None:
        """Frees what the pool holds for reuse."""
        self.synchronize()
        for addresses in self._free.values():
            for address in addresses:
                self._call("cuMemFree", address)
                self._held.memory.discard(address)
        self._free.clear()

    def pinned(self, dtype: Any, *shape: int) -> np.ndarray:
        """A host array that the GPU copies from and to by itself; content unknown. Freed with the last view of it."""
        dtype = np.dtype(dtype)
        size = math.prod(shape) * dtype.itemsize
        address = int(self._call("cuMemAllocHost", size))
        memory = (ctypes.c_uint8 * size).from_address(address)
        weakref.finalize(memory, self._driver.cuMemFreeHost, address).atexit = False
        return np.frombuffer(memory, dtype).reshape(shape)

    # --- copies, in the order of the stream ---

    def upload(self, source: np.ndarray, target: DeviceArray | None = None) -> DeviceArray:
        """Host to device; into new memory if no target is given. ``source`` is contiguous."""
        if target is None:
            target = self.empty(source.dtype, *source.shape)
        _same(source, target)
        self._sources.append(source)
        self._call("cuMemcpyHtoDAsync", target.address, source.ctypes.data, target.nbytes, self._stream)
        return target

    def download(self, source: DeviceArray, target: np.ndarray | None = None) -> np.ndarray:
        """Device to host; the values are there after ``synchronize``."""
        if target is None:
            target = np.empty(source.shape, source.dtype)
        _same(target, source)
        self._call("cuMemcpyDtoHAsync", target.ctypes.data, source.address, source.nbytes, self._stream)
        return target

    def copy(self, source: DeviceArray, target: DeviceArray) -> None:
        _same(source, target)
        self._call("cuMemcpyDtoDAsync", target.address, source.address, source.nbytes, self._stream)

    def copy_rows(self, source: int, source_pitch: int, target: int, target_pitch: int, width: int, rows: int) -> None:
        """``rows`` times ``width`` bytes, each row ``pitch`` bytes after the one before."""
        if source_pitch == width == target_pitch:
            self._call("cuMemcpyDtoDAsync", target, source, width * rows, self._stream)
            return
        kind = self._driver.CUmemorytype.CU_MEMORYTYPE_DEVICE
        copy = self._driver.CUDA_MEMCPY2D()
        copy.srcMemoryType = copy.dstMemoryType = kind
        copy.srcDevice, copy.srcPitch = source, source_pitch
        copy.dstDevice, copy.dstPitch = target, target_pitch
        copy.WidthInBytes, copy.Height = width, rows
        self._call("cuMemcpy2DAsync", copy, self._stream)

    def zero(self, target: DeviceArray) -> None:
        if target.nbytes:
            self._call("cuMemsetD8Async", target.address, 0, target.nbytes, self._stream)

    def zero_rows(self, target: int, pitch: int, width: int, rows: int) -> None:
        """The first ``width`` bytes of ``rows`` rows."""
        if width:
            self._call("cuMemsetD2D8Async", target, pitch, 0, width, rows, self._stream)

    def synchronize(self) -> None:
        """Waits for everything asked for so far."""
        self._call("cuStreamSynchronize", self._stream)
        self._sources.clear()

    # --- graphs ---

    def capture(self, work: Callable[[], None]) -> Graph | None:
        """What ``work`` puts on the stream, as one launch to be repeated; nothing of it runs now.

        ``work`` may not allocate. None if it cannot be captured, which costs time only and is logged for debugging.
        """
        driver = self._driver
        graph = None
        try:
            # Thread-local: what other threads do with the GPU meanwhile is their own affair.
            self._call(
                "cuStreamBeginCapture", self._stream, driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
            )
            try:
                work()
            finally:
                graph = self._call("cuStreamEndCapture", self._stream)
            executable = self._call("cuGraphInstantiate", graph, 0)
        except FlashVLMError as error:
            log.debug("no CUDA graph, running without: %s", error)
            return None
        finally:
            if graph is not None:
                driver.cuGraphDestroy(graph)
        return Graph(driver, executable, self._stream)

    def _call(self, name: str, *arguments: Any) -> Any:
        """A function of the driver: its value, its values, or a refusal with the driver's own words."""
        return _call(self._driver, name, *arguments)


class Graph:
    """A captured piece of work; gone with the last reference to it."""

    def __init__(self, driver: Any, executable: Any, stream: Any) -> None:
        self._driver, self._executable, self._stream = driver, executable, stream
        weakref.finalize(self, driver.cuGraphExecDestroy, executable).atexit = False

    def launch(self) -> None:
        _call(self._driver, "cuGraphLaunch", self._executable, self._stream)


class _Held:
    """What is to be given back to the driver when a ``Cuda`` is closed or forgotten."""

    def __init__(self, driver: Any, device: Any, context: Any, stream: Any) -> None:
        self.driver, self.device, self.context, self.stream = driver, device, context, stream
        self.memory: set[int] = set()

    def allocate(self, size: int) -> int:
        address = int(_call(self.driver, "cuMemAlloc", size))
        self.memory.add(address)
        return address

    def free(self) -> None:
        driver = self.driver
        try:
            _call(driver, "cuCtxSetCurrent", self.context)
            _call(driver, "cuStreamSynchronize", self.stream)
        except FlashVLMError as error:  # after a failed kernel nothing can be freed but by ending the process
            log.debug("not freed: %s", error)
            return
        for address in self.memory:
            driver.cuMemFree(address)
        driver.cuStreamDestroy(self.stream)
        driver.cuDevicePrimaryCtxRelease(self.device)


class OutOfMemoryError(FlashVLMError):
    """The GPU has no room for what was asked."""


def _call(driver: Any, name: str, *arguments: Any) -> Any:
    status, *values = getattr(driver, name)(*arguments)
    if status != driver.CUresult.CUDA_SUCCESS:
        if status == driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            raise OutOfMemoryError("the GPU is out of memory")
        words = _text(driver.cuGetErrorString(status)[1])
        raise FlashVLMError(f"CUDA failed in {name}: {words} ({status.name})")
    return values[0] if len(values) == 1 else tuple(values)


def _text(raw: bytes) -> str:
    return raw.split(b"\0")[0].decode(errors="replace")


def _same(host: Any, device: Any) -> None:
    if host.nbytes != device.nbytes or host.dtype != device.dtype:
        raise FlashVLMError(
            f"a copy between {host.dtype} {list(host.shape)} and {device.dtype} {list(device.shape)}: sizes differ"
        )


def stack(cuda: Cuda, arrays: Sequence[DeviceArray]) -> DeviceArray:
    """[...] each -> [B,...]; one array is not copied."""
    first = arrays[0]
    if len(arrays) == 1:
        return first.reshape(1, *first.shape)
    out = cuda.empty(first.dtype, len(arrays), *first.shape)
    for b, array in enumerate(arrays):
        cuda.copy(array, out.row(b))
    return out


def import_driver() -> Any:
    """NVIDIA's bindings of the CUDA driver, or a refusal with the install line for this platform."""
    try:
        return importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        # JetPack's CUDA is 12: bindings of 13 ask for a newer driver.
        line = "pip install 'cuda-bindings<13'" if is_jetson() else "pip install cuda-bindings"
        raise FlashVLMError(f"cuda-bindings cannot be imported ({error}); install it with: {line}") from None


def _open() -> Any:
    driver = import_driver()
    try:
        status = driver.cuInit(0)[0]
        problem = None if status == driver.CUresult.CUDA_SUCCESS else status.name
    except (RuntimeError, OSError, ImportError):  # the bindings look for libcuda when first called
        problem = "the NVIDIA driver is not installed"
    if problem is not None:
        raise FlashVLMError(
            f"no NVIDIA GPU can be used on this machine ({problem}); check nvidia-smi, or take --backend onnxruntime"
        )
    return driver
