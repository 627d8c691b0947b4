"""Conversations: a selection for each question, or the first one's selection and KV cache kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chats import QUESTION

from flashvlm import FlashVLMError, Pipeline


@pytest.fixture(scope="module")
def pipeline(tiny_gqa_bundle: Path) -> Pipeline:
    return Pipeline.from_bundle(tiny_gqa_bundle)


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (61, 90, 3), dtype=np.uint8)


@pytest.mark.parametrize("name", ["tiny_bundle", "tiny_gqa_bundle", "tiny_gqa_legacy_bundle"])
def test_a_kept_cache_prefills_only_what_is_new(
    name: str, request: pytest.FixtureRequest, image: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = Pipeline.from_bundle(request.getfixturevalue(name))
    lengths: list[int] = []
    inner = pipeline._session.decode

    def recording(tensors: Any, *arguments: Any) -> Any:
        lengths.append(tensors["inputs_embeds"].shape[1])
        return inner(tensors, *arguments)

    monkeypatch.setattr(pipeline._session, "decode", recording)
    talk = pipeline.conversation(image, budget="all", reselect=False)
    fresh = pipeline.conversation(image, budget="all")
    for turn, question in enumerate((QUESTION, "And the table?", "hi")):
        kept, again = talk.ask(question, max_new_tokens=4), fresh.ask(question, max_new_tokens=4)
        # With every token kept, the two differ in what is computed again alone.
        assert kept.token_ids == again.token_ids
        assert kept.prompt_tokens == again.prompt_tokens
        prefilled, whole = (length for length in lengths if length > 1)
        assert whole == again.prompt_tokens
        assert prefilled == whole if turn == 0 else prefilled < whole / 2
        lengths.clear()


def test_a_kept_selection_stays_until_another_budget_is_asked_for(tiny_bundle: Path, image: np.ndarray) -> None:
    talk = Pipeline.from_bundle(tiny_bundle).conversation(image, reselect=False)
    first, second = talk.ask(QUESTION, max_new_tokens=2), talk.ask("Is it dark outside?", max_new_tokens=2)
    assert first.kept.tolist() == second.kept.tolist()
    wider = talk.ask("hi", budget=7, max_new_tokens=2)
    assert len(wider.kept) == 7
    # Whatever was in the cache was of the other tokens.
    assert talk._held is not None
    assert sorted(-1 - talk._held.keys[talk._held.keys < 0]) == wider.kept.tolist()


def test_a_kept_cache_grows(pipeline: Pipeline, image: np.ndarray) -> None:
    talk = pipeline.conversation(image, budget="all", reselect=False)
    fresh = pipeline.conversation(image, budget="all")
    for turn in range(5):
        question = f"Is there a table, and what is on it? {turn}" * 2
        found, wanted = (each.ask(question, max_new_tokens=20) for each in (talk, fresh))
        assert found.token_ids == wanted.token_ids


def test_an_answer_cut_short_joins_with_what_it_has(pipeline: Pipeline, image: np.ndarray) -> None:
    for reselect in (True, False):
        talk = pipeline.conversation(image, reselect=reselect)
        stream = talk.stream(QUESTION, max_new_tokens=30)
        next(stream)
        cut = stream.close()
        assert talk.messages[-1].role == "assistant"
        dropped = talk.stream("And the table?")  # never read
        answer = talk.ask("hi", max_new_tokens=3)
        assert dropped.answer is not None
        assert [message.role for message in talk.messages] == ["user", "assistant", "user", "assistant"]
        again = pipeline.conversation(image)
        again._messages = list(talk.messages[:2])
        assert cut.text
        if reselect:
            assert again.ask("hi", max_new_tokens=3).token_ids == answer.token_ids


def test_instructions_stand_before_the_first_question(pipeline: Pipeline, image: np.ndarray) -> None:
    talk = pipeline.conversation(image, system="Be brief.")
    talk.ask(QUESTION, max_new_tokens=1)
    assert [message.role for message in talk.messages] == ["system", "user", "assistant"]


def test_a_prompt_beyond_the_bundle_is_refused_and_leaves_a_kept_cache_usable(
    pipeline: Pipeline, image: np.ndarray
) -> None:
    talk = pipeline.conversation(image, reselect=False)
    first = talk.ask(QUESTION, max_new_tokens=2)
    with pytest.raises(FlashVLMError, match="tokens long"):
        talk.ask("word " * 6000)
    second = talk.ask("hi", max_new_tokens=3)
    fresh = pipeline.conversation(image, reselect=False)
    assert fresh.ask(QUESTION, max_new_tokens=2).token_ids == first.token_ids
    assert fresh.ask("hi", max_new_tokens=3).token_ids == second.token_ids
