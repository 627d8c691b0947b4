"""Pipeline behaviour: streams, conversations, stopping, capacity, caching, sampling, in-place KV."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flashvlm import Answer, FlashVLMError, Pipeline
from flashvlm.errors import PromptError, SelectionError
from flashvlm.sessions import onnxruntime as backend

QUESTION = "What is the colour of the apple?"


@pytest.fixture(scope="module")
def pipeline(tiny_gqa_bundle: Path) -> Pipeline:
    return Pipeline.from_bundle(tiny_gqa_bundle)


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (61, 90, 3), dtype=np.uint8)


def edited(bundle: Path, out: Path, **model: Any) -> Path:
    """A copy of a bundle whose manifest says something else of the model."""
    shutil.copytree(bundle, out)
    manifest = json.loads((out / "bundle.json").read_text())
    manifest["model"] |= model
    (out / "bundle.json").write_text(json.dumps(manifest))
    return out


def counted(pipeline: Pipeline, name: str, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    inner: Callable[..., Any] = getattr(pipeline._session, name)

    def counting(*arguments: Any) -> Any:
        calls.append(1)
        return inner(*arguments)

    monkeypatch.setattr(pipeline._session, name, counting)
    return calls


def test_an_answer_prints_as_its_text_and_says_how_it_came_about(pipeline: Pipeline, image: np.ndarray) -> None:
    answer = pipeline.generate(image, QUESTION, budget=5, max_new_tokens=7)
    assert isinstance(answer, Answer)
    assert str(answer) == answer.text
    assert answer.text
    assert len(answer.token_ids) == 7
    assert len(answer.timings.decode) == 6
    assert answer.stop_reason == "length"
    assert answer.image_tokens == len(answer.kept) == 5
    assert sorted(set(answer.kept.tolist())) == answer.kept.tolist()
    assert answer.scores.shape == (25,)
    assert answer.is_top.sum() == 2
    assert min(answer.timings.prefill, answer.timings.select, answer.timings.total) > 0


def test_budget_all_keeps_everything(pipeline: Pipeline, image: np.ndarray) -> None:
    answer = pipeline.generate(image, QUESTION, budget="all", max_new_tokens=1)
    assert answer.kept.tolist() == list(range(25))
    assert answer.prompt_tokens == pipeline.generate(image, QUESTION, budget=5, max_new_tokens=1).prompt_tokens + 20


@pytest.mark.parametrize("budget", [0, -1, 6, 3.5, "64", True])
def test_a_budget_that_was_not_exported_is_refused(pipeline: Pipeline, image: np.ndarray, budget: Any) -> None:
    with pytest.raises(SelectionError, match=r"is not in this bundle, which has 5, all; "):
        pipeline.generate(image, QUESTION, budget=budget)


def test_a_stream_yields_what_generate_returns(pipeline: Pipeline, image: np.ndarray) -> None:
    whole = pipeline.generate(image, QUESTION, max_new_tokens=12)
    stream = pipeline.stream(image, QUESTION, max_new_tokens=12)
    assert stream.answer is None
    pieces = list(stream)
    assert len(pieces) > 1
    assert "".join(pieces).strip() == whole.text == stream.answer.text


def test_a_stream_refuses_before_the_first_piece(pipeline: Pipeline, image: np.ndarray) -> None:
    with pytest.raises(PromptError):
        pipeline.stream(image, " ")


def test_image_forms_and_paths_agree(pipeline: Pipeline, image: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    Image.fromarray(image).save(path)
    forms = (image, Image.fromarray(image), path, str(path), path.read_bytes())
    answers = [pipeline.generate(form, QUESTION, max_new_tokens=4).token_ids for form in forms]
    assert len(set(answers)) == 1


def test_vision_runs_once_an_image(tiny_gqa_bundle: Path, image: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = Pipeline.from_bundle(tiny_gqa_bundle)
    vision, select = counted(pipeline, "vision", monkeypatch), counted(pipeline, "select", monkeypatch)
    conversation = pipeline.conversation(image)
    first = conversation.ask(QUESTION, max_new_tokens=3)
    second = conversation.ask("And the table?", max_new_tokens=3)
    assert (len(vision), len(select)) == (1, 2)
    assert first.timings.vision > 0
    assert second.timings.vision == 0
    pipeline.generate(image.copy(), QUESTION, max_new_tokens=1)  # same content, other object
    assert len(vision) == 1
    pipeline.generate(255 - image, QUESTION, max_new_tokens=1)
    assert len(vision) == 2


def test_a_conversation_is_the_prompt_of_all_its_turns(pipeline: Pipeline, image: np.ndarray) -> None:
    conversation = pipeline.conversation(image)
    first = conversation.ask(QUESTION, max_new_tokens=3)
    second = conversation.ask("And the table?", max_new_tokens=3)
    assert [message.role for message in conversation.messages] == ["user", "assistant", "user", "assistant"]
    text = pipeline.encoder.text.render([message.plain() for message in conversation.messages[:3]])
    assert text.count("<image>") == 1
    assert first.text in text
    assert second.prompt_tokens > first.prompt_tokens
    # The second question guides its own selection, whatever was asked before it.
    other = pipeline.conversation(image)
    assert other.ask("Is it dark outside?", max_new_tokens=2).kept.tolist() != second.kept.tolist()
    assert other.ask("And the table?", max_new_tokens=1).kept.tolist() == second.kept.tolist()
    assert first.kept.tolist() != second.kept.tolist()


def test_a_refused_question_leaves_the_conversation_as_it_was(pipeline: Pipeline, image: np.ndarray) -> None:
    conversation = pipeline.conversation(image)
    conversation.ask(QUESTION, max_new_tokens=2)
    before = conversation.messages
    with pytest.raises(PromptError):
        conversation.ask("")
    with pytest.raises(PromptError):
        conversation.ask("what </s> is this")
    assert conversation.messages == before


def test_generation_stops_at_a_stop_token(
    pipeline: Pipeline, tiny_gqa_bundle: Path, image: np.ndarray, tmp_path: Path
) -> None:
    free = pipeline.generate(image, QUESTION, max_new_tokens=10)
    stop = next(token for i, token in enumerate(free.token_ids) if i >= 2 and token not in free.token_ids[:i])
    at = free.token_ids.index(stop)
    stopping = Pipeline.from_bundle(edited(tiny_gqa_bundle, tmp_path / "stopping", eos_token_ids=[stop]))
    answer = stopping.generate(image, QUESTION, max_new_tokens=10)
    assert answer.token_ids == free.token_ids[:at]
    assert answer.stop_reason == "stop token"
    # In a batch, a row that ended does not disturb one that goes on.
    both = stopping.generate(image, [QUESTION, "hi"], max_new_tokens=10)
    assert both[0].token_ids == answer.token_ids
    assert both[1].token_ids == stopping.generate(image, "hi", max_new_tokens=10).token_ids


def test_a_first_token_that_stops_gives_an_empty_answer(
    pipeline: Pipeline, tiny_gqa_bundle: Path, image: np.ndarray, tmp_path: Path
) -> None:
    (first,) = pipeline.generate(image, QUESTION, max_new_tokens=1).token_ids
    stopping = Pipeline.from_bundle(edited(tiny_gqa_bundle, tmp_path / "empty", eos_token_ids=[first]))
    answer = stopping.generate(image, QUESTION, max_new_tokens=5)
    assert (answer.text, answer.token_ids, answer.stop_reason) == ("", (), "stop token")
    assert list(stopping.stream(image, QUESTION)) == []


def test_capacity_ends_an_answer_and_refuses_a_prompt(
    pipeline: Pipeline, tiny_gqa_bundle: Path, image: np.ndarray, tmp_path: Path
) -> None:
    free = pipeline.generate(image, QUESTION, max_new_tokens=12)
    room = Pipeline.from_bundle(edited(tiny_gqa_bundle, tmp_path / "room", max_seq=free.prompt_tokens + 4))
    answer = room.generate(image, QUESTION, max_new_tokens=12)
    assert answer.token_ids == free.token_ids[:5]  # the fifth is never fed back
    assert answer.stop_reason == "length"
    tight = Pipeline.from_bundle(edited(tiny_gqa_bundle, tmp_path / "tight", max_seq=free.prompt_tokens - 1))
    with pytest.raises(PromptError, match=rf"{free.prompt_tokens} tokens long .* holds {free.prompt_tokens - 1}"):
        tight.generate(image, QUESTION)


def test_sampling_repeats_with_a_seed_alone_and_in_a_batch(pipeline: Pipeline, image: np.ndarray) -> None:
    options: dict[str, Any] = {"temperature": 1.5, "top_p": 0.95, "max_new_tokens": 10}
    one = pipeline.generate(image, QUESTION, seed=7, **options)
    assert one.token_ids == pipeline.generate(image, QUESTION, seed=7, **options).token_ids
    assert one.token_ids != pipeline.generate(image, QUESTION, seed=8, **options).token_ids
    batch = pipeline.generate(image, [QUESTION, "hi"], seed=7, **options)
    assert batch[0].token_ids == one.token_ids
    assert batch[1].token_ids == pipeline.generate(image, "hi", seed=7, **options).token_ids


def test_the_cache_is_written_in_place(
    tiny_gqa_bundle: Path, image: np.ndarray, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(backend, "FATAL_ONLY", 2)  # ONNX Runtime warns when TensorScatter has to copy
    pipeline = Pipeline.from_bundle(tiny_gqa_bundle)
    pipeline.generate(image, QUESTION, max_new_tokens=3)
    assert "in-place" not in capfd.readouterr().err
    # The same graph without shared buffers does warn, so the check above can fail.
    session = pipeline._session._graph("decoder").session
    model = pipeline.bundle.manifest.model
    inputs = {
        "inputs_embeds": np.zeros((1, 1, model.hidden_size), np.float32),
        "position_ids": np.zeros((1, 1), np.int64),
        "cache_position": np.zeros(1, np.int64),
        "num_tokens": np.ones(1, np.int64),
    }
    session.run(["logits"], inputs | {name: v.numpy() for name, v in pipeline._session.new_cache(1, 64).items()})
    assert "in-place" in capfd.readouterr().err


def test_non_finite_features_are_refused(
    tiny_gqa_bundle: Path, image: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = Pipeline.from_bundle(tiny_gqa_bundle)
    inner = pipeline._session.vision

    def overflowing(*arguments: Any) -> Any:
        (features,) = inner(*arguments)
        features.image_tokens[3] = np.nan
        return [features]

    monkeypatch.setattr(pipeline._session, "vision", overflowing)
    with pytest.raises(FlashVLMError, match="not finite"):
        pipeline.generate(image, QUESTION)


def test_running_a_bundle_never_imports_torch(tiny_gqa_bundle: Path, tmp_path: Path) -> None:
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    arguments = [str(tiny_gqa_bundle), "--image", "red.png", "--prompt", "hi", "--show", "kept.png", "--stats"]
    code = f"""
