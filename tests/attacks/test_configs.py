"""Numbers of a config.json are bounded before anything is allocated by them, and what would be ignored is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from refusals import assert_refused, copy_of, run

pytest.importorskip("torch")

from flashvlm_export import exporter
from flashvlm_export.cli.export import main

CONFIGS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "layers": ({"text_config__num_hidden_layers": 10**9}, ("text_config.num_hidden_layers is 1000000000", "1 to 512")),
    "vision layers": ({"vision_config__num_hidden_layers": 10**5}, ("vision_config.num_hidden_layers is 100000",)),
    "vocabulary": ({"text_config__vocab_size": 10**9}, ("text_config.vocab_size", "expected 1 to")),
    "image size": ({"vision_config__image_size": 10**8}, ("vision_config.image_size", "1 to 4,096")),
    "patch of zero": ({"vision_config__patch_size": 0}, ("vision_config.patch_size is 0",)),
    "width": ({"text_config__hidden_size": 10**6}, ("text_config.hidden_size",)),
    "heads below zero": ({"text_config__num_attention_heads": -4}, ("text_config.num_attention_heads is -4",)),
    "a truth for a size": ({"text_config__hidden_size": True}, ("text_config.hidden_size is True", "whole number")),
    "a text for a size": ({"text_config__hidden_size": "48"}, ("text_config.hidden_size is '48'", "whole number")),
    "a fraction for a size": ({"text_config__hidden_size": 48.5}, ("text_config.hidden_size is 48.5",)),
    "digits without end": ({"text_config__hidden_size": int("9" * 4000)}, ("text_config.hidden_size", "expected 1 to")),
    "labels": ({"num_labels": 10**9, "text_config__num_labels": 10**9, "text_config__hidden_act": "?"}, ("'?'",)),
    "initializer": ({"text_config__initializer_range": -0.5}, ("text_config.initializer_range is -0.5",)),
    "epsilon": ({"text_config__rms_norm_eps": -1}, ("text_config.rms_norm_eps is -1",)),
    "epsilon of text": ({"vision_config__layer_norm_eps": "small"}, ("layer_norm_eps is 'small'", "a number")),
    "long rope": (
        {"text_config__rope_scaling": {"rope_type": "longrope", "factor": 2.0}},
        ("text_config.rope_scaling is of type 'longrope'", "expected default, linear"),
    ),
    "rope of old": ({"text_config__rope_scaling": {"type": "longrope", "factor": 2.0}}, ("of type 'longrope'",)),
    "rope of text": ({"text_config__rope_parameters": "long"}, ("rope_parameters is of type 'long'",)),
    "rope factor": (
        {"text_config__rope_scaling": {"rope_type": "linear", "factor": -2.0}},
        ("text_config.rope_scaling.factor is -2.0",),
    ),
    "window": ({"text_config__sliding_window": 8}, ("text_config.sliding_window is 8", "attends to every token")),
    "window of text": ({"text_config__sliding_window": "8"}, ("text_config.sliding_window is '8'",)),
    "layers with windows": (
        {"text_config__layer_types": ["full_attention", "sliding_attention"]},
        ("text_config.layer_types has 'sliding_attention'",),
    ),
    "image token": ({"image_token_index": -1}, ("config.json",)),
    "image token beyond": (
        {"image_token_index": 10**6},
        ("image_token_index is 1000000; expected one of the 514 tokens",),
    ),
}


class WorkBeganError(Exception):
    pass


@pytest.fixture(autouse=True)
def _no_tracing(monkeypatch: pytest.MonkeyPatch) -> None:
    def reached(*_: object) -> None:
        raise WorkBeganError

    monkeypatch.setattr(exporter, "trace", reached)
    monkeypatch.setenv("FLASHVLM_DEBUG", "1")


def edited(checkpoint: Path, tmp_path: Path, changes: dict[str, Any]) -> Path:
    folder = copy_of(checkpoint, tmp_path, "checkpoint")
    content = json.loads((folder / "config.json").read_text())
    for path, value in changes.items():
        *parts, field = path.split("__")
        target = content
        for part in parts:
            target = target[part]
        target[field] = value
    (folder / "config.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(("changes", "expected"), CONFIGS.values(), ids=CONFIGS)
def test_config(changes: dict[str, Any], expected: tuple[str, ...], tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = edited(tiny_checkpoint, tmp_path, changes)
    assert_refused(run(main, "--model", folder, "--budget", "4", "--out", tmp_path / "out"), *expected)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["layers", "long rope", "image token"])
def test_planning_reads_it_likewise(name: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    changes, expected = CONFIGS[name]
    folder = edited(tiny_checkpoint, tmp_path, changes)
    assert_refused(run(main, "--model", folder, "--budget", "4", "--plan", "--dtype", "float16"), *expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"return_dict": False, "text_config__return_dict": False, "vision_config__return_dict": False},
        {"text_config__output_attentions": True, "vision_config__output_hidden_states": True},
        {"num_labels": 10**9, "text_config__num_labels": 10**12},
        {"text_config__sliding_window": 8, "text_config__use_sliding_window": False},
        {"text_config__sliding_window": 1 << 20},
        {"text_config__layer_types": ["full_attention", "full_attention"]},
        {"text_config___attn_implementation": "flash_attention_2", "torchscript": True},
    ],
    ids=str,
)
def test_what_does_not_change_the_model(changes: dict[str, Any], tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = edited(tiny_checkpoint, tmp_path, changes)
    with pytest.raises(WorkBeganError):
        run(main, "--model", folder, "--budget", "4", "--out", tmp_path / "out")


@pytest.mark.parametrize("content", ["[" * 60_000, '{"a":' * 60_000, '{"a": NaN}', "9" * 10_000, "\x00", "{" * 90])
def test_no_json(content: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_checkpoint, tmp_path, "checkpoint")
    for name in ("config.json", "processor_config.json", "tokenizer_config.json", "generation_config.json"):
        before = (folder / name).read_text()
        (folder / name).write_text(content)
        assert_refused(run(main, "--model", folder, "--budget", "4", "--out", tmp_path / "out"), name)
        (folder / name).write_text(before)
