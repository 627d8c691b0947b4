"""A model name or folder becomes a configuration and an index of tensors; no weight is read here.

Headers are parsed by hand, not through a memory map: pages of a mapped 13 GB file count as this process's resident
memory, and the exporter promises to stay small.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from flashvlm.bundle import hub_blobs
from flashvlm.errors import CheckpointError, FlashVLMError, one_line
from flashvlm.files import open_regular, parse_json, read_bytes
from flashvlm.files import read_json as read_any_json
from flashvlm.manifest import first_problem
from flashvlm_export.config_bounds import checked_config
from flashvlm_export.dtypes import DTYPES, STORED_FLOATS
from flashvlm_export.families import aliases

# Part of this package: 6 M parameters that answer questions about drawn scenes (demo/README.md).
SHIPPED = {"demo": Path(__file__).with_name("demo")}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# Everything an export reads; in particular never code, never pickles.
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt", "README.md", "LICEN[CS]E*", "NOTICE*"]
MAX_HEADER = 100 << 20  # the safetensors format's own limit
HUB_TIMEOUT = 20  # seconds
MAX_NUMBER = 1 << 48  # of a dimension, or an offset in bytes
MAX_RANK = 8


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor's bytes are: row-major, little-endian."""

    name: str
    file: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].size


@dataclass(frozen=True)
class Checkpoint:
    """A local checkpoint: what it was called, its folder, ``config.json`` as a dict, and every tensor by name."""

    name: str
    folder: Path
    config: dict[str, Any]
    tensors: dict[str, StoredTensor]


def open_checkpoint(model: str, revision: str | None = None) -> Checkpoint:
    """Finds a checkpoint and indexes its tensors.

    Args:
        model: a short name such as ``demo`` or ``llava-1.5-7b``, a Hub id such as ``llava-hf/llava-1.5-7b-hf``, or a
            folder.
        revision: branch, tag or commit on the Hub; None for its default branch.

    Raises:
        CheckpointError: nothing there, no config, no safetensors, or a file that is damaged.
    """
    folder = _locate(model, revision)
    config = read_config(folder / "config.json")
    files = _weight_files(folder)
    tensors: dict[str, StoredTensor] = {}
    for file, names in files.items():
        found = _read_header(file)
        for name in names or ():
            if name not in found:
                raise CheckpointError(
                    f"{folder / INDEX} says {name} is in {file.name}, which does not hold it; download again"
                )
        for name, tensor in found.items():
            if name in tensors:
                raise CheckpointError(
                    f"tensor {name} is in both {tensors[name].file.name} and {file.name}; expected once"
                )
            tensors[name] = tensor
    return Checkpoint(model, folder, config, tensors)


def find_config(model: str, revision: str | None = None) -> tuple[Path, dict[str, Any]]:
    """``config.json`` of a model alone: its path and what it says. From the Hub, no other file is downloaded.

    Raises:
        CheckpointError: as ``open_checkpoint``, of the one file.
    """
    path = _locate(model, revision, ["config.json"]) / "config.json"
    return path, read_config(path)


def _locate(model: str, revision: str | None, files: list[str] = HUB_FILES) -> Path:
    folder = Path(model).expanduser() if model.startswith("~/") else Path(model)
    if _exists(folder, Path.is_dir):
        if revision is not None:
            raise CheckpointError(f"--revision {revision} is for models on the Hub; {model} is a folder")
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"{folder} has no config.json; expected a Hugging Face checkpoint folder")
        return folder
    if model in SHIPPED:
        if revision is not None:
            raise CheckpointError(f"--revision {revision} is for models on the Hub; {model} comes with this package")
        return SHIPPED[model]
    repo = aliases().get(model, model)
    if repo.count("/") != 1 or repo.startswith((".", "/", "~")) or repo.endswith("/"):
        known = ", ".join((*SHIPPED, *aliases()))
        raise CheckpointError(
            f"unknown model {model!r}: expected a folder, a Hub id such as owner/name, or one of {known}"
        )
    return _download(repo, revision, files)


def _download(repo: str, revision: str | None, files: list[str]) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub import errors as hub

    try:
        reachable = True
        try:
            # snapshot_download asks the same first, but waits without limit for a network that swallows packets.
            HfApi().model_info(repo, revision=revision, timeout=HUB_TIMEOUT)
        except (hub.HfHubHTTPError, hub.HFValidationError):
            pass  # an answer: snapshot_download says what it means
        except Exception:  # of whichever HTTP library huggingface_hub is built on
            reachable = False
        return Path(snapshot_download(repo, revision=revision, allow_patterns=files, local_files_only=not reachable))
    except hub.GatedRepoError:
        reason = "it is gated; ask for access on its page, then run: hf auth login"
    except hub.RevisionNotFoundError:
        reason = f"it has no revision {revision!r}"
    except hub.HFValidationError:
        reason = "there is no such folder, and a Hub id looks like owner/name"
    except hub.RepositoryNotFoundError:
        reason = "the Hub has no such model, or it is private; check the name, or run: hf auth login"
    except hub.LocalEntryNotFoundError:
        reason = (
            "not in the local cache, and the Hub cannot be reached; connect, unset HF_HUB_OFFLINE, or pass a folder"
        )
    except Exception as error:  # a disk, a proxy, an HTTP library, or a page that is no answer of the Hub
        reason = f"download failed ({one_line(error)}); try again, or pass a folder"
    raise CheckpointError(f"model {repo}: {reason}")


