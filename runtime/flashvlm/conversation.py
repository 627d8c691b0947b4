"""A conversation about images and videos: what was said, and what can be kept from one question to the next."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flashvlm.answers import Answer, Stream
from flashvlm.budget import Budget
from flashvlm.encoder import Encoded, Kept, Visible, question, request
from flashvlm.generation import Held, Row, Timings, capacity_for, check_capacity
from flashvlm.messages import Message, TextPart, normalise
from flashvlm.sampling import SamplingParams

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from flashvlm.pipeline import Pipeline
    from flashvlm.sampling import SamplingOptions


class Conversation:
    """Questions and answers about the same images and videos. A question that is refused leaves it as it was."""

    def __init__(
        self,
        pipeline: Pipeline,
        visuals: tuple[Visible, ...],
        budget: Budget | None,
        reselect: bool,
        system: str | None,
    ) -> None:
        self._pipeline, self._visuals, self._budget, self._reselect = pipeline, visuals, budget, reselect
        self._messages = list(normalise([{"role": "system", "content": system}])) if system else []
        # Tokens to keep of each image, which images, and what was kept.
        self._kept: tuple[tuple[int | None, tuple[tuple[str, str], ...]], tuple[Kept, ...]] | None = None
        self._held: Held | None = None
        self._open: Stream | None = None

    @property
    def messages(self) -> tuple[Message, ...]:
        """What was said, by system, user and assistant."""
        return tuple(self._messages)

    def ask(self, prompt: str, *, budget: Budget | None = None, **options: Unpack[SamplingOptions]) -> Answer:
        """The next answer.

        Args:
            budget: for this question alone; None takes the conversation's. Another one selects anew.
            options: as for ``Pipeline.generate``.

        Example:
            >>> talk = pipeline.conversation("cat.jpg")  # doctest: +SKIP
            >>> talk.ask("What is on the sofa?").text  # doctest: +SKIP
            'a cat'
        """
        return self.stream(prompt, budget=budget, **options).result()

    def stream(self, prompt: str, *, budget: Budget | None = None, **options: Unpack[SamplingOptions]) -> Stream:
        """The next answer as it comes. It joins the conversation when the stream ends, cut short or not; a stream that
        is still open when the next question is asked ends there."""
        params = SamplingParams.from_options(options)
        if self._open is not None:
            self._open.close()
        first = not any(message.visuals for message in self._messages)
        messages = [*self._messages, question(prompt, self._visuals if first else ())]
        budget = self._budget if budget is None else budget
        timings = Timings()
        held = None
        if self._reselect:
            (encoded,) = self._pipeline.encode([messages], budget, timings)
        else:
            encoded = self._with_first_selection(messages, budget, timings)
            held = self._room_for(encoded.row, params.max_new_tokens)

        def join(answer: Answer) -> None:
            if answer.text or answer.stop_reason != "cancelled":
                self._messages = [*messages, Message("assistant", (TextPart(answer.text),))]

        self._open = Stream(self._pipeline.write([encoded], params, timings, held), join)
        return self._open

    def _with_first_selection(self, messages: list[Message], budget: Budget | None, timings: Timings) -> Encoded:
        """The prompt of all messages, with the visual tokens that the first question at this budget selected."""
        encoder, keep = self._pipeline.encoder, self._pipeline.keep(budget)
        (prompt,) = encoder.read([request(messages)], timings)
        of = keep, tuple(sight.key for sight in prompt.sights)
        if self._kept is None or self._kept[0] != of:
            (encoded,) = encoder.keep([prompt], keep, timings)
            self._kept = of, encoded.kept
            self._held = None  # a method may merge tokens: at the same place there is another
            return encoded
        return encoder.place(prompt, self._kept[1])

    def _room_for(self, row: Row, max_new_tokens: int) -> Held:
        """The cache of the questions before, or one of twice the size that is needed, to be filled again."""
        limits = self._pipeline.limits
        needed = len(row) + check_capacity([row], max_new_tokens, limits) - 1
        if self._held is None or self._held.capacity < needed:
            capacity = limits.capacity or capacity_for(min(2 * needed, limits.max_seq))
            self._held = None  # its memory is free before more is asked for
            self._held = self._pipeline.new_cache(capacity)
        return self._held
