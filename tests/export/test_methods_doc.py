"""docs/methods.md says of every method what the registry says."""

from __future__ import annotations

import re
from pathlib import Path

from flashvlm_export.selection import METHODS
from flashvlm_export.selection.method import INPUTS

TEXT = (Path(__file__).parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")


def test_the_table_is_the_registry() -> None:
    rows = []
    for name, method in METHODS.items():
        inputs = ", ".join(name for name in INPUTS if name in method.reads) or "nothing"
        params = " ".join(f"`{name}`" for name in method.params) or "none"
        rows.append(f"| [`{name}`](#{name}) | {inputs} | {params} | {method.score or 'none'} |")
    assert re.findall(r"^\| \[`.*", TEXT, re.MULTILINE) == rows


def test_every_method_has_a_paragraph_with_its_paper() -> None:
    sections = dict(re.findall(r"^## (\S+)\n\n(.*?)(?=\n## |\Z)", TEXT, re.MULTILINE | re.DOTALL))
    assert list(sections) == list(METHODS)
    for name, method in METHODS.items():
        cited = re.findall(r"\[arXiv ([\d.]+)\]\(https://arxiv\.org/abs/\1\)", sections[name])
        assert cited[:1] == ([method.paper] if method.paper else []), name
