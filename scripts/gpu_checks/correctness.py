"""The kernels against float64 references on fresh inputs: every type, odd sizes, masks, degenerate inputs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch

from flashvlm_export.selection import SelectionInputs, SelectionParams
from flashvlm_export.testing.references import DEFAULTS, DEGENERATE, ROUNDING, choice64, degenerate, make, score64

from .kernels import Kernels
from .record import Job, Record, Skip

# Of the log-score: 2e-6 of a cosine is 6.3e-5 after division by twice the temperature of 0.016.
SCORE_BOUND = 8e-5
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# B, N, D, L: one token, one word; below, at and above every tile, block and stage; many text tiles; many slices.
SCORES = (
    (1, 1, 8, 1), (3, 7, 72, 3), (2, 64, 64, 64), (2, 65, 136, 65), (2, 130, 520, 129), (4, 257, 1032, 31),
    (2, 40, 2048, 512), (1, 576, 4096, 64), (4, 576, 4096, 64), (2, 2880, 5120, 77), (1, 4096, 136, 512),
)  # fmt: skip
# B, N, Dv, K
CHOICES = (
    (1, 1, 8, 1), (3, 33, 8, 9), (2, 64, 64, 16), (2, 129, 136, 40), (2, 300, 72, 25), (2, 200, 24, 200),
    (1, 576, 1024, 64), (4, 576, 1024, 64), (2, 2880, 1152, 320), (1, 4096, 72, 640),
)  # fmt: skip
QUICK = 4  # cases of either list


def run(job: Job, record: Record) -> None:
    kernels = load(job)
    seeds = map(int, np.random.default_rng(job.seed).integers(0, 2**31, 10000))
    scores, choices = (SCORES[:QUICK], CHOICES[:QUICK]) if job.quick else (SCORES, CHOICES)
    for name, dtype in DTYPES.items():
        errors = [
            worst_error(kernels.score(x, DEFAULTS, mask), score64(x))
            for x, mask in _draws(scores, "BNDL", dtype, seeds)
        ]
        record.check(f"score, {name}: error of the log-score", len(errors), max(errors), SCORE_BOUND)
        tally = Tally()
        for (x, mask), (*_, budget) in zip(
            _draws(choices, "BNV", dtype, seeds), (c for c in choices for _ in range(2)), strict=True
        ):
            compare_choice(kernels, x, budget, DEFAULTS, tally, mask)
        record_tally(record, f"choice, {name}: items that keep other tokens", tally)
    _constants(kernels, record, seeds)
    _degenerate(kernels, record, seeds, (8, 20) if job.quick else (1, 8, 20, 37))
    _repeats(kernels, record, next(seeds), 90 if job.quick else 300)


def load(job: Job) -> Kernels:
    if "library" not in job.facts:
        raise Skip("the kernels were not built", "see the section build")
    if job.device == "cuda":
        need_torch_cuda()
    return Kernels(job.facts["library"], "cuda" if job.device == "cuda" else "cpu")


def need_torch_cuda() -> None:
    if not torch.cuda.is_available():
        built = "without CUDA" if torch.version.cuda is None else f"for CUDA {torch.version.cuda}"
        raise Skip(f"torch {torch.__version__}, built {built}, sees no GPU", "install a build of torch for this driver")


def _draws(
    cases: tuple[tuple[int, ...], ...], axes: str, dtype: torch.dtype, seeds: Iterator[int]
) -> Iterator[tuple[SelectionInputs, torch.dtype]]:
    """Each case whole with bool masks, and with holes in int32 masks."""
    for case in cases:
        sizes = {axis if axis != "V" else "Dv": size for axis, size in zip(axes, case, strict=False)}
        for masks, mask_dtype in ((False, torch.bool), (True, torch.int32)):
            yield make(**sizes, seed=next(seeds), masks=masks, dtype=dtype), mask_dtype


def worst_error(found: torch.Tensor, wanted: np.ndarray) -> float:
    """Largest absolute difference; NaN where either holds one."""
    return float(np.abs(found.double().numpy() - wanted).max())


class Chooses(Protocol):
    """``Kernels``, or what takes their place."""

    def lloyd(
        self,
        features: torch.Tensor,
        scores: torch.Tensor,
        valid: torch.Tensor,
        budget: int,
        top_count: int,
        iterations: int = 4,
        mask_dtype: torch.dtype = torch.bool,
    ) -> tuple[torch.Tensor, torch.Tensor]: ...


@dataclass
class Tally:
    items: int = 0
    different: int = 0
    undecided: int = 0  # of the items that differ, those whose closest decision is within rounding


def compare_choice(
    kernels: Chooses,
    x: SelectionInputs,
    budget: int,
    params: SelectionParams,
    tally: Tally,
    mask_dtype: torch.dtype = torch.bool,
) -> None:
    """Index for index, given the same scores. An item whose decision hangs on rounding may differ, and is counted."""
    scores = torch.from_numpy(score64(x, params)).float()
    top_count = math.floor(budget * params.top_ratio + 1e-9)
    found = kernels.lloyd(x.features, scores, x.valid, budget, top_count, params.iterations, mask_dtype)
    for b, (kept, is_top) in enumerate(zip(*(t.numpy() for t in found), strict=True)):
        features, valid = x.features[b].double().numpy(), x.valid[b].numpy()
        wanted = choice64(features, scores[b].numpy(), valid, budget, top_count, params.iterations)
        tally.items += 1
        lawful = (np.diff(kept) > 0).all() and kept.min() >= 0 and kept.max() < len(valid)
        if not lawful or not np.array_equal(kept[is_top], wanted.kept[wanted.is_top]):
            tally.different += 1
        elif not np.array_equal(kept, wanted.kept):
            tally.different += wanted.margin > ROUNDING
            tally.undecided += wanted.margin <= ROUNDING


def record_tally(record: Record, name: str, tally: Tally) -> None:
    detail = f"{tally.undecided} more differ where float64 decides by less than {ROUNDING:g}" if tally.undecided else ""
    record.check(name, tally.items, tally.different, 0, detail=detail)


def _constants(kernels: Kernels, record: Record, seeds: Iterator[int]) -> None:
    """The ends of each constant's range; every kind of choice."""
    ranges = {"eta": (0.0, 1.0), "temperature": (1e-3, 1e6), "pool_temperature": (1e-3, 1e6), "eps": (1e-30, 0.5)}
    errors = []
    for name, ends in ranges.items():
        for end in ends:
            x, params = make(N=50, L=70, masks=True, seed=next(seeds)), replace(DEFAULTS, **{name: end})
            errors.append(worst_error(kernels.score(x, params), score64(x, params)))
    # A temperature of 1e-3 magnifies a cosine's rounding four times as much as the default.
    record.check("score at the ends of its constants", len(errors), max(errors), 5e-3)
    tally = Tally()
    for top_ratio in (0.0, 0.3, 1.0):
        for iterations in (0, 1, 7):
            params = replace(DEFAULTS, top_ratio=top_ratio, iterations=iterations)
            compare_choice(kernels, make(B=3, N=90, masks=True, seed=next(seeds)), 17, params, tally)
    record_tally(record, "choice of every share and number of iterations", tally)


