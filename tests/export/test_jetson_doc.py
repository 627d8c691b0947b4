"""docs/jetson.md: what can run off a device is run as it stands; of the rest, every option exists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from flashvlm.cli import profile as cli_profile
from flashvlm.cli import run as cli_run
from flashvlm_export.cli import compile as cli_compile
from flashvlm_export.cli import export as cli_export
from flashvlm_export.plan import Plan
from refusals import run

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "jetson.md"
MAINS = {
    "flashvlm-export": cli_export.main,
    "flashvlm-compile": cli_compile.main,
    "flashvlm-run": cli_run.main,
    "flashvlm-profile": cli_profile.main,
}


def commands() -> list[list[str]]:
    blocks = re.findall(r"```bash\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    return [words for words in lines if words and words[0] in MAINS]


def test_the_plans_are_those_of_the_tables() -> None:
    plans = [words for words in commands() if "--plan" in words]
    assert len(plans) == 2
    text = DOCUMENT.read_text(encoding="utf-8")
    for words in plans:
        ran = run(MAINS[words[0]], *words[1:], *(() if "--json" in words else ("--json",)))
        assert ran.code == 0, ran.stderr
        found = Plan.model_validate_json(ran.stdout)
        device = max(budget.device_total for budget in found.budgets)
        row = (
            f"| {found.model} | {found.bundle_bytes / 1e9:.1f} GB | {found.kv.bytes_per_token / 1e6:.2f} MB "
            f"| {device / 1e9:.1f} GB | {found.build_anonymous_bytes / 1e9:.0f} GB, "
            f"{found.build_peak_bytes / 1e9:.0f} GB with its mapped weights |"
        )
        assert row in text


def test_the_trtexec_lines_are_printed_before_there_are_engines(
    tiny_gqa_legacy_bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (words,) = [words for words in commands() if "--print-commands" in words]
    (tmp_path / "llava").symlink_to(tiny_gqa_legacy_bundle)
    monkeypatch.chdir(tmp_path)
    given = [word.replace("64,128", "5") for word in words[1:]]
    for plugins in ([], ["--plugins", __file__]):
        ran = run(MAINS[words[0]], *given, *plugins)
        assert ran.code == 0, ran.stderr
        for name in ("vision", "select-k5", "decoder-prompt-k5", "decoder-token-all"):
            assert name in ran.stdout
        assert "enablePluginOverride" not in ran.stdout  # trtexec of JetPack does not know it


def test_every_option_of_the_document_exists() -> None:
    used: dict[str, set[str]] = {name: set() for name in MAINS}
    for words in commands():
        used[words[0]] |= {word for word in words if word.startswith("--")}
    assert all(used.values())
    for name, options in used.items():
        text = run(MAINS[name], "--help").stdout
        assert {option for option in options if option not in text} == set(), name
