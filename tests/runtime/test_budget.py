"""Budgets, sizes and install lines: each read, or put into words, in one place."""

from __future__ import annotations

import doctest
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashvlm import budget, extras, sizes
from flashvlm.budget import by_size, choose_budget, parse_budget, parse_budgets, tokens_kept
from flashvlm.errors import SelectionError
from flashvlm.extras import install, upgrade
from flashvlm.sizes import format_size


@pytest.mark.parametrize("module", [budget, sizes])
def test_examples(module: Any) -> None:
    assert doctest.testmod(module) == (0, doctest.testmod(module).attempted)


# --- budgets ---


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "''.* whole number of tokens, or all"),
        ("most", "'most'.* whole number"),
        ("3.5", "'3.5'"),
        ("1e3", "'1e3'"),
        ("ALL", "'ALL'"),
        ("32,64", "'32,64'"),
        ("٣٢", "whole number"),  # digits of another script
        ("--4", "'--4'"),
        ("9" * 5000, "'9{40}'"),
        ("0", "--budget 0: expected at least 1 token, or all"),
        ("-3", "--budget -3: expected at least 1 token, or all"),
    ],
)
def test_what_is_no_budget(text: str, expected: str) -> None:
    with pytest.raises(SelectionError, match=expected):
        parse_budget(text)
    with pytest.raises(SelectionError, match="--other"):
        parse_budget(text, "--other")


def test_lists_keep_their_order_and_nothing_twice() -> None:
    assert parse_budgets("8, 4,8,all") == (8, 4, "all")
    assert parse_budgets("all") == ("all",)
    assert by_size(parse_budgets("8, all,4,8")) == (4, 8, "all")
    with pytest.raises(SelectionError, match="''"):
        parse_budgets("8,,4")


def test_without_a_budget_the_default_is_taken() -> None:
    assert choose_budget(None, (64, 32), 32, 576) == 32
    assert choose_budget(None, (64,), "all", 576) == "all"
    assert choose_budget("all", (64,), 64, 576) == "all"
    chosen = choose_budget(np.int64(32), (64, 32), 64, 576)
    assert (chosen, type(chosen)) == (32, int)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (48, "budget 48 is not in this bundle, which has 64, 32, all; export with --budget 48"),
        (np.int32(48), "budget 48 is not in"),
        (0, "budget 0 .* take one of these"),
        (577, "budget 577 .* take one of these"),
        (True, "budget True .* take one of these"),
        (64.0, "budget 64.0 .* take one of these"),
        ("64", "budget '64' .* take one of these"),
        ([64], r"budget \[64\] .* take one of these"),
        (np.array([64, 32]), "take one of these"),
    ],
)
def test_what_a_bundle_does_not_have(asked: Any, expected: str) -> None:
    with pytest.raises(SelectionError, match=expected):
        choose_budget(asked, (64, 32), 64, 576)


def test_tokens() -> None:
    assert (tokens_kept(64, 576), tokens_kept("all", 576), tokens_kept(64, 50)) == (64, 576, 50)


# --- sizes ---


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.00 kB"),
        (9_995, "10.0 kB"),
        (999_499, "999 kB"),
        (999_500, "1.00 MB"),
        (5 * 10**15, "5,000 TB"),
    ],
)
def test_sizes(count: int, text: str) -> None:
    assert format_size(count) == text


# --- install lines ---


def test_in_a_clone_the_line_installs_the_clone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clone = tmp_path / "my clone"
    clone.mkdir()
    (clone / "pyproject.toml").touch()
    monkeypatch.setattr(extras, "ROOT", clone)
    assert install("export", "cpu") == f"pip install -e '{clone}[export,cpu]'"
    assert upgrade() == f"git -C '{clone}' pull"


def test_elsewhere_it_names_the_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(extras, "ROOT", tmp_path)
    listed = ["numpy>=1.26", 'torch>=2.11; extra == "export"', "onnxruntime-gpu>=1.31 ; extra == 'gpu'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: listed)
    assert install("gpu") == "pip install 'onnxruntime-gpu>=1.31'"
    assert install("gpu", "export") == "pip install 'torch>=2.11' 'onnxruntime-gpu>=1.31'"
    assert "clone" in upgrade()


def test_every_extra_that_a_message_names_exists() -> None:
    root = Path(__file__).resolve().parents[2]
    project = (root / "pyproject.toml").read_text(encoding="utf-8")
    extra = project.partition("[project.optional-dependencies]")[2].partition("[project.scripts]")[0]
    have = set(re.findall(r"^([\w-]+) = \[", extra, re.MULTILINE))
    for path in [*(root / "runtime").rglob("*.py"), *(root / "export").rglob("*.py")]:
        text = path.read_text(encoding="utf-8")
        assert "pip install 'flashvlm" not in text, path
        for call in re.findall(r"\binstall\((['\"][^)]*['\"])\)", text):
            assert set(re.findall(r"['\"]([\w-]+)['\"]", call)) <= have, path


def test_nothing_heavy_is_imported() -> None:
    code = "import sys, flashvlm.budget, flashvlm.extras, flashvlm.sizes; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