def _degenerate(kernels: Kernels, record: Record, seeds: Iterator[int], budgets: tuple[int, ...]) -> None:
    errors, tally = [], Tally()
    for kind in DEGENERATE:
        x = degenerate(kind, make(B=2, N=37, masks=kind in ("pairs", "half zero"), seed=next(seeds)))
        errors.append(worst_error(kernels.score(x, DEFAULTS), score64(x)))
        for budget in budgets:
            compare_choice(kernels, x, budget, DEFAULTS, tally)
    record.check("score of degenerate inputs", len(errors), max(errors), SCORE_BOUND)
    record_tally(record, "choice of degenerate inputs", tally)


def _repeats(kernels: Kernels, record: Record, seed: int, tokens: int) -> None:
    """The same again, alone as in the batch, and in a CUDA graph: bit for bit."""
    x = make(B=3, N=tokens, D=264, Dv=72, L=70, masks=True, seed=seed, dtype=torch.float16)

    def results(x: SelectionInputs) -> list[torch.Tensor]:
        scores = kernels.score(x, DEFAULTS)
        return [scores, *kernels.lloyd(x.features, scores, x.valid, 60, 30)]

    first = results(x)
    orders = range(3) if kernels.device.type == "cpu" else range(20)
    changed = 0
    for order in orders:
        kernels.order(order % 3)
        changed += not _same(first, results(x))
    kernels.order(0)
    record.check("runs that give other bits", len(orders), changed, 0)
    alone = [results(SelectionInputs(*(t[b : b + 1].clone() for t in x))) for b in range(3)]
    changed = sum(not _same([t[b : b + 1] for t in first], alone[b]) for b in range(3))
    record.check("items that differ alone and in a batch", 3, changed, 0)
    if kernels.device.type == "cuda":
        record.check("CUDA graph replays that give other bits", 3, _graph_changes(kernels, x, first), 0)


def _graph_changes(kernels: Kernels, x: SelectionInputs, wanted: list[torch.Tensor]) -> int:
    score = kernels.prepare_score(x, DEFAULTS)
    scores = score.outputs[0][: x.valid.numel()].view(x.valid.shape)
    lloyd = kernels.prepare_lloyd(x.features, scores, x.valid, 60, 30)  # reads the scores where the graph writes them
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        score.launch()
        lloyd.launch()
    changed = 0
    for _ in range(3):
        for output in (*score.outputs, *lloyd.outputs):
            output.view(torch.int32).fill_(-1)
        graph.replay()
        kept, is_top = (raw[: 3 * 60].view(3, 60).cpu() for raw in lloyd.outputs)
        changed += not _same(wanted, [scores.cpu(), kept, is_top.bool()])
    return changed


def _same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(a, b, strict=True))
