"""A bundle for each variant in the work folder, exported once: the same vision and decoder, its own selection."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Final

import flashvlm_export
from flashvlm import __version__
from flashvlm.bundle import Bundle
from flashvlm.files import atomic_folder
from flashvlm_export.checkpoint import open_checkpoint
from flashvlm_export.exporter import ExportOptions, export
from flashvlm_export.selection import METHODS, SelectionParams
from quality import resolution
from quality.variants import DOWNSAMPLED, EVERYTHING, Variant

DTYPE: Final = "float32"  # of every graph: what is compared is the selection, and no CPU computes in float16


class Shelf:
    """The bundles of one model. They are named by what they depend on, so that none is ever stale."""

    def __init__(self, model: str, work: Path) -> None:
        self._checkpoint = open_checkpoint(model).folder
        self._work = work
        METHODS[resolution.POOLED.name] = resolution.POOLED
        weights = [path for path in sorted(self._checkpoint.iterdir()) if path.suffix in (".safetensors", ".json")]
        exporter = sorted(Path(flashvlm_export.__path__[0]).rglob("*.py"))
        sources = (*weights, *exporter, Path(resolution.__file__))
        self._key = key_of(__version__, DTYPE, *(hashlib.sha256(path.read_bytes()).hexdigest() for path in sources))

    @cached_property
    def base(self) -> Bundle:
        """The bundle of the model as it is, without selection."""
        return self.bundle(EVERYTHING, ())

    def path(self, variant: Variant, tokens: Sequence[int]) -> Path:
        key = key_of(self._key, variant, *tokens)
        return self._work / "bundles" / f"{variant.name.replace('/', '-')}-{key}"

    def bundle(self, variant: Variant, tokens: Sequence[int]) -> Bundle:
        """The variant's bundle at budgets of so many tokens; ``downsampled`` has one resolution and no budget."""
        out = self.path(variant, tokens)
        if not out.exists():
            model, budgets, method = self._checkpoint, tuple(tokens), variant.method
            if method == DOWNSAMPLED:
                (count,) = tokens
                model, budgets, method = self._smaller(round(count**0.5)), (), "none"
            out.parent.mkdir(parents=True, exist_ok=True)
            options = ExportOptions(
                model=str(model),
                out=out,
                budgets=budgets,
                method=method,
                params=SelectionParams(**variant.params),
                query=variant.query,
                positions=variant.positions,
                dtype=DTYPE,
            )
            export(options)
            if variant != EVERYTHING:
                _link(Bundle(out, verify=False), self.base)
        return Bundle(out, verify=False)

    def _smaller(self, side: int) -> Path:
        """The checkpoint of the same model on images of ``side`` x ``side`` patches."""
        out = self._work / "checkpoints" / f"side-{side}-{self._key}"
        if not out.exists():
            out.parent.mkdir(parents=True, exist_ok=True)
            with atomic_folder(out) as folder:
                resolution.write_downsampled(self._checkpoint, side, folder)
        return out


def _link(bundle: Bundle, base: Bundle) -> None:
    """Weights that are the base's are stored once."""
    for name, spec in bundle.manifest.files.items():
        if base.manifest.files.get(name) == spec:
            linked = bundle.path / f"{name}.linked"
            os.link(base.path / name, linked)
            linked.replace(bundle.path / name)


def key_of(*parts: object) -> str:
    """12 hexadecimal digits of SHA-256."""
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:12]
