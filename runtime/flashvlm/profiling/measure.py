"""Where the milliseconds and megabytes of an answer go, at each budget of a bundle.

Every number comes from ``Pipeline.generate``, the path ``flashvlm-run`` takes, on synthetic input: a prompt of a given
number of tokens, an image that was not seen before each run (a given one with a pixel changed, or one made up) and
answers that never end early. Budgets take turns within a run, so that
drift of the machine (clocks, heat, other work) meets all of them alike, and ratios compare neighbours in time.
"""

from __future__ import annotations

import math
import os
import platform
import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from flashvlm.budget import ALL, Budget, choose_budget
from flashvlm.bundle import Bundle
from flashvlm.dtypes import NUMPY_DTYPES
from flashvlm.errors import PromptError
from flashvlm.generation import Timings, capacity_for
from flashvlm.graph_io import DECODER, TensorSpec, is_past
from flashvlm.manifest import PROCESSOR, Manifest
from flashvlm.pipeline import Pipeline
from flashvlm.profiling.synthetic import PHOTO, synthetic_photo, synthetic_prompt, synthetic_sight, variations
from flashvlm.sessions import Limits

STAGES = ("preprocess", "vision", "select", "prefill", "decode")  # decode: of one token


@dataclass(frozen=True)
class ProfileOptions:
    """What to measure.

    prompt_tokens: text of the prompt with its template, without the image. new_tokens: of an answer, at least 2.
    image: name of the picture, None for synthetic ones. photo: its pixels, width and height.
    """

    budgets: tuple[Budget, ...]
    prompt_tokens: int = 40
    new_tokens: int = 64
    runs: int = 20
    warm_up: int = 2
    image: str | None = None
    photo: tuple[int, int] = PHOTO


@dataclass(frozen=True)
class Spread:
    """Median, 10th and 90th percentile of repeated measurements, in the unit of the samples."""

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        p10, median, p90 = np.percentile(np.asarray(samples, dtype=np.float64), (10, 50, 90)).tolist()
        return cls(median, p10, p90)

    def __add__(self, other: Spread) -> Spread:
        return Spread(self.median + other.median, self.p10 + other.p10, self.p90 + other.p90)

    def times(self, factor: float) -> Spread:
        return Spread(self.median * factor, self.p10 * factor, self.p90 * factor)

    def over(self, other: Spread) -> Spread:
        """The ratio of two independent measurements: at worst low over high, at best high over low."""
        return Spread(self.median / other.median, self.p10 / other.p90, self.p90 / other.p10)


@dataclass(frozen=True)
class BudgetProfile:
    """One budget: milliseconds, tokens and bytes.

    stages       milliseconds of each of ``STAGES`` that ran; decode is the mean of a run's steps
    first_token  all stages before decode together
    answer       first_token and every decode step
    speedup      first_token of "all" in the same run over this one's; None if "all" was not measured
    kv_bytes     the KV cache as allocated for prompt and answer
    """

    budget: Budget
    text_tokens: int
    image_tokens: int
    kv_bytes: int
    stages: dict[str, Spread]
    first_token: Spread
    answer: Spread
    speedup: Spread | None

    @property
    def tokens_per_second(self) -> float:
        return 1e3 / self.stages["decode"].median


