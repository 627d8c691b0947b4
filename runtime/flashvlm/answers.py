"""Answers as they are written: tokens in, text out, until a stop token, a stop string, a limit or whoever reads ends
them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Generator
from dataclasses import dataclass
from types import TracebackType
from typing import Literal

import numpy as np

from flashvlm.encoder import Encoded, Selection
from flashvlm.generation import Decoding, Timings
from flashvlm.sampling import SamplingParams, TokenLogprob, token_logprob
from flashvlm.stopping import StopStrings
from flashvlm.text.processor import TextProcessor

StopReason = Literal["stop token", "stop string", "length", "cancelled"]


@dataclass(frozen=True, eq=False)
class Answer:
    """An answer and how it came about. Prints as its text.

    token_ids      the new tokens, without the stop token
    selections     of each image, which of its visual tokens the model saw
    prompt_tokens  tokens of the prompt as prefilled, text and images together
    image_tokens   how many of those are of images
    stop_reason    "stop token", "stop string", "length" when max_new_tokens or the bundle's capacity was reached, or
                   "cancelled" when a stream was closed before its end
    timings        milliseconds a stage; shared by the prompts of a batch
    logprobs       of each new token, where they were asked for

    Example:
        >>> answer = pipeline.generate("cat.jpg", "What is on the sofa?")  # doctest: +SKIP
        >>> print(answer, answer.stop_reason, len(answer.kept))  # doctest: +SKIP
        a cat stop token 64
    """

    text: str
    token_ids: tuple[int, ...]
    selections: tuple[Selection, ...]
    prompt_tokens: int
    image_tokens: int
    stop_reason: StopReason
    timings: Timings
    logprobs: tuple[TokenLogprob, ...] | None = None

    @property
    def kept(self) -> np.ndarray | None:
        """int64 [K]: the visual tokens of the first image that the model saw; None without an image."""
        return self.selections[0].kept if self.selections else None

    @property
    def is_top(self) -> np.ndarray | None:
        """bool [K]: of the first image, which were kept for their score."""
        return self.selections[0].is_top if self.selections else None

    @property
    def scores(self) -> np.ndarray | None:
        """float32 [N]: of the first image, what the selection ranked by; zeros for methods without a score."""
        return self.selections[0].scores if self.selections else None

    def __str__(self) -> str:
        return self.text


class _Writer:
    """One answer while it is written."""

    def __init__(self, text: TextProcessor, encoded: Encoded, params: SamplingParams) -> None:
        self._processor, self._encoded, self._params = text, encoded, params
        self._stream = text.stream()
        self._stops = StopStrings(params.stop)
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._text = ""

    def push(self, token: int, logits: np.ndarray) -> str:
        """The text that is sure with this token; logits [V] it was chosen from."""
        self._tokens.append(token)
        if self._params.logprobs is not None:
            self._logprobs.append(token_logprob(logits, token, self._params.logprobs))
        return self._add(self._stops.push(self._stream.push(token)))

    def finish(self) -> str:
        """The text that was held back until no more can follow."""
        return self._add(self._stops.push(self._stream.flush()) + self._stops.flush())

    @property
    def stopped(self) -> bool:
        return self._stops.found is not None

    def answer(self, limit: int, cancelled: bool, timings: Timings) -> Answer:
        reason: StopReason = "stop token"
        if self.stopped:
            reason = "stop string"
        elif len(self._tokens) == limit:
            reason = "length"
        elif cancelled:
            reason = "cancelled"
        whole = self._text if self.stopped else self._processor.decode(self._tokens)
        return Answer(
            text=whole.strip(),
            token_ids=tuple(self._tokens),
            selections=self._encoded.selections,
            prompt_tokens=len(self._encoded.row),
            image_tokens=self._encoded.image_tokens,
            stop_reason=reason,
            timings=timings,
            logprobs=None if self._params.logprobs is None else tuple(self._logprobs),
        )

    def _add(self, piece: str) -> str:
        self._text += piece
        return piece


class Writing:
    """Answers to a batch of prompts. Iterating writes them a step at a time and gives the new text of each."""

    def __init__(
        self,
        text: TextProcessor,
        prompts: list[Encoded],
        params: SamplingParams,
        decoding: Decoding,
        limit: int,
        timings: Timings,
    ) -> None:
        self._writers = [_Writer(text, prompt, params) for prompt in prompts]
        self._decoding, self._limit, self._timings = decoding, limit, timings

    def __iter__(self) -> Generator[list[str], None, None]:
        for step in self._decoding:
            pieces = []
            for b, (writer, token) in enumerate(zip(self._writers, step, strict=True)):
                pieces.append("" if token is None else writer.push(token, self._decoding.logits[b]))
                self._decoding.ended[b] |= writer.stopped
            yield pieces
        yield [writer.finish() for writer in self._writers]

    def answers(self, cancelled: bool = False) -> list[Answer]:
        """Of the prompts, as far as they are written."""
        return [writer.answer(self._limit, cancelled, self._timings) for writer in self._writers]


class Stream:
    """Pieces of text as they are generated. However it ends, ``answer`` then holds what was written.

    Leaving a ``with``, ``close`` and ``cancel`` end it early. ``cancel`` may be called from another thread or a signal
    handler: the step that is being computed is the last.

    Example:
        >>> with pipeline.stream("cat.jpg", "What is on the sofa?") as stream:  # doctest: +SKIP
        ...     for piece in stream:
        ...         print(piece, end="", flush=True)
        >>> stream.answer.stop_reason  # doctest: +SKIP
        'stop token'
    """

    def __init__(self, writing: Writing, ended: Callable[[Answer], None] | None = None) -> None:
        """``ended`` is called once, with the answer."""
        self._writing, self._ended = writing, ended
        self._steps = writing.__iter__()
        self._cancelled = threading.Event()
        self._lock = threading.Lock()  # one step at a time
        self.answer: Answer | None = None

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> str:
        with self._lock:
            while self.answer is None:
                if self._cancelled.is_set():
                    self._end(cancelled=True)
                    break
                try:
                    (piece,) = next(self._steps)
                except StopIteration:
                    self._end(cancelled=False)
                    break
                except BaseException as error:
                    self._cancelled.set()  # what was written is an answer cut short
                    if isinstance(error, Exception):
                        self._ended = None
                    raise
                if piece:
                    return piece
            raise StopIteration

    def cancel(self) -> None:
        """No further step is begun; whoever reads the stream finds its end."""
        self._cancelled.set()

    def close(self) -> Answer:
        """Ends the stream, if it has not ended, and gives the answer as far as it was written."""
        self.cancel()
        with self._lock:
            return self._end(cancelled=True)

    def result(self) -> Answer:
        """Reads to the end."""
        for _ in self:
            pass
        assert self.answer is not None
        return self.answer

    def _end(self, cancelled: bool) -> Answer:
        if self.answer is None:
            self._steps.close()  # and the KV cache is free
            (self.answer,) = self._writing.answers(cancelled)
            ended, self._ended = self._ended, None
            if ended is not None:
                ended(self.answer)
        return self.answer

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncStream:
    """A ``Stream`` whose steps run in threads, so that an event loop goes on meanwhile. A cancelled task cancels it.

    Example:
        >>> async with await pipeline.stream_async("cat.jpg", "What is it?") as stream:  # doctest: +SKIP
        ...     async for piece in stream:
        ...         print(piece, end="", flush=True)
    """

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    @property
    def answer(self) -> Answer | None:
        """What was written, once the stream has ended."""
        return self._stream.answer

    def __aiter__(self) -> AsyncIterator[str]:
        return self

    async def __anext__(self) -> str:
        try:
            piece = await asyncio.to_thread(next, self._stream, None)
        except asyncio.CancelledError:
            self._stream.cancel()
            raise
        if piece is None:
            raise StopAsyncIteration
        return piece

    def cancel(self) -> None:
        """See ``Stream.cancel``."""
        self._stream.cancel()

    async def close(self) -> Answer:
        """See ``Stream.close``."""
        self._stream.cancel()
        return await asyncio.to_thread(self._stream.close)

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
