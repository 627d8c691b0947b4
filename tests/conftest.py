"""Fixtures shared by all tests: small random checkpoints in the layout of the hub's LLaVA-1.5 folders."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

# scripts/ is no package; its modules are imported by name, as the scripts themselves do.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 LLaVA of 0.1 M parameters: 16 image tokens, 2 language layers of 4 heads."""
    return _write("tiny", tmp_path_factory)


@pytest.fixture(scope="session")
def tiny_gqa_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Awkward sizes: 25 image tokens, 6 heads over 2 key-value heads, padded vocabulary."""
    return _write("tiny-gqa", tmp_path_factory)


def _write(like: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    import checkpoints

    folder = tmp_path_factory.mktemp("checkpoints") / like
    return checkpoints.write_checkpoint(like, folder, dtype="float32").folder


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint at budgets 4 and 7 of 16, whole prompt as query, original positions kept."""
    return _export(tiny_checkpoint, tmp_path_factory, budgets=(4, 7), query="prompt", positions="keep")


@pytest.fixture(scope="session")
def tiny_gqa_bundle(tiny_gqa_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The awkward checkpoint at budget 5 of 25 with defaults, and the fused prefill graph."""
    return _export(tiny_gqa_checkpoint, tmp_path_factory, budgets=(5,), layout="fused")


def _export(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, **options: Any) -> Path:
    from flashvlm_export.exporter import ExportOptions, export

    out = tmp_path_factory.mktemp("bundles") / "bundle"
    return export(ExportOptions(model=str(checkpoint), out=out, **options)).out
