"""How an answer ends: stop strings, streams that are closed, cancelled or fail; async; several threads."""

from __future__ import annotations

import asyncio
import gc
import io
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chats import QUESTION, asked, png, same

from flashvlm import Answer, FlashVLMError, Pipeline
from flashvlm.errors import PromptError


@pytest.fixture(scope="module")
def pipeline(tiny_gqa_bundle: Path) -> Pipeline:
    return Pipeline.from_bundle(tiny_gqa_bundle)


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (61, 90, 3), dtype=np.uint8)


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
