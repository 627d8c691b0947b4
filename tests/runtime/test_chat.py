"""Chats as OpenAI's and transformers' users write them; streams that end early; async; several threads."""

from __future__ import annotations

import asyncio
import base64
import gc
import io
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flashvlm import Answer, FlashVLMError, Pipeline
from flashvlm.errors import PromptError

QUESTION = "What is the colour of the apple?"


@pytest.fixture(scope="module")
def pipeline(tiny_gqa_bundle: Path) -> Pipeline:
    return Pipeline.from_bundle(tiny_gqa_bundle)


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (61, 90, 3), dtype=np.uint8)


def png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def asked(*parts: Any) -> list[Any]:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": QUESTION}]}]


def same(found: Answer, wanted: Answer) -> bool:
    return (found.text, found.token_ids) == (wanted.text, wanted.token_ids)


# --- chat ------------------------------------------------------------------------------------------------------------


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


# --- how an answer ends ----------------------------------------------------------------------------------------------


def test_a_stop_string_ends_an_answer_and_is_no_part_of_it(pipeline: Pipeline, image: np.ndarray) -> None:
    free = pipeline.generate(image, QUESTION, max_new_tokens=12)
    stop = free.text[len(free.text) // 2 :][:3]
    at = free.text.index(stop)
    answer = pipeline.generate(image, QUESTION, max_new_tokens=12, stop=[stop])
    assert (answer.text, answer.stop_reason) == (free.text[:at].strip(), "stop string")
    assert len(answer.token_ids) <= len(free.token_ids)
    stream = pipeline.stream(image, QUESTION, max_new_tokens=12, stop=stop)
    assert "".join(stream).strip() == answer.text
    # In a batch the other answer goes on.
    both = pipeline.generate(image, [QUESTION, "hi"], max_new_tokens=12, stop=[stop])
    assert same(both[0], answer)
    assert same(both[1], pipeline.generate(image, "hi", max_new_tokens=12, stop=[stop]))


def test_logprobs_are_of_each_token(pipeline: Pipeline, image: np.ndarray) -> None:
    answer = pipeline.generate(image, QUESTION, max_new_tokens=4, logprobs=3)
    assert answer.logprobs is not None
    assert [each.token_id for each in answer.logprobs] == list(answer.token_ids)
    for each in answer.logprobs:
        assert each.top[0] == (each.token_id, each.logprob)  # greedy took the likeliest
        assert len(each.top) == 3
    assert pipeline.generate(image, QUESTION, max_new_tokens=1).logprobs is None


def test_a_stream_that_is_closed_has_an_answer(pipeline: Pipeline, image: np.ndarray) -> None:
    whole = pipeline.generate(image, QUESTION, max_new_tokens=12)
    with pipeline.stream(image, QUESTION, max_new_tokens=12) as stream:
        first = next(stream)
    assert stream.answer is not None
    assert stream.answer.stop_reason == "cancelled"
    assert whole.text.startswith(first.strip())
    assert 0 < len(stream.answer.token_ids) < 12
    assert list(stream) == []
    unread = pipeline.stream(image, QUESTION)
    assert (unread.close().text, unread.close().stop_reason) == ("", "cancelled")
    finished = pipeline.stream(image, QUESTION, max_new_tokens=2)
    assert finished.result() is finished.close()
    assert finished.result().stop_reason == "length"


def test_a_stream_is_cancelled_from_another_thread(pipeline: Pipeline, image: np.ndarray) -> None:
    stream = pipeline.stream(image, QUESTION, max_new_tokens=100)
    pieces = []
    for piece in stream:
        pieces.append(piece)
        if len(pieces) == 2:
            thread = threading.Thread(target=stream.cancel)
            thread.start()
            thread.join()
    assert stream.answer is not None
    assert stream.answer.stop_reason == "cancelled"
    assert len(stream.answer.token_ids) < 100


def test_a_prompt_that_cannot_fit_is_refused_before_vision(
    tiny_gqa_bundle: Path, image: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = Pipeline.from_bundle(tiny_gqa_bundle)
    monkeypatch.setattr(pipeline._session, "vision", lambda *_: pytest.fail("vision ran"))
    with pytest.raises(PromptError, match="tokens long"):
        pipeline.generate(image, "a b " * 50_000)


def test_a_stream_that_failed_claims_no_end(
    tiny_gqa_bundle: Path, image: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = Pipeline.from_bundle(tiny_gqa_bundle)
    talk = pipeline.conversation(image)
    stream = talk.stream(QUESTION, max_new_tokens=9)
    next(stream)

    def failing(*_: Any) -> Any:
        raise FlashVLMError("the device is gone")

    monkeypatch.setattr(pipeline._session, "decode", failing)
    with pytest.raises(FlashVLMError, match="the device is gone"):
        stream.result()
    assert stream.close().stop_reason == "cancelled"
    assert talk.messages == ()


def test_a_stream_that_ended_holds_no_cache(
    tiny_gqa_bundle: Path, image: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = Pipeline.from_bundle(tiny_gqa_bundle)
    caches: list[Any] = []
    inner = pipeline._session.new_cache

    class Cache(dict[str, Any]):
        """What can be referred to weakly."""

    def recording(*sizes: int) -> Any:
        cache = Cache(inner(*sizes))
        caches.append(weakref.ref(cache))
        return cache

    monkeypatch.setattr(pipeline._session, "new_cache", recording)
    gc.disable()
    try:
        with pipeline.stream(image, QUESTION, max_new_tokens=9) as stream:
            next(stream)
        assert caches[-1]() is None
        talk = pipeline.conversation(image, reselect=False)
        talk.ask(QUESTION, max_new_tokens=2)
        assert caches[-1]() is not None
        del talk
        assert caches[-1]() is None
    finally:
        gc.enable()


def test_prompts_share_an_image(pipeline: Pipeline, image: np.ndarray) -> None:
    loads: list[int] = []

    class Once(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            loads.append(1)
            return super().read(size)

        def seekable(self) -> bool:
            return False

    both = pipeline.generate(Once(png(image)), ["What?", "hi"], max_new_tokens=2)
    assert same(both[1], pipeline.generate(image, "hi", max_new_tokens=2))
    assert loads


@pytest.mark.parametrize("source", [5, None, b"demo"])
def test_what_is_no_bundle(source: Any) -> None:
    with pytest.raises(FlashVLMError, match="expected a folder or a name on the Hub"):
        Pipeline.from_bundle(source)


def test_a_closed_pipeline_says_so(tiny_gqa_bundle: Path) -> None:
    pipeline = Pipeline.from_bundle(tiny_gqa_bundle)
    pipeline.close()
    with pytest.raises(FlashVLMError, match="the pipeline was closed"):
        pipeline.generate(None, QUESTION)


# --- async and threads -----------------------------------------------------------------------------------------------


def test_async_gives_the_same_and_leaves_the_loop_free(pipeline: Pipeline, image: np.ndarray) -> None:
    async def main() -> tuple[list[Answer], list[str], int]:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0)

        ticking = asyncio.create_task(tick())
        answers = await asyncio.gather(
            pipeline.generate_async(image, QUESTION, max_new_tokens=6),
            pipeline.chat_async(asked({"type": "image", "image": image}), max_new_tokens=6),
        )
        async with await pipeline.stream_async(image, QUESTION, max_new_tokens=6) as stream:
            pieces = [piece async for piece in stream]
        ticking.cancel()
        return [*answers], pieces, ticks

    answers, pieces, ticks = asyncio.run(main())
    wanted = pipeline.generate(image, QUESTION, max_new_tokens=6)
    assert all(same(answer, wanted) for answer in answers)
    assert "".join(pieces).strip() == wanted.text
    assert ticks > 10


def test_a_cancelled_task_ends_its_stream(pipeline: Pipeline, image: np.ndarray) -> None:
    async def main() -> Answer | None:
        stream = await pipeline.stream_async(image, QUESTION, max_new_tokens=100)

        async def read() -> None:
            async for _ in stream:
                pass

        task = asyncio.create_task(read())
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return await stream.close()

    answer = asyncio.run(main())
    assert answer is not None
    assert answer.stop_reason == "cancelled"


def test_eight_threads_give_the_answers_of_one(pipeline: Pipeline, image: np.ndarray) -> None:
    questions = ["What?", QUESTION, "hi", "Is there a table?"]
    images = [image, image[::-1].copy(), None]
    cases = [(each, question) for each in images for question in questions]
    wanted = [pipeline.generate(*case, max_new_tokens=5) for case in cases]

    def work(_: int) -> list[Answer]:
        return [pipeline.generate(*case, max_new_tokens=5) for case in cases]

    with ThreadPoolExecutor(8) as pool:
        for answers in pool.map(work, range(8)):
            assert all(same(found, want) for found, want in zip(answers, wanted, strict=True))


# --- conversations ---------------------------------------------------------------------------------------------------


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
