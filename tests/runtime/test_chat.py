"""Chats as OpenAI's and transformers' users write them: every form of an image, several images, batches."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chats import QUESTION, asked, png, same
from PIL import Image

from flashvlm import Pipeline
from flashvlm.errors import PromptError


@pytest.fixture(scope="module")
def pipeline(tiny_gqa_bundle: Path) -> Pipeline:
    return Pipeline.from_bundle(tiny_gqa_bundle)


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (61, 90, 3), dtype=np.uint8)


def test_every_form_of_an_image_gives_the_answer_of_generate(
    pipeline: Pipeline, image: np.ndarray, tmp_path: Path
) -> None:
    wanted = pipeline.generate(image, QUESTION, max_new_tokens=4)
    path = tmp_path / "image.png"
    path.write_bytes(png(image))
    url = f"data:image/png;base64,{base64.b64encode(png(image)).decode()}"
    for part in (
        {"type": "image", "image": image},
        {"type": "image", "image": Image.fromarray(image)},
        {"type": "image", "image": io.BytesIO(png(image))},
        {"type": "image", "path": str(path)},
        {"type": "image_url", "image_url": {"url": url, "detail": "low"}},
        {"type": "image_url", "image_url": {"url": path.as_uri()}},
        {"type": "input_image", "image_url": url},
    ):
        assert same(pipeline.chat(asked(part), max_new_tokens=4), wanted)


def test_text_alone_and_a_system_prompt(pipeline: Pipeline) -> None:
    plain = pipeline.chat([{"role": "user", "content": QUESTION}], max_new_tokens=3)
    assert same(plain, pipeline.generate(None, QUESTION, max_new_tokens=3))
    assert plain.selections == ()
    told = pipeline.chat(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}], max_new_tokens=3
    )
    assert told.prompt_tokens > plain.prompt_tokens


def test_each_image_has_a_selection_of_its_own(pipeline: Pipeline, image: np.ndarray) -> None:
    other = image[::-1].copy()
    answer = pipeline.chat(
        asked({"type": "image", "image": image}, {"type": "image", "image": other}), max_new_tokens=2
    )
    assert answer.image_tokens == 10
    alone = [pipeline.generate(each, QUESTION, max_new_tokens=1).kept for each in (image, other)]
    assert [selection.kept.tolist() for selection in answer.selections] == [kept.tolist() for kept in alone]
    assert same(pipeline.generate([image, other], QUESTION, max_new_tokens=2), answer)
    batch = pipeline.generate([[image, other], image], [QUESTION, QUESTION], max_new_tokens=2)
    assert same(batch[0], answer)
    assert same(batch[1], pipeline.generate(image, QUESTION, max_new_tokens=2))


def test_a_batch_runs_vision_and_select_once(
    tiny_gqa_bundle: Path, image: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = Pipeline.from_bundle(tiny_gqa_bundle)
    calls = []
    for name in ("vision", "select"):
        inner = getattr(pipeline._session, name)

        def counting(*arguments: Any, name: str = name, inner: Any = inner) -> Any:
            calls.append(name)
            return inner(*arguments)

        monkeypatch.setattr(pipeline._session, name, counting)
    images = [image, image[::-1].copy(), image]
    batch = pipeline.generate(images, ["What?", QUESTION, "hi"], max_new_tokens=3)
    assert calls == ["vision", "select"]
    for found, each, question in zip(batch, images, ["What?", QUESTION, "hi"], strict=True):
        alone = pipeline.generate(each, question, max_new_tokens=3)
        assert same(found, alone)
        assert found.kept.tolist() == alone.kept.tolist()


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ("hello", "expected a list"),
        ([], "at least one"),
        ([{"role": "assistant", "content": "hi"}], "one of the user"),
        ([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "x"}]}], "found none"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://a/b.png"}}]}],
            "not fetched",
        ),
        ([{"role": "tool", "content": "x"}], "tools are not supported"),
        ([{"role": "user", "content": "what </s> is"}], "control token"),
    ],
)
def test_messages_that_cannot_be_used_are_refused(pipeline: Pipeline, messages: Any, words: str) -> None:
    with pytest.raises(PromptError, match=words):
        pipeline.chat(messages)


def test_options_that_do_not_exist_are_refused(pipeline: Pipeline) -> None:
    with pytest.raises(PromptError, match="did you mean temperature"):
        pipeline.generate(None, QUESTION, temprature=1.0)  # type: ignore[call-overload]


def test_numbers_of_numpy_are_taken(pipeline: Pipeline, image: np.ndarray) -> None:
    options: Any = {"max_new_tokens": np.int64(3), "temperature": np.float32(1.5), "seed": np.int32(2)}
    assert len(pipeline.generate(image, QUESTION, budget=np.int64(5), **options).token_ids) == 3
