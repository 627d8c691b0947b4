"""Pipeline: an image and a question in, text out."""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from flashvlm.bundle import Bundle
from flashvlm.embeddings import EmbeddingTable
from flashvlm.errors import FlashVLMError, PromptError, SelectionError
from flashvlm.generation import Row, StopReason, Timings, check_capacity, generate_tokens, row_with_image
from flashvlm.images import ImageSource, image_digest, load_image, preprocess
from flashvlm.manifest import EMBEDDINGS, PROCESSOR
from flashvlm.sampling import Sampler, SamplingParams
from flashvlm.sessions import Backend, ImageFeatures, Limits, Selected, Session, check_batch
from flashvlm.text.processor import EncodedPrompt, Message, TextProcessor

Budget = int | Literal["all"] | None
CACHED_IMAGES = 8
MAX_NEW_TOKENS = 128


@dataclass(frozen=True, eq=False)
class Answer:
    """An answer and how it came about. Prints as its text.

    token_ids        the new tokens, without the stop token
    kept             int64 [K]: the visual tokens the model saw, in raster order; None without an image
    is_top           bool [K]: kept for their score (the others represent the background)
    scores           float32 [N]: what the selection ranked by; zeros for methods without a score
    prompt_tokens    tokens of the prompt as prefilled, text and image together
    image_tokens     how many of those are of the image
    stop_reason      "stop token", or "length" when max_new_tokens or the bundle's capacity was reached
    timings          milliseconds a stage; shared by the rows of a batch
    """

    text: str
    token_ids: tuple[int, ...]
    kept: np.ndarray | None
    is_top: np.ndarray | None
    scores: np.ndarray | None
    prompt_tokens: int
    image_tokens: int
    stop_reason: StopReason
    timings: Timings

    def __str__(self) -> str:
        return self.text


class Stream:
    """Pieces of text as they are generated; ``answer`` holds the whole once the stream is exhausted."""

    def __init__(self, pieces: Iterator[str]) -> None:
        self._pieces = pieces
        self.answer: Answer | None = None

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)


@dataclass(frozen=True)
class _Prompt:
    """One row before prefill."""

    row: Row
    selection: Selected | None
    image_tokens: int


