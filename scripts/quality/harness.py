"""The exam: scenes are seen once; each variant selects, the language model answers in batches, greedily."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image

from demo_model.words import COVERED
from flashvlm.bundle import Bundle
from flashvlm.embeddings import EmbeddingTable
from flashvlm.generation import Row, Timings, check_capacity, generate_tokens, row_with_image
from flashvlm.images import preprocess
from flashvlm.manifest import EMBEDDINGS, PROCESSOR
from flashvlm.sampling import Sampler, SamplingParams
from flashvlm.sessions import ImageFeatures
from flashvlm.sessions.onnxruntime import OnnxRuntimeSession
from flashvlm.text.processor import TextProcessor
from flashvlm_export.selection.flashvlm import READS
from quality.variants import DOWNSAMPLED, POOLED, Variant
from scenes.draw import draw, owners
from scenes.exam import Item
from scenes.world import Scene

MAX_NEW_TOKENS = 8  # the longest answers have 4
BATCH_TOKENS = 8192  # prompt tokens in one batch, padding included; few enough for the caches of a CPU
SELECT_ROWS = 14  # rows of one call of a selection graph, whose [N,N] matrices are 1.3 MB each at 576 tokens
FATAL_ONLY = 4


@dataclass(frozen=True)
class Given:
    """One answer. ``kept``: share of the asked-for things' patches that were kept; None where it has no meaning."""

    item: int
    answer: str
    right: bool
    kept: float | None


@dataclass(frozen=True)
class _Chosen:
    """visual_embeds [K,D], kept int64 [K], None if no token was kept as it is."""

    embeds: np.ndarray
    kept: np.ndarray | None


