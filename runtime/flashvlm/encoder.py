"""Messages with images and videos -> what the decoder reads: tokens of text, and of each item those that are kept.

read     messages -> prompts: token ids, and for each image its pixels' size and place, of each video its frames
see      prompts -> features, from the cache or the vision graphs, images of one size together
select   prompts, features and a budget -> which visual tokens are kept, questions of one budget together
place    a prompt and what was kept -> one row for the decoder
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import PIL.Image

from flashvlm.bundle import Bundle
from flashvlm.embeddings import EmbeddingTable
from flashvlm.errors import FlashVLMError, PromptError, brief
from flashvlm.feature_cache import FeatureCache
from flashvlm.frames import Clip
from flashvlm.generation import Row, Timings, check_length
from flashvlm.graph_io import DECODER, select_graph
from flashvlm.images import ImageSource, image_digest, load_image
from flashvlm.manifest import EMBEDDINGS, PROCESSOR, Manifest
from flashvlm.messages import Message, VideoPart, normalise
from flashvlm.preprocess import Grid, grid_of, stack, tile
from flashvlm.prompt import Arrangement, Item, Text, arrange, expand, layout, select_rows
from flashvlm.sessions import Array, ImageFeatures, Segment, Selected, Session
from flashvlm.text.processor import Message as PlainMessage
from flashvlm.text.processor import TextProcessor
from flashvlm.tilings import Frames
from flashvlm.videos import Video, load_video
from flashvlm.visual import VisualSpec

CACHED_IMAGES = 8
Visible = PIL.Image.Image | Video
T = TypeVar("T")


@dataclass(frozen=True)
class Request:
    """One prompt: messages of roles and parts, in which each part ``{"type": "image"}`` or ``{"type": "video"}`` stands
    for the next of ``visuals``: RGB images and videos."""

    messages: Sequence[PlainMessage]
    visuals: tuple[Visible, ...] = ()


@dataclass(frozen=True, eq=False)
class Sight:
    """One image or video of a prompt, as the bundle will see it; ``key`` is what its features are known by.

    pictures  RGB: the image, or the chosen frames
    """

    pictures: tuple[PIL.Image.Image, ...]
    key: tuple[str, str]
    spec: VisualSpec
    grid: Grid
    arrangement: Arrangement

    def kept(self, budget: int | None) -> int:
        """How many of its tokens a budget keeps."""
        count = self.arrangement.count
        return count if budget is None else self.spec.kept_of(count, self.grid.units, budget)

    def selects(self, budget: int | None) -> bool:
        """Whether a budget keeps fewer than all of its tokens."""
        return self.kept(budget) < self.arrangement.count


@dataclass(frozen=True, eq=False)
class Prompt:
    """input_ids int64 [T] with placeholders, query int64 [L]: the ids that the selection is guided by; sights as the
    messages have them, ``order`` as the prompt has them."""

    input_ids: np.ndarray
    query: np.ndarray
    sights: tuple[Sight, ...]
    order: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Selection:
    """Which visual tokens of one image or video the model sees.

    kept    int64 [K] ascending: among its tokens in reading order
    is_top  bool [K]: kept for its score (the others represent the background)
    scores  float32 [N]: what the selection ranked by; zeros where nothing was selected
    count   its tokens, N
    spec    of the manifest, and ``grid``, how it became tiles or frames: where each token lies, and in which frame
    """

    kept: np.ndarray
    is_top: np.ndarray
    scores: np.ndarray
    count: int
    spec: VisualSpec
    grid: Grid


@dataclass(frozen=True, eq=False)
class Kept:
    """What is kept of one image, and its tensors [K,width] by name: inputs_embeds and streams."""

    selection: Selection
    tensors: Mapping[str, Array]


@dataclass(frozen=True, eq=False)
class Encoded:
    """One prompt for the decoder, and what was selected of each of its images."""

    row: Row
    kept: tuple[Kept, ...]

    @property
    def selections(self) -> tuple[Selection, ...]:
        return tuple(one.selection for one in self.kept)

    @property
    def image_tokens(self) -> int:
        return sum(len(selection.kept) for selection in self.selections)


class Encoder:
    """Everything before prefill. Safe to use from several threads, as far as the session is."""

    def __init__(self, bundle: Bundle, session: Session) -> None:
        self._manifest = bundle.manifest
        self._session = session
        model = bundle.manifest.model
        self.text = TextProcessor.from_files(bundle.read_processor, bundle.path / PROCESSOR, model.vocab_size)
        self.embedding = EmbeddingTable(
            bundle.file(EMBEDDINGS), model.vocab_size, model.hidden_size, model.dtypes.activations
        )
        self._features = FeatureCache(CACHED_IMAGES)

    def encode(self, requests: Sequence[Request], budget: int | None, timings: Timings) -> list[Encoded]:
        """Rows for the decoder; ``budget`` None keeps every token.

        Raises:
            FlashVLMError: messages or images that cannot be used, or scores that are not finite.
        """
        prompts = self.read(requests, timings)
        return self.keep(prompts, budget, timings)

    def keep(self, prompts: Sequence[Prompt], budget: int | None, timings: Timings) -> list[Encoded]:
        """``see``, ``select`` and ``place``, after the graphs they need are loaded."""
        for prompt in prompts:
            self._check_room(prompt, budget)
        self._session.prepare(list(self._graphs(prompts, budget)))
        features = self.see(prompts, timings)
        started = time.perf_counter()
        kept = self.select(prompts, features, budget)
        timings.select += _milliseconds(started)
        return [self.place(*each) for each in zip(prompts, kept, strict=True)]

    def _check_room(self, prompt: Prompt, budget: int | None) -> None:
        """Before vision and selection work for nothing."""
        text = ~np.isin(prompt.input_ids, [*self._manifest.placeholders.values()])
        kept = sum(sight.kept(budget) for sight in prompt.sights)
        check_length(int(text.sum()) + kept, self._session.limits, len(prompt.sights), kept)

    def forget_images(self) -> None:
        """Drops the features of images seen before, as for a measurement of vision."""
        self._features.clear()

    def close(self) -> None:
        self.forget_images()
        self.embedding.close()

    # --- read ---

    def read(self, requests: Sequence[Request], timings: Timings) -> list[Prompt]:
        """Chooses for each image the size whose shape is nearest to its own, and tokenizes the prompts."""
        started = time.perf_counter()
        seen: dict[tuple[int, bool], Sight] = {}  # an image that several prompts share is looked at once
        sights = []
        for request in requests:
            several = sum(isinstance(visual, PIL.Image.Image) for visual in request.visuals) > 1
            for visual in request.visuals:
                if (id(visual), several) not in seen:
                    seen[id(visual), several] = self._sight(visual, several)
            sights.append(tuple(seen[id(visual), several] for visual in request.visuals))
        timings.preprocess += _milliseconds(started)
        return [self._read(*each) for each in zip(requests, sights, strict=True)]

    def _sight(self, visual: Visible, several: bool) -> Sight:
        clip: Clip | None = None
        if isinstance(visual, Video):
            size = visual.size
            spec = nearest(self._manifest, "video", size)
            assert isinstance(spec.pixels, Frames)
            clip, pictures, digest = visual.shown(spec.pixels)
        else:
            size = visual.height, visual.width
            spec = nearest(self._manifest, "image", size)
            pictures, digest = (visual,), image_digest(visual)
        grid = grid_of(size, spec.pixels, clip, several)
        how = f"{spec.graph} square" if grid.square else spec.graph
        return Sight(pictures, (digest, how), spec, grid, arrange(spec, grid))

    def _read(self, request: Request, sights: tuple[Sight, ...]) -> Prompt:
        texts = [expand(sight.spec, sight.grid) for sight in sights]
        encoded = self.text.encode(request.messages, self._manifest.placeholders, texts, self._manifest.markers)
        check_length(len(encoded.input_ids), self._session.limits)  # before vision and selection work for nothing
        asked = self._manifest.selection.query == "question"
        mask = encoded.question_mask if asked else encoded.text_mask
        return Prompt(encoded.input_ids, encoded.input_ids[mask], sights, encoded.order)

    # --- see ---

    def see(self, prompts: Sequence[Prompt], timings: Timings) -> dict[tuple[str, str], ImageFeatures]:
        """Features of every image, by key."""
        found: dict[tuple[str, str], ImageFeatures] = {}
        missing: dict[str, dict[tuple[str, str], Sight]] = {}  # by vision graph
        for sight in (sight for prompt in prompts for sight in prompt.sights):
            cached = self._features.get(sight.key)
            if cached is not None:
                found[sight.key] = cached
            elif sight.key not in found:
                missing.setdefault(sight.spec.graph, {})[sight.key] = sight
        for graph, sights in missing.items():
            most = 1 if next(iter(sights.values())).spec.tiled else self._session.limits.max_batch
            for some in _in_batches([*sights.values()], most):
                for sight, features in zip(some, self._look(graph, some, timings), strict=True):
                    found[sight.key] = features
                    self._features.put(sight.key, features)
        return found

    def _look(self, graph: str, sights: Sequence[Sight], timings: Timings) -> list[ImageFeatures]:
        started = time.perf_counter()
        pixels = np.concatenate([_units(sight) for sight in sights])  # [B or U,C,H,W]
        timings.preprocess += _milliseconds(started)
        started = time.perf_counter()
        order = sights[0].arrangement.order if sights[0].spec.tiled else None
        features = self._session.vision(graph, pixels, order)
        timings.vision += _milliseconds(started)
        return features

    # --- select ---

    def select(
        self, prompts: Sequence[Prompt], features: dict[tuple[str, str], ImageFeatures], budget: int | None
    ) -> list[list[Kept]]:
        """What is kept of each image of each prompt. An image of no more tokens than the budget keeps all."""
        kept: dict[tuple[int, int], Kept] = {}  # by which image of which prompt
        chosen: dict[str, list[tuple[int, int]]] = {}  # by selection graph
        for p, prompt in enumerate(prompts):
            for i, sight in enumerate(prompt.sights):
                if budget is not None and sight.selects(budget):
                    chosen.setdefault(select_graph(sight.spec.graph, budget), []).append((p, i))
                else:
                    kept[p, i] = _all(sight, features[sight.key])
        for graph, places in chosen.items():
            by_unit = prompts[places[0][0]].sights[places[0][1]].spec.scope == "unit"
            for some in _in_batches(places, 1 if by_unit else self._session.limits.max_batch):
                sights = [prompts[p].sights[i] for p, i in some]
                queries = [prompts[p].query for p, _ in some]
                selected = self._select(graph, [features[sight.key] for sight in sights], sights, queries)
                kept.update(zip(some, selected, strict=True))
        return [[kept[p, i] for i in range(len(prompt.sights))] for p, prompt in enumerate(prompts)]

    def _select(
        self, graph: str, images: list[ImageFeatures], sights: list[Sight], queries: list[np.ndarray]
    ) -> list[Kept]:
        longest = max(map(len, queries))
        embeds = np.zeros((len(queries), longest, self.embedding.shape[1]), dtype=self.embedding.dtype)  # [B,L,D]
        mask = np.zeros((len(queries), longest), dtype=np.bool_)  # [B,L]
        for b, ids in enumerate(queries):
            embeds[b, : len(ids)] = self.embedding[ids]
            mask[b, : len(ids)] = True
        rows = [select_rows(sight.spec, sight.grid, sight.arrangement.valid) for sight in sights]
        asked = np.repeat(np.arange(len(rows)), [*map(len, rows)])  # each unit is asked its item's question
        selected = self._session.select(graph, images, np.concatenate(rows), embeds[asked], mask[asked])
        if not all(np.isfinite(one.scores).all() for one in selected):
            raise FlashVLMError(
                "the selection scores are not finite: the image features overflowed; export with --dtype float32"
            )
        return [_some(sight, one) for sight, one in zip(sights, selected, strict=True)]

    # --- place ---

    def place(self, prompt: Prompt, kept: Sequence[Kept]) -> Encoded:
        """The prompt with each item's tokens where they belong."""
        manifest = self._manifest
        shown = [kept[i] for i in prompt.order]
        items = [Item(one.spec, one.grid, one.count, one.kept) for one in (each.selection for each in shown)]
        keep_positions = manifest.selection.positions == "keep"
        placed = layout(prompt.input_ids, items, manifest.model.position_axes, keep_positions)
        text = {"inputs_embeds": self.embedding[prompt.input_ids]}  # [T,D]
        segments = tuple(
            Segment(text, run.start, run.stop)
            if isinstance(run, Text)
            else Segment(shown[run.item].tensors, run.start, run.stop)
            for run in placed.runs
        )
        keys = [
            prompt.input_ids[run.start : run.stop]
            if isinstance(run, Text)
            else -1 - (run.item << 32) - items[run.item].kept[run.start : run.stop]
            for run in placed.runs
        ]
        row = Row(segments, placed.position_ids, placed.next_position, np.concatenate(keys))
        return Encoded(row, tuple(kept))

    def _graphs(self, prompts: Sequence[Prompt], budget: int | None) -> Iterator[str]:
        for sight in (sight for prompt in prompts for sight in prompt.sights):
            yield sight.spec.graph
            if budget is not None and sight.selects(budget):
                yield select_graph(sight.spec.graph, budget)
        yield DECODER


