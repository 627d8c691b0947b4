"""CONTRIBUTING.md, "How to add a selection method", followed: one file, one registration, and all else comes of it."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest
import test_every_method
from PIL import Image

from flashvlm import Pipeline
from flashvlm.bundle import Bundle
from flashvlm_export.cli.export import main
from flashvlm_export.selection import METHODS
from refusals import assert_refused, run

FILE = '''
"""The least salient tokens."""

import torch

from flashvlm_export.selection.method import Method, Nodes, Selection, SelectionInputs, SelectionParams
from flashvlm_export.selection.ops import best_of, finish
from flashvlm_export.selection.score import log_saliency


def toy(inputs: SelectionInputs, budget: int, params: SelectionParams, nodes: Nodes) -> Selection:
    scores = params.eta * log_saliency(-inputs.saliency, inputs.valid, 1e-6)  # [B, N]
    top = best_of(scores, inputs.valid, budget)
    return finish(inputs, top, top, scores, budget)


METHOD = Method("toy", toy, "the least salient tokens", reads=frozenset({"saliency"}), params=("eta",), score="log")
'''


@pytest.fixture(scope="module", autouse=True)
def _registered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    path = tmp_path_factory.mktemp("methods") / "toy.py"
    path.write_text(FILE)
    spec = importlib.util.spec_from_file_location("toy", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    METHODS[module.METHOD.name] = module.METHOD
    yield
    del METHODS[module.METHOD.name]


GENERIC = [
    name
    for name, test in vars(test_every_method).items()
    if name.startswith("test_") and list(inspect.signature(test).parameters) == ["method"]
]


@pytest.mark.parametrize("name", GENERIC)
def test_the_tests_of_every_method_hold(name: str) -> None:
    getattr(test_every_method, name)("toy")


@pytest.mark.slow
def test_it_is_exported_and_answers(tiny_checkpoint: Path, tmp_path: Path) -> None:
    flags = ("--method", "toy", "--eta", "0.25", "--budget", "4")
    ran = run(main, "--model", tiny_checkpoint, "--out", tmp_path / "toy", *flags)
    assert ran.code == 0, ran.stderr
    selection = Bundle(tmp_path / "toy").manifest.selection
    assert (selection.method, selection.params) == ("toy", {"eta": 0.25})
    answer = Pipeline.from_bundle(tmp_path / "toy").generate(Image.new("RGB", (40, 30)), "What?", max_new_tokens=2)
    assert answer.kept.shape == (4,)


def test_a_parameter_that_it_does_not_read_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    flags = ("--method", "toy", "--top-ratio", "0.25", "--budget", "4")
    ran = run(main, "--model", tiny_checkpoint, "--out", tmp_path / "toy", *flags)
    assert_refused(ran, "--top-ratio is not a parameter of toy, which reads --eta; leave it out")
