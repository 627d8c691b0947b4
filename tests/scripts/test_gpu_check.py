"""scripts/gpu_check as far as it goes without a GPU: sections, their failures, the report, and the host emulation."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gpu_checks import names, report, runner, targets
from gpu_checks.build import build_emulation
from gpu_checks.record import Job, Record, read

ROOT = Path(__file__).resolve().parents[2]
NO_GPU = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}


def gpu_check(*arguments: object, env: dict[str, str] = NO_GPU) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "gpu_check"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env)


def test_without_a_gpu_it_says_so_in_one_line(tmp_path):
    done = gpu_check("--out", tmp_path / "out")
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "expected an NVIDIA GPU, found none" in done.stderr
    assert "--device emulation" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def emulation(once) -> Path:
    if shutil.which("g++") is None:
        pytest.skip("no g++: the kernels cannot be emulated on this machine")
    return once("kernels-host", build_emulation) / "libflashvlm_kernels_host.so"


def test_the_emulation_is_checked_and_called_by_its_name(emulation, tmp_path):
    pytest.importorskip("torch", reason="the references are torch code")
    only = ("--only", "kernels", "--only", "speed")
    done = gpu_check("--device", "emulation", "--library", emulation, *only, "--out", tmp_path, "--seed", 7)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu-check.json").read_text())
    assert found["passed"]
    assert found["finished"]
    assert found["seed"] == 7
    assert found["machine"]["gpu"] is None
    assert "no GPU" in found["machine"]["device"]
    assert found["targets"] == []
    sections = {section["name"]: section for section in found["sections"]}
    assert list(sections) == ["machine", "build", "kernels", "speed"]
    checks = {check["name"]: check for check in sections["kernels"]["checks"]}
    for dtype in ("float32", "float16", "bfloat16"):
        score = checks[f"score, {dtype}: error of the log-score"]
        assert 0 < score["worst"] < score["bound"]
        assert checks[f"choice, {dtype}: items that keep other tokens"]["worst"] == 0
    assert all(set(check) == {"name", "cases", "worst", "bound", "passed", "detail"} for check in checks.values())
    assert sections["speed"]["status"] == "skipped"  # there is nothing to time in an emulation
    assert "no GPU" in (tmp_path / "gpu-check.md").read_text()
    assert "no GPU" in done.stdout


def test_a_report_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    done = gpu_check("--device", "emulation", "--only", "machine", "--out", tmp_path / "file")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "cannot write" in done.stderr


# ---- sections that end badly --------------------------------------------------------------------------------------

CHILD = """
import json, os, sys, time
def say(kind, **fields):
    with open(sys.argv[1], "a") as file:
        file.write(json.dumps({"kind": kind, **fields}) + "\\n")
def check(worst, passed):
    say("check", name="c", cases=1, worst=worst, bound=1, passed=passed, detail="")