class Pipeline:
    """A loaded bundle. Safe to use from one thread at a time; image features are cached by content.

    ``backend`` says what runs it. ``close``, or leaving a ``with``, frees its memory before the process ends.
    """

    def __init__(self, bundle: Bundle, session: Session) -> None:
        self.bundle = bundle
        self._session = session
        model = bundle.manifest.model
        self._text = TextProcessor.from_files(bundle.read_processor, bundle.path / PROCESSOR, model.vocab_size)
        self._embedding = EmbeddingTable(bundle.file(EMBEDDINGS), model.vocab_size, model.hidden_size)
        self._features: OrderedDict[str, ImageFeatures] = OrderedDict()

    @classmethod
    def from_bundle(
        cls,
        path: str | os.PathLike[str] | Bundle,
        *,
        backend: str = "auto",
        device: int = 0,
        provider: str = "auto",
        threads: int | None = None,
        verify: bool = True,
        plugins: str | os.PathLike[str] | None = None,
        engine_code: bool = False,
    ) -> Pipeline:
        """Opens a bundle.

        Args:
            path: its folder, or a Bundle that is open already.
            backend: ``onnxruntime``, ``tensorrt`` or ``tensorrt-rtx``; ``auto`` takes engines the bundle has for this
                machine's TensorRT and GPU, else ONNX Runtime.
            device: number of the GPU.
            provider: of ONNX Runtime: ``auto``, ``cpu``, ``cuda``, ``tensorrt`` or ``tensorrt-rtx``.
            threads: of ONNX Runtime, within an operator; None for every core.
            verify: check the SHA-256 of every file first; turn off to start large bundles sooner.
            plugins: the library that engines were built with, if with ``flashvlm-compile --plugins``.
            engine_code: take engines that carry a TensorRT runtime as code (``--version-compatible``).

        Raises:
            FlashVLMError: the bundle is damaged, engines asked for are not for this machine, or what it needs is not
                installed.
        """
        from flashvlm.sessions.backends import open_session

        bundle = path if isinstance(path, Bundle) else Bundle(path, verify=verify)
        library = None if plugins is None else Path(plugins)
        return cls(bundle, open_session(bundle, backend, device, provider, threads, verify, library, engine_code))

    @property
    def backend(self) -> Backend:
        """What runs the graphs: name, version and device."""
        return self._session.backend

    @property
    def limits(self) -> Limits:
        """The longest sequence and largest batch the backend takes."""
        return self._session.limits

    def close(self) -> None:
        """Frees what the backend holds. The pipeline is not used afterwards."""
        self._features.clear()
        self._session.close()
        self._embedding.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def generate(
        self,
        image: ImageSource | Sequence[ImageSource] | None,
        prompt: str | Sequence[str],
        *,
        budget: Budget = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> Any:
        """Answers a question about an image, or several at once.

        Args:
            image: path, bytes, PIL image or array; None for text alone. With several prompts, one image for
                all of them or a list with one each.
            prompt: the question, or a list of them.
            budget: visual tokens to keep: a number the bundle was exported for, or ``"all"``. None takes the
                bundle's smallest.
            temperature: 0 picks the likeliest token; otherwise samples, within ``top_k`` and ``top_p``.

        Returns:
            An Answer; a list of them if ``prompt`` is a list.

        Raises:
            FlashVLMError: one of the inputs cannot be used, with the reason.
        """
        single = not isinstance(prompt, (list, tuple))
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(prompts, (list, tuple)) or not prompts:
            raise PromptError(f"prompt: expected a question or a list of them, found {prompt!r}")
        images = _pair(image, len(prompts), single)
        turns = [[_user_message(text, i is not None)] for text, i in zip(prompts, images, strict=True)]
        sampling = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        timings = Timings()
        rows = self._prompts(images, turns, budget, timings)
        tokens: list[list[int]] = [[] for _ in rows]
        limit = check_capacity([r.row for r in rows], max_new_tokens, self._session.limits)
        for step in self._steps(rows, sampling, limit, timings):
            for row_tokens, token in zip(tokens, step, strict=True):
                if token is not None:
                    row_tokens.append(token)
        answers = [self._answer(r, t, limit, timings) for r, t in zip(rows, tokens, strict=True)]
        return answers[0] if single else answers

    def stream(
        self,
        image: ImageSource | None,
        prompt: str,
        *,
        budget: Budget = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> Stream:
        """Like ``generate`` for one prompt, yielding text as it comes. Inputs are checked before it returns."""
        sampling = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        (source,) = _pair(image, 1, single=True)
        return self._stream(source, [_user_message(prompt, source is not None)], budget, max_new_tokens, sampling)

    def conversation(self, image: ImageSource | None = None, *, budget: Budget = None) -> Conversation:
        """Several questions about one image; each selects its own tokens, and vision runs once."""
        (source,) = _pair(image, 1, single=True)
        return Conversation(self, None if source is None else load_image(source), budget)

    def _stream(
        self,
        image: ImageSource | None,
        messages: Sequence[Message],
        budget: Budget,
        max_new_tokens: int,
        sampling: SamplingParams,
    ) -> Stream:
        timings = Timings()
        rows = self._prompts([image], [messages], budget, timings)
        limit = check_capacity([rows[0].row], max_new_tokens, self._session.limits)

        def pieces() -> Iterator[str]:
            tokens: list[int] = []
            text = self._text.stream()
            for (token,) in self._steps(rows, sampling, limit, timings):
                assert token is not None  # a single row ends with the loop
                tokens.append(token)
                if piece := text.push(token):
                    yield piece
            if piece := text.flush():
                yield piece
            stream.answer = self._answer(rows[0], tokens, limit, timings)

        stream = Stream(pieces())
        return stream

    def _steps(
        self, prompts: list[_Prompt], sampling: SamplingParams, limit: int, timings: Timings
    ) -> Iterator[list[int | None]]:
        stop = frozenset(self.bundle.manifest.model.eos_token_ids)
        rows = [prompt.row for prompt in prompts]
        return generate_tokens(self._session, self._embedding, rows, Sampler(sampling), stop, limit, timings)

    def _answer(self, prompt: _Prompt, tokens: list[int], limit: int, timings: Timings) -> Answer:
        selection = prompt.selection
        return Answer(
            text=self._text.decode(tokens).strip(),
            token_ids=tuple(tokens),
            kept=None if selection is None else selection.kept,
            is_top=None if selection is None else selection.is_top,
            scores=None if selection is None else selection.scores,
            prompt_tokens=len(prompt.row.position_ids),
            image_tokens=prompt.image_tokens,
            stop_reason="length" if len(tokens) == limit else "stop token",
            timings=timings,
        )

    # --- from messages to rows ---

    def _prompts(
        self,
        images: Sequence[ImageSource | None],
        turns: Sequence[Sequence[Message]],
        budget: Budget,
        timings: Timings,
    ) -> list[_Prompt]:
        model = self.bundle.manifest.model
        keep = self._budget(budget)
        check_batch(len(turns), self._session.limits)
        encoded = [self._text.encode(messages, model.image_token_id) for messages in turns]
        for prompt, image in zip(encoded, images, strict=True):
            if len(prompt.image_positions) != (image is not None):
                raise PromptError(f"expected one image for a prompt, found {len(prompt.image_positions)} placeholders")
        self._session.prepare(keep)
        features = [None if image is None else self._image_features(image, timings) for image in images]
        started = time.perf_counter()
        selections = [
            None if f is None else self._select(keep, f, prompt) for f, prompt in zip(features, encoded, strict=True)
        ]
        timings.select = (time.perf_counter() - started) * 1e3
        return [self._row(prompt, selection) for prompt, selection in zip(encoded, selections, strict=True)]

    def _budget(self, budget: Budget) -> int | None:
        """The number of tokens to keep; None for all."""
        exported = self.bundle.manifest.selection.budgets
        if budget is None:
            return exported[0] if exported else None
        if budget == "all":
            return None
        if isinstance(budget, bool) or not isinstance(budget, int) or budget not in exported:
            have = ", ".join(map(str, (*exported, "all")))
            possible = type(budget) is int and 0 < budget <= self.bundle.manifest.model.num_image_tokens
            remedy = f"export with --budget {budget}" if possible else "take one of these"
            raise SelectionError(f"budget {budget!r} is not in this bundle, which has {have}; {remedy}")
        return budget

    def _image_features(self, source: ImageSource, timings: Timings) -> ImageFeatures:
        started = time.perf_counter()
        image = load_image(source)
        key = image_digest(image)
        if key in self._features:
            self._features.move_to_end(key)
            timings.preprocess += (time.perf_counter() - started) * 1e3
            return self._features[key]
        pixel_values = preprocess(image, self.bundle.manifest.image)[None]  # [1,3,H,W]
        timings.preprocess += (time.perf_counter() - started) * 1e3
        started = time.perf_counter()
        (features,) = self._session.vision(pixel_values)
        timings.vision += (time.perf_counter() - started) * 1e3
        self._features[key] = features
        if len(self._features) > CACHED_IMAGES:
            self._features.popitem(last=False)
        return features

    def _select(self, budget: int | None, image: ImageFeatures, prompt: EncodedPrompt) -> Selected:
        if budget is None:
            n = self.bundle.manifest.model.num_image_tokens
            return Selected(image.image_tokens, np.arange(n), np.ones(n, bool), np.zeros(n, np.float32))
        mask = prompt.question_mask if self.bundle.manifest.selection.query == "question" else prompt.text_mask
        query = self._embedding[prompt.input_ids[mask]][None]  # [1,L,D]
        (selected,) = self._session.select(budget, [image], query, np.ones(query.shape[:2], dtype=np.bool_))
        if not np.isfinite(selected.scores).all():
            raise FlashVLMError(
                "the selection scores are not finite: the image features overflowed; export with --dtype float32"
            )
        return selected

    def _row(self, prompt: EncodedPrompt, selection: Selected | None) -> _Prompt:
        text = self._embedding[prompt.input_ids]  # [T,D]
        if selection is None:
            return _Prompt(Row((text,), np.arange(len(text))), None, 0)
        manifest = self.bundle.manifest
        keep = manifest.selection.positions == "keep"
        places = (selection.kept, manifest.model.num_image_tokens) if keep else None
        row = row_with_image(text, int(prompt.image_positions[0]), selection.visual_embeds, places)
        return _Prompt(row, selection, len(selection.kept))


class Conversation:
    """Questions and answers about one image. A question the pipeline refuses leaves the conversation as it was."""

    def __init__(self, pipeline: Pipeline, image: ImageSource | None, budget: Budget) -> None:
        self._pipeline = pipeline
        self._image = image
        self._budget = budget
        self.messages: list[Message] = []

    def ask(self, prompt: str, **options: Any) -> Answer:
        """The next answer; options as for ``Pipeline.stream``."""
        stream = self.stream(prompt, **options)
        for _ in stream:
            pass
        assert stream.answer is not None
        return stream.answer

    def stream(
        self, prompt: str, *, budget: Budget = None, max_new_tokens: int = MAX_NEW_TOKENS, **sampling: Any
    ) -> Stream:
        """The next answer as it comes; it joins the conversation when the stream is exhausted.

        ``budget``: for this question alone; None takes the conversation's.
        """
        budget = self._budget if budget is None else budget
        user = _user_message(prompt, with_image=self._image is not None and not self.messages)
        messages = [*self.messages, user]
        inner = self._pipeline._stream(self._image, messages, budget, max_new_tokens, SamplingParams(**sampling))

        def pieces() -> Iterator[str]:
            yield from inner
            assert inner.answer is not None
            outer.answer = inner.answer
            said = {"role": "assistant", "content": [{"type": "text", "text": inner.answer.text}]}
            self.messages = [*messages, said]

        outer = Stream(pieces())
        return outer


def _user_message(text: str, with_image: bool) -> Message:
    if not isinstance(text, str):
        raise PromptError(f"prompt: expected a question as a str, found {text!r}")
    if not text.strip():
        raise PromptError("the prompt is empty; expected a question")
    content: list[dict[str, str]] = [{"type": "image"}] if with_image else []
    return {"role": "user", "content": [*content, {"type": "text", "text": text}]}


def _pair(image: Any, count: int, single: bool) -> list[ImageSource | None]:
    """One image a prompt."""
    if not isinstance(image, (list, tuple)):
        return [image] * count
    if len(image) != count:
        more = "; several images in one prompt are not supported by this family" if single else ""
        raise PromptError(f"expected {count} image(s) for {count} prompt(s), found {len(image)}{more}")
    return list(image)
