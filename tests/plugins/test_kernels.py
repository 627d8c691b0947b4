"""The CUDA kernels, run by the host emulation, against flashvlm_export.selection.flashvlm and a float64 reference.

With FLASHVLM_TEST_DEVICE=cuda the same tests run the kernels themselves, on the GPU of the machine.
"""

from __future__ import annotations

import ctypes
import math
import os
import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the references are torch code")

from plugin_references import check_choice, check_score  # noqa: E402

from flashvlm_export.selection import SelectionInputs, SelectionParams, select  # noqa: E402
from flashvlm_export.testing.references import DEFAULTS, DEGENERATE, ROUNDING, choice64, degenerate, make  # noqa: E402
from gpu_checks.build import build_emulation, build_for_gpu  # noqa: E402
from gpu_checks.kernels import Kernels, LloydCall, ScoreCall  # noqa: E402

# On a GPU they are of another tier as well: scripts/test -m gpu.
pytestmark = [pytest.mark.gpu] if os.environ.get("FLASHVLM_TEST_DEVICE") == "cuda" else []

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
ORDERS = (0, 1, 2)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, once) -> Kernels:
    if os.environ.get("FLASHVLM_TEST_DEVICE") == "cuda":
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        return Kernels(build_for_gpu(tmp_path_factory.mktemp("kernels"), capability), "cuda")
    if shutil.which("g++") is None:
        pytest.skip("no g++: the kernels cannot be emulated on this machine")
    return Kernels(once("kernels-host", build_emulation) / "libflashvlm_kernels_host.so")


@pytest.fixture
def kernels(built: Kernels) -> Kernels:
    built.order(0)
    return built


