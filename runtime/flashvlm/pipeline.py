"""Pipeline: images, videos and messages in, text out."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast, overload

import numpy as np

from flashvlm.answers import Answer, AsyncStream, Stream, Writing
from flashvlm.budget import ALL, Budget, choose_budget
from flashvlm.bundle import Bundle
from flashvlm.conversation import Conversation
from flashvlm.encoder import Encoded, Encoder, Visible, question, request
from flashvlm.errors import FlashVLMError, PromptError, brief
from flashvlm.generation import Decoding, Held, Timings, check_capacity
from flashvlm.hub import bundle_folder
from flashvlm.images import ImageSource
from flashvlm.messages import Message, normalise
from flashvlm.sampling import RowSampler, SamplingParams
from flashvlm.sessions import Backend, Limits, Session, check_batch
from flashvlm.videos import Video, VideoSource, load_videos

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from flashvlm.messages import ChatMessage
    from flashvlm.sampling import SamplingOptions


Videos = VideoSource | Video | Sequence[VideoSource | Video] | None


class Pipeline:
    """A loaded bundle. Safe to use from several threads; image features are cached by content.

    ``backend`` says what runs it. ``close``, or leaving a ``with``, frees its memory before the process ends.

    Example:
        >>> from flashvlm import Pipeline  # doctest: +SKIP
        >>> pipeline = Pipeline.from_bundle("demo-out/bundle")  # doctest: +SKIP
        >>> print(pipeline.generate("cat.jpg", "What is on the sofa?", budget=64))  # doctest: +SKIP
        a cat
    """

    def __init__(self, bundle: Bundle, session: Session) -> None:
        self.bundle = bundle
        self._session = session
        self.encoder = Encoder(bundle, session)

    @classmethod
    def from_bundle(
        cls,
        path: str | os.PathLike[str] | Bundle,
        *,
        revision: str | None = None,
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
            path: its folder, its name OWNER/NAME on the Hugging Face Hub (with huggingface_hub installed), or a Bundle
                that is open already.
            revision: of a bundle on the Hub: a branch, tag or commit.
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

        bundle = path if isinstance(path, Bundle) else Bundle(bundle_folder(path, revision), verify=verify)
        if not isinstance(plugins, (str, os.PathLike, type(None))):
            raise FlashVLMError(f"plugins: expected the path of a library, found {brief(plugins)}")
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
        self.encoder.close()
        self._session.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- questions ---

    @overload
    def generate(  # type: ignore[overload-overlap]  # a str is a sequence of str
        self,
        image: ImageSource | Sequence[ImageSource] | None,
        prompt: str,
        *,
        video: Videos = None,
        budget: Budget | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Answer: ...

    @overload
    def generate(
        self,
        image: ImageSource | Sequence[ImageSource | Sequence[ImageSource] | None] | None,
        prompt: Sequence[str],
        *,
        video: Videos = None,
        budget: Budget | None = None,
        **options: Unpack[SamplingOptions],
    ) -> list[Answer]: ...

    def generate(
        self,
        image: ImageSource | Sequence[ImageSource | Sequence[ImageSource] | None] | None,
        prompt: str | Sequence[str],
        *,
        video: Videos = None,
        budget: Budget | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Answer | list[Answer]:
        """Answers a question about images or videos, or several at once.

        Args:
            image: path, bytes, PIL image, array or open file; None for text alone; a list of them for one question
                about several images. With several prompts, one image for all of them or a list with one each.
            prompt: the question, or a list of them.
            video: path, bytes, array [T,H,W,3] or list of frames (PIL images or arrays); a list of any but frames for
                several. They stand behind the images, for every prompt the same.
            budget: visual tokens to keep of each image or video: a number the bundle was exported for, or ``"all"``.
                None takes the bundle's first.
            options: of sampling and length, see ``SamplingParams``.

        Returns:
            An Answer; a list of them if ``prompt`` is a list.

        Raises:
            FlashVLMError: one of the inputs cannot be used, with the reason.

        Example:
            >>> pipeline.generate("cat.jpg", ["What is it?", "Where?"], max_new_tokens=8)  # doctest: +SKIP
        """
        params = SamplingParams.from_options(options)
        videos = load_videos(video)
        if isinstance(prompt, str):
            return self._answers([[question(prompt, [*_images(image), *videos])]], budget, params)[0]
        if not isinstance(prompt, (list, tuple)) or not prompt:
            raise PromptError(f"prompt: expected a question or a list of them, found {brief(prompt)}")
        images = image if isinstance(image, (list, tuple)) else [image] * len(prompt)
        if len(images) != len(prompt):
            raise PromptError(f"expected {len(prompt)} image(s) for {len(prompt)} prompt(s), found {len(images)}")
        asked = [[question(text, [*_images(each), *videos])] for text, each in zip(prompt, images, strict=True)]
        return self._answers(asked, budget, params)

    @overload
    def chat(
        self,
        messages: Sequence[ChatMessage],
        *,
        stream: Literal[False] = False,
        budget: Budget | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Answer: ...

    @overload
    def chat(
        self,
        messages: Sequence[ChatMessage],
        *,
        stream: Literal[True],
        budget: Budget | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Stream: ...

    def chat(
        self,
        messages: Sequence[ChatMessage],
        *,
        stream: bool = False,
        budget: Budget | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Answer | Stream:
        """Answers a conversation, in the form that OpenAI's and transformers' users write it.

        Args:
            messages: ``{"role": ..., "content": ...}`` each, of the roles system, user and assistant; content is text
                or a list of parts: text, image, image_url (a data URL or path), video. See ``flashvlm.messages``.
            stream: give a ``Stream`` of text instead of waiting for the whole.
            budget, options: as for ``generate``.

        Raises:
            FlashVLMError: one of the inputs cannot be used, with the reason.

        Example:
            >>> pipeline.chat([{"role": "user", "content": [  # doctest: +SKIP
            ...     {"type": "image", "image": "left.jpg"}, {"type": "image", "image": "right.jpg"},
            ...     {"type": "text", "text": "What is different?"}]}])
        """
        params = SamplingParams.from_options(options)
        if stream:
            return self.open_stream(normalise(messages), budget, params)
        return self._answers([normalise(messages)], budget, params)[0]

    def stream(
        self,
        image: ImageSource | Sequence[ImageSource] | None,
        prompt: str,
        *,
        video: Videos = None,
        budget: Budget | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Stream:
        """Like ``generate`` for one prompt, giving text as it comes. Inputs are checked before it returns.

        Example:
            >>> for piece in pipeline.stream("cat.jpg", "What is it?"):  # doctest: +SKIP
            ...     print(piece, end="", flush=True)
        """
        params = SamplingParams.from_options(options)
        return self.open_stream([question(prompt, [*_images(image), *load_videos(video)])], budget, params)

    def conversation(
        self,
        image: ImageSource | Sequence[ImageSource] | None = None,
        *,
        video: Videos = None,
        budget: Budget | None = None,
        reselect: bool = True,
        system: str | None = None,
    ) -> Conversation:
        """Several questions about the same images or videos. Vision runs once.

        Args:
            reselect: each question selects its own tokens, and the whole prompt is prefilled again. False keeps the
                first question's selection and the KV cache: a later question prefills its own text alone.
            system: instructions that stand before the first question.

        Example:
            >>> talk = pipeline.conversation("cat.jpg", reselect=False)  # doctest: +SKIP
            >>> print(talk.ask("What is on the sofa?"), talk.ask("What colour is it?"))  # doctest: +SKIP
        """
        visuals = [*_images(image), *load_videos(video)]
        loaded = request([question("?", visuals)]).visuals  # once, whatever is asked
        return Conversation(self, loaded, budget, reselect, system)

    async def generate_async(
        self,
        image: ImageSource | Sequence[ImageSource] | None,
        prompt: str,
        *,
        video: Videos = None,
        budget: Budget | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Answer:
        """``generate`` for one prompt, in a thread: an event loop goes on meanwhile, and a cancelled task ends it."""
        return await _whole(await self.stream_async(image, prompt, video=video, budget=budget, **options))

    async def chat_async(
        self, messages: Sequence[ChatMessage], *, budget: Budget | None = None, **options: Unpack[SamplingOptions]
    ) -> Answer:
        """``chat`` in a thread: an event loop goes on meanwhile, and a cancelled task ends it."""
        params = SamplingParams.from_options(options)
        opened = await asyncio.to_thread(lambda: self.open_stream(normalise(messages), budget, params))
        return await _whole(AsyncStream(opened))

    async def stream_async(
        self,
        image: ImageSource | Sequence[ImageSource] | None,
        prompt: str,
        *,
        video: Videos = None,
        budget: Budget | None = None,
        **options: Unpack[SamplingOptions],
    ) -> AsyncStream:
        """``stream`` whose steps run in threads."""
        params = SamplingParams.from_options(options)

        def start() -> Stream:
            asked = question(prompt, [*_images(image), *load_videos(video)])
            return self.open_stream([asked], budget, params)

        return AsyncStream(await asyncio.to_thread(start))

    # --- from messages to answers ---

    def open_stream(self, messages: Sequence[Message], budget: Budget | None, params: SamplingParams) -> Stream:
        """The answer to normalised messages, as it comes."""
        timings = Timings()
        prompts = self.encode([messages], budget, timings)
        return Stream(self.write(prompts, params, timings))

    def encode(
        self, conversations: Sequence[Sequence[Message]], budget: Budget | None, timings: Timings
    ) -> list[Encoded]:
        """Normalised messages -> rows for the decoder: vision and selection run for all of them together."""
        keep = self.keep(budget)
        check_batch(len(conversations), self._session.limits)
        loaded: dict[int, Visible] = {}  # prompts may share an image
        return self.encoder.encode([request(messages, loaded) for messages in conversations], keep, timings)

    def write(
        self, prompts: list[Encoded], params: SamplingParams, timings: Timings, held: Held | None = None
    ) -> Writing:
        """The answers to encoded prompts, as they are generated; ``held``: the cache to go on with, of one prompt."""
        rows = [prompt.row for prompt in prompts]
        limit = check_capacity(rows, params.max_new_tokens, self._session.limits)
        samplers = [RowSampler(params, row.keys[row.keys >= 0]) for row in rows]
        stop = frozenset(self.bundle.manifest.model.eos_token_ids)
        decoding = Decoding(self._session, self.encoder.embedding, rows, samplers, stop, limit, timings, held)
        return Writing(self.encoder.text, prompts, params, decoding, limit, timings)

    def new_cache(self, capacity: int) -> Held:
        """An empty KV cache of one prompt, to go on with from answer to answer."""
        return Held(self._session.new_cache(1, capacity), capacity, np.zeros(0, dtype=np.int64))

    def keep(self, budget: Budget | None) -> int | None:
        """The number of tokens to keep; None for all."""
        selection = self.bundle.manifest.selection
        chosen = choose_budget(budget, selection.budgets, selection.default, self.bundle.manifest.candidates)
        return None if chosen == ALL else chosen

    def _answers(
        self, conversations: Sequence[Sequence[Message]], budget: Budget | None, params: SamplingParams
    ) -> list[Answer]:
        timings = Timings()
        writing = self.write(self.encode(conversations, budget, timings), params, timings)
        for _ in writing:
            pass
        return writing.answers()


def _images(image: object) -> list[ImageSource]:
    """None, an image or several -> a list."""
    if image is None:
        return []
    if isinstance(image, (list, tuple)) and not image:
        raise PromptError("image: expected an image, a list of them or None, found an empty list")
    return cast("list[ImageSource]", list(image) if isinstance(image, (list, tuple)) else [image])


async def _whole(stream: AsyncStream) -> Answer:
    async with stream:
        async for _ in stream:
            pass
    assert stream.answer is not None
    return stream.answer
