"""Folders that appear whole or not at all, and bundles that never take the place of anything but a bundle."""

from __future__ import annotations

import glob
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flashvlm.bundle import ENGINES, MANIFEST
from flashvlm.errors import FlashVLMError


def check_out(out: Path, force: bool) -> None:
    """Refuses a place that cannot be written, or that holds something this export may not replace."""
    if not out.parent.is_dir():
        raise FlashVLMError(f"--out {out}: the folder {out.parent} does not exist; create it first")
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
        listed = {MANIFEST, *json.loads((out / MANIFEST).read_text(encoding="utf-8"))["files"]}
    except (OSError, ValueError, RecursionError, LookupError, TypeError):
        listed = set()
    for path in out.rglob("*"):
        name = path.relative_to(out)
        if (path.is_symlink() or not path.is_dir()) and name.as_posix() not in listed and name.parts[0] != ENGINES:
            return path
    return None


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


@contextmanager
def whole_or_not(out: Path, replace: bool) -> Iterator[Path]:
    """A temporary sibling of the folder ``out`` that takes its name on success and is removed on failure.

    With ``replace``, an old folder steps aside first and is deleted last. A kill between the two renames leaves both,
    the old one under a hidden name that the next run for ``out`` turns back.
    """
    out = out.resolve()  # of a link to a folder, the folder is replaced
    _recover(out)
    partial, replaced = (out.parent / f".{out.name}.{kind}-{os.getpid()}" for kind in ("partial", "replaced"))
    try:
        partial.mkdir()
        yield partial
        if replace and os.path.lexists(out):
            out.rename(replaced)
        partial.rename(out)
    except OSError as error:
        raise FlashVLMError(
            f"cannot write {out}: {error.strerror or error}; free space or choose another place"
        ) from None
    finally:
        if replaced.exists() and not os.path.lexists(out):
            replaced.rename(out)
        for path in (partial, replaced):
            shutil.rmtree(path, ignore_errors=True)


def _recover(out: Path) -> None:
    """Undoes what runs for the same place left when they were killed."""
    for kind in ("replaced", "partial"):
        for path in out.parent.glob(f".{glob.escape(out.name)}.{kind}-*"):
            pid = path.name.rpartition("-")[2]
            # This process's own id is an earlier one's where ids start over, as in a container.
            if not pid.isdigit() or (int(pid) != os.getpid() and Path("/proc", pid).exists()):
                continue
            if kind == "replaced" and not os.path.lexists(out):
                path.rename(out)
            else:
                shutil.rmtree(path, ignore_errors=True)
