"""The bundle: the contract between export and runtime.

A bundle is a folder whose ``bundle.json`` lists every graph (names, dtypes and symbolic shapes of its inputs and
outputs) and every file (size and SHA-256). Nothing outside the folder is needed to run it, and nothing in it is code.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flashvlm.errors import BundleError
from flashvlm.images import ImagePreprocess

MANIFEST = "bundle.json"
SCHEMA_VERSION = 1
EMBEDDINGS = "embed_tokens.safetensors"
PROCESSOR = "processor"
ENGINES = "engines"  # what is compiled from the bundle, each folder with a manifest of its own

FloatType = Literal["float32", "float16", "bfloat16"]
DType = Literal["float32", "float16", "bfloat16", "int64", "int32", "bool"]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TensorSpec(_Record):
    """One input or output of a graph. A dimension is a size, or the name of one that varies from run to run."""

    name: str
    dtype: DType
    shape: tuple[int | str, ...]


class GraphSpec(_Record):
    file: str
    data: tuple[str, ...] = ()
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


class FileSpec(_Record):
    size: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class ModelSpec(_Record):
    """What the runtime needs to know of the model; shapes in tokens, heads and channels."""

    name: str
    family: str
    dtype: FloatType
    num_image_tokens: int = Field(gt=0)
    image_grid: tuple[int, int]
    hidden_size: int = Field(gt=0)
    num_layers: int = Field(gt=0)
    num_key_value_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    vocab_size: int = Field(gt=0)
    max_seq: int = Field(gt=0)
    image_token_id: int
    eos_token_ids: tuple[int, ...]


class SelectionSpec(_Record):
    method: str
    query: Literal["question", "prompt"]
    positions: Literal["renumber", "keep"]
    budgets: tuple[int, ...]
    params: dict[str, float | int | str]


class Manifest(_Record):
    schema_version: int = SCHEMA_VERSION
    created_by: dict[str, str]
    source: str
    dialect: Literal["modern", "legacy"]
    layout: Literal["split", "fused"]
    model: ModelSpec
    image: ImagePreprocess
    selection: SelectionSpec
    graphs: dict[str, GraphSpec]
    files: dict[str, FileSpec]
    unused_tensors: tuple[str, ...] = ()


def select_graph(budget: int) -> str:
    """Name of the selection graph for one budget."""
    return f"select-k{budget}"


def prefill_graph(budget: int) -> str:
    """Name of the fused vision + select + decoder graph for one budget (``--layout fused``)."""
    return f"prefill-k{budget}"


class Bundle:
    """A bundle folder whose manifest parses and whose files are present with their recorded sizes.

    Args:
        path: the folder ``flashvlm-export --out`` wrote.
        verify: also check the SHA-256 of every file, which reads each of them once.

    Raises:
        BundleError: anything about the folder is not as the manifest says.
    """

    def __init__(self, path: str | os.PathLike[str], *, verify: bool = True) -> None:
        self.path = Path(path)
        self.manifest = _read_manifest(self.path)
        for name, spec in self.manifest.files.items():
            self._check_file(name, spec.size)
        for graph in self.manifest.graphs.values():
            for name in (graph.file, *graph.data):
                if name not in self.manifest.files:
                    raise BundleError(
                        f"{self.path}: {MANIFEST} uses {name!r} but does not list it; export the bundle again"
                    )
        if verify:
            self._verify()

    def file(self, name: str) -> Path:
        """Path of a file the manifest lists."""
        if name not in self.manifest.files:
            raise BundleError(f"{self.path}: {name!r} is not part of this bundle; export it again")
        return self._inside(name)

    def graph(self, name: str) -> GraphSpec:
        """Names, dtypes and shapes of one graph, such as ``vision`` or ``select-k64``."""
        if name not in self.manifest.graphs:
            raise BundleError(f"{self.path}: no graph {name!r}; it has {', '.join(sorted(self.manifest.graphs))}")
        return self.manifest.graphs[name]

    def _inside(self, name: str) -> Path:
        root = self.path.resolve()
        try:
            target = (root / name).resolve()
        except (OSError, RuntimeError, ValueError):  # a loop of links, or a name no file can have
            target = root
        if root not in target.parents:
            raise BundleError(f"{self.path}: {MANIFEST} names {name!r}, which lies outside the bundle; refused")
        return target

    def _check_file(self, name: str, size: int) -> None:
        path = self._inside(name)
        if not path.is_file():
            raise BundleError(
                f"{self.path}: bundle file {name} is missing; copy the whole folder or export the bundle again"
            )
        found = path.stat().st_size
        if found != size:
            raise BundleError(
                f"{self.path}: bundle file {name} was resized: expected {size} bytes, found {found}; "
                f"copy it again or export the bundle again"
            )

    def _verify(self) -> None:
        def digest(name: str) -> tuple[str, str]:
            try:
                return name, sha256(self._inside(name))
            except OSError as error:
                raise BundleError(f"{self.path}/{name} cannot be read: {error.strerror}; copy it again") from None

        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            for name, found in pool.map(digest, self.manifest.files):
                if found != self.manifest.files[name].sha256:
                    raise BundleError(
                        f"{self.path}/{name} was edited after export: expected sha256 "
                        f"{self.manifest.files[name].sha256[:12]}..., found {found[:12]}...; export the bundle again"
                    )


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing there"
        raise BundleError(
            f"{folder}: expected a bundle folder, found {found}; make one with: flashvlm-export --model MODEL --out DIR"
        )
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        is_checkpoint = (folder / "config.json").is_file()
        what, model = ("is a checkpoint", folder) if is_checkpoint else ("is not a complete bundle", "MODEL")
        raise BundleError(
            f"{folder} {what}: it has no {MANIFEST}; make a bundle with: flashvlm-export --model {model} --out DIR"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{path} cannot be read ({error}); export the bundle again") from None
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if not isinstance(version, int) or version < 1:
        raise BundleError(f"{path}: expected a schema_version from 1, found {version!r}; export the bundle again")
    if version > SCHEMA_VERSION:
        raise BundleError(
            f"{folder} has bundle schema {version}, this flashvlm reads up to {SCHEMA_VERSION}; "
            f"upgrade with: pip install --upgrade flashvlm"
        )
    try:
        return Manifest.model_validate(raw)
    except ValidationError as error:
        raise BundleError(f"{path}: {first_problem(error)}; export the bundle again") from None


def first_problem(error: ValidationError) -> str:
    """Which field is wrong and why, without pydantic's many lines."""
    first = error.errors()[0]
    return f"field {'.'.join(map(str, first['loc']))}: {first['msg']}"


def sha256(path: Path, on_bytes: Callable[[int], None] = lambda _: None) -> str:
    """SHA-256 of a file in hex, reading 4 MiB at a time."""
    digest = hashlib.sha256()
    for block in _blocks(path):
        digest.update(block)
        on_bytes(len(block))
    return digest.hexdigest()


def _blocks(path: Path, size: int = 4 << 20) -> Iterator[memoryview]:
    buffer = bytearray(size)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            yield view[:count]
