"""Write Hugging Face checkpoints of every family with seeded random weights.

Real weights cannot be downloaded on every machine that builds or tests this project. A folder written here
has the file layout, tensor names, shapes, tokenizer conventions and chat template of the checkpoints on the
hub, so that every tool that reads the real ones reads these, and the same bytes come out on every machine.

Weights never need to fit in memory: names and shapes come from the model class on the meta device (``tensors.py``).
A family has a file in presets/.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, get_args

from flashvlm_export.testing.presets import PRESETS as PRESETS
from flashvlm_export.testing.tensors import DTYPES, Naming, Tensor, itemsize, write_shards

NAMINGS: tuple[Naming, ...] = get_args(Naming)


class CheckpointError(Exception):
    """A request that cannot be met, in one line that says what to do instead."""


class Preset(Protocol):
    """The sizes of one checkpoint, and how its family writes it."""

    @property
    def dtype(self) -> str: ...

    def cut(self, layers: int) -> Preset:
        """With fewer language layers."""

    def write_files(self, folder: Path, dtype: str) -> None:
        """Every file but the weights: configurations, tokenizer, image processor, chat template."""

    def tensors(self, dtype: str, naming: Naming) -> list[Tensor]:
        """Every tensor, in the order of the model class."""


@dataclass(frozen=True)
class Written:
    """What `write_checkpoint` left on disk."""

    folder: Path
    parameters: int
    weight_bytes: int
    shards: int


def write_checkpoint(
    like: str,
    out: str | os.PathLike[str],
    *,
    seed: int = 0,
    dtype: str | None = None,
    layers: int | None = None,
    naming: Naming = "hub",
    max_shard_size: int | str = "5GB",
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Written:
    """Write a checkpoint folder that transformers loads with no missing and no unexpected tensor.

    Args:
        like: a key of `PRESETS`.
        out: the folder to create; it appears only when complete.
        seed: with a tensor's name it fixes that tensor's values, whatever the naming, sharding or dtype (a
            narrower dtype holds the same values rounded).
        dtype: one of `DTYPES`; by default the preset's.
        layers: number of language layers, to cut a real-size model down.
        naming: ``hub`` as in the llava-hf checkpoints; ``transformers5`` as transformers 5.23 saves a fresh
            model (no ``vision_model`` level); ``module`` as ``state_dict()`` names them.
        max_shard_size: bytes, or a number with KB, MB or GB (powers of 1000).
        force: replace an existing folder.
        progress: called with (bytes written, bytes in all).

    Raises:
        CheckpointError: for an unknown choice, or an ``out`` that exists without ``force``.
    """
    preset: Preset = _choose(like, PRESETS, "--like")
    dtype = dtype or preset.dtype
    _choose(dtype, DTYPES, "--dtype")
    _choose(naming, dict.fromkeys(NAMINGS), "--naming")
    limit = parse_size(max_shard_size)
    if layers is not None:
        if layers < 1:
            raise CheckpointError(f"--layers must be at least 1, not {layers}.")
        preset = preset.cut(layers)

    with _appear_whole(Path(out), force) as folder:
        preset.write_files(folder, dtype)
        tensors = preset.tensors(dtype, naming)
        shards = write_shards(tensors, folder, seed, dtype, limit, progress)
    parameters = sum(t.numel for t in tensors)
    return Written(Path(out), parameters, parameters * itemsize(dtype), shards)


def parse_size(size: int | str) -> int:
    """``5GB`` -> 5_000_000_000, as transformers' ``max_shard_size``."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?B)?", str(size).strip(), re.IGNORECASE)
    factor = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
    value = int(float(match[1]) * factor[(match[2] or "").upper()]) if match else 0
    if value < 1:
        raise CheckpointError(f"--max-shard-size {size!r} is not a size; write it like 5GB or 200MB.")
    return value


def _choose(value: str, choices: Mapping[str, Any], flag: str) -> Any:
    if value not in choices:
        raise CheckpointError(f"{flag} {value!r} is unknown; choose one of {', '.join(choices)}.")
    return choices[value]


@contextlib.contextmanager
def _appear_whole(out: Path, force: bool) -> Iterator[Path]:
    """Yield a temporary sibling of ``out`` that takes its name if the block ends well, and else vanishes."""
    if out.exists() and not force:
        raise CheckpointError(f"{out} exists; choose another --out, or pass --force to replace it.")
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.partial")
    old = out.with_name(f".{out.name}.{os.getpid()}.old")
    temporary.mkdir()
    try:
        yield temporary
        if out.exists():
            out.rename(old)
        try:
            temporary.rename(out)
        except OSError:
            if old.exists():
                old.rename(out)
            raise
    finally:
        for leftover in (temporary, old):
            if leftover.is_dir():
                shutil.rmtree(leftover)
            else:
                leftover.unlink(missing_ok=True)
