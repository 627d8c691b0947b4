"""Streams weights from a checkpoint into ONNX external data, transposed or cast on the way, one tensor at a time.

Peak memory is two copies of the largest tensor that needs a transpose or a cast; the rest passes through in blocks.
Reading and transposing overlap with hashing and writing, which run on a second thread.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import onnx_ir as ir
import torch

from flashvlm.errors import CheckpointError, FlashVLMError
from flashvlm.manifest import FileSpec
from flashvlm_export.checkpoint import ITEMSIZE, StoredTensor
from flashvlm_export.graph.modules import TORCH_DTYPES

ALIGNMENT = 4096  # ONNX Runtime maps external data by page
BLOCK = 8 << 20
IR_DTYPES = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Placement:
    """One tensor's bytes in a data file: row-major, transposed with respect to the checkpoint or not."""

    initializer: str
    source: StoredTensor
    transposed: bool
    dtype: str
    offset: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape[::-1] if self.transposed else self.source.shape

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEMSIZE[self.dtype]


def place(tensors: Iterable[tuple[str, StoredTensor, bool]], dtype: str) -> list[Placement]:
    """Lays out (initializer, source, transposed) one after the other, page-aligned."""
    placements: list[Placement] = []
    offset = 0
    for initializer, source, transposed in tensors:
        placements.append(Placement(initializer, source, transposed, dtype, offset))
        offset += -(-placements[-1].nbytes // ALIGNMENT) * ALIGNMENT
    return placements


def renamed(placement: Placement, initializer: str) -> Placement:
    """The same bytes under another graph's name for them."""
    return dataclasses.replace(placement, initializer=initializer)


def reference(graph: ir.Graph, placements: Sequence[Placement], data: Path) -> None:
    """Points the initializers of a graph at their bytes in ``data``, a file beside the graph."""
    for p in placements:
        value = graph.initializers[p.initializer]
        assert value.shape is not None
        if tuple(value.shape) != p.shape:
            raise AssertionError(f"{p.initializer}: graph has {value.shape}, data {p.shape}")
        value.const_value = ir.ExternalTensor(
            data.name,
            p.offset,
            p.nbytes,
            IR_DTYPES[p.dtype],
            shape=ir.Shape(p.shape),
            name=p.initializer,
            base_dir=data.parent,
        )


def write(
    placements: Sequence[Placement], path: Path, header: bytes = b"", on_bytes: Progress = lambda _: None
) -> FileSpec:
    """Writes a data file: the header, then every tensor at header + offset. Returns its size and SHA-256.

    Raises:
        FlashVLMError: the disk is full or the file cannot be written.
        CheckpointError: a source file changed or ended early.
    """
    digest = hashlib.sha256()
    position = 0

    def emit(block: memoryview | bytes) -> None:
        nonlocal position
        digest.update(block)
        position += len(block)
        left = memoryview(block)
        while left:  # one call takes at most 2 GiB
            left = left[file.write(left) :]

    with path.open("wb", buffering=0) as raw, ThreadPoolExecutor(max_workers=1) as writer:
        file = raw
        pending: list[Future[None]] = []
        try:
            if size := len(header) + (placements[-1].offset + placements[-1].nbytes if placements else 0):
                # Doubles the speed of ext4 (no delayed allocation), and a full disk is found out before the work.
                os.posix_fallocate(file.fileno(), 0, size)
            for block in _blocks(placements, header):
                pending.append(writer.submit(emit, block))
                if len(pending) > 1:  # at most one block waits while one is written
                    pending.pop(0).result()
                on_bytes(len(block))
            for future in pending:
                future.result()
        except OSError as error:
            writer.shutdown(cancel_futures=True)
            raise FlashVLMError(
                f"cannot write {path}: {error.strerror or error}; free space or choose another --out"
            ) from None
    return FileSpec(size=position, sha256=digest.hexdigest())


class _Scratch:
    """Buffers reused from tensor to tensor: a fresh one costs a page fault every 4 KiB.

    The last block handed to the writer may still be in flight, so what is handed over alternates between two.
    """

    def __init__(self) -> None:
        self._buffers = {"read": bytearray(), "even": bytearray(), "odd": bytearray()}
        self._turn = "even"

    def read(self, nbytes: int) -> memoryview:
        return self._take("read", nbytes)

    def hand_over(self, nbytes: int) -> memoryview:
        self._turn = "odd" if self._turn == "even" else "even"
        return self._take(self._turn, nbytes)

    def _take(self, name: str, nbytes: int) -> memoryview:
        if len(self._buffers[name]) < nbytes:
            self._buffers[name] = bytearray(nbytes)
        return memoryview(self._buffers[name])[:nbytes]


def _blocks(placements: Sequence[Placement], header: bytes) -> Iterator[memoryview | bytes]:
    if header:
        yield header
    position = 0
    scratch = _Scratch()
    with ExitStack() as stack:
        files = {
            path: stack.enter_context(path.open("rb", buffering=0)) for path in {p.source.file for p in placements}
        }
        for p, following in zip(placements, [*placements[1:], None], strict=True):
            if following is not None:  # the kernel reads the next tensor while this one is transposed and written
                ahead = following.source
                os.posix_fadvise(files[ahead.file].fileno(), ahead.offset, ahead.nbytes, os.POSIX_FADV_WILLNEED)
            if p.offset > position:
                yield bytes(p.offset - position)
            file = files[p.source.file]
            file.seek(p.source.offset)
            changed = p.transposed or p.dtype != p.source.dtype
            yield from _whole(p, file, scratch) if changed else _pieces(p.source, file, scratch)
            # Its pages are not needed again, and dropping them is cheaper than having the kernel look for victims:
            # a fifth of the time when checkpoint and bundle together outgrow memory.
            os.posix_fadvise(file.fileno(), p.source.offset, p.source.nbytes, os.POSIX_FADV_DONTNEED)
            position = p.offset + p.nbytes


def _pieces(source: StoredTensor, file: FileIO, scratch: _Scratch) -> Iterator[memoryview]:
    """The bytes as stored, in blocks: no tensor is held."""
    for start in range(0, source.nbytes, BLOCK):
        block = scratch.hand_over(min(BLOCK, source.nbytes - start))
        _read_exactly(file, block, source)
        yield block


def _whole(p: Placement, file: FileIO, scratch: _Scratch) -> Iterator[memoryview]:
    """The bytes transposed or cast."""
    raw, ready = scratch.read(p.source.nbytes), scratch.hand_over(p.nbytes)
    _read_exactly(file, raw, p.source)
    stored = torch.frombuffer(raw, dtype=TORCH_DTYPES[p.source.dtype]).view(p.source.shape)
    result = torch.frombuffer(ready, dtype=TORCH_DTYPES[p.dtype]).view(p.shape)
    result.copy_(stored.t() if p.transposed else stored)
    if p.dtype != p.source.dtype and torch.isfinite(stored).all() and not torch.isfinite(result).all():
        raise CheckpointError(f"{p.source.name} has values beyond {p.dtype}; export with --dtype bfloat16 or float32")
    yield ready  # whole: the next tensor is read and transposed while this one is hashed and written


def _read_exactly(file: FileIO, target: memoryview, source: StoredTensor) -> None:
    filled = 0
    while filled < len(target):
        count = file.readinto(target[filled:])
        if not count:
            raise CheckpointError(
                f"{source.file} ended inside {source.name}; it changed during the export, start again"
            )
        filled += count
