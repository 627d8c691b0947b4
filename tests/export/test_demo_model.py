"""``--model demo``: the weights that are shipped answer as their card says, and as transformers makes them answer."""

from __future__ import annotations

import math
import re
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxruntime")

from PIL import Image  # noqa: E402

from flashvlm import Pipeline  # noqa: E402
from flashvlm.budget import Budget  # noqa: E402
from flashvlm.evaluation import EvalRun  # noqa: E402
from flashvlm_export.checkpoint import SHIPPED, open_checkpoint  # noqa: E402
from quality.task import Asked, exam_task  # noqa: E402
from scenes.draw import draw  # noqa: E402
from scenes.exam import Item, conversations, exam  # noqa: E402

SAMPLE = 203  # questions: 29 scenes with one of each kind
MAX_BYTES = 12_000_000


@pytest.fixture
def bundle(demo_bundle: Path) -> Path:
    return demo_bundle


def stated_accuracy() -> float:
    """Of all test questions, as the model card says."""
    card = (SHIPPED["demo"] / "README.md").read_text(encoding="utf-8")
    found = re.search(r"^\| all \| ([\d.]+)% \|$", card, re.MULTILINE)
    assert found
    return float(found[1]) / 100


@pytest.mark.slow
def test_accuracy_is_what_the_card_states(bundle: Path) -> None:
    """A sample of the test split, through the exported graphs, within its binomial 95 % interval."""
    found = EvalRun(Pipeline.from_bundle(bundle), exam_task(exam(SAMPLE), "test")).predict(["all"])
    right = sum(prediction.right for prediction in found["all"]) / SAMPLE
    stated = stated_accuracy()
    assert abs(right - stated) <= 1.96 * math.sqrt(stated * (1 - stated) / SAMPLE), right


# With all tokens only in the slow tier, for time: below, they are held against transformers.
@pytest.mark.parametrize("budget", [64, pytest.param("all", marks=pytest.mark.slow)])
def test_later_turns_are_answered(bundle: Path, budget: Budget) -> None:
    """With its own answers before them. The weights that knew no conversations had a third right; the bar is low as
    20 scenes tell little."""
    pipeline = Pipeline.from_bundle(bundle)
    right = []
    for items in conversations(140, 4):
        conversation = pipeline.conversation(Image.fromarray(draw(items[0].scene)), budget=budget)
        given = [conversation.ask(item.question.text).text == item.question.answer for item in items]
        right += given[1:]
    assert np.mean(right) > 0.8


def test_budget_64_keeps_what_is_asked_for(bundle: Path) -> None:
    """Far more of the asked-for things' patches than the ninth that chance keeps."""
    asked = exam(70)
    found = EvalRun(Pipeline.from_bundle(bundle), exam_task(asked, "test"), keep_indices=True).predict([64])
    shares = [share for share in Asked(asked, 24).kept_shares(found[64]) if share is not None]
    assert np.mean(shares) > 3 * 64 / 576


@pytest.mark.parametrize("questions", [14, pytest.param(42, marks=pytest.mark.slow)])  # two scenes, or six
def test_answers_with_all_tokens_are_those_of_transformers(bundle: Path, questions: int) -> None:
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    folder = SHIPPED["demo"]
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    pipeline = Pipeline.from_bundle(bundle)
    for scene, group in groupby(exam(questions), key=lambda item: item.scene):
        image = Image.fromarray(draw(scene))
        for item in group:
            assert str(pipeline.generate(image, item.question.text, budget="all")) == own(model, processor, image, item)


def own(model, processor, image: Image.Image, item: Item) -> str:  # type: ignore[no-untyped-def]
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": item.question.text}]}
    prompt = processor.apply_chat_template([message], add_generation_prompt=True)
    inputs = processor(images=image, text=prompt, return_tensors="pt")
    with torch.inference_mode():
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=16)
    return processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def test_the_package_stays_small() -> None:
    files = {path.name: path.stat().st_size for path in SHIPPED["demo"].iterdir()}
    assert files["model.safetensors"] <= MAX_BYTES
    assert sum(files.values()) <= MAX_BYTES + 200_000
    checkpoint = open_checkpoint("demo")
    assert {tensor.dtype for tensor in checkpoint.tensors.values()} == {"float16"}
