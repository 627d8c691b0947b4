"""scripts/benchmark quality: variants answer as their own pipelines do, and the numbers are what they say."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxruntime")

import typer  # noqa: E402
from click.testing import Result  # noqa: E402
from PIL import Image  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from flashvlm import Pipeline  # noqa: E402
from flashvlm.evaluation import Bootstrap, Prediction  # noqa: E402
from flashvlm.sessions.onnxruntime import OnnxRuntimeSession  # noqa: E402
from flashvlm_export.selection import METHODS as REGISTRY  # noqa: E402
from flashvlm_export.selection import select  # noqa: E402
from quality import command, plot, report  # noqa: E402
from quality.bundles import Shelf  # noqa: E402
from quality.command import quality  # noqa: E402
from quality.measures import Measure, Scored, measure, score, subsets  # noqa: E402
from quality.resolution import POOLED, interpolated  # noqa: E402
from quality.runs import Run, Sitting  # noqa: E402
from quality.task import Asked, asked_patches, exam_task  # noqa: E402
from quality.variants import EVERYTHING, GRIDS, METHODS, REFERENCE, Variant, ablation, parse  # noqa: E402
from scenes.draw import draw, owners  # noqa: E402
from scenes.exam import exam  # noqa: E402

ITEMS = exam(28)
TASK = exam_task(ITEMS, "test")
KEEP = Variant("kept places", "flashvlm", query="prompt", positions="keep")


@pytest.fixture(scope="module", autouse=True)
def _methods_as_they_were() -> Iterator[None]:
    """The benchmark adds a baseline to the registry of this process."""
    before = dict(REGISTRY)
    REGISTRY[POOLED.name] = POOLED
    yield
    REGISTRY.clear()
    REGISTRY.update(before)


@pytest.fixture(scope="module")
def work(tiny_checkpoint: Path, tiny_bundle: Path, once) -> Path:
    """A work folder, so that each variant is exported once, with two that the shared bundle is: KEEP, and the base, of
    which only vision and decoder are used."""

    def make(out: Path) -> None:
        shelf = Shelf(str(tiny_checkpoint), out)
        for path in (shelf.path(EVERYTHING, ()), shelf.path(KEEP, (4, 7))):
            shutil.copytree(tiny_bundle, path)

    return once("quality", make)


def variant(name: str) -> Variant:
    return next(variant for variant in METHODS if variant.name == name)


def make_run(variant: Variant, budget: int, seed: int, share: float = 0.5) -> Run:
    rng = np.random.default_rng(seed)
    predictions = [Prediction(item.id, "", float(rng.random() < share)) for item in TASK.items]
    kept = [float(rng.random()) if item.question.about else None for item in ITEMS]
    return Run(variant, budget, variant.tokens(budget), predictions, kept)


# --- numbers -------------------------------------------------------------------------------------------------------


def test_the_task_is_the_exam() -> None:
    for asked, item in zip(ITEMS, TASK.items, strict=True):
        assert (item.question, item.answers, item.kind) == (
            asked.question.text, (asked.question.answer,), asked.question.kind
        )  # fmt: skip
        assert np.array_equal(TASK.load(item.images[0]), draw(asked.scene))
    assert TASK.groups == [str(n // 7) for n in range(28)]
    assert TASK.version == exam_task(ITEMS, "check").version


def test_measures_by_kind() -> None:
    groups = subsets(TASK, ITEMS)
    assert {"all", "seen", "held out", "attribute", "ground"} <= set(groups)
    predictions = [Prediction(item.id, "", float(item.kind == "ground")) for item in TASK.items]
    run = Run(EVERYTHING, 1, 1, predictions, [None] * 28)
    ground = sum(item.kind == "ground" for item in TASK.items)
    assert measure(run, groups["ground"]) == Measure(ground, 1.0, None)
    assert measure(run, groups["all"]).accuracy == ground / 28
    assert sum(groups[kind].sum() for kind in groups if kind not in ("all", "seen", "held out")) == 28
    assert sum(groups[name].sum() for name in ("seen", "held out")) == sum(bool(i.question.about) for i in ITEMS)

    a, b = make_run(variant("uniform"), 4, 1), make_run(variant(REFERENCE), 4, 2)
    first, second = score([a, b, make_run(variant("uniform"), 7, 3)], TASK, ITEMS, b, REFERENCE, {("uniform", 4): 2.5})[
        :2
    ]
    right = [[p.score for p in run.predictions] for run in (a, b)]
    for name, chosen in groups.items():
        assert first.against[name] == Bootstrap(TASK.groups, chosen).difference(*right)
        assert first.by[name].accuracy == np.array(right[0])[chosen].mean()
    assert first.relative["all"] == sum(right[0]) / sum(right[1])
    assert first.by["all"].kept == pytest.approx(np.mean([share for share in a.kept if share is not None]))
    assert (first.select_ms, second.select_ms, second.against) == (2.5, None, {})


def test_asked_patches_by_counting_pixels() -> None:
    item = next(item for item in ITEMS if len(item.question.about) > 1)
    owned = owners(item.scene)
    for side in (24, 4):
        size = 336 // side
        expected = np.zeros((side, side), dtype=bool)
        for row in range(side):
            for column in range(side):
                patch = owned[row * size : (row + 1) * size, column * size : (column + 1) * size]
                expected[row, column] = any((patch == i + 1).mean() >= 0.2 for i in item.question.about)
        found = asked_patches(item.scene, item.question.about, side).reshape(side, side)
        assert (found == expected).all()
    patches = asked_patches(item.scene, item.question.about, 24)
    assert patches.sum() >= len(item.question.about)
    first = int(np.flatnonzero(patches)[0])
    (share,) = Asked([item], 24).kept_shares([Prediction("", "", 1.0, ((first,),))])
    assert share == 1 / patches.sum()


# --- runs ----------------------------------------------------------------------------------------------------------


def test_answers_are_those_of_the_variants_pipelines(
    tiny_checkpoint: Path, tiny_bundle: Path, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sitting = Sitting(str(tiny_checkpoint), work, 7, "test")
    seen = []
    vision = OnnxRuntimeSession.vision
    monkeypatch.setattr(OnnxRuntimeSession, "vision", lambda *args: seen.append(args) or vision(*args))
    everything, runs = sitting.everything(), sitting.runs(KEEP, [4, 7])
    assert len(seen) == 1  # one scene
    monkeypatch.undo()
    assert [(run.budget, run.tokens) for run in (everything, *runs)] == [(16, 16), (4, 4), (7, 7)]
    pipeline = Pipeline.from_bundle(tiny_bundle)
    for run, budget in ((everything, "all"), *((run, run.budget) for run in runs)):
        for item, found, kept in zip(sitting.items, run.predictions, run.kept, strict=True):
            image = Image.fromarray(draw(item.scene))
            answer = pipeline.generate(image, item.question.text, budget=budget, max_new_tokens=8)
            assert found.text == answer.text
            assert found.right == (answer.text == item.question.answer)
            asked = asked_patches(item.scene, item.question.about, 4)
            assert kept == (asked[answer.kept].sum() / asked.sum() if asked.any() else None)
    again = Sitting(str(tiny_checkpoint), work, 7, "test")
    monkeypatch.setattr(OnnxRuntimeSession, "decode", None)  # what is on disk is not asked again
    assert again.runs(KEEP, [4, 7]) == runs


def test_variants_share_the_weights_of_their_model(tiny_checkpoint: Path, work: Path) -> None:
    sitting = Sitting(str(tiny_checkpoint), work, 7, "test")
    wanted = Variant("few", "uniform", query="prompt", positions="keep")
    base, bundle = sitting.shelf.base, sitting.shelf.bundle(wanted, [4])
    selection = bundle.manifest.selection
    assert (selection.method, selection.budgets) == ("uniform", (4,))
    assert (selection.query, selection.positions) == ("prompt", "keep")
    for name in ("decoder.data", "vision.data", "embed_tokens.safetensors"):
        assert (base.path / name).samefile(bundle.path / name)
    Pipeline.from_bundle(bundle.path)  # every file is what its manifest says


@pytest.mark.slow
def test_resolutions_without_selection(tiny_checkpoint: Path, work: Path) -> None:
    sitting = Sitting(str(tiny_checkpoint), work, 7, "test")
    for name in ("pooled", "downsampled"):
        (run,) = sitting.runs(variant(name), [5])
        assert (run.budget, run.tokens, len(run.predictions)) == (5, 4, 7)
        assert run.kept == [None] * 7
    manifest = sitting.shelf.bundle(variant("downsampled"), [4]).manifest
    assert (manifest.candidates, manifest.visual[0].pixels.crop) == (4, (28, 28))


def invoke(*arguments: object) -> Result:
    app = typer.Typer()
    app.command()(quality)
    return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.mark.slow
def test_command_line(tiny_checkpoint: Path, work: Path, tmp_path: Path) -> None:
    common = ("--model", tiny_checkpoint, "--work", work, "--questions", 14, "--rounds", 2, "--budgets", 4)
    done = invoke(*common, "--variants", "uniform,flashvlm")
    assert done.exit_code == 0, done.output
    written = json.loads((work / "test.json").read_text())
    runs = {run["variant"]: run for run in written["runs"]}
    assert list(runs) == ["none", "uniform", "flashvlm"]
    assert runs["none"]["tokens"] == 16
    assert runs["uniform"]["select_ms"] > 0
    assert set(runs["uniform"]["against"]) == {"flashvlm"}
    assert "14 questions about 2 held-out scenes" in done.output

    for bad in (["--variants", "nothing"], ["--budgets", "0"], ["--split", "train"], ["--write", tmp_path / "nowhere"]):
        refused = invoke(*common, *bad)
        assert refused.exit_code == 2
        assert "Traceback" not in refused.output


def without_blocks(text: str) -> str:
    return re.sub(r"<!-- (\w+) -->.*?<!-- /\1 -->", r"<!-- \1 -->\n<!-- /\1 -->", text, flags=re.DOTALL)


def test_the_tables_of_the_documentation_are_written_by_this() -> None:
    assert without_blocks((Path(__file__).parents[2] / "docs" / report.DOCUMENT).read_text()) == report.empty()


@pytest.mark.slow
def test_everything_is_exported_and_written(tiny_checkpoint: Path, work: Path, tmp_path: Path) -> None:
    common = ("--model", tiny_checkpoint, "--work", work, "--questions", 7, "--rounds", 1, "--budgets", 4)
    done = invoke(*common, "--variants", "all", "--write", tmp_path)
    assert done.exit_code == 0, done.output
    methods, others = (
        {run["variant"]: run for run in json.loads((work / f"{split}.json").read_text())["runs"]}
        for split in ("test", "check")
    )
    assert set(methods) == {"none", *(variant.name for variant in METHODS)}
    offered = {variant.name for variant in parse("all")} - set(methods)
    assert set(others) == {"none", REFERENCE, *offered}
    assert methods["downsampled"]["by"]["all"]["kept"] is None
    after = (tmp_path / report.DOCUMENT).read_text()
    for row in ("`downsampled`", "eta 0.25"):
        assert f"| {row} |" in after
    assert without_blocks(after) == report.empty()
    assert (tmp_path / "quality.png").stat().st_size > 0


# --- variants ------------------------------------------------------------------------------------------------------


def test_positions_are_interpolated_around_cls() -> None:
    table = torch.cat([torch.full((1, 3), 9.0), torch.arange(24.0).repeat(24)[:, None] * torch.tensor([1.0, 2.0, 3.0])])
    assert torch.allclose(interpolated(table, 24), table, atol=1e-5)
    small = interpolated(table, 6)
    assert small.shape == (37, 3)
    assert torch.equal(small[0], table[0])
    # Centres of 6 cells over 24 columns: 1.5, 5.5, ... 21.5.
    assert torch.allclose(small[1:7, 0], torch.arange(6) * 4 + 1.5, atol=0.2)


def test_pooled_tokens_are_adaptive_averages() -> None:
    grid = torch.randn(2, 8, 7, 7, generator=torch.Generator().manual_seed(0))
    tokens = grid.flatten(2).transpose(1, 2)  # [B, 49, 8]
    for side in (1, 3, 5):  # cells of unequal sizes, which overlap
        wanted = torch.nn.functional.adaptive_avg_pool2d(grid, side).flatten(2).transpose(1, 2)
        found = select(tokens, tokens, tokens[:, :, 0], tokens, method="pooled", budget=side * side)
        assert torch.allclose(found.visual_embeds, wanted, atol=1e-6)


def test_variants() -> None:
    assert [v.name for v in parse("eta=0.25,flashvlm,eta=0.25")] == ["eta=0.25", "flashvlm"]
    (named,) = parse("flashvlm-contrast:eta=0.75:query=prompt")
    assert (named.method, named.params, named.query) == ("flashvlm-contrast", {"eta": 0.75}, "prompt")
    for parameter, values in GRIDS.items():
        assert METHODS[0] in [ablation(parameter, value) for value in values], parameter
    assert set(command._plans(parse("ablations"), None, None)) == {"check"}
    assert set(command._plans(parse("all"), None, None)) == {"test", "check"}
    downsampled = next(variant for variant in METHODS if variant.name == "downsampled")
    assert [downsampled.tokens(b) for b in (192, 128, 64, 32, 16, 8)] == [196, 121, 64, 36, 16, 9]
    for bad, words in {
        "nothing": "unknown variant 'nothing'; expected methods, ablations, all, or one of flashvlm, ",
        "trim:speed=1": "unknown parameter 'speed' in 'trim:speed=1'; expected one of eta, ",
        "flashvlm:eta": "eta in 'flashvlm:eta': expected a value such as eta=0.5, found 'eta'",
    }.items():
        with pytest.raises(ValueError, match=re.escape(words)):
            parse(bad)


# --- report --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scored() -> tuple[report.Scores, list[Scored]]:
    """Made-up answers of every method and ablation at every budget."""
    everything = make_run(EVERYTHING, 576, 0, share=0.9)
    budgets = (192, 128, 64, 32, 16, 8)
    runs = [make_run(v, b, i * 10 + j, 0.3 + 0.05 * i) for i, v in enumerate(METHODS) for j, b in enumerate(budgets)]
    others = [v for v in parse("ablations") if v not in METHODS]
    runs += [make_run(v, b, 999 + i) for i, v in enumerate(others) for b in (64, 32, 16)]
    whole, *found = score([everything, *runs], TASK, ITEMS, everything, REFERENCE, {("flashvlm", 64): 1.234})
    return report.Scores(whole, found), found


def test_tables(scored: tuple[report.Scores, list[Scored]]) -> None:
    scores, found = scored
    conditions = report.Conditions("scripts/benchmark quality", "demo", 28, 4, "test", "a machine")
    text = report.methods_block(scores, conditions)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    assert rows[0] == ["method", "192", "128", "64", "32", "16", "8"]
    ours = next(s for s in found if (s.run.variant.name, s.run.budget) == ("flashvlm", 64))
    (accuracy, *_), _, _ = ([row for row in rows if row[0] == "`flashvlm`"][i : i + 1] for i in range(3))
    assert accuracy[3] == f"{100 * ours.by['all'].accuracy:.1f} ({ours.relative['all']:.2f})"
    assert "1.23" in text
    assert "(196 tokens)" in text
    rival = next(s for s in found if (s.run.variant.name, s.run.budget) == ("uniform", 16))
    difference = rival.against["all"]
    assert report.interval(difference) in text
    assert report.interval(difference).startswith("**") == difference.is_clear

    ablations = report.ablations_block(scores, conditions)
    assert ablations.count("(default)") == len(GRIDS)
    assert "| eta 0.25 |" in ablations


def test_blocks_replace_only_what_is_between_their_markers(tmp_path: Path) -> None:
    document = tmp_path / "quality.md"
    document.write_text("before\n<!-- methods -->\nold\n<!-- /methods -->\nafter\n")
    for _ in range(2):
        report.write_blocks(document, {"methods": "new"})
        assert document.read_text() == "before\n<!-- methods -->\n\nnew\n\n<!-- /methods -->\nafter\n"
    with pytest.raises(ValueError, match="ablations"):
        report.write_blocks(document, {"ablations": "new"})


def test_every_block_that_was_run_is_written(scored: tuple[report.Scores, list[Scored]], tmp_path: Path) -> None:
    scores, _ = scored
    conditions = report.Conditions("scripts/benchmark quality", "demo", 28, 4, "test", "a machine")
    command._write(tmp_path, scores, conditions)
    methods, ablations = (
        (tmp_path / report.DOCUMENT).read_text().split(f"<!-- /{name} -->")[0] for name in report.TITLES
    )
    assert "| `downsampled` |" in methods
    assert "| eta 0.25 |" in ablations
    assert Image.open(tmp_path / "quality.png").size[0] > 1000


def test_picture(scored: tuple[report.Scores, list[Scored]]) -> None:
    picture = plot.draw(scored[0], [variant.name for variant in METHODS])
    pixels = np.asarray(picture).reshape(-1, 3)
    blue = (np.abs(pixels.astype(int) - plot.COLOURS["flashvlm"]).max(1) < 8).sum()
    assert blue > 1000  # the line of flashvlm, drawn over the others
    places = plot._apart({"a": 10.0, "b": 11.0, "c": 12.0, "d": 200.0})
    heights = list(places.values())
    assert np.diff(heights).min() >= plot.LINE_HEIGHT - 1e-9
    assert places["b"] == pytest.approx(11.0)
    assert places["d"] == 200.0