# One token, one word; below, at and above every tile, block and stage; many text tiles; many slices of the width.
SHAPES = [
    {"N": 1, "D": 8, "L": 1},
    {"N": 7, "D": 72, "L": 3},
    {"N": 64, "D": 64, "L": 64},
    {"N": 65, "D": 136, "L": 65},
    {"N": 130, "D": 520, "L": 129},
    {"N": 257, "D": 1032, "L": 31},
    {"N": 40, "D": 2048, "L": 512},
]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("masks", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scores(kernels, shape, masks, dtype):
    check_score(kernels, make(B=2, **shape, seed=shape["N"], masks=masks, dtype=dtype))


@pytest.mark.parametrize("field", ["eta", "temperature", "pool_temperature", "eps"])
@pytest.mark.parametrize("end", [0, 1])
def test_scores_at_the_ends_of_each_constant(kernels, field, end):
    low, high = {"eta": (0.0, 1.0), "temperature": (1e-3, 1e6), "pool_temperature": (1e-3, 1e6), "eps": (1e-30, 0.5)}[
        field
    ]
    check_score(kernels, make(N=50, L=70, masks=True), SelectionParams(**{field: high if end else low}), tolerance=5e-3)


@pytest.mark.parametrize("kind", DEGENERATE)
def test_degenerate_inputs(kernels, kind):
    x = degenerate(kind, make(B=2, N=37, masks=kind in ("pairs", "half zero"), seed=4))
    check_score(kernels, x)
    for budget, options in [(1, {}), (8, {}), (8, {"top_ratio": 0.0}), (8, {"iterations": 1}), (20, {}), (37, {})]:
        check_choice(kernels, x, budget, SelectionParams(**options))
    for budget in (9, 30):
        check_choice(kernels, x, budget, SelectionParams(iterations=0))


@pytest.mark.parametrize("iterations", [0, 1, 4])
@pytest.mark.parametrize(("N", "budget", "top_count"), [(1, 1, 0), (37, 9, 4), (90, 40, 0), (129, 40, 40)])
def test_the_float64_choice_is_that_of_torch(N, budget, top_count, iterations):
    """The reference that GPUs are held to: where it calls a decision close, and only there, torch may differ."""
    params = SelectionParams(top_ratio=top_count / budget, iterations=iterations)
    for seed in range(5):
        x = make(B=2, N=N, seed=seed, masks=True)
        wanted = select(*x, budget=budget, params=params)
        for b in range(2):
            features, scores, valid = (t[b].numpy() for t in (x.features, wanted.scores, x.valid))
            exact = choice64(features, scores, valid, budget, top_count, iterations)
            same = np.array_equal(exact.kept, wanted.kept[b]) and np.array_equal(exact.is_top, wanted.is_top[b])
            assert same or exact.margin < ROUNDING


def test_padding_may_hold_anything(kernels):
    x = make(B=2, N=70, L=9, masks=True)
    clean = kernels.score(x, DEFAULTS)
    projected = x.projected.masked_fill(~x.valid[:, :, None], math.nan)
    query = x.query.masked_fill(~x.query_mask[:, :, None], math.inf)
    saliency = x.saliency.masked_fill(~x.valid, math.nan)
    dirty = kernels.score(x._replace(projected=projected, query=query, saliency=saliency), DEFAULTS)
    assert torch.equal(clean, dirty)


def test_negative_zero_ties_with_zero(kernels):
    x = make(N=12)
    scores = torch.tensor([[-0.0, 0.0, -1.0, 0.0, -0.0, 1.0, -0.0, 0.0, 0.0, -2.0, -0.0, 0.0]])
    kept, _ = kernels.lloyd(x.features, scores, x.valid, 5, 5)
    assert kept.tolist() == [[0, 1, 3, 4, 5]]


def test_nan_in_the_features_still_gives_distinct_tokens(kernels):
    x = make(B=1, N=40)
    scores = torch.randn(1, 40)
    scores[0, 5] = math.nan
    kept, _ = kernels.lloyd(torch.full_like(x.features, math.nan), scores, x.valid, 16, 8)
    assert (kept.diff(dim=1) > 0).all()
    assert (kept >= 0).all()
    assert (kept < 40).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("masks", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize(
    ("N", "Dv", "budget"), [(1, 8, 1), (33, 8, 9), (64, 64, 16), (129, 136, 40), (300, 72, 25), (200, 24, 200)]
)
def test_choice(kernels, N, Dv, budget, masks, dtype):
    check_choice(kernels, make(B=2, N=N, Dv=Dv, masks=masks, dtype=dtype, seed=N), budget)


@pytest.mark.parametrize("iterations", [0, 1, 2, 7])
@pytest.mark.parametrize("top_ratio", [0.0, 0.3, 1.0])
def test_choice_of_every_kind(kernels, top_ratio, iterations):
    params = SelectionParams(top_ratio=top_ratio, iterations=iterations)
    check_choice(kernels, make(B=3, N=90, masks=True, seed=8), 17, params)


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int32], ids=str)
def test_the_order_of_threads_changes_nothing(kernels, mask_dtype):
    """A missing barrier would show here, and a sum in an order that the hardware decides."""
    x = make(B=2, N=150, D=264, Dv=72, L=70, masks=True, dtype=torch.float16)
    results = []
    for order in ORDERS:
        kernels.order(order)
        scores = kernels.score(x, DEFAULTS, mask_dtype)
        results.append([scores, *kernels.lloyd(x.features, scores, x.valid, 60, 30, 4, mask_dtype)])
        results.append([scores, *kernels.lloyd(x.features, scores, x.valid, 60, 30, 0, mask_dtype)])
    for other in ORDERS[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], results[2 * other], strict=True))
        assert all(torch.equal(a, b) for a, b in zip(results[1], results[2 * other + 1], strict=True))


def test_an_item_alone_is_the_item_in_a_batch(kernels):
    x = make(B=3, N=77, D=136, L=20, masks=True)
    scores = kernels.score(x, DEFAULTS)
    kept, _ = kernels.lloyd(x.features, scores, x.valid, 20, 10)
    for b in range(3):
        alone = SelectionInputs(*(t[b : b + 1].clone() for t in x))
        assert torch.equal(kernels.score(alone, DEFAULTS), scores[b : b + 1])
        assert torch.equal(kernels.lloyd(alone.features, scores[b : b + 1], alone.valid, 20, 10)[0], kept[b : b + 1])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_llava_size(kernels, dtype):
    x = make(N=576, D=4096, Dv=1024, L=64, seed=2, dtype=dtype)
    check_score(kernels, x)
    check_choice(kernels, x, 64)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_largest_size(kernels, dtype):
    x = make(B=1, N=4096, D=136, Dv=72, L=512, seed=3, masks=True, dtype=dtype)
    check_score(kernels, x)
    check_choice(kernels, x, 640)
    check_choice(kernels, x, 4096, SelectionParams(top_ratio=0.06, iterations=1))


