"""A bundle says where it is from and under which terms, in the form that the Hub reads."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from flashvlm.bundle import Bundle
from flashvlm.errors import CheckpointError
from flashvlm.manifest import Manifest
from flashvlm_export import model_card
from flashvlm_export.checkpoint import Checkpoint
from flashvlm_export.exporter import ExportOptions
from flashvlm_export.selection import SelectionParams

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CARD = "---\nlicense: llama2\ntags:\n- vision\n---\n# A model\nlicense: mit\n"


def checkpoint(folder: Path, **files: str | bytes) -> Checkpoint:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = folder / name.replace("__", ".")
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return Checkpoint("x", folder, {}, {})


def in_hub_cache(tmp_path: Path) -> Checkpoint:
    """As huggingface_hub leaves it: links to blobs."""
    repository = tmp_path / "models--someone--a-model"
    snapshot, blobs = repository / "snapshots" / COMMIT, repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name, content in (("README.md", CARD), ("LICENSE.txt", "the terms"), ("NOTICE", "by someone")):
        (blobs / name.lower()).write_text(content)
        (snapshot / name).symlink_to(Path("../../blobs", name.lower()))
    return Checkpoint("someone/a-model", snapshot, {}, {})


def manifest_of(bundle: Path, **changes: Any) -> Manifest:
    return Bundle(bundle).manifest.model_copy(update=changes)


def front_matter(card: str) -> dict[str, Any]:
    start, content, _ = card.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(content)


def test_a_snapshot_of_the_hub(tmp_path: Path, tiny_gqa_bundle: Path) -> None:
    found = model_card.provenance(in_hub_cache(tmp_path))
    assert (found.repo, found.revision, found.license) == ("someone/a-model", COMMIT, "llama2")
    assert found.files == {"LICENSE.txt": b"the terms", "NOTICE": b"by someone"}
    manifest = manifest_of(tiny_gqa_bundle, license="llama2", revision=COMMIT)
    card = model_card.write(manifest, found, ExportOptions("someone/a-model", tmp_path / "out", budgets=(5,)))
    assert front_matter(card) == {
        "license": "llama2",
        "base_model": "someone/a-model",
        "library_name": "flashvlm",
        "pipeline_tag": "image-text-to-text",
        "tags": ["onnx", "flashvlm", "vision-language"],
    }
    assert COMMIT in card
    assert "flashvlm-export --model someone/a-model --budget 5 --out BUNDLE" in card


def test_a_folder_of_ones_own(tmp_path: Path, tiny_gqa_bundle: Path) -> None:
    found = model_card.provenance(checkpoint(tmp_path / "mine"))
    assert found == model_card.Provenance(None, None, None, {})
    options = ExportOptions(
        str(tmp_path / "mine"),
        tmp_path / "out",
        budgets=(),
        method="trim",
        dialect="legacy",
        params=SelectionParams(eta=0.25),
    )
    card = model_card.write(manifest_of(tiny_gqa_bundle), found, options)
    assert {"license", "base_model"}.isdisjoint(front_matter(card))
    assert str(tmp_path) not in card  # nothing of this machine
    assert "--budget all --method trim --dialect legacy --eta 0.25 --out BUNDLE" in card


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        (CARD, "llama2"),
        ("---\r\nlicense: apache-2.0\r\n---\r\n", "apache-2.0"),
        ("---\nlicense: 'mit'\n---", "mit"),
        ("---\nlicense: other\nlicense_name: qwen-research\n---\n", "qwen-research"),
        ("---\nlicense:\n- mit\n- apache-2.0\n---\n", None),
        ("---\nlicense: !!python/object:os.system\n---\n", None),
        (f"---\nlicense: {'x' * 99}\n---\n", None),
        ("license: mit\n", None),
        ("---\nlicense: mit\n", None),  # front matter without an end
        ("---\n" + "a: b\n" * 20_000 + "license: mit\n---\n", None),  # beyond what is looked at
        ("", None),
    ],
)
def test_licences_of_cards(card: str, expected: str | None, tmp_path: Path) -> None:
    assert model_card.provenance(checkpoint(tmp_path / "mine", README__md=card)).license == expected


def test_files_that_are_no_terms(tmp_path: Path) -> None:
    mine = checkpoint(tmp_path / "mine", LICENSE__md="1", notice__txt="2", LICENSE__py="3", NOTICED="4")
    assert model_card.provenance(mine).files == {"LICENSE.md": b"1", "notice.txt": b"2"}


def test_terms_that_are_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("mine")
    linked = checkpoint(tmp_path / "linked")
    (linked.folder / "LICENSE").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=r"LICENSE is a link to .*secret, outside the checkpoint"):
        model_card.provenance(linked)
    piped = checkpoint(tmp_path / "piped")
    os.mkfifo(piped.folder / "README.md")
    with pytest.raises(CheckpointError, match=r"README.md cannot be read: .*a named pipe"):
        model_card.provenance(piped)
    large = checkpoint(tmp_path / "large", NOTICE=b"x" * (model_card.MAX_TERMS + 1))
    with pytest.raises(CheckpointError, match="NOTICE cannot be read: expected at most"):
        model_card.provenance(large)


def test_it_is_part_of_the_bundle(tiny_gqa_bundle: Path) -> None:
    bundle = Bundle(tiny_gqa_bundle)
    card = bundle.read("README.md").decode()
    for name in ("vision.data", "decoder.onnx", "processor/tokenizer.json"):
        assert f"| `{name}` |" in card
    assert (bundle.manifest.license, bundle.manifest.revision) == (None, None)


def test_the_demo_model_says_its_licence() -> None:
    from flashvlm_export.checkpoint import SHIPPED

    folder = SHIPPED["demo"]
    config = json.loads((folder / "config.json").read_text())
    assert model_card.provenance(Checkpoint("demo", folder, config, {})).license == "apache-2.0"
