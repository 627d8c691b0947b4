"""Nothing in a checkpoint is code: what asks for code is refused, or exported without it, and stdin is never read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from refusals import assert_refused, copy_of, run

pytest.importorskip("torch")

from flashvlm_export import exporter
from flashvlm_export.cli.export import main

CODE = "from transformers import *\nopen({marker!r}, 'w').close()\n\n\nclass Mine: ...\n"
AUTO = ("AutoProcessor", "AutoImageProcessor", "AutoTokenizer", "AutoConfig", "AutoModel", "AutoVideoProcessor")


class WorkBeganError(Exception):
    pass


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint with a module beside its weights that leaves a mark when it is imported."""
    folder = copy_of(tiny_checkpoint, tmp_path, "checkpoint")
    (folder / "mine.py").write_text(CODE.format(marker=str(tmp_path / "marker")))
    # transformers 5 keeps the image processor's settings in this file, older versions in one of their own.
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    edit(folder / "processor_config.json", lambda content: content.update(image_processor=settings))
    return folder


def edit(path: Path, change: Any) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    change(content)
    path.write_text(json.dumps(content))


def auto_map(content: dict[str, Any]) -> None:
    # transformers wants a pair for tokenizers, a text for the rest.
    content["auto_map"] = {name: ["mine.Mine", "mine.Mine"] if "Tok" in name else "mine.Mine" for name in AUTO}


PLACES = {
    "processor": ("processor_config.json", auto_map, "processor_class"),
    "image processor": ("processor_config.json", lambda c: auto_map(c["image_processor"]), "image_processor_type"),
    "tokenizer": ("tokenizer_config.json", auto_map, "tokenizer_class"),
    "preprocessor": ("preprocessor_config.json", auto_map, "image_processor_type"),
}


# Each starts a process that imports torch: one of them in the fast tier.
@pytest.mark.parametrize("place", ["processor", *(pytest.param(p, marks=pytest.mark.slow) for p in [*PLACES][1:])])
def test_code_that_would_be_used_is_refused(place: str, checkpoint: Path, tmp_path: Path) -> None:
    name, change, key = PLACES[place]

    def wants_code(content: dict[str, Any]) -> None:
        change(content)
        (content["image_processor"] if place == "image processor" else content)[key] = "Mine"

    edit(checkpoint / name, wants_code)
    ran = export_with_yes_on_stdin(checkpoint, tmp_path / "out")
    assert ran.returncode == 2, ran
    assert ran.stderr.count("\n") <= 3, ran.stderr
    assert f"error: {name}: auto_map names code" in ran.stderr
    assert "never run" in ran.stderr
    assert not (tmp_path / "marker").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", [*PLACES, "config"])
def test_code_that_is_not_needed_is_left_alone(
    place: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many checkpoints still carry the code from before transformers had their class."""
    name, change, key = PLACES.get(place, ("config.json", auto_map, ""))
    edit(checkpoint / name, change)
    if key:
        classes = {"processor_class": "LlavaProcessor", "image_processor_type": "CLIPImageProcessor"}
        classes["tokenizer_class"] = "PreTrainedTokenizerFast"

        def declare(content: dict[str, Any]) -> None:
            (content["image_processor"] if place == "image processor" else content)[key] = classes[key]

        edit(checkpoint / name, declare)

    def reached(*_: object) -> None:
        raise WorkBeganError

    monkeypatch.setattr(exporter, "trace", reached)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setenv("FLASHVLM_DEBUG", "1")
    with pytest.raises(WorkBeganError):
        run(main, "--model", checkpoint, "--budget", "4", "--out", tmp_path / "out")
    assert not (tmp_path / "marker").exists()


def export_with_yes_on_stdin(checkpoint: Path, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flashvlm_export.cli.export", "--model", str(checkpoint), "--budget", "4"]
    return subprocess.run(
        [*command, "--out", str(out)], input="y\n" * 20, capture_output=True, text=True, check=False, timeout=120
    )


@pytest.mark.parametrize("name", ["chat_template.jinja", "processor_config.json", "tokenizer_config.json"])
def test_a_link_out_of_the_checkpoint(name: str, checkpoint: Path, tmp_path: Path) -> None:
    """It would end up in the bundle, which may then be shown to others."""
    secret = tmp_path / "secret"
    secret.write_text('{"secret": true}')
    (checkpoint / name).unlink(missing_ok=True)
    (checkpoint / name).symlink_to(secret)
    ran = run(main, "--model", checkpoint, "--budget", "4", "--out", tmp_path / "out")
    assert_refused(ran, f"{name} is a link to {secret}", "outside the checkpoint")


def test_a_pipe_in_the_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    for name in ("chat_template.jinja", "model.safetensors", "config.json"):
        (checkpoint / name).rename(tmp_path / "aside")
        os.mkfifo(checkpoint / name)
        ran = run(main, "--model", checkpoint, "--budget", "4", "--out", tmp_path / "out")
        assert_refused(ran, name)
        (checkpoint / name).unlink()
        (tmp_path / "aside").rename(checkpoint / name)
