"""The examples in docstrings run, and the names that users call have one."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from typing import Any

import pytest

import flashvlm

# What opens an engine, a terminal or a GPU is not imported here.
LEFT_OUT = ("flashvlm.cli", "flashvlm.__main__", "flashvlm.sessions.tensorrt")
MODULES = [
    module.name
    for module in pkgutil.walk_packages(flashvlm.__path__, "flashvlm.")
    if not module.ispkg and not module.name.startswith(LEFT_OUT)
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    found = doctest.testmod(importlib.import_module(name), raise_on_error=False)
    assert found.failed == 0


def test_there_are_examples() -> None:
    finder = doctest.DocTestFinder()
    counts = {name: sum(len(test.examples) for test in finder.find(importlib.import_module(name))) for name in MODULES}
    assert counts["flashvlm.sampling"] >= 3
    assert counts["flashvlm.pipeline"] >= 5


@pytest.mark.parametrize("name", [name for name in flashvlm.__all__ if not name.startswith("_")])
def test_public_names_say_what_they_do(name: str) -> None:
    public: Any = getattr(flashvlm, name)
    assert public.__doc__
    if isinstance(public, type) and not issubclass(public, Exception):
        methods = [getattr(public, each) for each in vars(public) if not each.startswith("_")]
        assert all(each.__doc__ for each in methods if callable(each))
