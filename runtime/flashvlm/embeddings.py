"""The token embedding table: rows are read from its file when they are gathered."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from flashvlm.dtypes import NUMPY_DTYPES, SAFETENSORS
from flashvlm.errors import BundleError, FlashVLMError
from flashvlm.files import open_regular, parse_json
from flashvlm.graph_io import FloatType

MAX_HEADER = 1 << 20  # bytes; the exporter writes one page


class EmbeddingTable:
    """The one tensor of a safetensors file, [V,D]; its rows come as ``dtype``, or as they are stored.

    Rows are read, not mapped: a file cut short under a map ends the process, under a read it is an error. The file
    stays open, so that rows keep coming from the one that was checked.

    Raises:
        BundleError: the file holds something else.
    """

    def __init__(self, path: Path, rows: int, width: int, dtype: FloatType | None = None) -> None:
        self._path = path
        self.shape = (rows, width)
        damaged = BundleError(f"{path}: expected a table of {rows} x {width}; export the bundle again")
        try:
            self._file = open_regular(path)
        except OSError as error:
            raise BundleError(f"{path} cannot be read: {error.strerror}; export the bundle again") from None
        try:
            length = int.from_bytes(self._pread(8, 0), "little")
            if length > MAX_HEADER:
                raise damaged
            header = parse_json(self._pread(length, 8))
            header.pop("__metadata__", None)
            (entry,) = header.values()
            self._stored = NUMPY_DTYPES[SAFETENSORS[entry["dtype"]]]
            self._start = 8 + length
            end = self._start + rows * width * self._stored.itemsize
            if entry["shape"] != [rows, width] or os.fstat(self._file.fileno()).st_size < end:
                raise damaged
        except (ValueError, KeyError, TypeError, AttributeError):
            raise damaged from None
        self.dtype = self._stored if dtype is None else NUMPY_DTYPES[dtype]

    def __getitem__(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Token ids [T] -> their rows [T,D]."""
        rows, width = self.shape
        found = np.empty((len(ids), width), dtype=self._stored)
        size = width * self._stored.itemsize
        if not size:
            return found
        into = found.view(np.uint8).reshape(len(ids), size)
        for row, token in zip(into, np.asarray(ids).tolist(), strict=True):
            if not 0 <= token < rows:
                raise BundleError(f"{self._path}: token id {token} is beyond its {rows} rows; export the bundle again")
            row[:] = np.frombuffer(self._pread(size, self._start + token * size), dtype=np.uint8)
        return found.astype(self.dtype, copy=False)

    def close(self) -> None:
        self._file.close()

    def _pread(self, size: int, offset: int) -> bytes:
        if self._file.closed:
            raise FlashVLMError("the pipeline was closed; open the bundle again")
        content = os.pread(self._file.fileno(), size, offset)
        if len(content) != size:
            raise BundleError(f"{self._path} ended early: it was cut while in use; export the bundle again")
        return content
