"""Selection: against literal float64 references, and what it refuses."""

from __future__ import annotations

import dataclasses
import inspect
import math

import numpy as np
import pytest
import torch
from selection_cases import exported, nodes_of, run_onnx, same
from selection_references import PUBLISHED, REFERENCES, cosine, ref_relevance, ref_score, ref_trim, ref_visionzip

from flashvlm.errors import SelectionError
from flashvlm_export.cli import export as cli
from flashvlm_export.selection import (
    SelectionInputs,
    SelectionParams,
    select,
    text_guided_score,
)
from flashvlm_export.selection.uniform import evenly_spaced
from flashvlm_export.selection.vispruner import deduplication_steps
from flashvlm_export.testing.references import DEFAULTS, make, minmax64

CONSTANTS = (DEFAULTS.eta, DEFAULTS.temperature, DEFAULTS.pool_temperature, DEFAULTS.eps)


def valid_part(inputs: SelectionInputs, b: int) -> tuple[SelectionInputs, np.ndarray]:
    """One item without its padding, float64 numpy, and the indices that its tokens had."""
    p, f, s, q, query_mask, valid = (x[b].numpy() for x in inputs)
    p, f, s, q = (x.astype(np.float64) for x in (p, f, s, q))
    return SelectionInputs(p[valid], f[valid], s[valid], q[query_mask], None, None), np.flatnonzero(valid)


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("method", REFERENCES)
def test_method_matches_its_literal_reference(method, masks):
    K = 12
    inputs = make(B=8, N=48, seed=3, masks=masks)
    got = select(*inputs, method=method, budget=K)
    for b in range(8):
        item, index = valid_part(inputs, b)
        top, kept = REFERENCES[method](item, K)
        assert got.kept[b].tolist() == sorted(index[kept])
        assert got.kept[b][got.is_top[b]].tolist() == sorted(index[top])


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_score_matches_its_literal_reference(eta):
    inputs = make(B=6, N=40, D=64, L=9, seed=1, masks=True)
    p, _, s, q, query_mask, valid = inputs
    got = text_guided_score(p, q, query_mask, s, valid, eta, *CONSTANTS[1:])
    assert got.dtype == torch.float32
    for b in range(6):
        item, index = valid_part(inputs, b)
        want = ref_score(item, SelectionParams(eta=eta))
        np.testing.assert_allclose(got[b, index], want, atol=2e-4)
        np.testing.assert_allclose(got[b][~valid[b]], math.log(DEFAULTS.eps), rtol=1e-6)


def test_closed_form_has_the_ranks_of_the_published_softmax():
    item, _ = valid_part(make(N=64, D=64, seed=2), 0)
    r, a = ref_relevance(item), np.maximum(minmax64(item.saliency), 1e-6)
    sharp = (np.exp(r / 0.01) / np.exp(r / 0.01).sum()) ** 2.5
    published = np.sqrt(a) * np.sqrt(np.maximum(sharp / sharp.max(), 1e-6))
    closed = ref_score(item, PUBLISHED)
    assert np.argsort(-published, kind="stable").tolist() == np.argsort(-closed, kind="stable").tolist()
    np.testing.assert_allclose(np.log(published), closed, atol=1e-9)


def test_vispruner_is_published_flashvlm_without_the_question():
    inputs = make(B=5, N=60, seed=4, masks=True)
    blind = dataclasses.replace(DEFAULTS, eta=0.0)
    published = select(*inputs, method="flashvlm-published", budget=14, params=blind)
    vispruner = select(*inputs, method="vispruner", budget=14)
    assert same(published, vispruner)
    assert torch.equal(published.scores, vispruner.scores)


def test_published_bonus_goes_to_the_most_relevant_half_percent():
    inputs = make(B=3, N=420, D=32, seed=16, masks=True)
    inputs.query_mask[2] = False  # no question, no bonus
    got = select(*inputs, method="flashvlm-published", budget=400)
    bonus = got.scores - select(*inputs, budget=400, params=PUBLISHED).scores
    for b in (0, 1):
        item, index = valid_part(inputs, b)
        order = np.argsort(-ref_relevance(item))
        want = np.zeros(420)
        want[index[order[: math.ceil(len(index) / 200)]]] = 0.5 * math.log(10)
        np.testing.assert_allclose(bonus[b], want, atol=1e-5)
    assert not bonus[2].any()