def nearest(manifest: Manifest, modality: Literal["image", "video"], size: tuple[int, int]) -> VisualSpec:
    """Of the sizes a bundle has, the one whose shape is nearest to that of an image or video of ``size`` (height,
    width). Raises PromptError if it has none."""
    specs = manifest.of(modality)
    if not specs:
        other = "images alone" if modality == "video" else "videos alone"
        remedy = "export with --frames 8" if modality == "video" else "send the image as a video of one frame"
        raise PromptError(f"expected {other}, which are all this bundle takes, found {modality}s; {remedy}")

    def distance(spec: VisualSpec) -> float:
        _, height, width = spec.pixels.unit_shape
        return abs(math.log(size[0] / size[1]) - math.log(height / width))

    return min(specs, key=distance)


def _units(sight: Sight) -> np.ndarray:
    if isinstance(sight.spec.pixels, Frames):
        return stack(sight.pictures, sight.spec.pixels)
    return tile(sight.pictures[0], sight.spec.pixels, sight.grid.square)[0]


def _all(sight: Sight, features: ImageFeatures) -> Kept:
    count = sight.arrangement.count
    every = Selection(
        np.arange(count), np.ones(count, bool), np.zeros(count, np.float32), count, sight.spec, sight.grid
    )
    return Kept(every, features.tensors)


