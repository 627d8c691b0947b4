"""docs/models.md says of each family what its tests showed, and nothing more."""

from __future__ import annotations

import importlib.util
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import pytest

from flashvlm_export.families import FAMILIES

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def models() -> ModuleType:
    loader = SourceFileLoader("models", str(ROOT / "scripts" / "models"))
    spec = importlib.util.spec_from_loader("models", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def test_every_family_has_a_row() -> None:
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    rows = {line.split("|")[1].strip(" `"): line for line in page.splitlines() if line.startswith("| `")}
    assert {*rows} == {*FAMILIES}
    for family in FAMILIES.values():
        assert all(f"`{name}`" in rows[family.NAME] for name in family.ALIASES)


@pytest.mark.parametrize(
    ("failed", "cells"),
    [
        ("", ["text, one", "yes", "modern", "modern"]),
        ("test_all_tokens[modern-one]", ["", "yes", "", "modern"]),
        ("test_video_with_all_tokens[modern]", ["", "", "", "modern"]),
        ("test_real_sizes_compile[modern]", ["text, one", "yes", "modern", ""]),
    ],
)
def test_what_no_test_showed_is_left_empty(failed: str, cells: list[str], models: ModuleType, tmp_path: Path) -> None:
    names = ["test_pixels", "test_video_with_all_tokens", "test_real_sizes_compile"]
    tests = [f"{name}[modern]" for name in names]
    tests += [f"test_{kind}_tokens[modern-{name}]" for kind in ("all", "some") for name in ("text", "one")]
    cases = "".join(
        f'<testcase classname="tests.export.test_internvl.TestInternVL" name="{name}">'
        f"{'<failure/>' if name == failed else ''}</testcase>"
        for name in tests
    )
    results = tmp_path / "results.xml"
    results.write_text(f"<testsuite>{cases}</testsuite>")
    (proof,) = (proof for _, proof in models.proofs() if proof.__name__ == "TestInternVL")
    row = models.row(proof, models.outcomes([results]))
    assert [cell.strip() for cell in row.split("|")[4:8]] == cells