"""
BODIES = {
    "good": "check(0.5, True); say('fact', name='library', value='here')",
    "wrong": "check(2, False)",
    "segfault": "check(0.5, True); print('last words'); sys.stdout.flush(); os.kill(os.getpid(), 11)",
    "cut": "check(0.5, True); open(sys.argv[1], 'a').write('{\"kind\": \"che'); sys.exit(3)",
    "hang": "check(0.5, True); time.sleep(600)",
    "mute": "pass",
    "sanitized": f"check(0.5, True); sys.exit({runner.SANITIZER_FOUND})",
    "told": "say('fact', name='told', value=json.load(open(sys.argv[2]))['facts'])",
}


def run_fake(tmp_path: Path, *sections: str, seconds: float = 60.0, saved: list | None = None) -> dict:
    def command(section: runner.Section, job: Path, findings: Path) -> list[str]:
        return [sys.executable, "-S", "-c", CHILD + BODIES[section.module], str(findings), str(job)]

    job = Job("cuda", 1, quick=True, work=tmp_path)
    listed = [runner.Section(name, name, 1.0 if name == "hang" else 30.0) for name in sections]
    save = (lambda found: saved.append(json.dumps(found))) if saved is not None else lambda _: None
    return runner.run_sections(job, listed, seconds, save=save, command=command)


def test_a_section_that_dies_or_hangs_is_recorded_and_the_rest_runs(tmp_path):
    saved: list[str] = []
    found = run_fake(tmp_path, "segfault", "cut", "hang", "mute", "sanitized", "wrong", "good", "told", saved=saved)
    sections = {section["name"]: section for section in found["sections"]}
    statuses = {name: section["status"] for name, section in sections.items()}
    assert statuses == {
        "segfault": "crashed", "cut": "crashed", "hang": "timed out", "mute": "failed", "sanitized": "failed",
        "wrong": "failed", "good": "passed", "told": "passed",
    }  # fmt: skip
    assert "SIGSEGV" in sections["segfault"]["error"]
    assert "last words" in sections["segfault"]["error"]
    assert "status 3" in sections["cut"]["error"]
    for name in ("segfault", "cut", "hang", "sanitized"):  # what they had found before
        assert [check["passed"] for check in sections[name]["checks"]] == [True]
    assert sections["told"]["facts"]["told"] == {"library": "here"}  # facts go to the sections after
    assert not found["passed"]
    assert found["finished"]
    assert [json.loads(text)["finished"] for text in saved] == [False] * 8 + [True]
    text = report.markdown(found | {"targets": []})
    assert "hang timed out" in text
    assert "FAILED" in text


@pytest.mark.parametrize("section", ["segfault", "hang", "mute", "sanitized", "wrong"])
def test_one_bad_section_fails_the_whole(tmp_path, section):
    assert not run_fake(tmp_path, "good", section)["passed"]


def test_good_sections_pass_and_none_at_all_do_not(tmp_path):
    assert run_fake(tmp_path, "good")["passed"]
    assert not run_fake(tmp_path)["passed"]
    assert not run_fake(tmp_path, "told")["passed"]  # nothing was checked


def test_sections_are_not_begun_when_the_time_is_used_up(tmp_path):
    found = run_fake(tmp_path, "good", seconds=runner.SHORTEST / 2)
    (section,) = found["sections"]
    assert section["status"] == "skipped"
    assert "used up" in section["skipped"][0]["reason"]
    assert not found["passed"]


def test_an_exception_is_a_finding_and_a_missing_package_a_skip(tmp_path, monkeypatch):
    Job("emulation", 1, quick=True, work=tmp_path).save(tmp_path / "job")

    def run(error: Exception) -> list[dict]:
        class Module:
            @staticmethod
            def run(job: Job, record: Record) -> None:
                raise error

        (tmp_path / "found").unlink(missing_ok=True)
        monkeypatch.setattr(runner.importlib, "import_module", lambda *_: Module)
        assert runner.run_child("kernels", tmp_path / "job", tmp_path / "found") == 0
        return read(tmp_path / "found")

    (error,) = run(ValueError("no such thing"))
    assert error["kind"] == "error"
    assert "ValueError at test_gpu_check.py:" in error["message"]
    (skip,) = run(ModuleNotFoundError("No module named 'torch'", name="torch"))
    assert (skip["kind"], skip["remedy"]) == ("skip", "pip install torch")
    (error,) = run(ModuleNotFoundError("No module named 'gpu_checks.x'", name="gpu_checks.x"))
    assert error["kind"] == "error"


def test_the_sanitizer_runs_the_same_section_on_few_cases(tmp_path, monkeypatch):
    section = runner.SANITIZED[0]
    command = runner.command_of(section, tmp_path / "job", tmp_path / "found")
    assert command[:3] == ["compute-sanitizer", "--tool", "memcheck"]
    assert command[command.index("--section") + 1] == section.name
    told = []
    module = type("Module", (), {"run": staticmethod(lambda job, record: told.append(job))})
    monkeypatch.setattr(runner.importlib, "import_module", lambda *_: module)
    Job("cuda", 1, quick=False, work=tmp_path).save(tmp_path / "job")
    runner.run_child(section.name, tmp_path / "job", tmp_path / "found")
    assert [job.quick for job in told] == [True]


# ---- what is measured, and what is made of it ---------------------------------------------------------------------


def test_nan_never_passes_and_stays_out_of_json(tmp_path):
    record = Record(tmp_path / "found")
    assert not record.check("c", 1, float("nan"), 1.0)
    assert not record.check("c", 1, float("inf"), 1.0)
    assert not record.check("c", 0, 0.0, 1.0)  # no case is no pass
    assert record.check("c", 1, 1.0, 1.0)
    assert [found["worst"] for found in read(tmp_path / "found")] == [None, None, 0.0, 1.0]


def test_targets_are_judged_on_their_gpu_only():
    row = {"dtype": "float16", "batch": 1}
    timings = [
        row | {"what": names.SELECTION, "method": names.HOT, "median": 59.0},
        row | {"what": names.SELECTION, "method": names.COLD, "median": 70.0},
        row | {"what": names.SCORE, "method": names.COLD, "median": 15.0},
        row | {"what": names.PUBLISHED, "method": names.LAUNCHES, "median": 7000.0},
        row | {"what": names.SELECTION, "method": names.HOT, "median": 900.0, "batch": 4},
    ]
    found = targets.evaluate(timings, "NVIDIA H200")
    assert [(t["value"], t["target"], t["met"]) for t in found] == [
        (59.0, 60.0, True), (70.0, 60.0, False), (15.0, 15.0, True), (100.0, 50.0, True),
    ]  # fmt: skip
    assert {t["met"] for t in targets.evaluate(timings, "NVIDIA L4")} == {None}


def test_the_report_keeps_its_columns_and_needs_no_rich(tmp_path, monkeypatch, capsys):
    section = {
        "name": "kernels", "status": "failed", "comparison": False, "seconds": 1.0, "facts": {}, "error": "a\nb",
        "checks": [{"name": "a|b", "cases": 2, "worst": None, "bound": 1.0, "passed": False, "detail": "why"}],
        "timings": [{"what": "score", "dtype": "float16", "batch": 1, "method": "graph, hot", "runs": 9,
                     "median": 8.25, "p10": 8.0, "p90": 9.0}],
        "skipped": [{"reason": "no nvcc", "remedy": "install it"}],
    }  # fmt: skip
    found = {"seed": 1, "machine": {"device": "GPU"}, "sections": [section], "passed": False, "seconds": 2.0}
    report.save(found, tmp_path)
    text = (tmp_path / report.MARKDOWN).read_text()
    assert "| kernels | a\\|b (why) | FAILED | 2 | not finite | 1 |" in text
    assert "| score | float16 | 1 | graph, hot | 8.2 | 8.0 | 9.0 |" in text
    assert "a<br>b" in text
    assert json.loads((tmp_path / report.JSON).read_text()) == found
    assert sorted(path.name for path in tmp_path.iterdir()) == [report.JSON, report.MARKDOWN]
    report.show(found)
    assert "no nvcc" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "rich.console", None)
    report.show(found)
    assert capsys.readouterr().out.rstrip() == text.rstrip()


def test_a_kernel_that_is_wrong_is_found():
    torch = pytest.importorskip("torch", reason="the references are torch code")
    from flashvlm_export.testing.references import DEFAULTS, choice64, make, score64
    from gpu_checks.correctness import Tally, compare_choice

    class Kernels:
        """Right, or with the last token in the place of the one before."""

        wrong = False

        def lloyd(self, features, scores, valid, budget, top_count, iterations=4, mask_dtype=torch.bool):
            items = zip(features.double().numpy(), scores.numpy(), valid.numpy(), strict=True)
            chosen = [choice64(*item, budget, top_count, iterations) for item in items]
            kept, is_top = (torch.from_numpy(np.stack([c[i] for c in chosen])) for i in range(2))
            if self.wrong:
                free = torch.from_numpy(np.setdiff1d(np.arange(valid.shape[1]), kept[0].numpy()))
                kept[0] = torch.cat([kept[0, 1:], free[-1:]]).sort().values
            return kept, is_top

    x = make(B=2, N=40, masks=True, seed=3)
    kernels, tally = Kernels(), Tally()
    compare_choice(kernels, x, 9, DEFAULTS, tally)
    assert (tally.items, tally.different) == (2, 0)
    kernels.wrong = True
    compare_choice(kernels, x, 9, DEFAULTS, tally)
    assert (tally.items, tally.different) == (4, 1)
    assert np.isfinite(score64(x)).all()


def test_sessions_are_compared_stage_by_stage(tiny_bundle, tmp_path):
    from flashvlm import Pipeline
    from gpu_checks import sessions

    reference, other = (sessions.Recorded(Pipeline.from_bundle(tiny_bundle, provider="cpu")) for _ in range(2))
    record = Record(tmp_path / "found")
    sessions.compare(record, "again", reference, other)
    sessions.times(record, "again", other)
    found = read(tmp_path / "found")
    checks = [f for f in found if f["kind"] == "check"]
    assert [check["passed"] for check in checks] == [True] * 5  # all tokens; kept and logits of two budgets
    assert any(check["cases"] > 1 for check in checks)  # prefill and decode
    stages = {f["what"] for f in found if f["kind"] == "timing"}
    assert "again, budget 4: prefill" in stages
    assert "again, budget all: decode a token" in stages

    noisy = sessions.Recorded(Pipeline.from_bundle(tiny_bundle, provider="cpu"))
    answer = noisy.answer

    def louder(budget):
        said = answer(budget)
        noisy.logits[:] = [logits * 1.1 for logits in noisy.logits]
        return said

    noisy.answer = louder
    (tmp_path / "found").unlink()
    sessions.compare(record, "noisy", reference, noisy)
    failed = [f["name"] for f in read(tmp_path / "found") if not f["passed"]]
    assert len(failed) == 3
    assert all("logits" in name for name in failed)


def test_each_graph_is_compared_by_itself(tiny_bundle, tmp_path):
    pytest.importorskip("polygraphy", reason="polygraphy is not installed; pip install polygraphy")
    from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx

    from flashvlm.bundle import Bundle
    from gpu_checks import graphs

    bundle = Bundle(tiny_bundle, verify=False)

    class Altered:
        """An ONNX Runtime session of a graph, with some outputs altered."""

        def __init__(self, graph, alter):
            self.session, self.alter = SessionFromOnnx(str(bundle.graph_file(graph)))(), alter

        def __getattr__(self, name):
            return getattr(self.session, name)

        def run(self, names, feed):
            outputs = self.session.run(names, feed)
            found = zip((node.name for node in self.session.get_outputs()), outputs, strict=True)
            return [self.alter(name, value) for name, value in found]

    def failing(alter):
        (tmp_path / "found").unlink(missing_ok=True)
        record = Record(tmp_path / "found")
        graphs.compare(record, "x", bundle, lambda graph: OnnxrtRunner(Altered(graph, alter)), capacity=16, seed=3)
        checks = read(tmp_path / "found")
        assert {check["name"].partition(":")[0] for check in checks} == {
            f"x, {graph}" for graph in bundle.manifest.graphs
        }
        return {check["name"] for check in checks if not check["passed"]}

    assert failing(lambda name, value: value) == set()
    assert failing(lambda name, value: value * 1.1 if name == "logits" else value) == {
        "x, decoder: relative error of logits"
    }
    assert failing(lambda name, value: np.full_like(value, np.nan) if name == "saliency" else value) == {
        "x, vision: relative error of saliency"
    }
    assert failing(lambda name, value: value * 0 if name == "kept" else value) == {
        f"x, select-k{budget}: share of other tokens kept" for budget in (4, 7)
    }
