"""Where the weights of a bundle lie in its data files: every tensor once, however many graphs read it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir

from flashvlm_export.checkpoint import StoredTensor
from flashvlm_export.dtypes import DTYPES
from flashvlm_export.weights.recipes import Recipe, Stored

ALIGNMENT = 4096  # ONNX Runtime maps external data by page


@dataclass(frozen=True)
class Place:
    """A stored tensor and the parameter it is made from, ``offset`` bytes into a file; row-major, little-endian."""

    file: str
    offset: int
    source: StoredTensor
    stored: Stored

    @property
    def end(self) -> int:
        return self.offset + self.stored.nbytes


@dataclass
class DataFile:
    """A header, then tensors on pages of their own, in the order of ``places``."""

    header: bytes = b""
    places: list[Place] = field(default_factory=list)

    @property
    def size(self) -> int:
        return self.places[-1].end if self.places else len(self.header)


class Layout:
    """Data files by name, as they will be written."""

    def __init__(self) -> None:
        self.files: dict[str, DataFile] = {}
        self._places: dict[tuple[StoredTensor, Stored], Place] = {}

    def add(self, file: str, recipes: Mapping[str, Recipe]) -> dict[str, Place]:
        """Lays out what ``recipes`` make, by initializer, and says where each is: at the end of ``file``, or where
        the same tensor lies already, in whichever file."""
        found = {}
        for initializer, recipe in recipes.items():
            for stored in recipe.outputs:
                key = recipe.source, stored
                if key not in self._places:
                    data = self.files.setdefault(file, DataFile())
                    offset = -(-data.size // ALIGNMENT) * ALIGNMENT
                    self._places[key] = Place(file, offset, recipe.source, stored)
                    data.places.append(self._places[key])
                found[initializer + stored.suffix] = self._places[key]
        return found

    def add_safetensors(self, file: str, name: str, recipe: Recipe) -> Place:
        """Lays out one tensor as a safetensors file, on its second page."""
        (stored,) = recipe.outputs
        self.files[file] = DataFile(_header(name, stored))
        return self.add(file, {name: recipe})[name]

    @property
    def nbytes(self) -> int:
        return sum(file.size for file in self.files.values())

    @property
    def sources(self) -> set[str]:
        """Names of the checkpoint's tensors that are in it."""
        return {source.name for source, _ in self._places}


def attach(graph: ir.Graph, places: Mapping[str, Place], folder: Path) -> None:
    """Points the initializers of a graph at their bytes in files of ``folder``."""
    for initializer, place in places.items():
        value, stored = graph.initializers[initializer], place.stored
        assert value.shape is not None
        if tuple(value.shape) != stored.shape:
            raise AssertionError(f"{initializer}: graph has {value.shape}, data {stored.shape}")
        value.const_value = ir.ExternalTensor(
            place.file,
            place.offset,
            stored.nbytes,
            DTYPES[stored.dtype].onnx,
            shape=ir.Shape(stored.shape),
            name=initializer,
            base_dir=folder,
        )


def files_of(places: Mapping[str, Place]) -> tuple[str, ...]:
    """The data files that a graph reads."""
    return tuple(dict.fromkeys(place.file for place in places.values()))


def _header(name: str, stored: Stored) -> bytes:
    entry = {
        "dtype": DTYPES[stored.dtype].safetensors,
        "shape": list(stored.shape),
        "data_offsets": [0, stored.nbytes],
    }
    header = json.dumps({name: entry}).encode()
    header += b" " * (-(8 + len(header)) % ALIGNMENT)  # the table starts on a page
    return len(header).to_bytes(8, "little") + header
