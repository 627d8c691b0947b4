"""The tiers of the tests: each file has one, and the unit tier has no torch."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from tiers import NAMES, THOROUGH, TIERS, UNIT_LACKS, tier_of

TESTS = Path(__file__).parent


def test_the_table_names_what_exists() -> None:
    assert not [path for path in TIERS if not (TESTS / path).exists()]
    assert set(TIERS.values()) == set(NAMES)
    markers = re.findall(r'^  "(\w+): ', (TESTS.parent / "pyproject.toml").read_text(), re.MULTILINE)
    assert markers == [*NAMES, "thorough", "slow", "gpu"]


def test_what_waits_for_ci_exists() -> None:
    for test in THOROUGH:
        file, _, name = test.partition("::")
        path = TESTS / file
        assert path.is_file(), test
        assert name.partition("[")[0].partition("::")[0] in path.read_text(encoding="utf-8"), test


def test_a_file_has_the_tier_of_its_folder_or_its_own() -> None:
    assert tier_of("export/test_of_tomorrow.py") == "graph"
    assert tier_of("export/test_parity.py") == "parity"
    assert tier_of("test_readme.py") == "commands"


@pytest.mark.parametrize("name", UNIT_LACKS)
def test_a_run_of_the_unit_tier_cannot_import_torch(name: str, request: pytest.FixtureRequest) -> None:
    if request.config.option.markexpr != "unit":
        pytest.skip("other tiers have it: scripts/test -m unit")
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(name)
