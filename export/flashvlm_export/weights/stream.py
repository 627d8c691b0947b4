"""Streams weights from a checkpoint into the data files of a bundle, one tensor at a time.

Peak memory is the largest parameter that is not stored as the checkpoint has it, and two stripes of what is made of it;
the rest passes through in blocks. Reading and making overlap with hashing and writing, which run on a second thread.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from io import FileIO
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from flashvlm.errors import CheckpointError, FlashVLMError
from flashvlm.manifest import FileSpec
from flashvlm_export.checkpoint import StoredTensor
from flashvlm_export.dtypes import DTYPES
from flashvlm_export.weights.layout import DataFile, Place
from flashvlm_export.weights.recipes import copied, transposed

BLOCK = 8 << 20
STRIPE = 32 << 20

Progress = Callable[[int], None]


def write(data: DataFile, path: Path, on_bytes: Progress = lambda _: None) -> FileSpec:
    """Writes a data file. Returns its size and SHA-256.

    Raises:
        FlashVLMError: the disk is full or the file cannot be written.
        CheckpointError: a source file changed or ended early, or values do not fit the dtype they are stored in.
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
            if data.size:
                # Doubles the speed of ext4 (no delayed allocation), and a full disk is found out before the work.
                os.posix_fallocate(file.fileno(), 0, data.size)
            for block in _blocks(data):
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


def _blocks(data: DataFile) -> Iterator[memoryview | bytes]:
    if data.header:
        yield data.header
    position = len(data.header)
    scratch = _Scratch()
    groups = [(source, list(places)) for source, places in groupby(data.places, key=lambda place: place.source)]
    with ExitStack() as stack:
        files = {path: stack.enter_context(path.open("rb", buffering=0)) for path in {s.file for s, _ in groups}}
        for (source, places), following in zip(groups, [*groups[1:], None], strict=True):
            if following is not None:  # the kernel reads the next tensor while this one is made and written
                ahead, _ = following
                os.posix_fadvise(files[ahead.file].fileno(), ahead.offset, ahead.nbytes, os.POSIX_FADV_WILLNEED)
            file = files[source.file]
            file.seek(source.offset)
            if _as_stored(places):
                yield bytes(places[0].offset - position)
                yield from _pieces(source, file, scratch)
            else:
                raw = scratch.read(source.nbytes)
                _read_exactly(file, raw, source)
                for place in places:
                    yield bytes(place.offset - position)
                    yield from _made(place, raw, scratch)
                    position = place.end
            # Its pages are not needed again, and dropping them is cheaper than having the kernel look for victims:
            # a fifth of the time when checkpoint and bundle together outgrow memory.
            os.posix_fadvise(file.fileno(), source.offset, source.nbytes, os.POSIX_FADV_DONTNEED)
            position = places[-1].end


def _as_stored(places: Sequence[Place]) -> bool:
    """Whether the bytes of a parameter pass through as the checkpoint has them."""
    first = places[0]
    return len(places) == 1 and first.stored.make is copied and first.stored.dtype == first.source.dtype


def _pieces(source: StoredTensor, file: FileIO, scratch: _Scratch) -> Iterator[memoryview]:
    """The bytes as stored, in blocks: no tensor is held."""
    for start in range(0, source.nbytes, BLOCK):
        block = scratch.hand_over(min(BLOCK, source.nbytes - start))
        _read_exactly(file, block, source)
        yield block


def _made(place: Place, raw: memoryview, scratch: _Scratch) -> Iterator[memoryview]:
    """The bytes of one tensor, in stripes of rows where its recipe makes each of a stripe of the parameter: one is made
    while the one before it is hashed and written."""
    source, stored = place.source, place.stored
    given = torch.frombuffer(raw, dtype=DTYPES[source.dtype].torch).view(source.shape)
    row = stored.nbytes // stored.shape[0] if stored.shape else stored.nbytes
    rows = max(1, STRIPE // max(1, row))
    stripes: Sequence[tuple[Tensor, int]] = [(given, stored.shape[0] if stored.shape else 1)]
    if stored.make in (copied, transposed) and stored.shape:
        parts = given.split(rows, dim=int(stored.make is transposed))
        stripes = [(part, part.shape[int(stored.make is transposed)]) for part in parts]
    for part, count in stripes:
        ready = scratch.hand_over(row * count)
        result = torch.frombuffer(ready, dtype=DTYPES[stored.dtype].torch)
        result = result.view(count, *stored.shape[1:]) if stored.shape else result.view(())
        stored.make(part, result)
        changed = stored.dtype != source.dtype and result.is_floating_point()
        if changed and torch.isfinite(part).all() and not torch.isfinite(result).all():
            raise CheckpointError(
                f"{source.name} has values beyond {stored.dtype}; export with --dtype bfloat16 or float32"
            )
        yield ready


def _read_exactly(file: FileIO, target: memoryview, source: StoredTensor) -> None:
    filled = 0
    while filled < len(target):
        count = file.readinto(target[filled:])
        if not count:
            raise CheckpointError(
                f"{source.file} ended inside {source.name}; it changed during the export, start again"
            )
        filled += count
