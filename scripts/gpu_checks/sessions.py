"""A bundle on what a GPU offers, against ONNX Runtime's CPU: logits, kept tokens, and the time of each stage."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from flashvlm.errors import FlashVLMError
from flashvlm.extras import install

from . import graphs
from .graphs import BOUND, DIFFERENT_BOUND
from .record import Job, Record, Skip

PICTURE = Path(__file__).resolve().parents[1] / "assets" / "scene.png"
QUESTION = "What color is the heart?"
NEW_TOKENS = 8
RUNS = 5  # of an answer, for the times; one more warms up
Open = Callable[[Path], Any]


def run_bundle(job: Job, record: Record) -> None:
    """The bundle that the sessions share: the one given, or a small one with random weights."""
    try:
        if job.bundle is not None:
            from flashvlm.bundle import Bundle

            Bundle(job.bundle)
            made = job.bundle
        else:
            made = _export(job.work / "exported", "tiny" if job.quick else "small")
    except (ImportError, FlashVLMError) as error:
        raise Skip(f"no bundle: {error}", f"{install('export', 'cpu')}, or give --bundle") from None
    copy = job.work / "bundle"
    shutil.copytree(made, copy, copy_function=_link)  # engines are built in it
    record.fact("bundle", str(copy))
    record.fact("bundle_of", str(job.bundle or "random weights"))


def run_cuda(job: Job, record: Record) -> None:
    from flashvlm import Pipeline

    def open_cuda(path: Path) -> Any:
        return Pipeline.from_bundle(path, backend="onnxruntime", provider="cuda")

    _compare(job, record, "ONNX Runtime CUDA", open_cuda, must_run_on="CUDAExecutionProvider")


def run_rtx(job: Job, record: Record) -> None:
    _compiled(job, record, "tensorrt-rtx", (job.facts["gpu"]["compute_capability"],))


def run_tensorrt(job: Job, record: Record) -> None:
    _compiled(job, record, "tensorrt", ())


def run_tensorrt_plugins(job: Job, record: Record) -> None:
    if "plugins_library" not in job.facts:
        raise Skip("there is no plugin library", "see the section tensorrt plugins")
    _compiled(job, record, "tensorrt", (), Path(job.facts["plugins_library"]))


def _compiled(
    job: Job, record: Record, target: Any, capabilities: tuple[str, ...], plugins: Path | None = None
) -> None:
    from flashvlm import Pipeline
    from flashvlm.bundle import Bundle
    from flashvlm_export.compile.engines import CompileOptions, compile_bundle

    try:
        options = CompileOptions(_bundle(job), target=target, compute_capabilities=capabilities, plugins=plugins)
        report = compile_bundle(options)
    except FlashVLMError as refusal:
        raise Skip(f"flashvlm-compile: {refusal}") from None
    record.fact("compile_seconds", round(report.seconds, 1))
    name = target if plugins is None else f"{target} with plugins"
    _compare(job, record, name, lambda path: Pipeline.from_bundle(path, backend=target, device=0, plugins=plugins))
    runner = graphs.tensorrt_runner(target, report.folder)
    graphs.compare(record, name, Bundle(_bundle(job)), runner, report.manifest.flags.max_seq, job.seed)


def _bundle(job: Job) -> Path:
    if "bundle" not in job.facts:
        raise Skip("there is no bundle", "see the section bundle")
    return Path(job.facts["bundle"])


def _compare(job: Job, record: Record, name: str, open_other: Open, must_run_on: str = "") -> None:
    from flashvlm import Pipeline

    path = _bundle(job)
    try:
        reference = Recorded(Pipeline.from_bundle(path, backend="onnxruntime", provider="cpu"))
    except FlashVLMError as refusal:
        raise Skip(f"ONNX Runtime CPU, the reference: {refusal}") from None
    try:
        other = Recorded(open_other(path))
        other.answer("all")
    except FlashVLMError as refusal:
        raise Skip(str(refusal)) from None
    if must_run_on:
        _check_provider(other, must_run_on)
    compare(record, name, reference, other)
    times(record, name, other)


def _check_provider(other: Recorded, wanted: str) -> None:
    """ONNX Runtime takes the CPU, with no more than a warning, where a library of CUDA's is missing."""
    for name, graph in other.pipeline._session._graphs.items():
        if wanted not in graph.session.get_providers():
            raise Skip(
                f"ONNX Runtime runs {name} on {', '.join(graph.session.get_providers())}, not on {wanted}",
                "install the CUDA and cuDNN that this onnxruntime-gpu is built for",
            )