def test_deduplication_steps_are_those_of_the_published_code():
    steps = [deduplication_steps(576 - K // 2, K - K // 2) for K in (192, 128, 64, 32, 16)]
    assert steps == [48, 56, 64, 68, 70]
    assert all(deduplication_steps(n, 3) <= deduplication_steps(n + 1, 3) for n in range(3, 200))


def test_visionzip_merges_every_other_token_into_its_most_similar_target():
    K = 16
    inputs = make(N=50, seed=5, masks=True)
    got = select(*inputs, method="visionzip", budget=K)
    item, index = valid_part(inputs, 0)
    top, kept = ref_visionzip(item, K)
    targets = kept[len(top) :]
    groups = {t: [t] for t in targets}
    for i in set(range(len(index))) - set(kept):
        groups[max(targets, key=lambda t, i=i: cosine(item.features[i], item.features[t]))].append(i)
    for position, token in enumerate(sorted(kept)):
        want = item.projected[groups.get(token, [token])].mean(0)
        np.testing.assert_allclose(got.visual_embeds[0, position], want, atol=1e-5)


def test_trim_ends_with_the_mean_of_what_it_drops():
    inputs = make(N=30, seed=6, masks=True)
    got = select(*inputs, method="trim", budget=8)
    item, index = valid_part(inputs, 0)
    top, kept = ref_trim(item, 8)
    dropped = [i for i in range(len(index)) if i not in top]
    position = got.kept[0].tolist().index(index[kept[-1]])
    np.testing.assert_allclose(got.visual_embeds[0, position], item.projected[dropped].mean(0), atol=1e-5)
    plain = got.is_top[0]
    assert torch.equal(got.visual_embeds[0, plain], inputs.projected[0, got.kept[0, plain]])


def test_uniform_spreads_over_the_grid():
    cells = np.array(evenly_spaced(576, 64))
    assert sorted(set((cells // 24).tolist())) == list(range(1, 24, 3))
    assert sorted(set((cells % 24).tolist())) == list(range(1, 24, 3))
    assert evenly_spaced(10, 2) == [2, 7]
    for tokens in (1, 9, 10, 144):
        for budget in range(1, tokens + 1):
            cells = evenly_spaced(tokens, budget)
            assert len(cells) == budget
            assert cells == sorted(set(cells))


def test_random_follows_its_seed():
    inputs = make(B=2, N=60)
    kept = [select(*inputs, method="random", budget=9, params=SelectionParams(seed=s)).kept for s in (0, 0, 1)]
    assert torch.equal(kept[0], kept[1])
    assert torch.equal(kept[0][0], kept[0][1])
    assert not torch.equal(kept[0], kept[2])


def test_none_keeps_everything_whatever_the_budget():
    inputs = make(B=2, N=7, masks=True)
    got = select(*inputs, method="none", budget=64)
    assert got.kept.tolist() == [list(range(7))] * 2
    assert torch.equal(got.visual_embeds, inputs.projected)


def test_all_background_and_all_top():
    inputs = make(B=3, N=40, seed=8)
    top = select(*inputs, budget=10, params=SelectionParams(top_ratio=1.0))
    assert top.is_top.all()
    assert torch.equal(top.kept, top.scores.topk(10).indices.sort().values)
    assert not select(*inputs, budget=10, params=SelectionParams(top_ratio=0.0)).is_top.any()
    # 100 * 0.29 is 28.999999999999996 in binary
    share = select(*make(N=120), budget=100, params=SelectionParams(top_ratio=0.29))
    assert share.is_top.sum() == 29


def test_a_row_without_query_falls_back_on_saliency():
    inputs = make(B=2, N=30, seed=15)
    inputs.query_mask[0] = False
    got = select(*inputs, budget=10, params=SelectionParams(top_ratio=1.0))
    by_saliency = inputs.saliency.topk(10).indices.sort().values
    assert torch.equal(got.kept[0], by_saliency[0])
    assert not torch.equal(got.kept[1], by_saliency[1])


def test_masks_are_optional():
    inputs = make(B=2)
    assert same(select(*inputs[:4], budget=6), select(*inputs, budget=6))


GOOD = make(B=2, N=20, D=8, Dv=6, L=3)


NAN = GOOD.saliency.clone()
NAN[1, 3] = math.nan


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"method": "best"}, "method: expected one of flashvlm, .*none; found 'best'"),
        ({}, {"budget": 0}, "budget: expected an integer from 1 to 20, .* found 0"),
        ({}, {"budget": -3}, "found -3"),
        ({}, {"budget": 21}, "found 21"),
        ({}, {"budget": True}, "found True"),
        ({}, {"budget": 4.0}, r"found 4\.0"),
        ({"projected": GOOD.projected[0]}, {}, r"projected: .* \[B, N, D\], found \[20, 8\]; add the batch"),
        ({"features": GOOD.features[:, :19]}, {}, r"features: .* with N = 20 .*, found \[2, 19, 6\]"),
        ({"saliency": GOOD.saliency[:1]}, {}, r"saliency: .* with B = 2 .*, found \[1, 20\]"),
        ({"query": GOOD.query[..., :7]}, {}, r"query: .* with D = 8 .*, found \[2, 3, 7\]"),
        ({"query_mask": GOOD.query_mask[:, :2]}, {}, r"query_mask: .* with L = 3 .*, found \[2, 2\]"),
        ({"valid": GOOD.valid[:, :2]}, {}, r"valid: .* with N = 20 .*, found \[2, 2\]"),
        ({"valid": GOOD.valid.int()}, {}, r"valid: expected torch.bool, found torch.int32; .*\.bool\(\)"),
        ({"query_mask": GOOD.query_mask.long()}, {}, "query_mask: expected torch.bool, found torch.int64"),
        ({"saliency": GOOD.saliency.long()}, {}, r"saliency: expected a float dtype, .*\.float\(\)"),
        ({"saliency": NAN}, {}, "saliency: expected finite values in float32, found NaN or infinity"),
        ({"query": GOOD.query / 0}, {}, "query: expected finite"),
        ({"projected": GOOD.projected.double() * 1e300}, {}, "projected: expected finite values in float32"),
        ({n: GOOD._asdict()[n][:, :0] for n in ("projected", "features", "saliency", "valid")}, {},
         "projected: expected at least one visual token, found none"),
    ],
)  # fmt: skip
def test_refusals_say_what_was_expected(changes, options, message):
    with pytest.raises(SelectionError, match=message) as refusal:
        select(*GOOD._replace(**changes), **{"budget": 4, **options})
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("eta", 1.5, "eta: expected a number from 0 to 1, found 1.5"),
        ("eta", math.nan, "eta: .* found nan"),
        ("eta", "half", "eta: .* found 'half'"),
        ("temperature", 0, "temperature: expected a number from 1e-06 to 1e"),
        ("pool_temperature", -1.0, r"pool_temperature: .* found -1\.0"),
        ("eps", 0.0, "eps: expected a number from 1e-30 to 0.5"),
        ("top_ratio", 2, "top_ratio: .* found 2"),
        ("iterations", 1.5, r"iterations: expected an integer from 0 to 100, found 1\.5"),
        ("iterations", True, "iterations: .* found True"),
        ("seed", -1, "seed: .* found -1"),
        ("partition_space", "pixels", "partition_space: expected 'features' or 'projected', found 'pixels'"),
    ],
)
def test_params_refuse_values_out_of_range(field, value, message):
    with pytest.raises(SelectionError, match=message):
        SelectionParams(**{field: value})


