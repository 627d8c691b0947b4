"""flashvlm-profile on ONNX Runtime: what it measures, what it recommends, and the report it writes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flashvlm import FlashVLMError, Pipeline
from flashvlm.bundle import Bundle
from flashvlm.cli.profile import main
from flashvlm.extras import install
from flashvlm.files import atomic_folder
from flashvlm.generation import Timings
from flashvlm.profiling.measure import (
    BudgetProfile,
    Profile,
    ProfileOptions,
    Spread,
    allocated_rows,
    describe,
    kv_bytes,
    measure,
    recommend,
    summarise,
)
from flashvlm.profiling.plot import draw
from flashvlm.profiling.synthetic import synthetic_photo, synthetic_prompt, variations
from flashvlm.profiling.table import spread, statistics, to_json
from flashvlm.sessions.onnxruntime import OnnxRuntimeSession
from refusals import assert_refused, run

QUICK = ("--runs", "2", "--warm-up", "1", "--new-tokens", "3")


@pytest.fixture(scope="module")
def measured(tiny_bundle: Path) -> Profile:
    options = ProfileOptions((4, 7, "all"), prompt_tokens=20, new_tokens=5, runs=3, warm_up=1)
    return measure(Pipeline.from_bundle(tiny_bundle), "ONNX Runtime", options, lambda _: None)


def budget_profile(budget: int | str, first: tuple[float, float, float], tokens: int = 0) -> BudgetProfile:
    part = Spread(*first)
    stages = {
        "vision": part.times(0.7),
        "select": part.times(0.1),
        "prefill": part.times(0.2),
        "decode": Spread(2, 1, 3),
    }
    return BudgetProfile(budget, 40, tokens or int(budget), 1 << 20, stages, part, part.times(2), None)


def profile_of(bundle: Path, *budgets: BudgetProfile) -> Profile:
    options = ProfileOptions(tuple(b.budget for b in budgets))
    return describe(Bundle(bundle, verify=False), "ONNX Runtime", options, budgets, interleaved=True)


# --- input ---


@pytest.mark.parametrize("fixture", ["tiny_bundle", "tiny_gqa_bundle"])
def test_a_synthetic_prompt_has_exactly_the_tokens_asked_for(fixture: str, request: pytest.FixtureRequest) -> None:
    bundle = Bundle(request.getfixturevalue(fixture), verify=False)
    shortest = len(synthetic_prompt(bundle, 9)[1].input_ids) - 1
    for tokens in (shortest, shortest + 1, 17, 40, 41, 42, 500):
        question, encoded = synthetic_prompt(bundle, tokens)
        assert len(encoded.input_ids) - 1 == tokens
        assert (encoded.input_ids == bundle.manifest.visual[0].placeholder_id).sum() == 1
        assert question.startswith("what")


def test_a_prompt_shorter_than_its_template_is_refused(tiny_bundle: Path) -> None:
    with pytest.raises(FlashVLMError, match=r"--prompt-tokens 3: .* expected at least 9"):
        synthetic_prompt(Bundle(tiny_bundle, verify=False), 3)


def test_every_photo_is_another_and_seeds_repeat() -> None:
    first, second = synthetic_photo(0), synthetic_photo(1)
    assert first.size == second.size == (640, 480)
    assert first.tobytes() != second.tobytes()
    assert first.tobytes() == synthetic_photo(0).tobytes()


# --- statistics ---


def test_spreads_are_percentiles_and_add_up() -> None:
    found = Spread.of(range(11))
    assert (found.p10, found.median, found.p90) == (1, 5, 9)
    assert found + Spread(1, 1, 1) == Spread(6, 2, 10)
    assert found.times(2) == Spread(10, 2, 18)
    assert Spread(8, 6, 9).over(Spread(4, 3, 5)) == Spread(2, 1.2, 3)


def test_speedups_compare_a_run_with_itself() -> None:
    """A machine that slows down between runs moves times, not ratios."""
    slower = [1.0, 10.0, 100.0]
    small = [Timings(vision=f, prefill=f, decode=[f]) for f in slower]
    whole = [Timings(vision=f, prefill=3 * f, decode=[f]) for f in slower]
    found = summarise(4, (20, 4), 0, small, whole)
    assert found.speedup == Spread(2, 2, 2)
    assert found.first_token.median == 20
    assert found.answer.median == 30
    assert found.tokens_per_second == 100


# --- measuring ---


def test_every_stage_of_every_budget_is_measured(measured: Profile) -> None:
    assert [b.budget for b in measured.budgets] == [4, 7, "all"]
    assert [b.image_tokens for b in measured.budgets] == [4, 7, 16]
    for budget in measured.budgets:
        assert budget.text_tokens == 20
        assert list(budget.stages) == ["preprocess", "vision", "select", "prefill", "decode"]
        for part in (*budget.stages.values(), budget.first_token, budget.answer):
            assert 0 < part.p10 <= part.median <= part.p90
        assert budget.answer.median > budget.first_token.median
    assert measured.budgets[-1].speedup == Spread(1, 1, 1)
    assert measured.interleaved
    assert measured.peak_resident is not None
    assert measured.peak_resident > 10e6


def test_budgets_take_turns_and_no_answer_ends_early(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = Pipeline.from_bundle(tiny_bundle)
    generate, asked, lengths, advanced = pipeline.generate, [], [], []

    def spy(image: Image.Image, prompt: str, *, budget: int | str, max_new_tokens: int) -> object:
        assert pipeline.bundle.manifest.model.eos_token_ids == ()
        answer = generate(image, prompt, budget=budget, max_new_tokens=max_new_tokens)  # type: ignore[arg-type]
        asked.append(budget)
        lengths.append(len(answer.token_ids))
        assert answer.timings.vision > 0  # never from the cache
        return answer

    monkeypatch.setattr(pipeline, "generate", spy)
    stop = pipeline.bundle.manifest.model.eos_token_ids
    options = ProfileOptions((4, 7, "all"), prompt_tokens=12, new_tokens=6, runs=3, warm_up=1)
    measure(pipeline, "", options, advanced.append)
    assert asked == ["all", 4, 7, 4, 7, "all", 7, "all", 4, "all", 4, 7]
    assert lengths == [6] * 12
    assert sum(advanced) == 12
    assert pipeline.bundle.manifest.model.eos_token_ids == stop != ()


@pytest.mark.parametrize("fixture", ["tiny_bundle", "tiny_gqa_bundle"])
def test_cache_bytes_are_those_allocated(fixture: str, request: pytest.FixtureRequest) -> None:
    bundle = Bundle(request.getfixturevalue(fixture), verify=False)
    cache = OnnxRuntimeSession(bundle).new_cache(1, 128)
    held = sum(np.asarray(value if isinstance(value, np.ndarray) else value.numpy()).nbytes for value in cache.values())
    assert kv_bytes(bundle, 128) == held
    assert [allocated_rows(60, n) for n in (2, 5, 6)] == [64, 64, 128]


def test_without_all_there_are_no_ratios(tiny_bundle: Path) -> None:
    options = ProfileOptions((4,), prompt_tokens=12, new_tokens=2, runs=1, warm_up=0)
    profile = measure(Pipeline.from_bundle(tiny_bundle), "", options, lambda _: None)
    assert profile.budgets[0].speedup is None


# --- recommending ---


def test_the_largest_budget_within_the_target_is_recommended(tiny_bundle: Path) -> None:
    profile = profile_of(
        tiny_bundle,
        budget_profile(4, (10, 9, 12)),
        budget_profile(7, (20, 18, 22)),
        budget_profile("all", (40, 35, 45), 16),
    )
    assert recommend(profile, 22).budget == 7  # p90 decides, and equal is within
    assert recommend(profile, 21).budget == 4  # though the median of 7 would do
    assert recommend(profile, 1e6).budget == "all"
    none = recommend(profile, 11)
    assert (none.budget, none.fastest) == (None, 4)
    assert str(none) == "no budget gives the first token within 11 ms; the closest is 4 with 12 ms (p90 of 20 runs)"
    assert str(recommend(profile, 22)) == (
        "budget 7 is the largest with the first token within 22 ms: 22 ms (p90 of 20 runs)"
    )


def test_one_run_is_called_one_run(tiny_bundle: Path) -> None:
    options = ProfileOptions((4,), runs=1)
    found = budget_profile(4, (10, 10, 10))
    profile = describe(Bundle(tiny_bundle, verify=False), "ONNX Runtime", options, (found,), interleaved=True)
    assert str(recommend(profile, 12345)) == (
        "budget 4 is the largest with the first token within 12,345 ms: 10 ms (one run)"
    )
    assert statistics(profile) == "one run, budgets in turn"
    assert spread(Spread(10, 10, 10)) == "10.0"
    assert spread(Spread(10, 9, 12)) == "10.0 (9.0-12.0)"


# --- the report ---


def test_json_is_plain_and_complete(measured: Profile) -> None:
    values = json.loads(json.dumps(to_json(measured, recommend(measured, 1e6))))
    assert values["recommendation"]["budget"] == "all"
    assert values["recommendation"]["statistic"] == "first_token.p90"
    assert values["options"]["runs"] == 3
    for entry in values["budgets"]:
        assert set(entry["first_token"]) == {"median", "p10", "p90"}
        assert entry["tokens_per_second"] > 0
        assert entry["kv_bytes"] > 0


@pytest.mark.parametrize("count", [1, 5, 12])
@pytest.mark.parametrize("scale", [0.01, 1e5])
def test_pictures_fit_any_number_of_budgets(count: int, scale: float, tiny_bundle: Path, tmp_path: Path) -> None:
    budgets = [budget_profile(n, (scale * (9 + n), scale * 9, scale * (10 + n))) for n in range(1, count + 1)]
    profile = profile_of(tiny_bundle, *budgets)
    for recommendation in (None, recommend(profile, 12 * scale)):
        draw(profile, recommendation, tmp_path / "profile.png")
        with Image.open(tmp_path / "profile.png") as picture:
            pixels = np.asarray(picture.convert("RGB"))
        assert pixels.shape == (690, 1400, 3)
        border = np.concatenate([pixels[:20].ravel(), pixels[-20:].ravel(), pixels[:, -20:].ravel()])
        assert (border == 255).all()  # nothing runs over the edge


def test_the_same_profile_gives_the_same_picture(tiny_bundle: Path, tmp_path: Path) -> None:
    profile = profile_of(tiny_bundle, budget_profile(4, (10, 9, 12)), budget_profile("all", (40, 35, 45), 16))
    for name in ("one", "two"):
        draw(profile, None, tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    def fail_half_way() -> None:
        with atomic_folder(tmp_path / "report", replace=True) as partial:
            (partial / "profile.json").write_text("{}")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail_half_way()
    assert not list(tmp_path.iterdir())


# --- the command ---


def test_the_command_prints_a_table_and_writes_a_report(tiny_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    ran = run(main, tiny_bundle, *QUICK, "--target-ms", "60000", "--out", out)
    assert ran.code == 0, ran.stderr
    for word in ("budget", "vision", "select", "prefill", "first token", "decode/token", "KV cache", "all/this"):
        assert word in ran.stdout
    assert "budget all is the largest with the first token within 60,000 ms" in ran.stdout
    assert max(map(len, ran.stdout.splitlines())) < 120  # no table cell is wrapped or cut
    values = json.loads((out / "profile.json").read_text())
    assert [b["budget"] for b in values["budgets"]] == [4, 7, "all"]
    with Image.open(out / "profile.png") as picture:
        picture.load()
    assert [path.name for path in tmp_path.iterdir()] == ["report"]

    assert_refused(run(main, tiny_bundle, *QUICK, "--out", out), "exists", "--force")
    again = run(main, tiny_bundle, *QUICK, "--budget", "all,4,4", "--out", out, "--force")
    assert again.code == 0, again.stderr
    values = json.loads((out / "profile.json").read_text())
    assert [b["budget"] for b in values["budgets"]] == [4, "all"]
    (out / "notes.txt").write_text("mine")
    assert_refused(run(main, tiny_bundle, *QUICK, "--out", out, "--force"), "other files")
    assert (out / "notes.txt").exists()


REFUSED: list[tuple[list[str], tuple[str, ...]]] = [
    (["--budget", "5"], ("budget 5 is not in this bundle", "has 4, 7, all", "export with --budget 5")),
    (["--budget", "4,most"], ("--budget 'most'", "whole number", "all")),
    (["--budget", ""], ("--budget ''",)),
    (["--image", "x.png", "--print-commands"], ("--image", "trtexec makes pixels of its own")),
    (["--image", "none.png"], ("none.png", "found nothing there")),
    (["--static-plugins", "x.so"], ("--static-plugins", "add --trtexec")),
    (["--plugins", "a.so", "--plugins", "b.so"], ("a second --plugins", "add --trtexec")),
    (["--backend", "torch"], ("--backend 'torch'", "auto, onnxruntime")),
    (["--backend", "onnxruntime", "--trtexec"], ("--backend onnxruntime", "tensorrt")),
    (["--prompt-tokens", "2"], ("--prompt-tokens 2", "at least")),
    (["--prompt-tokens", "5000"], ("5000 prompt, 16 image and 64 new tokens need 5079", "--max-seq 5079")),
    (["--new-tokens", "1"], ("--new-tokens",)),
    (["--runs", "0"], ("--runs",)),
    (["--target-ms", "0"], ("--target-ms 0", "above 0")),
    (["--target-ms", "nan"], ("--target-ms nan", "above 0")),
    (["--out", "no/such/report"], ("no/such does not exist", "create it")),
    (["--provider", "tpu"], ("unknown provider 'tpu'",)),
    (["--trtexec"], ("has no engines", "flashvlm-compile", "--target tensorrt")),
]


@pytest.mark.parametrize(("flags", "expected"), REFUSED, ids=[" ".join(flags) for flags, _ in REFUSED])
def test_refusals_are_one_line(flags: list[str], expected: tuple[str, ...], tiny_bundle: Path) -> None:
    assert_refused(run(main, tiny_bundle, *flags), *expected)


def test_bad_budgets_are_refused_before_the_bundle_is_read() -> None:
    assert_refused(run(main, "no/such/bundle", "--budget", "abc"), "--budget 'abc'")


def test_json_and_an_image_of_ones_own(tiny_bundle: Path, tmp_path: Path) -> None:
    Image.new("RGB", (90, 60), "teal").save(tmp_path / "own.png")
    ran = run(main, tiny_bundle, *QUICK, "--json", "--image", tmp_path / "own.png", "--target-ms", "60000")
    assert ran.code == 0, ran.stderr
    values = json.loads(ran.stdout)
    assert values["options"]["image"] == str(tmp_path / "own.png")
    assert values["recommendation"] | {"budget": "all", "runs": 2} == values["recommendation"]
    assert all(budget["stages"]["vision"]["p10"] > 0 for budget in values["budgets"])  # never from the cache


def test_variations_differ_in_a_pixel() -> None:
    image = Image.new("RGB", (9, 7), "teal")
    vary = variations(image)
    first, second = (np.asarray(vary(seed)).astype(int) for seed in (1, 65536))
    assert (first != second).any(-1).sum() == 1
    assert image.getpixel((0, 0)) == (0, 128, 128)


def test_without_matplotlib_there_is_a_report_and_a_line(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("matplotlib")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    ran = run(main, tiny_bundle, *QUICK, "--out", tmp_path / "report")
    assert ran.code == 0, ran
    assert "first token" in ran.stdout
    assert [line for line in ran.stderr.splitlines() if "matplotlib" in line and install("plot") in line]
    assert [path.name for path in (tmp_path / "report").iterdir()] == ["profile.json"]


def test_not_a_bundle_is_refused(tmp_path: Path) -> None:
    assert_refused(run(main, tmp_path), "it has no bundle.json", "flashvlm-export")


def test_nothing_heavy_is_imported() -> None:
    modules = ("cli.profile", "cli.trtexec", "profiling.measure", "profiling.report", "profiling.plot")
    names = ", ".join(f"flashvlm.{name}" for name in modules)
    code = f"import sys, {names}; sys.exit(bool({{'torch', 'onnxruntime', 'matplotlib'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
