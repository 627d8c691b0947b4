"""What holds for every selection method, in torch and index for index on ONNX Runtime."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from selection_cases import GRAPH_NAMES, KINDS, degenerate, exported, nodes_of, row, run_onnx, same

from flashvlm.errors import SelectionError
from flashvlm_export.selection import (
    METHODS,
    TORCH,
    SelectionInputs,
    SelectionParams,
    select,
)
from flashvlm_export.selection.method import INPUTS
from flashvlm_export.testing.references import DEFAULTS, make


@settings(max_examples=300, deadline=None, derandomize=True)
@given(data=st.data())
def test_exactly_the_budget_comes_back_for_every_input(data):
    method = data.draw(st.sampled_from([m for m in METHODS if m != "none"]))
    N = data.draw(st.integers(1, 40))
    K = data.draw(st.sampled_from([1, N, (N + 1) // 2, max(1, N - 1)]))
    shape = {"B": 2, "N": N, "D": data.draw(st.integers(1, 9)), "Dv": data.draw(st.integers(1, 9))}
    inputs = make(**shape, L=3, seed=data.draw(st.integers(0, 99)), masks=data.draw(st.booleans()))
    inputs = degenerate(data.draw(st.sampled_from(KINDS)), inputs)
    choices = {
        "top_ratio": [0.0, 0.5, 1.0], "eta": [0.0, 0.5, 1.0], "iterations": [0, 1, 4], "seed": [0, 1],
        "partition_space": ["features", "projected"],
    }  # fmt: skip
    params = SelectionParams(
        **{n: data.draw(st.sampled_from(values)) for n, values in choices.items() if n in METHODS[method].params}
    )
    got = select(*inputs, method=method, budget=K, params=params)
    assert got.kept.shape == got.is_top.shape == (2, K)
    assert got.kept.dtype == torch.int64
    assert (got.kept.diff(dim=1) > 0).all()
    assert got.kept.min() >= 0
    assert got.kept.max() < N
    assert got.scores.isfinite().all()
    assert got.visual_embeds.isfinite().all()
    used = torch.gather(inputs.valid, 1, got.kept).sum(1)  # nothing invalid while something valid is left
    assert torch.equal(used, inputs.valid.sum(1).clamp(max=K))
    assert not (got.is_top & ~torch.gather(inputs.valid, 1, got.kept)).any()


@pytest.mark.parametrize("method", [name for name, entry in METHODS.items() if entry.reads])
def test_padding_changes_nothing(method):
    inputs = make(B=4, N=45, L=5, seed=9)
    noise = make(B=4, N=12, L=3, seed=10)
    padded = SelectionInputs(*(torch.cat(pair, 1) for pair in zip(inputs, noise, strict=True)))
    padded.query_mask[:, 5:] = False
    padded.valid[:, 45:] = False
    a, b = (select(*x, method=method, budget=13) for x in (inputs, padded))
    assert same(a, b)
    torch.testing.assert_close(a.scores, b.scores[:, :45], atol=5e-5, rtol=0)
    torch.testing.assert_close(a.visual_embeds, b.visual_embeds)


@pytest.mark.parametrize("method", METHODS)
def test_a_row_alone_is_the_row_in_a_batch(method):
    inputs = make(B=6, N=41, seed=11, masks=True)
    together = select(*inputs, method=method, budget=11)
    for b in range(6):
        alone = select(*row(inputs, b), method=method, budget=11)
        assert torch.equal(alone.kept[0], together.kept[b])
        assert torch.equal(alone.is_top[0], together.is_top[b])
        torch.testing.assert_close(alone.visual_embeds[0], together.visual_embeds[b])


@pytest.mark.parametrize("method", METHODS)
def test_half_precision_inputs_are_scored_in_float32(method):
    exact = make(B=8, N=64, D=48, seed=12)
    half = make(B=8, N=64, D=48, seed=12, dtype=torch.float16)
    got = select(*half, method=method, budget=16)
    assert got.visual_embeds.dtype == torch.float16
    assert got.scores.dtype == torch.float32
    widened = SelectionInputs(*(x.float() if x.is_floating_point() else x for x in half))
    assert same(got, select(*widened, method=method, budget=16))
    want = select(*exact, method=method, budget=16)
    agree = np.mean([len(set(a) & set(b)) / len(a) for a, b in zip(got.kept.tolist(), want.kept.tolist(), strict=True)])
    assert agree > (0.9 if METHODS[method].stable else 0.7)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_reads_what_it_declares(method):
    inputs, other = make(B=4, seed=13), make(B=4, seed=14)
    want = select(*inputs, method=method, budget=9)
    for name in INPUTS:
        got = select(*inputs._replace(**{name: getattr(other, name)}), method=method, budget=9)
        changed = not torch.equal(got.kept, want.kept)
        if name != "projected":  # of which the kept tokens are
            changed |= not torch.equal(got.visual_embeds, want.visual_embeds)
        assert changed == (name in METHODS[method].reads)


OTHER_PARAMS = {
    "eta": 0.9, "pool_temperature": 0.05, "temperature": 0.2, "eps": 0.01, "top_ratio": 0.2, "iterations": 0, "seed": 5,
    "partition_space": "projected",
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_a_method_reads_the_parameters_it_declares_and_refuses_others(method):
    inputs, entry = make(B=4, N=60, seed=13), METHODS[method]
    want = entry.choose(inputs, 15, DEFAULTS, TORCH)
    assert set(OTHER_PARAMS) == set(dataclasses.asdict(DEFAULTS))
    for name, value in OTHER_PARAMS.items():
        params = dataclasses.replace(DEFAULTS, **{name: value})
        got = entry.choose(inputs, 15, params, TORCH)
        changed = any(not torch.equal(a, b) for a, b in zip(got, want, strict=True))
        assert changed == (name in entry.params), name
        if name not in entry.params:
            with pytest.raises(SelectionError, match=f"^{name} is not a parameter of {method}, which reads "):
                select(*inputs, method=method, budget=15, params=params)
    assert entry.values(DEFAULTS) == {name: getattr(DEFAULTS, name) for name in entry.params}


@pytest.mark.parametrize("method", METHODS)
def test_a_score_is_what_its_method_declares(method):
    scores = select(*make(B=4, seed=18), method=method, budget=9).scores
    kind = METHODS[method].score
    assert scores.any() == (kind is not None)
    if kind == "cosine":  # less the best
        assert torch.equal(scores.amax(1), torch.zeros(4))
        assert scores.min() >= -2
    if kind == "log" and method != "flashvlm-published":  # whose bonus may lift it above one
        assert scores.max() <= 0


@pytest.mark.parametrize("method", METHODS)
def test_onnx_keeps_the_same_tokens(method):
    shape = {"N": 65, "D": 37, "Dv": 29}
    for seed, L in enumerate((1, 2, 5, 11, 40)):
        inputs = make(B=50, **shape, L=L, seed=100 + seed, masks=seed > 1)
        want, got = select(*inputs, method=method, budget=15), run_onnx(inputs, method, *shape.values(), 15)
        torch.testing.assert_close(got.scores, want.scores, atol=2e-4, rtol=0)
        if not METHODS[method].stable:
            for b in range(50):
                assert torch.equal(got.kept[b][got.is_top[b]], want.kept[b][want.is_top[b]])
        else:
            assert same(got, want)
            torch.testing.assert_close(got.visual_embeds, want.visual_embeds, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["zero saliency", "no query", "all zero", "one valid", "none valid"])
@pytest.mark.parametrize("method", METHODS)
def test_onnx_breaks_ties_the_same_way(method, kind):
    shape = {"N": 65, "D": 37, "Dv": 29}
    inputs = degenerate(kind, make(B=20, **shape, L=4, seed=7))
    want, got = select(*inputs, method=method, budget=15), run_onnx(inputs, method, *shape.values(), 15)
    if not METHODS[method].stable:
        assert torch.equal(got.is_top.sum(1), want.is_top.sum(1))
    else:
        assert same(got, want)


@pytest.mark.parametrize("method", METHODS)
def test_exported_graph_is_one_that_compilers_take(method):
    model = exported(method, 65, 37, 29, 15)
    nodes = nodes_of(model)
    ops = {node.op_type for node in nodes}
    assert not ops & {"ScatterND", "ScatterElements", "NonZero", "Compress", "Loop", "Scan", "If", "Einsum"}
    assert not ops & {"RandomUniform", "RandomNormal", "RandomUniformLike", "RandomNormalLike"}
    names = {GRAPH_NAMES.get(name, name) for name in SelectionInputs._fields}
    assert {d.name for d in model.graph.input} == names
    assert METHODS[method].fused == ("MaskedLloyd" in ops)
    if method == "flashvlm":
        assert len([node for node in nodes if node.op_type != "Constant"]) < 180