class Recorded:
    """A pipeline whose logits are kept."""

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        self.logits: list[np.ndarray] = []  # [1, V] of each step
        session = pipeline._session
        decode = session.decode

        def recording(*arguments: Any, **named: Any) -> np.ndarray:
            logits = decode(*arguments, **named)
            self.logits.append(np.array(logits, dtype=np.float64))
            return logits

        session.decode = recording

    def answer(self, budget: int | str) -> Any:
        """Greedily, vision included."""
        self.logits.clear()
        self.pipeline.encoder.forget_images()
        return self.pipeline.generate(PICTURE, QUESTION, budget=budget, max_new_tokens=NEW_TOKENS)


def compare(record: Record, name: str, reference: Recorded, other: Recorded) -> None:
    error, steps = _logits_error(reference, other, "all")[:2]
    record.check(f"{name}: relative error of the logits, all image tokens", steps, error, BOUND)
    for budget in reference.pipeline.bundle.manifest.selection.budgets:
        error, steps, wanted, found = _logits_error(reference, other, budget)
        different = 1 - len(np.intersect1d(wanted.kept, found.kept)) / len(wanted.kept)
        lawful = len(found.kept) == budget and bool((np.diff(found.kept) > 0).all())
        passed = lawful and different <= DIFFERENT_BOUND
        record.check(
            f"{name}: share of other tokens kept, budget {budget}", 1, different, DIFFERENT_BOUND, passed=passed
        )
        if different == 0:  # else the decoder reads other tokens, and rightly says something else
            record.check(f"{name}: relative error of the logits, budget {budget}", steps, error, BOUND)


def _logits_error(reference: Recorded, other: Recorded, budget: int | str) -> tuple[float, int, Any, Any]:
    """Over the steps in which both had read the same tokens; how many those were; both answers."""
    wanted, found = reference.answer(budget), other.answer(budget)
    same = 1  # prefill
    for a, b in zip(wanted.token_ids, found.token_ids, strict=False):
        if a != b:
            break
        same += 1
    pairs = list(zip(reference.logits, other.logits, strict=False))[:same]
    errors = [float(np.linalg.norm(a - b) / np.linalg.norm(a)) for a, b in pairs]
    return max(errors), len(errors), wanted, found


def times(record: Record, name: str, pipeline: Recorded) -> None:
    """Wall time of each stage."""
    dtype = pipeline.pipeline.bundle.manifest.model.dtypes.activations
    for budget in (*pipeline.pipeline.bundle.manifest.selection.budgets, "all"):
        runs = [pipeline.answer(budget).timings for _ in range(RUNS + 1)][1:]
        stages = {stage: [getattr(run, stage) for run in runs] for stage in ("vision", "select", "prefill")}
        stages["decode a token"] = [step for run in runs for step in run.decode]
        for stage, milliseconds in stages.items():
            if milliseconds:
                what = f"{name}, budget {budget}: {stage}"
                record.timing(what, dtype, 1, "wall clock", [time * 1e3 for time in milliseconds])


def _export(folder: Path, like: str) -> Path:
    from flashvlm_export.exporter import ExportOptions, export
    from flashvlm_export.testing import checkpoints

    checkpoints.write_checkpoint(like, folder / "checkpoint", dtype="float16")  # TensorRT's attention has no float32
    export(ExportOptions(str(folder / "checkpoint"), folder / "bundle", budgets=(4,) if like == "tiny" else (64,)))
    shutil.rmtree(folder / "checkpoint")
    return folder / "bundle"


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)