@dataclass(frozen=True)
class Profile:
    """What was measured, on what, and how.

    backend       in words, such as "ONNX Runtime 1.31.1, cpu"
    disk_bytes    graphs, weights and embedding table
    interleaved   budgets took turns; if not, ratios between them include what the machine did meanwhile
    peak_resident highest resident memory of this process so far, over all budgets; None where others did the work
    layers        milliseconds by graph path of each graph that trtexec profiled
    commands      the lines that measured, if they were not in this process
    """

    bundle: str
    model: str
    dtype: str
    method: str
    backend: str
    machine: dict[str, str | int]
    options: ProfileOptions
    disk_bytes: int
    budgets: tuple[BudgetProfile, ...]
    interleaved: bool
    peak_resident: int | None = None
    layers: dict[str, dict[str, float]] = field(default_factory=dict)
    commands: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recommendation:
    """The largest budget whose p90 of the time to first token is within ``target_ms``, or None; and the fastest one.

    runs: how many the percentile is of; of one run it is that run.
    """

    target_ms: float
    budget: Budget | None
    p90_ms: float  # of ``budget``, else of ``fastest``
    fastest: Budget
    runs: int

    def __str__(self) -> str:
        measured = "one run" if self.runs == 1 else f"p90 of {self.runs} runs"
        target, found = f"{_in_words(self.target_ms)} ms", f"{_in_words(self.p90_ms)} ms ({measured})"
        if self.budget is None:
            return f"no budget gives the first token within {target}; the closest is {self.fastest} with {found}"
        return f"budget {self.budget} is the largest with the first token within {target}: {found}"


def _in_words(milliseconds: float) -> str:
    return f"{milliseconds:,.0f}" if milliseconds >= 1000 else f"{milliseconds:.4g}"


