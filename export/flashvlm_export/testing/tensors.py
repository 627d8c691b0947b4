"""Safetensors files of seeded random values, as large as wanted: they never need to fit in memory.

Each shard's header is computed before its data, and values are drawn a chunk at a time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

Naming = Literal["hub", "transformers5", "module"]
DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}  # torch name -> safetensors name


@dataclass(frozen=True)
class Tensor:
    """One tensor to write: its name in the file, its shape, and the law of its values."""

    name: str
    key: str  # the naming-independent name; with the seed it fixes the values
    shape: tuple[int, ...]
    mean: float
    std: float
    spoken: tuple[int, int] | None = None  # rows outside [start, stop) are scaled down by 100

    @property
    def numel(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))


def drawn(parameter: str, name: str, key: str, shape: tuple[int, ...], spoken: tuple[int, int] | None = None) -> Tensor:
    """A tensor with the law of its values, by the name of its parameter.

    Scales keep activations of order one through any depth: weights have a standard deviation of
    1/sqrt(fan-in), norms are near one, biases near zero, and no tensor is constant, so that an exporter that
    drops or swaps one is caught.
    """
    mean, std = 0.0, float(np.prod(shape[1:])) ** -0.5
    if len(shape) == 1 and parameter.endswith(".weight"):  # of norms alone
        mean, std = 1.0, 0.05
    elif parameter.endswith(".bias"):
        std = 0.02
    elif "position_embedding" in parameter:
        std = 0.3  # below the patches' own scale, or every image would look alike
    elif "embed_tokens" in parameter or "class_embedding" in parameter:
        std = 1.0
    return Tensor(name, key, shape, mean, std, spoken)


def write_shards(
    tensors: list[Tensor],
    folder: Path,
    seed: int,
    dtype: str,
    limit: int,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write safetensors files of at most ``limit`` bytes of data, or one tensor, each; return how many."""
    size = itemsize(dtype)
    shards: list[list[Tensor]] = [[]]
    room = limit
    for tensor in tensors:
        if shards[-1] and tensor.numel * size > room:
            shards.append([])
            room = limit
        shards[-1].append(tensor)
        room -= tensor.numel * size

    total, done = sum(t.numel for t in tensors) * size, 0
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        alone = len(shards) == 1
        file = "model.safetensors" if alone else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map.update({tensor.name: file for tensor in shard})
        with open(folder / file, "wb") as stream:
            stream.write(safetensors_header(shard, dtype))
            for tensor in shard:
                for chunk in draw(tensor, seed, dtype):
                    stream.write(chunk)
                    done += len(chunk)
                    if progress:
                        progress(done, total)
    if len(shards) > 1:  # like transformers, which writes no index beside a single file
        index = {
            "metadata": {"total_parameters": total // size, "total_size": total},
            "weight_map": dict(sorted(weight_map.items())),
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return len(shards)


def safetensors_header(tensors: list[Tensor], dtype: str) -> bytes:
    """The bytes before the data: an 8-byte little-endian length, then JSON padded to align the data."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.numel * itemsize(dtype)
        header[tensor.name] = {
            "dtype": DTYPES[dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


_CHUNK = 1 << 22  # values drawn at once; a multiple of the four that one random word gives


def draw(tensor: Tensor, seed: int, dtype: str) -> Iterator[memoryview]:
    """The tensor's bytes, a chunk at a time.

    Each value is one of 65,536 quantiles of its normal law, chosen by 16 bits of a counter-based generator.
    Looking up a table that already holds the target dtype makes one pass of 2-byte reads and writes: several
    times faster than drawing float32 normals and converting them, and the same bits on every machine and
    library version.
    """
    digest = hashlib.sha256(f"{seed}:{tensor.key}".encode()).digest()
    bits = np.random.Philox(key=int.from_bytes(digest[:16], "little"))
    table = _table(tensor.mean, tensor.std, dtype)
    quiet = _table(tensor.mean, tensor.std / 100, dtype)
    row = tensor.numel // tensor.shape[0]
    first, last = (border * row for border in tensor.spoken or (0, tensor.shape[0]))
    for start in range(0, tensor.numel, _CHUNK):
        count = min(_CHUNK, tensor.numel - start)
        index = bits.random_raw(-(-count // 4)).astype("<u8", copy=False).view("<u2")[:count]
        values = table[index]
        for part in (slice(0, max(first - start, 0)), slice(max(last - start, 0), None)):
            values[part] = quiet[index[part]]
        yield memoryview(values).cast("B")


_QUANTILES: list[np.ndarray] = []


def _table(mean: float, std: float, dtype: str) -> np.ndarray:
    """65,536 equally likely values of N(mean, std), as unsigned integers of the dtype's width."""
    import torch

    if not _QUANTILES:
        from statistics import NormalDist

        inverse = NormalDist().inv_cdf
        half = np.array([inverse((i + 0.5) / 65536) for i in range(32768)])
        _QUANTILES.append(np.concatenate([half, -half[::-1]]))
    values = torch.from_numpy(mean + std * _QUANTILES[0]).to(torch.float32).to(getattr(torch, dtype))
    width = {2: torch.uint16, 4: torch.uint32}[itemsize(dtype)]
    return values.view(width).numpy()


def itemsize(dtype: str) -> int:
    return 4 if dtype == "float32" else 2
