"""Seeded checkpoints: their folders load in transformers as the hub's do, the same bytes every time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors")

from PIL import Image  # noqa: E402

from flashvlm_export.testing import checkpoints  # noqa: E402
from flashvlm_export.testing.__main__ import app  # noqa: E402
from flashvlm_export.testing.presets import llava  # noqa: E402
from refusals import run  # noqa: E402

QUESTION = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8))


def load(folder: Path) -> tuple[torch.nn.Module, dict]:
    return transformers.LlavaForConditionalGeneration.from_pretrained(
        folder, output_loading_info=True, local_files_only=True
    )


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safetensors.safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found


def assert_clean(info: dict) -> None:
    assert not any(info.values()), info


@pytest.mark.parametrize(("fixture", "count"), [("tiny_checkpoint", 16), ("tiny_gqa_checkpoint", 25)])
def test_transformers_loads_and_generates(
    fixture: str, count: int, picture: Image.Image, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(fixture)
    model, info = load(folder)
    assert_clean(info)
    processor = transformers.AutoProcessor.from_pretrained(folder)
    text = processor.apply_chat_template(QUESTION, add_generation_prompt=True)
    inputs = processor(images=picture, text=text, return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_index).sum() == count == model.config.image_seq_length
    assert inputs["input_ids"][0, 0] == processor.tokenizer.bos_token_id == 1

    answer = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert len(answer) == 8
    assert ((answer >= 259) & (answer < model.config.image_token_index)).all()
    assert processor.decode(answer)


def test_gqa_is_awkward_on_purpose(tiny_gqa_checkpoint: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(tiny_gqa_checkpoint)
    text = config.text_config
    assert text.num_key_value_heads < text.num_attention_heads
    assert text.num_attention_heads * text.head_dim != text.hidden_size
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_gqa_checkpoint)
    assert text.vocab_size % 64 == 0
    assert text.vocab_size > len(tokenizer)
    assert tokenizer.convert_tokens_to_ids("<image>") == config.image_token_index == len(tokenizer) - 2
    assert tokenizer.pad_token_id == config.text_config.pad_token_id == len(tokenizer) - 1


def test_chat_template(tiny_checkpoint: Path) -> None:
    processor = transformers.AutoProcessor.from_pretrained(tiny_checkpoint)
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "What is it?"}, {"type": "image"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
        {"role": "user", "content": "Where?"},
    ]
    assert processor.apply_chat_template(chat, add_generation_prompt=True) == (
        "Be brief. USER: <image>\nWhat is it? ASSISTANT: A cat.</s>USER: Where? ASSISTANT:"
    )
    plain = [{**chat[1], "content": "What is it?"}, {**chat[2], "content": "A cat."}]
    tokens = processor.tokenizer.apply_chat_template(
        plain, chat_template=llava.CHAT_TEMPLATE, return_dict=True, return_assistant_tokens_mask=True
    )
    marked = [token for token, own in zip(tokens["input_ids"], tokens["assistant_masks"], strict=True) if own]
    assert processor.tokenizer.decode(marked).strip() == "A cat.</s>"


def test_tokenizer_needs_no_transformers(tiny_checkpoint: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    bare = tokenizers.Tokenizer.from_file(str(tiny_checkpoint / "tokenizer.json"))
    text = "USER: <image>\nWas für ein Tier? 漢字"
    assert bare.encode(text).ids == transformers.AutoTokenizer.from_pretrained(tiny_checkpoint)(text)["input_ids"]
    assert bare.decode(bare.encode(text).ids, skip_special_tokens=False) == "<s> " + text


def test_values_do_not_depend_on_sharding_naming_or_dtype(tmp_path: Path, tiny_checkpoint: Path) -> None:
    whole = tensors(tiny_checkpoint)
    written = checkpoints.write_checkpoint("tiny", tmp_path / "shards", max_shard_size="100KB")
    index = json.loads((written.folder / "model.safetensors.index.json").read_text())
    assert written.shards == len(set(index["weight_map"].values())) > 2
    assert index["metadata"]["total_size"] == written.weight_bytes == 4 * written.parameters
    sharded = tensors(written.folder)
    assert set(index["weight_map"]) == sharded.keys() == whole.keys()
    assert all(torch.equal(sharded[name], whole[name]) for name in whole)

    narrow = tensors(checkpoints.write_checkpoint("tiny", tmp_path / "half", dtype="bfloat16").folder)
    assert all(torch.equal(narrow[name], whole[name].bfloat16()) for name in whole)

    other = tensors(checkpoints.write_checkpoint("tiny", tmp_path / "other", seed=1).folder)
    assert not any(torch.equal(other[name], whole[name]) for name in whole)


def test_same_bytes_every_time(tmp_path: Path) -> None:
    folders = [checkpoints.write_checkpoint("tiny", tmp_path / name).folder for name in "ab"]
    for file in folders[0].iterdir():
        assert file.read_bytes() == (folders[1] / file.name).read_bytes(), file.name


@pytest.mark.parametrize(
    ("naming", "expected"),
    [
        ("hub", ("language_model.model.norm.weight", "vision_tower.vision_model.post_layernorm.bias")),
        ("transformers5", ("language_model.lm_head.weight", "vision_tower.post_layernorm.bias")),
        ("module", ("lm_head.weight", "model.language_model.norm.weight")),
    ],
)
def test_every_naming_loads(tmp_path: Path, tiny_checkpoint: Path, naming: str, expected: tuple[str, ...]) -> None:
    folder = checkpoints.write_checkpoint("tiny", tmp_path / naming, naming=naming).folder
    assert set(expected) <= tensors(folder).keys()
    model, info = load(folder)
    assert_clean(info)
    reference = load(tiny_checkpoint)[0].state_dict()
    assert all(torch.equal(value, reference[name]) for name, value in model.state_dict().items())


def test_transformers5_naming_is_what_transformers_saves(tmp_path: Path) -> None:
    config = llava.make_config(llava.PRESETS["tiny"], "float32")
    transformers.LlavaForConditionalGeneration(config).save_pretrained(tmp_path)
    saved = {name: tuple(value.shape) for name, value in tensors(tmp_path).items()}
    assert saved == {t.name: t.shape for t in llava.list_tensors(config, "transformers5")}


def test_no_tensor_is_constant(tiny_gqa_checkpoint: Path) -> None:
    for name, value in tensors(tiny_gqa_checkpoint).items():
        assert value.std() > 1e-3, name
        assert value.isfinite().all(), name


def test_real_sizes_are_the_real_ones() -> None:
    preset = llava.PRESETS["llava-1.5-7b"]
    assert (preset.image_token_id, preset.pad_token_id, preset.vocab_size) == (32000, 32001, 32064)
    config = llava.make_config(preset, "float16")
    assert config.image_seq_length == 576
    listed = llava.list_tensors(config)
    # The published model counts 7.06 B parameters.
    assert sum(t.numel for t in listed) == 7_063_427_072
    assert len(listed) == 686


def test_refusals(tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "keep").touch()
    with pytest.raises(checkpoints.CheckpointError, match="--force"):
        checkpoints.write_checkpoint("tiny", taken)
    for bad in ({"like": "huge"}, {"dtype": "int8"}, {"max_shard_size": "big"}, {"layers": 0}):
        with pytest.raises(checkpoints.CheckpointError):
            checkpoints.write_checkpoint(**{"like": "tiny", "out": tmp_path / "new", **bad})
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
    checkpoints.write_checkpoint("tiny", taken, force=True, layers=1)
    assert not (taken / "keep").exists()
    assert json.loads((taken / "config.json").read_text())["text_config"]["num_hidden_layers"] == 1


def test_a_broken_write_leaves_nothing(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoints.write_checkpoint("tiny", tmp_path / "half", progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_command_line(tmp_path: Path) -> None:
    flags = ("--like", "tiny", "--out", str(tmp_path / "new"))
    command = [sys.executable, "-m", "flashvlm_export.testing", *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "M parameters" in done.stdout
    again = run(app, *flags)  # in this process
    assert again.code == 2
    assert len(again.stderr.strip().splitlines()) == 1
    assert "--force" in again.stderr