def measure(
    pipeline: Pipeline,
    backend: str,
    options: ProfileOptions,
    advance: Callable[[int], None],
    image: Image.Image | None = None,
) -> Profile:
    """Measures every budget in turn, ``options.runs`` times after ``options.warm_up``.

    ``image`` is an RGB picture to ask about, None for synthetic ones; its decoding is not measured. ``advance(1)`` is
    called after each answer, ``(runs + warm_up) * len(budgets)`` times.

    Raises:
        FlashVLMError: a budget is not in the bundle, or prompt and answer do not fit it.
    """
    bundle = pipeline.bundle
    check_options(bundle.manifest, options, pipeline.limits)
    seen = synthetic_sight(bundle.manifest, options.photo)
    prompt, encoded = synthetic_prompt(bundle, options.prompt_tokens, options.photo)
    text_tokens = len(encoded.input_ids) - seen.runs
    samples: dict[Budget, list[Timings]] = {budget: [] for budget in options.budgets}
    picture = synthetic_photo if image is None else variations(image)
    with _endless(bundle):
        for run in range(-options.warm_up, options.runs):
            for turn in range(len(options.budgets)):
                # The order rotates: no budget always follows the same neighbour.
                budget = options.budgets[(run + turn) % len(options.budgets)]
                image = picture((run + options.warm_up) * len(options.budgets) + turn)
                answer = pipeline.generate(image, prompt, budget=budget, max_new_tokens=options.new_tokens)
                if run >= 0:
                    samples[budget].append(answer.timings)
                advance(1)
    profiles = []
    for budget in options.budgets:
        tokens = text_tokens, seen.tokens(budget)
        rows = pipeline.limits.capacity or allocated_rows(sum(tokens), options.new_tokens)
        kv = kv_bytes(bundle, rows)
        profiles.append(summarise(budget, tokens, kv, samples[budget], samples.get(ALL)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB
    return describe(bundle, backend, options, tuple(profiles), interleaved=True, peak_resident=peak)


def describe(
    bundle: Bundle, backend: str, options: ProfileOptions, budgets: tuple[BudgetProfile, ...], **more: Any
) -> Profile:
    """Measurements, and what they are of. ``more``: the other fields of ``Profile``."""
    model = bundle.manifest.model
    return Profile(
        bundle=str(bundle.path),
        model=model.name,
        dtype=model.dtypes.activations,
        method=bundle.manifest.selection.method,
        backend=backend,
        machine=machine(),
        options=options,
        disk_bytes=disk_bytes(bundle.manifest),
        budgets=budgets,
        **more,
    )


@contextmanager
def _endless(bundle: Bundle) -> Iterator[None]:
    """Within the context no token stops an answer: every run has as many decode steps."""
    manifest = bundle.manifest
    model = manifest.model.model_copy(update={"eos_token_ids": ()})
    bundle.manifest = manifest.model_copy(update={"model": model})
    try:
        yield
    finally:
        bundle.manifest = manifest


def summarise(
    budget: Budget, tokens: tuple[int, int], kv: int, samples: Sequence[Timings], baseline: Sequence[Timings] | None
) -> BudgetProfile:
    """Statistics over the runs of one budget; ``baseline`` holds the same runs with all tokens."""
    columns = {stage: [_stage(t, stage) for t in samples] for stage in STAGES}
    first = [_first_token(t) for t in samples]
    return BudgetProfile(
        budget=budget,
        text_tokens=tokens[0],
        image_tokens=tokens[1],
        kv_bytes=kv,
        stages={stage: Spread.of(column) for stage, column in columns.items()},
        first_token=Spread.of(first),
        answer=Spread.of([t.total for t in samples]),
        speedup=None
        if baseline is None
        else Spread.of([_first_token(b) / f for b, f in zip(baseline, first, strict=True)]),
    )


def _stage(timings: Timings, stage: str) -> float:
    return float(np.mean(timings.decode)) if stage == "decode" else float(getattr(timings, stage))


def _first_token(timings: Timings) -> float:
    return timings.preprocess + timings.vision + timings.select + timings.prefill


def recommend(profile: Profile, target_ms: float) -> Recommendation:
    """The largest budget whose 90th percentile of the time to first token is within the target."""
    by_size = sorted(profile.budgets, key=lambda b: b.image_tokens, reverse=True)
    fastest = min(by_size, key=lambda b: b.first_token.p90)
    best = next((b for b in by_size if b.first_token.p90 <= target_ms), None)
    shown = fastest if best is None else best
    runs = profile.options.runs
    return Recommendation(target_ms, None if best is None else best.budget, shown.first_token.p90, fastest.budget, runs)


# --- sizes ---------------------------------------------------------------------------------------------------------


def check_options(manifest: Manifest, options: ProfileOptions, limits: Limits | None = None) -> None:
    """Refuses budgets the bundle lacks, and prompts and answers beyond its capacity, or that of an opened pipeline."""
    limits = limits or Limits(manifest.model.max_seq)
    for budget in options.budgets:
        choose_budget(budget, manifest.selection.budgets, manifest.selection.default, manifest.candidates)
    largest = max(map(synthetic_sight(manifest, options.photo).tokens, options.budgets))
    needed = options.prompt_tokens + largest + options.new_tokens - 1
    if needed > limits.max_seq:
        raise PromptError(
            f"{options.prompt_tokens} prompt, {largest} image and {options.new_tokens} new tokens need {needed} slots, "
            f"{limits.holder} {limits.max_seq}: take smaller ones, or {limits.larger(max_seq=needed)}"
        )


def allocated_rows(prompt: int, new_tokens: int) -> int:
    """Rows of the KV cache that an answer allocates; the last new token needs none."""
    return capacity_for(prompt + new_tokens - 1)


def kv_bytes(bundle: Bundle, rows: int) -> int:
    """Bytes of the KV cache of one conversation with this many rows."""
    return sum(_bytes(spec, {"batch": 1, "capacity": rows}) for spec in bundle.graph(DECODER).inputs if is_past(spec))


def _bytes(spec: TensorSpec, sizes: dict[str, int]) -> int:
    shape = [sizes[d] if isinstance(d, str) else d for d in spec.shape]
    return math.prod(shape) * NUMPY_DTYPES[spec.dtype].itemsize


def disk_bytes(manifest: Manifest) -> int:
    """Everything of the bundle but the tokenizer's files."""
    return sum(spec.size for name, spec in manifest.files.items() if not name.startswith(f"{PROCESSOR}/"))


def machine() -> dict[str, str | int]:
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "numpy": np.__version__,
    }
