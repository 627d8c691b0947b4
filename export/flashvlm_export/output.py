"""Places for bundles and engines: a bundle never takes the place of anything but a bundle."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from flashvlm.bundle import ENGINES, MANIFEST
from flashvlm.engines import ENGINE_MANIFEST, read_manifest
from flashvlm.errors import BundleError, FlashVLMError
from flashvlm.files import read_json, refuse_link


def check_place(out: Path, force: bool) -> None:
    """Refuses a place that cannot be written, or that holds something this export may not replace."""
    try:
        exists = out.parent.is_dir()
        os.lstat(out)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:  # too long, or with a null byte
        raise FlashVLMError(f"--out {out}: {getattr(error, 'strerror', None) or error}; choose another name") from None
    if not exists:
        raise FlashVLMError(f"--out {out}: the folder {out.parent} does not exist; create it first")
    refuse_link(out)
    if not os.access(out.parent, os.W_OK):
        raise FlashVLMError(f"--out {out}: no permission to write in {out.parent}; choose another folder")
    if not os.path.lexists(out):
        return
    if not force:
        raise FlashVLMError(f"--out {out} exists; choose another name, or add --force to replace it")
    if foreign := _foreign_file(out):
        raise FlashVLMError(
            f"--out {out}: --force replaces only bundles, and {foreign} is not part of one; "
            f"move it away, or choose another name"
        )


def _foreign_file(out: Path) -> Path | None:
    """A file that is lost with ``out`` and that no manifest in it lists."""
    if not out.is_dir():
        return out
    try:
        listed = {MANIFEST, *read_json(out / MANIFEST)["files"]}
    except (OSError, ValueError, LookupError, TypeError):
        listed = set()
    for path in out.rglob("*"):
        name = path.relative_to(out)
        if name.parts[0] == ENGINES and len(name.parts) > 1:
            continue
        if (path.is_symlink() or not path.is_dir()) and name.as_posix() not in listed:
            return path
    engines = (path for path in (out / ENGINES).glob("*"))
    return next((found for path in engines if (found := foreign_to_engines(path))), None)


def foreign_to_engines(folder: Path) -> Path | None:
    """A file that is lost with a folder of engines and that its manifest does not list; None: it may be replaced."""
    if folder.is_symlink() or not folder.is_dir():
        return folder
    try:
        manifest = read_manifest(folder)
        listed = {ENGINE_MANIFEST, *(spec.file for spec in manifest.engines.values())}
    except BundleError:
        listed = set()
    return next((path for path in folder.iterdir() if path.name not in listed), None)


def check_apart(out: Path, checkpoint: Path) -> None:
    """Refuses a bundle in, around or in place of its checkpoint: replacing it would take the checkpoint along."""
    bundle, source = out.resolve(), checkpoint.resolve()
    if bundle == source or source in bundle.parents or bundle in source.parents:
        raise FlashVLMError(f"--out {out} and the checkpoint {checkpoint} overlap; choose another folder for --out")


def check_space(folder: Path, needed: int) -> None:
    """Refuses a disk without ``needed`` bytes free, before they are written."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise FlashVLMError(
            f"disk full: {needed / 1e9:.2f} GB are needed and {folder.parent} has {free / 1e9:.2f} GB free; "
            f"free space or choose another place"
        )
