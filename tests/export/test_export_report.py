"""What flashvlm-export says of what it wrote: a table or JSON, and where budget all cannot keep its promise."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from flashvlm.bundle import Bundle
from flashvlm_export.cli.tables import print_report
from flashvlm_export.exporter import ExportReport

NOTICE = (
    "--budget all never fits this bundle: 16 image tokens and the shortest question take 24 of its 23 cache slots; "
    "for all, export with --max-seq 24 or more"
)


def report(bundle: Path, max_seq: int) -> ExportReport:
    """As of an export with ``--max-seq`` whose shortest question has eight tokens of text."""
    manifest = Bundle(bundle, verify=False).manifest
    model = manifest.model.model_copy(update={"max_seq": max_seq})
    manifest = manifest.model_copy(update={"model": model})
    return ExportReport(bundle, manifest, 1.25, 0.5, 186_000_000, text_tokens=8)


def test_json(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_report(report(tiny_bundle, 23), json_output=True, quiet=False)
    shown = capsys.readouterr()
    found: dict[str, Any] = json.loads(shown.out)
    on_disk = {p.relative_to(tiny_bundle).as_posix(): p.stat().st_size for p in tiny_bundle.rglob("*") if p.is_file()}
    del on_disk["bundle.json"]
    assert found["files"] == on_disk
    assert found["bytes"] == sum(on_disk.values())
    assert (found["bundle"], found["budgets"], found["image_tokens"]) == (str(tiny_bundle), [4, 7], 16)
    assert (found["seconds"], found["peak_resident"]) == (1.25, 186_000_000)
    assert found["notices"] == [NOTICE]
    assert shown.err == f"note: {NOTICE}\n"


def test_table(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_report(report(tiny_bundle, 24), json_output=False, quiet=False)
    shown = capsys.readouterr()
    assert shown.err == ""  # all just fits
    assert "16 image tokens, budgets 4, 7, all; float32;" in shown.out
    assert "peak memory 186 MB" in shown.out
    assert not re.search(r" 0\.00 |MiB|GiB", shown.out)
    assert re.search(r"^processor/chat_template.jinja +\d+ bytes$", shown.out, re.MULTILINE)
    for name in Bundle(tiny_bundle, verify=False).manifest.files:
        assert name in shown.out


def test_quiet(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_report(report(tiny_bundle, 23), json_output=False, quiet=True)
    assert capsys.readouterr() == ("", "")
    print_report(report(tiny_bundle, 23), json_output=True, quiet=True)
    shown = capsys.readouterr()
    assert json.loads(shown.out)["notices"] == [NOTICE]
    assert shown.err == ""
