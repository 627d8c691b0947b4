"""scripts/benchmark quality: the exam answers as the pipeline does, and the numbers are what they say."""

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
from flashvlm_export.selection import flashvlm as selection  # noqa: E402
from flashvlm_export.selection.flashvlm import select  # noqa: E402
from quality import command, experimental, measures, plot, report, results  # noqa: E402
from quality.bundles import Shelf  # noqa: E402
from quality.command import quality  # noqa: E402
from quality.harness import Given, asked_patches  # noqa: E402
from quality.measures import Scored, Subset, score  # noqa: E402
from quality.resolution import interpolated  # noqa: E402
from quality.results import Run, Sitting  # noqa: E402
from quality.variants import EVERYTHING, GRIDS, METHODS, OFFERED, RIVALS, Variant, ablation, parse  # noqa: E402
from scenes.draw import draw, owners  # noqa: E402
from scenes.exam import exam  # noqa: E402

ITEMS = exam(28)


@pytest.fixture(scope="module", autouse=True)
def _methods_as_they_were() -> Iterator[None]:
    """The benchmark adds its candidates to the tables of this process."""
    tables = selection.METHODS, selection.READS
    before = [dict(table) for table in tables]
    yield
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)


@pytest.fixture(scope="module")
def work(tiny_checkpoint: Path, tiny_bundle: Path, once) -> Path:
    """A work folder that has the bundle already: the shared one, of which only vision and decoder are used."""
    return once("quality", lambda out: shutil.copytree(tiny_bundle, Shelf(str(tiny_checkpoint), out).bundle_path()))


def make_run(variant: Variant, budget: int, seed: int, share: float = 0.5) -> Run:
    rng = np.random.default_rng(seed)
    about = [bool(item.question.about) for item in ITEMS]
    given = [Given(i, "", bool(rng.random() < share), float(rng.random()) if a else None) for i, a in enumerate(about)]
    return Run(variant, budget, variant.tokens(budget), given)


# --- numbers -------------------------------------------------------------------------------------------------------


def test_the_interval_is_that_of_a_plain_bootstrap() -> None:
    kind = [item.question.kind in ("counting", "where") for item in ITEMS]
    a, b = make_run(EVERYTHING, 1, 1).given, make_run(EVERYTHING, 1, 2).given
    found = Subset(ITEMS, kind, resamples=500).difference(a, b)

    scenes = list(dict.fromkeys(item.scene for item in ITEMS))
    change = {scene: [] for scene in scenes}
    for item, wanted, x, y in zip(ITEMS, kind, a, b, strict=True):
        if wanted:
            change[item.scene].append(x.right - y.right)
    drawn = np.random.default_rng(measures.SEED).multinomial(len(scenes), [1 / len(scenes)] * len(scenes), size=500)
    means = []
    for counts in drawn:
        sample = [value for scene, count in zip(scenes, counts, strict=True) for value in change[scene] * count]
        means.append(np.mean(sample))
    low, high = np.quantile(means, [0.025, 0.975])
    assert found.value == pytest.approx(np.mean([v for values in change.values() for v in values]))
    assert (found.low, found.high) == pytest.approx((low, high))
    assert found.low < found.value < found.high