def _weight_files(folder: Path) -> dict[Path, list[str] | None]:
    """Weight files, each with the tensors the index expects in it (None where there is no index)."""
    index = folder / INDEX
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index} has no weight_map; download it again")
        files: dict[Path, list[str] | None] = {}
        for name, file in weight_map.items():
            if not isinstance(file, str) or os.path.basename(file) != file or file in ("", ".", ".."):
                raise CheckpointError(f"{index} places {name} in {file!r}; expected a file name beside it")
            files.setdefault(folder / file, [])
            files[folder / file].append(name)  # type: ignore[union-attr]
        for path in files:
            if not _exists(path, Path.is_file):
                raise CheckpointError(f"{path.name} is named by {INDEX} but missing from {folder}; download it again")
        return files
    single = folder / SINGLE
    if single.is_file():
        return {single: None}
    if any(next(folder.glob(pattern), None) for pattern in PICKLED):
        raise CheckpointError(
            f"{folder} has only pickled weights (.bin/.pt), which can run code when loaded; expected .safetensors: "
            f"convert with transformers' save_pretrained, or take a revision that has them"
        )
    raise CheckpointError(f"{folder} has no weights; expected {SINGLE} or {INDEX}")


def _read_header(file: Path) -> dict[str, StoredTensor]:
    """Index of one safetensors file: 8-byte little-endian header size, JSON header, then the data."""
    try:
        opened = open_regular(file)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}; download it again") from None
    with opened as stream:
        size = os.fstat(stream.fileno()).st_size
        prefix = stream.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(size - 8, MAX_HEADER):
            raise CheckpointError(f"{file} is truncated or not safetensors ({size} bytes); download it again")
        try:
            header = parse_json(stream.read(length))
        except ValueError:
            header = None
    if not isinstance(header, dict):
        raise CheckpointError(f"{file} has a damaged safetensors header; download it again")
    header.pop("__metadata__", None)
    if not header:
        raise CheckpointError(f"{file} holds no tensors; download it again")
    start = 8 + length
    tensors = {}
    for name, entry in header.items():
        try:
            code, shape, (first, last) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            numbers = (*shape, first, last)
            if not isinstance(code, str) or not all(isinstance(n, int) and 0 <= n < MAX_NUMBER for n in numbers):
                raise ValueError
            if len(shape) > MAX_RANK:
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(f"{file}: the header entry of {name} is damaged; download it again") from None
        if code not in STORED_FLOATS:
            known = ", ".join(STORED_FLOATS)
            raise CheckpointError(
                f"{file}: {name} is {code}; expected one of {known} (quantized weights: use the original)"
            )
        tensor = StoredTensor(name, file, start + first, STORED_FLOATS[code], shape)
        if last - first != tensor.nbytes:
            raise CheckpointError(
                f"{file}: {name} {list(shape)} needs {tensor.nbytes} bytes, its entry spans {last - first}"
            )
        tensors[name] = tensor
    end = start
    for tensor in sorted(tensors.values(), key=lambda t: (t.offset, t.nbytes)):
        if tensor.offset != end:
            raise CheckpointError(f"{file}: {tensor.name} overlaps its neighbour or leaves a gap; download it again")
        end += tensor.nbytes
    if end != size:
        raise CheckpointError(f"{file} is truncated or damaged: expected {end} bytes, found {size}; download it again")
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: the file cannot be read or holds something else.
    """
    try:
        value = read_any_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {one_line(error)}; download it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_config(path: Path) -> dict[str, Any]:
    """``config.json`` with its numbers in range. Raises CheckpointError."""
    return checked_config(read_json(path))


def read_file(folder: Path, name: str, limit: int) -> bytes | None:
    """A regular file of at most ``limit`` bytes in a checkpoint, or in the Hub cache that it is a snapshot of.

    None: there is no such file.

    Raises:
        CheckpointError: it cannot be read, or is a link out of the checkpoint.
    """
    path = folder / name
    try:
        root, target = folder.resolve(), path.resolve(strict=True)
        if root not in target.parents and target.parent != hub_blobs(root):
            raise CheckpointError(f"{path} is a link to {target}, outside the checkpoint; copy the file itself there")
        return read_bytes(path, limit)
    except FileNotFoundError:
        return None
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{path} cannot be read: {reason}; download it again") from None


def _exists(path: Path, kind: Callable[[Path], bool]) -> bool:
    try:
        return kind(path)
    except OSError:  # a name that no file can have
        return False


@contextmanager
def describes_a_model(path: Path) -> Iterator[None]:
    """transformers, torch and pydantic raise whatever a wrong value leads to, and warn of what they take."""
    import transformers

    transformers.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except FlashVLMError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        if isinstance(error, ValidationError):
            reason = first_problem(error)
        raise CheckpointError(f"{path} does not describe a model of this family: {reason}; download it again") from None
