"""Fixtures shared by all tests: small random checkpoints in the layout of the hub's LLaVA-1.5 folders, and bundles.

Each is made once a run, whichever worker needs it first. Tests only read them; those that edit take a copy.
"""

from __future__ import annotations

import fcntl
import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tiers import NAMES, UNIT_LACKS, is_thorough, tier_of

# scripts/ is no package; its modules are imported by name, as the scripts themselves do.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

# One worker a core: more threads of torch would only wait for each other, at a quarter of the processor time.
os.environ.setdefault("OMP_NUM_THREADS", "1")

TESTS = Path(__file__).parent
Make = Callable[[Path], object]
Once = Callable[[str, Make], Path]


def pytest_configure(config: pytest.Config) -> None:
    if config.option.markexpr == "unit":
        sys.modules.update(dict.fromkeys(UNIT_LACKS))  # type: ignore[arg-type] - None: an import of it fails


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """A run of the unit tier reads no file of another: most import torch."""
    if config.option.markexpr != "unit" or collection_path.suffix != ".py":
        return None
    return tier_of(collection_path.relative_to(TESTS).as_posix()) != "unit" or None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not item.path.is_relative_to(TESTS):
            continue
        path = item.path.relative_to(TESTS).as_posix()
        if not any(item.get_closest_marker(name) for name in NAMES):
            item.add_marker(tier_of(path))
        _, _, name = item.nodeid.partition("::")
        if is_thorough(f"{path}::{name}") or "tiny_gqa_legacy_bundle" in getattr(item, "fixturenames", ()):
            item.add_marker("thorough")


def pytest_collection_finish() -> None:
    """What the imports made stays: walking it at every collection costs the exports an eighth of their time."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """once(name, make): the folder ``make`` wrote, in this worker or in another."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base  # xdist gives each worker a folder below

    def path_of(name: str, make: Make) -> Path:
        out = shared / "once" / name
        out.parent.mkdir(exist_ok=True)
        with out.with_name(f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not out.exists():
                make(out)
        return out

    return path_of


@pytest.fixture(scope="session")
def tiny_checkpoint(once: Once) -> Path:
    """A float32 LLaVA of 0.1 M parameters: 16 image tokens, 2 language layers of 4 heads."""
    return once("tiny", lambda out: _write("tiny", out))


@pytest.fixture(scope="session")
def tiny_gqa_checkpoint(once: Once) -> Path:
    """Awkward sizes: 25 image tokens, 6 heads over 2 key-value heads, padded vocabulary."""
    return once("tiny-gqa", lambda out: _write("tiny-gqa", out))


def _write(like: str, out: Path) -> None:
    from flashvlm_export.testing import checkpoints

    checkpoints.write_checkpoint(like, out, dtype="float32")


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, once: Once) -> Path:
    """The tiny checkpoint at budgets 4 and 7 of 16, whole prompt as query, original positions kept."""
    options = {"budgets": (4, 7), "query": "prompt", "positions": "keep"}
    return once("tiny-bundle", lambda out: _export(tiny_checkpoint, out, **options))


@pytest.fixture(scope="session")
def tiny_gqa_bundle(tiny_gqa_checkpoint: Path, once: Once) -> Path:
    """The awkward checkpoint at budget 5 of 25 with defaults, and the fused prefill graph."""
    return once("gqa-bundle", lambda out: _export(tiny_gqa_checkpoint, out, budgets=(5,), layout="fused"))


@pytest.fixture(scope="session")
def tiny_gqa_legacy_bundle(tiny_gqa_checkpoint: Path, once: Once) -> Path:
    """The awkward checkpoint in primitives of opset 20."""
    return once("gqa-legacy-bundle", lambda out: _export(tiny_gqa_checkpoint, out, budgets=(5,), dialect="legacy"))


@pytest.fixture(scope="session")
def tiny_gqa_half_bundle(tiny_gqa_checkpoint: Path, once: Once) -> Path:
    """The awkward checkpoint in float16, with the fused prefill graph."""
    options = {"budgets": (5,), "layout": "fused", "dtype": "float16"}
    return once("gqa-half-bundle", lambda out: _export(tiny_gqa_checkpoint, out, **options))


@pytest.fixture(scope="session")
def demo_bundle(once: Once) -> Path:
    """The demo model in float32 at budget 64 of 576."""
    return once("demo", lambda out: _export("demo", out, budgets=(64,), dtype="float32"))


def _export(checkpoint: Path | str, out: Path, **options: Any) -> None:
    from flashvlm_export.exporter import ExportOptions, export

    export(ExportOptions(model=str(checkpoint), out=out, **options))
