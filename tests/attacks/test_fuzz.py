"""The fuzz command: 2,000 seeded cases a class in the slow tier, and a few of each in every run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("onnx")

import fuzz

CASES = 2000


def run_class(name: str, cases: int, bundle: Path, checkpoint: Path, timeout: int) -> str:
    command = [sys.executable, fuzz.__file__, name, "--cases", str(cases)]
    command += ["--bundle", str(bundle), "--checkpoint", str(checkpoint)]
    paths = {"PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=timeout, env={**_environment(), **paths}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _environment() -> dict[str, str]:
    import os

    return dict(os.environ)


@pytest.mark.parametrize("name", fuzz.CLASSES)
def test_a_few_of_each_class(name: str, tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    printed = run_class(name, 6, tiny_bundle, tiny_checkpoint, 240)
    assert "'found': 0" in printed


@pytest.mark.slow
@pytest.mark.parametrize("name", fuzz.CLASSES)
def test_fuzz(name: str, tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    printed = run_class(name, CASES, tiny_bundle, tiny_checkpoint, 5400)
    assert "'found': 0" in printed
    assert "'refused': 0" not in printed  # or the mutations no longer bite