import sys
sys.argv = ["flashvlm-run", *{arguments!r}]
from flashvlm.cli.run import main
try:
    main()
except SystemExit as stop:
    assert stop.code == 0, stop.code
heavy = {{"torch", "transformers", "onnx", "onnxscript", "huggingface_hub", "flashvlm_export"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    with Image.open(tmp_path / "kept.png") as picture:
        assert picture.width > 500


def test_running_a_bundle_leaves_no_trace_in_the_home_directory(tiny_gqa_bundle: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    code = "import sys, flashvlm as f; f.Pipeline.from_bundle(sys.argv[1]).generate(None, 'hi', max_new_tokens=1)"
    subprocess.run([sys.executable, "-c", code, tiny_gqa_bundle], env={"HOME": str(home)}, check=True)
    assert list(home.rglob("*")) == []


def test_a_conversation_takes_another_budget_for_one_question(tiny_bundle: Path) -> None:
    image = np.full((60, 60, 3), 90, dtype=np.uint8)
    conversation = Pipeline.from_bundle(tiny_bundle).conversation(image, budget=7)
    assert conversation.ask("What is it?", budget="all", max_new_tokens=1).image_tokens == 16
    assert conversation.ask("What is it?", budget=4, max_new_tokens=1).image_tokens == 4
    assert conversation.ask("What is it?", max_new_tokens=1).image_tokens == 7
    with pytest.raises(FlashVLMError, match="budget 5 is not in this bundle"):
        conversation.ask("What is it?", budget=5)


def test_public_names_are_listed() -> None:
    import flashvlm

    assert {"Pipeline", "Answer", "Conversation", "FlashVLMError"} <= set(dir(flashvlm))
    assert (Path(flashvlm.__file__).parent / "py.typed").exists()