class Exam:
    """Questions on the features of one bundle.

    Args:
        bundle: with or without selection; only its vision and decoder are used.
        items: questions, those of a scene in a row.
    """

    def __init__(self, bundle: Bundle, items: Sequence[Item], threads: int | None = None) -> None:
        self.items = list(items)
        self._model = bundle.manifest.model
        self._threads = threads
        self._session = OnnxRuntimeSession(bundle, "cpu", threads)
        self._text = TextProcessor.from_files(bundle.read_processor, bundle.path / PROCESSOR, self._model.vocab_size)
        self._embedding = EmbeddingTable(bundle.file(EMBEDDINGS), self._model.vocab_size, self._model.hidden_size)
        messages = [[_message(item.question.text)] for item in self.items]
        self._prompts = [self._text.encode(each, self._model.image_token_id) for each in messages]
        self._scenes = [list(group) for _, group in groupby(range(len(self.items)), lambda i: self.items[i].scene)]
        self._scene_of = [scene for scene, questions in enumerate(self._scenes) for _ in questions]
        self._features: list[ImageFeatures] = []
        self._asked = [self._asked_patches(item) for item in self.items]
        self._image = bundle.manifest.image

    def look(self, report: Callable[[int], None] = lambda _: None) -> None:
        """Runs vision over every scene; features stay in memory (1 MB a scene for the demo model)."""
        for questions in self._scenes[len(self._features) :]:
            image = Image.fromarray(draw(self.items[questions[0]].scene))
            self._features += self._session.vision(preprocess(image, self._image)[None])
            report(len(questions))

    def sit(self, variant: Variant, graph: Path | None, report: Callable[[int], None] = lambda _: None) -> list[Given]:
        """Answers to all questions.

        Args:
            graph: selection of the variant; None for all tokens.
        """
        self.look()
        select = None if graph is None else self.load(graph)
        given: list[Given] = []
        for questions in self._batches(variant, select):
            chosen = self._choose(variant, select, questions)
            answers = self._answer(variant, questions, chosen)
            for index, choice, answer in zip(questions, chosen, answers, strict=True):
                right = answer == self.items[index].question.answer
                given.append(Given(index, answer, right, self._kept_share(variant, index, choice.kept)))
            report(len(questions))
        return given

    def select_milliseconds(
        self, graphs: dict[str, tuple[Variant, Path]], rounds: int, report: Callable[[int], None] = lambda _: None
    ) -> dict[str, float]:
        """Median wall milliseconds of each selection graph at batch 1 on the exam's own questions.

        Every round runs each graph once, so that other load on the machine falls on all of them alike.
        """
        self.look()
        loaded = {name: (variant, self.load(path)) for name, (variant, path) in graphs.items()}
        times: dict[str, list[float]] = {name: [] for name in graphs}
        for turn in range(rounds + 2):  # two to warm up
            index = turn * len(self.items) // (rounds + 2)
            for name, (variant, session) in loaded.items():
                feed = self._feed(variant, [index])
                started = time.perf_counter()
                session.run(None, feed)
                times[name].append((time.perf_counter() - started) * 1e3)
            report(1)
        return {name: statistics.median(taken[2:]) for name, taken in times.items()}

    def load(self, graph: Path) -> Any:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = FATAL_ONLY
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])

    def _batches(self, variant: Variant, select: Any) -> Iterator[list[int]]:
        """Whole scenes, as many as fit."""
        tokens = self._model.num_image_tokens if select is None else select.get_outputs()[0].shape[1]
        longest = max(len(prompt.input_ids) for prompt in self._prompts) + tokens
        most = max(1, BATCH_TOKENS // longest)
        batch: list[int] = []
        for questions in self._scenes:
            if batch and len(batch) + len(questions) > most:
                yield batch
                batch = []
            batch = [*batch, *questions]
        yield batch

    def _choose(self, variant: Variant, select: Any, questions: list[int]) -> list[_Chosen]:
        if select is None:
            every = np.arange(self._model.num_image_tokens)
            return [_Chosen(self._features[self._scene_of[i]].image_tokens, every) for i in questions]
        # One row a scene where the question changes nothing.
        reads_query = "query" in READS.get(variant.method, {"query"})
        row_of = list(range(len(questions))) if reads_query else [self._scene_of[i] - self._scene_of[questions[0]]
                                                                  for i in questions]  # fmt: skip
        asked = [questions[row_of.index(row)] for row in range(row_of[-1] + 1)]
        rows: list[_Chosen] = []
        for start in range(0, len(asked), SELECT_ROWS):
            feed = self._feed(variant, asked[start : start + SELECT_ROWS])
            embeds, kept = select.run(["visual_embeds", "kept"], feed)
            rows += [_Chosen(e, None if variant.method == POOLED else k) for e, k in zip(embeds, kept, strict=True)]
        return [rows[row] for row in row_of]

    def _feed(self, variant: Variant, questions: list[int]) -> dict[str, np.ndarray]:
        images = [self._features[self._scene_of[i]] for i in questions]
        prompts = [self._prompts[i] for i in questions]
        masks = [p.question_mask if variant.query == "question" else p.text_mask for p in prompts]
        ids = [prompt.input_ids[mask] for prompt, mask in zip(prompts, masks, strict=True)]
        query_mask = np.arange(max(map(len, ids))) < np.array([[len(each)] for each in ids])  # [B,L]
        query = np.zeros((*query_mask.shape, self._model.hidden_size), dtype=self._embedding.dtype)
        query[query_mask] = self._embedding[np.concatenate(ids)]
        saliency = np.stack([image.saliency for image in images])
        return {
            "image_tokens": np.stack([image.image_tokens for image in images]),
            "features": np.stack([image.features for image in images]),
            "saliency": saliency,
            "valid": np.ones(saliency.shape, dtype=np.bool_),
            "query_embeds": query,
            "query_mask": query_mask,
        }

    def _answer(self, variant: Variant, questions: list[int], chosen: list[_Chosen]) -> list[str]:
        rows = [self._row(variant, i, choice) for i, choice in zip(questions, chosen, strict=True)]
        limit = check_capacity(rows, MAX_NEW_TOKENS, self._session.limits)
        tokens: list[list[int]] = [[] for _ in rows]
        stop = frozenset(self._model.eos_token_ids)
        greedy = Sampler(SamplingParams())
        for step in generate_tokens(self._session, self._embedding, rows, greedy, stop, limit, Timings()):
            for said, token in zip(tokens, step, strict=True):
                if token is not None:
                    said.append(token)
        return [self._text.decode(said).strip() for said in tokens]

    def _row(self, variant: Variant, index: int, chosen: _Chosen) -> Row:
        prompt = self._prompts[index]
        places = None
        if variant.positions == "keep":
            assert chosen.kept is not None
            places = chosen.kept, self._model.num_image_tokens
        return row_with_image(self._embedding[prompt.input_ids], int(prompt.image_positions[0]), chosen.embeds, places)

    def _asked_patches(self, item: Item) -> np.ndarray | None:
        rows, columns = self._model.image_grid
        asked = asked_patches(item.scene, item.question.about, rows) if rows == columns else np.zeros(0, bool)
        return asked if asked.any() else None

    def _kept_share(self, variant: Variant, index: int, kept: np.ndarray | None) -> float | None:
        asked = self._asked[index]
        if kept is None or asked is None or variant.method == DOWNSAMPLED:
            return None
        return float(asked[kept].sum() / asked.sum())


def asked_patches(scene: Scene, about: Sequence[int], side: int) -> np.ndarray:
    """Bool [side * side]: patches of which one of the things covers at least a fifth."""
    owned = owners(scene)
    cell = np.arange(len(owned)) * side // len(owned)
    patch = cell[:, None] * side + cell[None, :]  # [S,S]
    pixels = np.bincount(patch.ravel(), minlength=side * side)
    shown = np.zeros(side * side, dtype=bool)
    for thing in about:
        shown |= np.bincount(patch[owned == thing + 1], minlength=side * side) >= COVERED * pixels
    return shown


def _message(text: str) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