def test_workspace_never_shrinks_as_a_shape_grows(kernels):
    def grows(size, *ranges):
        for axis, values in enumerate(ranges):
            for others in np.ndindex(*(len(r) for i, r in enumerate(ranges) if i != axis)):
                chosen = [r[i] for r, i in zip((r for i, r in enumerate(ranges) if i != axis), others, strict=True)]
                sizes = [size(*chosen[:axis], value, *chosen[axis:]) for value in values]
                assert sizes == sorted(sizes)

    tokens, width = (1, 63, 64, 65, 128, 577, 1000, 2880, 4096), (8, 64, 72, 1024, 1152, 4096, 8192)
    grows(kernels.c.flashvlm_score_workspace, (1, 2, 8), tokens, (1, 64, 65, 300, 512), width)
    grows(lambda *shape: kernels.c.flashvlm_lloyd_workspace(*shape, 1, 0), (1, 2, 8), tokens, width)
    assert all(kernels.c.flashvlm_lloyd_workspace(1, 576, 1024, 64, top) for top in range(65))


def test_refusals(kernels):
    """Bad calls are refused before anything is read or written."""
    memory = torch.zeros(64)
    at = memory.data_ptr()
    score = dict.fromkeys(("projected", "query", "query_mask", "saliency", "valid", "scores"), at)
    score |= {"batch": 1, "tokens": 4, "text": 2, "width": 8, "dtype": 0, "mask_bytes": 1}
    score |= {"eta": 0.5, "temperature": 0.016, "pool_temperature": 1.0, "eps": 1e-6}
    lloyd = dict.fromkeys(("features", "scores", "valid", "kept", "is_top"), at)
    lloyd |= {"batch": 1, "tokens": 4, "width": 8, "dtype": 0, "mask_bytes": 1}
    lloyd |= {"budget": 2, "top_count": 1, "iterations": 4}
    shape, dtype, parameter, pointer, workspace = "shape", "dtype", "parameter", "pointer", "workspace"
    bad_shapes = [{"batch": 0}, {"tokens": 0}, {"tokens": 4097}, {"width": 12}, {"width": 0}, {"width": 65544}]
    both = [(change, shape) for change in bad_shapes]
    both += [(change, dtype) for change in ({"dtype": 3}, {"dtype": -1}, {"mask_bytes": 2})]
    cases = [(kernels.c.flashvlm_score, ScoreCall, score | change, word) for change, word in both]
    cases += [(kernels.c.flashvlm_lloyd, LloydCall, lloyd | change, word) for change, word in both]
    for change, word in [
        ({"text": 0}, shape), ({"text": 513}, shape), ({"eta": 1.5}, parameter), ({"eta": math.nan}, parameter),
        ({"temperature": 0.0}, parameter), ({"pool_temperature": -1.0}, parameter), ({"eps": 0.9}, parameter),
        ({"query": 0}, pointer), ({"query": at + 8}, pointer), ({"scores": at + 2}, pointer), ({}, workspace),
    ]:  # fmt: skip
        cases.append((kernels.c.flashvlm_score, ScoreCall, score | change, word))
    for change, word in [
        ({"budget": 0}, parameter), ({"budget": 5}, parameter), ({"top_count": 3}, parameter),
        ({"top_count": -1}, parameter), ({"iterations": 101}, parameter), ({"kept": 0}, pointer), ({}, workspace),
    ]:  # fmt: skip
        cases.append((kernels.c.flashvlm_lloyd, LloydCall, lloyd | change, word))
    for function, kind, fields, word in cases:
        size = 0 if word == "workspace" else 1 << 40
        assert kernels.text(function(ctypes.byref(kind(**fields)), at, size, None)).startswith(word + ":"), fields