def _some(sight: Sight, selected: Selected) -> Kept:
    count = sight.arrangement.count
    # What stands behind the units of scope unit has no score of its own: the least, as other newlines.
    scores = np.full(count, selected.scores.min())
    scores[: len(selected.scores)] = selected.scores[:count]
    some = Selection(selected.kept, selected.is_top, scores, count, sight.spec, sight.grid)
    return Kept(some, selected.tensors)


def _in_batches(items: Sequence[T], most: int | None) -> Iterator[Sequence[T]]:
    most = most or max(1, len(items))
    for start in range(0, len(items), most):
        yield items[start : start + most]


def _milliseconds(started: float) -> float:
    return (time.perf_counter() - started) * 1e3


def question(text: object, visuals: Iterable[ImageSource | Video]) -> Message:
    """A user's message: the images and videos, then the text."""
    if not isinstance(text, str):
        raise PromptError(f"prompt: expected a question as a str, found {brief(text)}")
    if not text.strip():
        raise PromptError("the prompt is empty; expected a question")
    parts: list[object] = []
    for visual in visuals:
        kind = "video" if isinstance(visual, Video) else "image"
        parts.append({"type": kind, kind: visual})
    (message,) = normalise([{"role": "user", "content": [*parts, {"type": "text", "text": text}]}])
    return message


def request(messages: Sequence[Message], loaded: dict[int, Visible] | None = None) -> Request:
    """Messages as the chat template sees them, and their images and videos, loaded. One that occurs again is loaded
    once.

    ``loaded``: what was loaded for other messages, by the ``id`` of the source; it learns what is loaded here.
    """
    loaded = {} if loaded is None else loaded
    parts = [part for message in messages for part in message.visuals]
    for part in parts:
        if id(part.source) not in loaded:
            loaded[id(part.source)] = (
                load_video(part.source, part.fps) if isinstance(part, VideoPart) else load_image(part.source)
            )
    return Request([message.plain() for message in messages], tuple(loaded[id(part.source)] for part in parts))
