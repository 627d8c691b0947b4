"""A budget for each tile (scope unit): the same selection with tiles as its batch, index for index as torch."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toy_family
import toy_video
from test_parity import TOLERANCE, Recorded
from test_toy_family import QUESTION, SQUARE, STEPS, UNIT, WIDE, Reference

from clips import scene
from flashvlm import Pipeline
from flashvlm.bundle import Bundle
from flashvlm.encoder import question, request
from flashvlm.errors import FlashVLMError
from flashvlm.generation import Timings
from flashvlm.manifest import Manifest
from flashvlm.profiling.measure import ProfileOptions
from flashvlm.profiling.synthetic import synthetic_prompt, synthetic_sight
from flashvlm.profiling.trtexec import jobs
from flashvlm.videos import load_video
from flashvlm_export.exporter import ExportOptions, export
from flashvlm_export.families import registered
from flashvlm_export.families.contract import VisualOptions
from flashvlm_export.selection import select

BUDGETS = (20,)
UNITS = toy_family.MAX_TILES + 1
SHARE = {20: 6}  # of each of 3 tiles at most; 2 of the budget are left
BY_TILE = VisualOptions(scope=frozenset({"tile"}))
ALIKE = pytest.mark.parametrize("budget", ["all", *BUDGETS])


class ByTile(Reference):
    """Selects of each tile by itself."""

    def choose(self, found: list[torch.Tensor], query: torch.Tensor, valid: torch.Tensor, budget: int) -> torch.Tensor:
        kept = []
        for start in range(0, int(valid.sum()), UNIT):
            one = [tensor[:, start : start + UNIT] for tensor in found[:3]]
            kept.append(start + select(*one, query, budget=SHARE[budget]).kept[0])
        return torch.cat(kept)


@pytest.fixture(scope="session")
def checkpoint(once: Any) -> Path:
    return once("toy", toy_family.write_checkpoint)


@pytest.fixture(scope="session")
def scoped_bundle(once: Any, checkpoint: Path) -> Callable[[Any], Path]:
    """scoped_bundle(dialect)."""

    def make(dialect: Any) -> Path:
        def write(out: Path) -> None:
            with registered(toy_family):
                export(ExportOptions(str(checkpoint), out, budgets=BUDGETS, dialect=dialect, visual=BY_TILE))

        return once(f"toy-scope-{dialect}", write)

    return make


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> ByTile:
    return ByTile(tmp_path_factory.mktemp("reference") / "toy")


@pytest.fixture(scope="module", params=["modern", "legacy"])
def recorded(request: pytest.FixtureRequest, scoped_bundle: Callable[[Any], Path]) -> Recorded:
    return Recorded(scoped_bundle(request.param))


@pytest.mark.parity
@pytest.mark.parametrize("images", [(SQUARE,), (WIDE,), (SQUARE, WIDE)], ids=["square", "wide", "both"])
@ALIKE
def test_equal_to_torch(recorded: Recorded, reference: ByTile, budget: Any, images: tuple[np.ndarray, ...]) -> None:
    parts = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": QUESTION}]
    answer = recorded.chat([{"role": "user", "content": parts}], budget=budget, max_new_tokens=1 + STEPS)
    said, logits, kept = reference.greedy(recorded, images, None if budget == "all" else budget)
    assert [selection.kept.tolist() for selection in answer.selections] == [each.tolist() for each in kept]
    assert list(answer.token_ids) == said
    assert np.abs(np.concatenate(recorded.logits) - logits).max() <= TOLERANCE


def test_every_tile_keeps_its_share(recorded: Recorded) -> None:
    """Of images and questions at once; a square, one tile with fewer tokens than the budget of 20, keeps 6 as well."""
    for budget, share in SHARE.items():
        answers = recorded.run([SQUARE, None, WIDE], ["hi", "hi", QUESTION], budget=budget, max_new_tokens=2)
        for answer, tiles in zip(answers, (1, 0, 3), strict=True):
            assert answer.image_tokens == tiles * share
            for selection in answer.selections:
                assert (np.diff(selection.kept) > 0).all()
                assert np.bincount(selection.kept // UNIT).tolist() == [share] * tiles
                assert len(selection.scores) == selection.count == tiles * UNIT
        alone = recorded.run(WIDE, QUESTION, budget=budget, max_new_tokens=2)
        assert alone.kept.tolist() == answers[2].kept.tolist()


def test_the_manifest_says_it(scoped_bundle: Callable[[Any], Path]) -> None:
    manifest = Bundle(scoped_bundle("legacy")).manifest
    assert manifest.visual[0].scope == "unit"
    graph = manifest.graphs["select-k20"]
    assert {tensor.shape[0] for tensor in (*graph.inputs, *graph.outputs)} == {"units"}
    assert {tensor.name: tensor.shape[1] for tensor in graph.outputs} == {
        "visual_embeds": 6, "kept": 6, "is_top": 6, "scores": UNIT, "visual_deepstack": 6
    }  # fmt: skip
    assert (manifest.max_units("vision"), manifest.max_units("select-k20"), manifest.max_units("decoder")) == (3, 3, 1)


def test_a_profile_counts_on_it(scoped_bundle: Callable[[Any], Path]) -> None:
    bundle = Bundle(scoped_bundle("legacy"))
    assert synthetic_sight(bundle.manifest, (61, 30)).tokens(20) == 18  # of 48
    options = ProfileOptions(BUDGETS, prompt_tokens=80, new_tokens=2, photo=(61, 30))
    found = jobs(bundle, options, synthetic_prompt(bundle, options.prompt_tokens, (61, 30))[1], None)
    (job,) = (job for job in found if job.stage == "select")
    assert job.sizes["units"] == 3
    assert {name: array.shape[0] for name, array in job.values.items()} == {"valid": 3, "query_mask": 3}


@pytest.mark.engines
def test_the_stand_in_of_tensorrt_answers_alike(
    scoped_bundle: Callable[[Any], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With engines of batch 1: the tiles of an image are no batch of prompts."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "runtime")
    from tensorrt_standin import build, install

    folder = shutil.copytree(scoped_bundle("legacy"), tmp_path / "toy")
    plain = Pipeline.from_bundle(folder, backend="onnxruntime")
    build(folder, "tensorrt", max_seq=256, max_batch=1)
    install(monkeypatch, "tensorrt")
    pipeline = Pipeline.from_bundle(folder, backend="tensorrt")
    for budget in ("all", *BUDGETS):
        for images in (SQUARE, WIDE, [WIDE, SQUARE]):
            found, wanted = (p.generate(images, QUESTION, budget=budget, max_new_tokens=4) for p in (pipeline, plain))
            assert found.token_ids == wanted.token_ids
            for a, b in zip(found.selections, wanted.selections, strict=True):
                assert a.kept.tolist() == b.kept.tolist()
                assert a.is_top.tolist() == b.is_top.tolist()
                np.testing.assert_allclose(a.scores, b.scores, atol=1e-5)


@pytest.mark.engines
def test_tensorrt_rtx_builds_it(scoped_bundle: Callable[[Any], Path], tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    from flashvlm_export.compile.engines import CompileOptions, compile_bundle

    folder = shutil.copytree(scoped_bundle("legacy"), tmp_path / "toy")
    report = compile_bundle(CompileOptions(folder, "tensorrt-rtx", ("8.9",), max_seq=256, max_query=64))
    assert {*report.manifest.engines} == {*Bundle(folder).manifest.graphs}


def test_a_budget_that_leaves_a_tile_without_tokens(
    checkpoint: Path, scoped_bundle: Callable[[Any], Path], tmp_path: Path
) -> None:
    words = "a budget that up to 3 tiles or frames share is at least 3, found 2"
    with (
        registered(toy_family),
        pytest.raises(FlashVLMError, match=f"--budget: {words}; ask for more, or use --budget-scope image"),
    ):
        export(ExportOptions(str(checkpoint), tmp_path / "out", budgets=(20, 2), visual=BY_TILE))
    content = Bundle(scoped_bundle("legacy")).manifest.model_dump()
    content["selection"]["budgets"] = (*BUDGETS, 2)
    with pytest.raises(ValueError, match=words):
        Manifest.model_validate(content)


@pytest.mark.parametrize(
    ("model", "scope", "expected"),
    [
        ("toy", {"frame"}, "--budget-scope frame: expected frames in turn, found none; leave it out"),
        ("llava", {"tile"}, "--budget-scope tile: expected tiles in turn, found none; leave it out"),
    ],
)
def test_a_scope_that_nothing_has_is_refused(
    model: str, scope: set[Any], expected: str, tiny_checkpoint: Path, once: Any, tmp_path: Path
) -> None:
    folder = tiny_checkpoint if model == "llava" else once("toy", toy_family.write_checkpoint)
    with registered(toy_family), pytest.raises(FlashVLMError, match=expected):
        export(ExportOptions(str(folder), tmp_path / "out", (4,), visual=VisualOptions(scope=frozenset(scope))))


@pytest.mark.slow
@pytest.mark.parametrize("size", [(32, 40), (16, 64), (64, 16)], ids=["square", "wide", "tall"])
def test_every_frame_keeps_its_share(size: tuple[int, int], once: Any) -> None:
    """Frames alone, in pairs, and before a newline; index for index as torch selects of each."""
    checkpoint = once("toy-video", toy_video.write_checkpoint)
    visual = VisualOptions(scope=frozenset({"frame"}))

    def write(out: Path) -> None:
        with toy_video.with_video():
            export(ExportOptions(str(checkpoint), out, budgets=(13,), visual=visual))

    with Pipeline.from_bundle(once("toy-frame-scope", write)) as pipeline:
        encoder, timings = pipeline.encoder, Timings()
        prompts = encoder.read([request([question(QUESTION, [load_video(scene(10, size), fps=5)])])], timings)
        (sight,) = prompts[0].sights
        features = encoder.see(prompts, timings)[sight.key]
        ((found,),) = encoder.select(prompts, {sight.key: features}, 13)
        query = torch.from_numpy(encoder.embedding[prompts[0].query])[None]
        n, units = sight.spec.tokens_per_unit, sight.grid.units
        share = 13 // sight.spec.pixels.max_units
        assert units > 1
        kept, scores = [], []
        for start in range(0, units * n, n):
            unit = (features.image_tokens, features.features, features.saliency)
            one = select(*(torch.from_numpy(t[None, start : start + n]) for t in unit), query, budget=share)
            kept += (start + one.kept[0]).tolist()
            scores += one.scores[0].tolist()
        selection = found.selection
        assert selection.kept.tolist() == kept
        newlines = selection.count - units * n
        assert newlines == (sight.spec.newline == "end")
        np.testing.assert_allclose(selection.scores, scores + [min(scores)] * newlines, atol=1e-4)
        for name, width in (("inputs_embeds", 64), ("deepstack", 128)):
            assert found.tensors[name].shape == (units * share, width)
        np.testing.assert_array_equal(found.tensors["inputs_embeds"], features.image_tokens[kept])
