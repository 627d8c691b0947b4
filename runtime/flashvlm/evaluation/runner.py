"""A pipeline over a task: images are seen once, questions are answered in batches, greedily, at every budget."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import PIL.Image

from flashvlm import __version__
from flashvlm.answers import Answer
from flashvlm.budget import Budget
from flashvlm.encoder import Encoded, Prompt, Request, question
from flashvlm.errors import FlashVLMError
from flashvlm.evaluation.results import Prediction, Record, bundle_parts, key_of
from flashvlm.evaluation.tasks import Item, Task
from flashvlm.generation import Timings
from flashvlm.images import load_image
from flashvlm.pipeline import Pipeline
from flashvlm.sampling import SamplingParams
from flashvlm.sessions import ImageFeatures

CHUNK_ITEMS = 64  # whose images are seen together
CHUNK_IMAGES = 16  # whose pixels and features are in memory at once
BATCH_TOKENS = 8192  # prompt tokens in one batch, padding included; few enough for the caches of a CPU
T = TypeVar("T")
Advance = Callable[[Budget, int], None]  # at this budget, so many more items are done


class EvalRun:
    """A pipeline answers the questions of a task.

    Args:
        pipeline: of any backend; answers go through its own encoder and decoder.
        folder: for predictions, one file a budget; a run that was interrupted goes on. None keeps none.
        keep_indices: predictions also say which visual tokens the model saw.
        batch_tokens: prompt tokens of a batch at most, padding included.

    Example:
        >>> run = EvalRun(Pipeline.from_bundle("demo-out/bundle"), task, Path("demo-out/eval"))  # doctest: +SKIP
        >>> found = run.predict([64, "all"])  # doctest: +SKIP
        >>> sample = Bootstrap(task.groups)  # doctest: +SKIP
        >>> sample.difference(scores(found[64]), scores(found["all"]))  # doctest: +SKIP
        Interval(value=-0.01, low=-0.02, high=0.0)
    """

    def __init__(
        self,
        pipeline: Pipeline,
        task: Task,
        folder: Path | None = None,
        *,
        keep_indices: bool = False,
        batch_tokens: int = BATCH_TOKENS,
    ) -> None:
        self.task = task
        self._pipeline, self._folder = pipeline, folder
        self._keep_indices, self._batch_tokens = keep_indices, batch_tokens
        self._params = SamplingParams(max_new_tokens=task.max_new_tokens)

    def predict(self, budgets: Sequence[Budget], advance: Advance = lambda *_: None) -> dict[Budget, list[Prediction]]:
        """Predictions by budget, in the order of the items: from the files, or else from the model.

        Raises:
            FlashVLMError: a budget the bundle lacks, an item that cannot be asked, or files that cannot be written.
        """
        keeps = {budget: self._pipeline.keep(budget) for budget in budgets}
        ids = [item.id for item in self.task.items]
        chunks = list(_chunks(self.task.items))
        with contextlib.ExitStack() as stack:
            # A run goes on at the end of a chunk, so that no batch depends on where the last run was interrupted.
            ends = [stop for _, stop in chunks]
            records = {budget: stack.enter_context(Record(self.file(budget), ids, ends)) for budget in keeps}
            for budget, record in records.items():
                advance(budget, len(record.predictions))
            for start, stop in chunks:
                missing = {b: keeps[b] for b, record in records.items() if len(record.predictions) == start}
                for budget, predictions in self._predict(self.task.items[start:stop], missing) if missing else ():
                    records[budget].add(predictions)
                    advance(budget, len(predictions))
        return {budget: record.predictions for budget, record in records.items()}

    def file(self, budget: Budget) -> Path | None:
        """Named by task and budget for people, and by a key of everything the answers depend on."""
        if self._folder is None:
            return None
        task, pipeline = self.task, self._pipeline
        judged = (task.name, task.version, task.metric.__qualname__, task.max_new_tokens, *task.items)
        ran = (__version__, pipeline.backend, self._batch_tokens, self._keep_indices)
        key = key_of(*judged, *ran, *bundle_parts(pipeline.bundle.manifest, pipeline.keep(budget)))
        return self._folder / f"{task.name}-{budget}-{key}.jsonl"

    def _predict(
        self, items: Sequence[Item], keeps: dict[Budget, int | None]
    ) -> Iterator[tuple[Budget, list[Prediction]]]:
        encoder, timings = self._pipeline.encoder, Timings()
        prompts = encoder.read(self._requests(items), timings)
        features = encoder.see(prompts, timings)
        for budget, keep in keeps.items():
            encoded = self._encode(prompts, features, keep)
            answers = [answer for some in self._batches(encoded, _tokens) for answer in self._answer(some)]
            yield budget, [self._judged(*each) for each in zip(items, answers, strict=True)]

    def _requests(self, items: Sequence[Item]) -> list[Request]:
        loaded: dict[object, PIL.Image.Image] = {}
        return [self._request(item, loaded) for item in items]

    def _request(self, item: Item, loaded: dict[object, PIL.Image.Image]) -> Request:
        try:
            for image in item.images:
                if image not in loaded:
                    loaded[image] = load_image(self.task.load(image))
            images = tuple(loaded[image] for image in item.images)
            return Request([question(item.question, images).plain()], images)
        except FlashVLMError as error:
            raise type(error)(f"task {self.task.name}, item {item.id}: {error}") from None

    def _encode(
        self, prompts: Sequence[Prompt], features: dict[tuple[str, str], ImageFeatures], keep: int | None
    ) -> list[Encoded]:
        encoder, encoded = self._pipeline.encoder, []
        # A selection's matrices grow with all tokens of an image, however few are kept.
        for some in self._batches(prompts, _all_tokens):
            kept = encoder.select(some, features, keep)
            encoded += [encoder.place(*each) for each in zip(some, kept, strict=True)]
        return encoded

    def _answer(self, prompts: list[Encoded]) -> list[Answer]:
        writing = self._pipeline.write(prompts, self._params, Timings())
        for _ in writing:
            pass
        return writing.answers()

    def _judged(self, item: Item, answer: Answer) -> Prediction:
        kept = tuple(tuple(selection.kept.tolist()) for selection in answer.selections)
        score = self.task.metric(answer.text, item.answers)
        return Prediction(item.id, answer.text, float(score), kept if self._keep_indices else None)

    def _batches(self, prompts: Sequence[T], tokens: Callable[[T], int]) -> Iterator[list[T]]:
        """As many prompts as fit, in their order; at least one."""
        most = self._pipeline.limits.max_batch
        batch: list[T] = []
        longest = 0
        for prompt in prompts:
            longest = max(longest, tokens(prompt))
            if batch and (len(batch) == most or longest * (len(batch) + 1) > self._batch_tokens):
                yield batch
                batch, longest = [], tokens(prompt)
            batch.append(prompt)
        if batch:
            yield batch


def scores(predictions: Sequence[Prediction]) -> list[float]:
    """Of each prediction, for ``Bootstrap``."""
    return [prediction.score for prediction in predictions]


def _chunks(items: Sequence[Item]) -> Iterator[tuple[int, int]]:
    """Runs of items, few enough that their images are in memory together."""
    start, images = 0, set[object]()
    for n, item in enumerate(items):
        images |= {*item.images}
        if n > start and (n - start == CHUNK_ITEMS or len(images) > CHUNK_IMAGES):
            yield start, n
            start, images = n, {*item.images}
    yield start, len(items)


def _all_tokens(prompt: Prompt) -> int:
    return len(prompt.input_ids) + sum(sight.arrangement.count for sight in prompt.sights)


def _tokens(prompt: Encoded) -> int:
    return len(prompt.row)
