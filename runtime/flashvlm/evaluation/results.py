"""Predictions on disk: one file of JSON lines for each run and budget, which has its name only when it is whole."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from flashvlm.errors import FlashVLMError
from flashvlm.files import read_bytes
from flashvlm.graph_io import DECODER, select_graph
from flashvlm.manifest import EMBEDDINGS, PROCESSOR, PROCESSOR_FILES, Manifest

MAX_BYTES = 1 << 30  # of a file of predictions; a line with 576 indices has some 3 KB


@dataclass(frozen=True)
class Prediction:
    """What a model answered.

    item   its id
    text   the answer
    score  0 to 1, by the task's metric
    kept   of each image, the indices of its visual tokens that the model saw; None where they were not asked for
    """

    item: str
    text: str
    score: float
    kept: tuple[tuple[int, ...], ...] | None = None

    @property
    def right(self) -> bool:
        return self.score == 1


class Record:
    """Predictions of one run, on disk as far as they are given: an interrupted run goes on where it was.

    Args:
        path: of the file when it is whole; until then it is called ``.partial``. None keeps nothing.
        ids: of the items, in order.
        ends: numbers of items after which an interrupted run may go on.

    Raises:
        FlashVLMError: what is there is no such file, or another run is writing it.
    """

    def __init__(self, path: Path | None, ids: Sequence[str], ends: Sequence[int]) -> None:
        self._path, self._count = path, len(ids)
        self._file: BinaryIO | None = None
        self.predictions: list[Prediction] = []
        if path is None:
            return
        try:
            if path.exists():
                self.predictions = _parse(path, _lines(path), ids)
                if len(self.predictions) < len(ids):
                    found = f"expected {len(ids)} predictions, found {len(self.predictions)}"
                    raise FlashVLMError(f"{path}: {found}; remove the file")
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._partial.open("ab")
            _lock(self._file, path)
            lines = _lines(self._partial)
            done = max((end for end in ends if end <= len(lines)), default=0)
            self.predictions = _parse(self._partial, lines[:done], ids)
            self._file.truncate(sum(map(len, lines[:done])))
        except OSError as error:
            raise self._unwritable(error) from None

    def add(self, predictions: Sequence[Prediction]) -> None:
        """Appends predictions; with those of the last item, the file gets its name."""
        self.predictions += predictions
        if self._file is None:
            return
        try:
            self._file.write("".join(json.dumps(asdict(each)) + "\n" for each in predictions).encode())
            self._file.flush()
            if self._path is not None and len(self.predictions) == self._count:
                os.fsync(self._file.fileno())
                self._partial.replace(self._path)
        except OSError as error:
            raise self._unwritable(error) from None

    @property
    def _partial(self) -> Path:
        assert self._path is not None
        return self._path.with_name(f"{self._path.name}.partial")

    def _unwritable(self, error: OSError) -> FlashVLMError:
        reason = error.strerror or error
        return FlashVLMError(f"cannot write {self._path}: {reason}; free space or choose another place")

    def __enter__(self) -> Record:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # what could not be written was told when it was added
                self._file.close()


def _lines(path: Path) -> list[bytes]:
    """Whole ones: a kill may have left half of the last."""
    lines = read_bytes(path, MAX_BYTES).splitlines(keepends=True)
    return lines if not lines or lines[-1].endswith(b"\n") else lines[:-1]


def _parse(path: Path, lines: Sequence[bytes], ids: Sequence[str]) -> list[Prediction]:
    if len(lines) > len(ids):
        raise FlashVLMError(f"{path}: expected {len(ids)} predictions, found {len(lines)}; remove the file")
    return [_prediction(line, ids[n], f"{path}, line {n + 1}") for n, line in enumerate(lines)]


def _prediction(line: bytes, item: str, where: str) -> Prediction:
    try:
        found = Prediction(**json.loads(line))
        kept = None if found.kept is None else tuple(tuple(map(int, image)) for image in found.kept)
        if found.item == item and isinstance(found.text, str):
            return Prediction(item, found.text, float(found.score), kept)
    except (TypeError, ValueError, RecursionError):
        pass
    raise FlashVLMError(f"{where}: expected the prediction of item {item!r}, found something else; remove the file")


def _lock(file: BinaryIO, path: Path) -> None:
    """Until the file is closed. A system without locks goes on without."""
    if sys.platform == "win32":
        return
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise FlashVLMError(f"{path} is being written by another run; wait for it, or choose another folder") from None
    except OSError:
        pass


def bundle_parts(manifest: Manifest, keep: int | None) -> list[str]:
    """All of a bundle that answers at a budget depend on: its own graphs and weights, and how it selects.

    Budgets beside it change nothing, nor does the selection where ``keep`` is None.
    """
    graphs = [DECODER, *(spec.graph for spec in manifest.visual)]
    parts = [manifest.model.model_dump_json(), *(spec.model_dump_json() for spec in manifest.visual)]
    if keep is not None:
        selects = (select_graph(spec.graph, keep) for spec in manifest.visual)
        graphs += [name for name in selects if name in manifest.graphs]
        parts.append(manifest.selection.model_dump_json(exclude={"budgets", "default"}))
    files = {EMBEDDINGS, *(f"{PROCESSOR}/{name}" for name in PROCESSOR_FILES)}
    files |= {file for name in graphs for file in (manifest.graphs[name].file, *manifest.graphs[name].data)}
    return parts + [f"{name} {manifest.files[name].sha256}" for name in sorted(files)]


def key_of(*parts: object) -> str:
    """12 hexadecimal digits of SHA-256."""
    found = hashlib.sha256()
    for part in parts:
        found.update(str(part).encode())
        found.update(b"\0")
    return found.hexdigest()[:12]