@pytest.mark.parametrize("top_ratio", [0.0, 1.0])
def test_an_absent_half_leaves_no_empty_tensor(top_ratio):
    params = SelectionParams(top_ratio=top_ratio)
    model = exported("flashvlm", 20, 8, 6, 5, params)
    constants = [node.attribute[0].t for node in nodes_of(model) if node.op_type == "Constant"]
    assert all(0 not in tensor.dims for tensor in (*model.graph.initializer, *constants))
    shapes = [v.type.tensor_type.shape.dim for v in model.graph.value_info]
    assert all(d.dim_value != 0 or d.HasField("dim_param") for dims in shapes for d in dims)
    assert ("CumSum" in {node.op_type for node in nodes_of(model)}) == (top_ratio < 1)
    inputs = make(B=9, N=20, D=8, Dv=6, L=4, masks=True)
    assert same(run_onnx(inputs, "flashvlm", 20, 8, 6, 5, params), select(*inputs, budget=5, params=params))


def test_score_traces_with_tensor_constants_and_every_size_dynamic():
    """As it is traced into the body of the ONNX function TextGuidedScore."""

    class Body(torch.nn.Module):
        def forward(self, *args):
            return text_guided_score(*args)

    def arguments(**shape):
        p, _, s, q, query_mask, valid = make(**shape, masks=True)
        return (p, q, query_mask, s, valid), tuple(torch.tensor(c) for c in CONSTANTS)

    B, N, D, L = (torch.export.Dim(name, min=1, max=8192) for name in "BNDL")
    sizes = ({0: B, 1: N, 2: D}, {0: B, 1: L, 2: D}, {0: B, 1: L}, {0: B, 1: N}, {0: B, 1: N}, {}, {}, {}, {})
    tensors, constants = arguments(B=2, N=33, D=24, L=5)
    program = torch.export.export(Body(), (*tensors, *constants), dynamic_shapes=(sizes,))
    tensors, constants = arguments(B=3, N=50, D=11, L=7, seed=5)
    torch.testing.assert_close(program.module()(*tensors, *constants), text_guided_score(*tensors, *CONSTANTS))


def test_flags_have_the_defaults_of_the_parameters():
    flags = inspect.signature(cli.export).parameters
    assert {name: flags[name].default for name in dataclasses.asdict(DEFAULTS)} == dataclasses.asdict(DEFAULTS)
