"""A bundle folder: the contract between export and runtime.

``bundle.json`` lists every graph (names, dtypes and symbolic shapes of its inputs and outputs) and every file (size and
SHA-256). Nothing outside the folder is needed to run it, nothing in it is code, and no file is read that it does not
list.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pydantic import ValidationError

from flashvlm.errors import BundleError
from flashvlm.extras import upgrade
from flashvlm.files import digest, open_regular, read_bytes, read_json
from flashvlm.graph_check import check_graph
from flashvlm.manifest import PROCESSOR, SCHEMA_VERSION, GraphSpec, Manifest, first_problem

MANIFEST = "bundle.json"
ENGINES = "engines"  # what is compiled from the bundle, each folder with a manifest of its own
MAX_MANIFEST = 16 << 20  # bytes
MAX_READ = 128 << 20  # bytes of a file that is read whole: a graph without its weights, a tokenizer

# Device, inode, size and times of a file: while they stay, it is the file that was verified.
Fingerprint = tuple[int, int, int, int, int]


class Bundle:
    """A bundle folder whose manifest parses and whose files are present with their recorded sizes.

    A snapshot in the Hugging Face cache is one too: its files are links to ``blobs`` of the same repository. Every
    other link out of the folder is refused.

    Args:
        path: the folder ``flashvlm-export --out`` wrote.
        verify: also check the SHA-256 of every file, which reads each of them once. What is loaded later is then what
            was verified: a file that has changed since is verified again.

    Raises:
        BundleError: anything about the folder is not as the manifest says.
    """

    def __init__(self, path: str | os.PathLike[str], *, verify: bool = True) -> None:
        self.path = Path(path)
        self._verify = verify
        self._seen: dict[str, Fingerprint] = {}
        self._checked: dict[str, Fingerprint] = {}  # graphs whose operators were checked
        self._lock = threading.Lock()
        _check_folder(self.path)
        try:
            self._root = self.path.resolve()
        except (OSError, RuntimeError) as error:
            raise BundleError(f"{self.path}: expected a bundle folder, found: {error}") from None
        self._blobs = hub_blobs(self._root)
        self._inside(MANIFEST)
        self.manifest = _read_manifest(self.path)
        for name in self.manifest.files:
            self._check_size(name)
        if verify:
            with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
                for _ in pool.map(self._check, self.manifest.files):
                    pass

    def file(self, name: str) -> Path:
        """Path of a file the manifest lists, for a library that opens it by name; it is what it was when verified."""
        if name not in self.manifest.files:
            raise BundleError(f"{self.path}: {name!r} is not part of this bundle; export it again")
        path = self._inside(name)
        if self._fingerprint(name, path) != self._seen.get(name):
            self._check(name)
        return path

    def read(self, name: str) -> bytes:
        """The content of a small file the manifest lists."""
        path = self.file(name)
        try:
            content = read_bytes(path, MAX_READ)
        except OSError as error:
            raise self._unreadable(name, error) from None
        if self._verify and hashlib.sha256(content).hexdigest() != self.manifest.files[name].sha256:
            raise BundleError(f"{self.path}/{name} changed while it was read; export the bundle again")
        return content

    def read_processor(self, name: str) -> bytes:
        """The content of a file of the ``processor`` folder."""
        return self.read(f"{PROCESSOR}/{name}")

    def graph(self, name: str) -> GraphSpec:
        """Names, dtypes and shapes of one graph, such as ``vision`` or ``select-k64``."""
        if name not in self.manifest.graphs:
            raise BundleError(f"{self.path}: no graph {name!r}; it has {', '.join(sorted(self.manifest.graphs))}")
        return self.manifest.graphs[name]

    def graph_file(self, name: str) -> Path:
        """Path of a graph's ONNX file, with its weights beside it, that nothing but our operators is in.

        Every library that loads the file gets it from here: none of them is to meet a graph that was not checked.
        """
        spec = self.graph(name)
        path = self.file(spec.file)
        for data in spec.data:
            self.file(data)
        with self._lock:
            if self._checked.get(name) != (found := self._seen[spec.file]):
                sizes = {data: self.manifest.files[data].size for data in spec.data}
                check_graph(self.read(spec.file), f"{self.path}/{spec.file}", sizes)
                self._checked[name] = found
        return path

    def _inside(self, name: str) -> Path:
        """The path of a file that lies in the folder, or that a link of the Hub cache leads to."""
        path = self.path / name
        try:
            target = path.resolve()
        except (OSError, RuntimeError, ValueError):  # a loop of links, or a name no file can have
            target = self._root
        if self._root in target.parents or (self._blobs is not None and target.parent == self._blobs):
            return path
        found = f"is a link to {target}" if path.is_symlink() else f"lies in {target.parent}"
        raise BundleError(f"{self.path}: {name!r} {found}, outside the bundle; refused: copy the file itself there")

    def _fingerprint(self, name: str, path: Path) -> Fingerprint:
        try:
            return _fingerprint(os.stat(path))
        except OSError as error:
            raise self._unreadable(name, error) from None

    def _check_size(self, name: str) -> None:
        path = self._inside(name)
        if not path.is_file():
            raise BundleError(
                f"{self.path}: bundle file {name} is missing; copy the whole folder or export the bundle again"
            )
        found = self._fingerprint(name, path)
        size = self.manifest.files[name].size
        if found[2] != size:
            raise BundleError(
                f"{self.path}: bundle file {name} was resized: expected {size} bytes, found {found[2]}; "
                f"copy it again or export the bundle again"
            )
        self._seen[name] = found

    def _check(self, name: str) -> None:
        """Size and, if asked for, SHA-256 of a file, which is remembered as the one that passed."""
        self._check_size(name)
        if not self._verify:
            return
        expected = self.manifest.files[name].sha256
        try:
            with open_regular(self._inside(name)) as file:
                before = _fingerprint(os.fstat(file.fileno()))
                found = digest(file)
                after = _fingerprint(os.fstat(file.fileno()))
        except OSError as error:
            raise self._unreadable(name, error) from None
        if found != expected or before != after:
            raise BundleError(
                f"{self.path}/{name} was edited after export: expected sha256 {expected[:12]}..., found "
                f"{found[:12]}...; export the bundle again"
            )
        self._seen[name] = before

    def _unreadable(self, name: str, error: OSError) -> BundleError:
        return BundleError(f"{self.path}/{name} cannot be read: {error.strerror or error}; copy it again")


def _fingerprint(found: os.stat_result) -> Fingerprint:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def hub_blobs(root: Path) -> Path | None:
    """``blobs`` of the cached repository that a folder is a snapshot of, or lies in one; None for any other folder.

    The cache's layout: ``models--owner--name/snapshots/REVISION/...``, whose files are links to ``models--.../blobs``.
    """
    for snapshot in (root, *root.parents):
        repository = snapshot.parent.parent
        if snapshot.parent.name == "snapshots" and re.match(r"models--[^/]+$", repository.name):
            blobs = repository / "blobs"
            return None if blobs.is_symlink() else blobs
    return None


def _check_folder(folder: Path) -> None:
    try:
        if folder.is_dir():
            return
        found = "a file" if folder.exists() else "nothing there"
    except (OSError, ValueError) as error:  # too long, or with a null byte
        found = getattr(error, "strerror", None) or str(error)
    raise BundleError(
        f"{folder}: expected a bundle folder, found {found}; make one with: flashvlm-export --model MODEL --out DIR"
    )


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    try:
        raw = read_json(path, MAX_MANIFEST)
    except FileNotFoundError:
        is_checkpoint = (folder / "config.json").is_file()
        what, model = ("is a checkpoint", folder) if is_checkpoint else ("is not a complete bundle", "MODEL")
        raise BundleError(
            f"{folder} {what}: it has no {MANIFEST}; make a bundle with: flashvlm-export --model {model} --out DIR"
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BundleError(f"{path} cannot be read ({reason}); export the bundle again") from None
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if not isinstance(version, int) or version < 1:
        raise BundleError(f"{path}: expected a schema_version from 1, found {version!r}; export the bundle again")
    if version != SCHEMA_VERSION:
        newer = f"upgrade with: {upgrade()}"
        remedy = newer if version > SCHEMA_VERSION else "export the model again with: flashvlm-export"
        raise BundleError(f"{folder} has bundle schema {version}, this flashvlm reads {SCHEMA_VERSION}; {remedy}")
    try:
        return Manifest.model_validate(raw)
    except ValidationError as error:
        raise BundleError(f"{path}: {first_problem(error)}; export the bundle again") from None