def test_questions_of_a_scene_count_as_one_draw() -> None:
    """Scenes that are right or wrong as a whole give the interval of 4 draws, not of 28."""
    items = exam(7 * 40)
    right = [Given(i, "", (i // 7) % 2 == 0, None) for i in range(len(items))]
    wrong = [Given(i, "", False, None) for i in range(len(items))]
    found = Subset(items, [True] * len(items)).difference(right, wrong)
    half = 1.96 * np.sqrt(0.25 / 40)
    assert (found.low, found.high) == pytest.approx((0.5 - half, 0.5 + half), abs=0.03)


def test_measures_by_kind() -> None:
    groups = measures.subsets(ITEMS)
    assert {"all", "seen", "held out", "attribute", "ground"} <= set(groups)
    given = [Given(i, "", item.question.kind == "ground", None) for i, item in enumerate(ITEMS)]
    ground = sum(item.question.kind == "ground" for item in ITEMS)
    assert groups["ground"].measure(given) == measures.Measure(ground, 1.0, None)
    assert groups["all"].measure(given).accuracy == ground / 28
    sizes = [len(groups[kind].indices) for kind in groups if kind not in ("all", "seen", "held out")]
    assert sum(sizes) == 28


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
    assert asked_patches(item.scene, item.question.about, 24).sum() >= len(item.question.about)


# --- the exam ------------------------------------------------------------------------------------------------------


def test_answers_are_those_of_the_pipeline(tiny_bundle: Path, tiny_checkpoint: Path, work: Path) -> None:
    sitting = Sitting(str(tiny_checkpoint), work, 7, "test")
    pipeline = Pipeline.from_bundle(tiny_bundle)  # whole prompt as query, original positions kept
    variant = Variant("as the bundle", "flashvlm", query="prompt", positions="keep")
    for run in (sitting.answers(variant, 4), sitting.answers(EVERYTHING, 16)):
        budget = run.budget if run.budget < 16 else "all"
        for given, item in zip(run.given, sitting.items, strict=True):
            image = Image.fromarray(draw(item.scene))
            answer = pipeline.generate(image, item.question.text, budget=budget, max_new_tokens=8)
            assert given.answer == answer.text
            asked = asked_patches(item.scene, item.question.about, 4)
            assert given.kept == (asked[answer.kept].sum() / asked.sum() if asked.any() else None)
            assert given.right == (answer.text == item.question.answer)


def test_a_run_that_was_cut_short_goes_on(
    tiny_checkpoint: Path, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sitting() -> Sitting:
        opened = Sitting(str(tiny_checkpoint), work, 14, "check")
        opened._folder = tmp_path
        return opened

    def cut(doing: str, done: int) -> None:
        if doing.startswith("idf+merge") and done:
            raise KeyboardInterrupt

    (candidate,), whole = parse("idf+merge"), EVERYTHING
    interrupted = sitting()
    first = interrupted.answers(whole, 16, cut)
    with pytest.raises(KeyboardInterrupt):
        interrupted.answers(candidate, 4, cut)
    assert [path.name[:4] for path in tmp_path.iterdir()] == ["none"]

    resumed = sitting()
    monkeypatch.setattr(results, "Exam", None)  # what is on disk is not asked again
    assert resumed.answers(whole, 16) == first
    monkeypatch.undo()
    assert len(resumed.answers(candidate, 4).given) == 14
    assert len(list(tmp_path.iterdir())) == 2
    assert resumed.file(candidate, 4) != Sitting(str(tiny_checkpoint), work, 7, "check").file(candidate, 4)


def invoke(*arguments: object) -> Result:
    app = typer.Typer()
    app.command()(quality)
    return CliRunner().invoke(app, list(map(str, arguments)))


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

    for bad in (["--variants", "nothing"], ["--budgets", "0"], ["--split", "train"], ["--write", tmp_path]):
        refused = invoke(*common, *bad)
        assert refused.exit_code == 2
        assert "Traceback" not in refused.output


@pytest.mark.slow
def test_everything_is_exported_and_written(tiny_checkpoint: Path, work: Path, tmp_path: Path) -> None:
    text = Path(__file__).parents[2].joinpath("docs", "quality.md").read_text()
    before = re.sub(r"<!-- (\w+) -->.*?<!-- /\1 -->", r"<!-- \1 -->\n<!-- /\1 -->", text, flags=re.DOTALL)
    (tmp_path / "quality.md").write_text(before)
    common = ("--model", tiny_checkpoint, "--work", work, "--questions", 7, "--rounds", 1, "--budgets", 4)
    done = invoke(*common, "--variants", "all", "--write", tmp_path)
    assert done.exit_code == 0, done.output
    methods, others = (
        {run["variant"]: run for run in json.loads((work / f"{split}.json").read_text())["runs"]}
        for split in ("test", "check")
    )
    assert set(methods) == {"none", *(variant.name for variant in METHODS)}
    offered = {variant.name for variant in parse("all")} - set(methods)
    assert set(others) == {"none", *RIVALS, OFFERED, *offered}
    assert methods["downsampled"]["by"]["all"]["kept"] is None
    after = (tmp_path / "quality.md").read_text()
    for row in ("`downsampled`", "eta 0.25", "`idf+lloyd`"):
        assert f"| {row} |" in after
    assert re.sub(r"<!-- (\w+) -->.*?<!-- /\1 -->", r"<!-- \1 -->\n<!-- /\1 -->", after, flags=re.DOTALL) == before
    assert (tmp_path / "quality.png").stat().st_size > 0


# --- methods of the benchmark --------------------------------------------------------------------------------------


def test_candidates_are_methods() -> None:
    """Distinct ascending valid tokens; the same alone as in a batch, and with or without padding of the question."""
    torch.manual_seed(0)
    tokens, features, saliency = torch.randn(2, 49, 32), torch.randn(2, 49, 24), torch.rand(2, 49)
    query, mask, valid = torch.randn(2, 6, 32), torch.ones(2, 6, dtype=torch.bool), torch.ones(2, 49, dtype=torch.bool)
    mask[1, 4:], valid[1, 40:] = False, False
    names = [f"{relevance}+merge" for relevance in experimental.RELEVANCE]
    names += [f"idf+{rest}" for rest in experimental.REST]
    experimental.register(np.random.default_rng(0).normal(size=(50, 32)))
    for name in names:
        for budget in (1, 12):
            batch = select(tokens, features, saliency, query, mask, valid, method=name, budget=budget)
            assert batch.kept.shape == (2, budget), name
            assert (batch.kept.diff(dim=1) > 0).all(), name
            assert valid.gather(1, batch.kept).all(), name
            alone = select(
                tokens[1:], features[1:], saliency[1:], query[1:, :4], None, valid[1:], method=name, budget=budget
            )
            assert torch.equal(alone.kept, batch.kept[1:]), name
    ours = select(tokens, features, saliency, query, mask, valid, budget=12)
    same = select(tokens, features, saliency, query, mask, valid, method="pooled+lloyd", budget=12)
    merged = select(tokens, features, saliency, query, mask, valid, method="pooled+merge", budget=12)
    assert torch.equal(ours.kept, same.kept)
    assert torch.equal(ours.kept, merged.kept)
    assert torch.equal(ours.visual_embeds[ours.is_top], merged.visual_embeds[ours.is_top])
    assert not torch.allclose(ours.visual_embeds, merged.visual_embeds)


def test_positions_are_interpolated_around_cls() -> None:
    table = torch.cat([torch.full((1, 3), 9.0), torch.arange(24.0).repeat(24)[:, None] * torch.tensor([1.0, 2.0, 3.0])])
    assert torch.allclose(interpolated(table, 24), table, atol=1e-5)
    small = interpolated(table, 6)
    assert small.shape == (37, 3)
    assert torch.equal(small[0], table[0])
    # Centres of 6 cells over 24 columns: 1.5, 5.5, ... 21.5.
    assert torch.allclose(small[1:7, 0], torch.arange(6) * 4 + 1.5, atol=0.2)


def test_variants() -> None:
    assert [v.name for v in parse("eta=0.25,flashvlm,eta=0.25")] == ["eta=0.25", "flashvlm"]
    (named,) = parse("idf+merge:eta=0.75:query=prompt")
    assert (named.method, named.params, named.query) == ("idf+merge", {"eta": 0.75}, "prompt")
    for parameter, values in GRIDS.items():
        assert METHODS[0] in [ablation(parameter, value) for value in values], parameter
    assert set(command._plans(parse("ablations"), None, None)) == {"check"}
    assert set(command._plans(parse("all"), None, None)) == {"test", "check"}
    downsampled = next(variant for variant in METHODS if variant.name == "downsampled")
    assert [downsampled.tokens(b) for b in (192, 128, 64, 32, 16, 8)] == [196, 121, 64, 36, 16, 9]
    for bad in ("idf", "idf+nothing", "idf+merge:speed=1", "idf+merge:eta"):
        with pytest.raises(ValueError, match=bad.partition(":")[2].partition("=")[0] or bad.partition("+")[0]):
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
    rivals = [run for run in runs if run.variant.name in RIVALS]
    (whole,) = score([everything], ITEMS, everything, [], {})
    found = score(runs, ITEMS, everything, rivals, {("flashvlm", 64): 1.234})
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
    difference = rival.against["flashvlm"]["all"]
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
    scores, found = scored
    document = tmp_path / "quality.md"
    names = ("methods", "ablations", "experimental")
    document.write_text("".join(f"<!-- {name} -->\n<!-- /{name} -->\n" for name in names))
    conditions = report.Conditions("scripts/benchmark quality", "demo", 28, 4, "test", "a machine")
    command._write(tmp_path, scores, conditions, [each.run.variant.name for each in found])
    methods, ablations, experimental_ = (document.read_text().split(f"<!-- /{name} -->")[0] for name in names)
    assert "| `downsampled` |" in methods
    assert "| eta 0.25 |" in ablations
    assert experimental_.endswith("<!-- experimental -->\n")  # no candidate was run
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
