import dataclasses

import numpy as np
import pytest

from flashvlm.errors import FlashVLMError, PromptError
from flashvlm.sampling import (
    RowSampler,
    SamplingOptions,
    SamplingParams,
    _penalise,
    draw,
    probabilities,
    token_logprob,
)


class Sampler:
    """The samplers of a whole batch: params of every row, or of each; prompt ids of each."""

    def __init__(self, params, prompt_ids=()):
        self._params = params if isinstance(params, SamplingParams) and not len(prompt_ids) else None
        each = [params] * len(prompt_ids) if isinstance(params, SamplingParams) else params
        prompts = prompt_ids if len(prompt_ids) else [()] * len(each) if self._params is None else []
        self.rows = [] if self._params else [RowSampler(p, ids) for p, ids in zip(each, prompts, strict=True)]

    def __call__(self, logits):
        while self._params is not None and len(self.rows) < len(logits):
            self.rows.append(RowSampler(self._params))
        return draw(logits, self.rows[: len(logits)] if self._params else self.rows)


def logits_of(*shape, seed=0, scale=3.0):
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", "0.5"),
        ("temperature", None),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_k", True),
        ("top_p", 1.01),
        ("top_p", -0.01),
        ("top_p", float("nan")),
        ("top_p", "1"),
        ("top_p", np.bool_(True)),
        ("temperature", 10**400),
        ("temperature", True),
        pytest.param("temperature", 10**5000, id="no repr either"),
        ("seed", -1),
        ("seed", 1.0),
        ("seed", True),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("min_p", "0.1"),
        ("repetition_penalty", 0),
        ("repetition_penalty", -1.0),
        ("repetition_penalty", 1e-300),
        ("repetition_penalty", float("nan")),
        ("repetition_penalty", "1.1"),
        ("max_new_tokens", 0),
        ("max_new_tokens", 1.0),
        ("max_new_tokens", True),
        ("max_new_tokens", "5"),
        ("max_new_tokens", None),
        ("logprobs", -1),
        ("logprobs", 21),
        ("logprobs", True),
        ("logprobs", "5"),
        ("stop", 5),
        ("stop", [""]),
        ("stop", ["a", None]),
        ("stop", "x" * 257),
        ("stop", ["x"] * 17),
    ],
)
def test_bad_parameters_are_refused(field, value):
    with pytest.raises(PromptError, match=f"^{field}: expected .*, found ") as refusal:
        SamplingParams(**{field: value})
    assert len(str(refusal.value)) < 200
    with pytest.raises(PromptError, match=f"^{field}: expected .*, found "):
        SamplingParams.from_options({field: value})


def test_numpy_numbers_are_taken_and_stored_as_pythons():
    params = SamplingParams(
        max_new_tokens=np.int64(9),
        temperature=np.float32(0.5),
        top_p=np.float64(0.75),
        top_k=np.uint8(3),
        min_p=np.float16(0.5),
        repetition_penalty=np.int32(2),
        seed=np.int32(1),
        logprobs=np.int64(0),
        stop=["a", "b"],
    )
    assert list(vars(params).values()) == [9, 0.5, 0.75, 3, 0.5, 2.0, ("a", "b"), 1, 0]
    assert [type(v) for v in vars(params).values()] == [int, float, float, int, float, float, tuple, int, int]
    assert len({params, dataclasses.replace(params), SamplingParams()}) == 2


@pytest.mark.parametrize(("name", "remedy"), [("temprature", "did you mean temperature?"), ("n", "out"), (3, "out")])
def test_unknown_options_are_refused_with_the_known_ones(name, remedy):
    with pytest.raises(PromptError, match=f"expected the options max_new_tokens, .*, logprobs, found .*{remedy}"):
        SamplingParams.from_options({"top_k": 1, name: 1})


def test_options_by_name():
    assert SamplingParams.from_options({}) == SamplingParams()
    assert SamplingParams.from_options({"stop": None, "top_k": 4}) == SamplingParams(top_k=4)
    assert set(SamplingOptions.__annotations__) == {field.name for field in dataclasses.fields(SamplingParams)}


def test_greedy_takes_the_first_maximum():
    logits = np.array([[0, 2, 2, 1], [5, 0, 0, 0]], np.float32)
    ids = Sampler(SamplingParams(top_k=1, top_p=0.1, seed=3))(logits)
    assert ids.dtype == np.int64
    assert ids.tolist() == [1, 0]


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_logits_are_refused(value, temperature):
    logits = logits_of(3, 10)
    logits[1, 4] = value
    with pytest.raises(FlashVLMError, match="row 1: expected finite"):
        Sampler(SamplingParams(temperature=temperature))(logits)
    logits[1] = -np.inf
    with pytest.raises(FlashVLMError, match="row 1"):
        Sampler(SamplingParams(temperature=temperature))(logits)
    logits[1, 7] = -1e30
    assert Sampler(SamplingParams(temperature=temperature))(logits)[1] == 7


@pytest.mark.parity
@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [0, 1, 7, 500])
@pytest.mark.parametrize("top_p", [0.0, 0.05, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("min_p", [0.0, 0.1])
def test_distribution_equals_transformers(temperature, top_k, top_p, min_p):
    import torch
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    rows = logits_of(20, 300)
    scores = TemperatureLogitsWarper(temperature)(None, torch.from_numpy(rows).double())
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    if min_p:
        scores = MinPLogitsWarper(min_p)(None, scores)
    want = scores.softmax(-1).numpy()
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    got = np.stack([probabilities(row, params) for row in rows])
    np.testing.assert_array_equal(got > 0, want > 0)
    np.testing.assert_allclose(got, want, atol=1e-12)


def test_ties_at_the_kth_place_are_kept():
    p = probabilities(np.array([1, 3, 2, 2, 0], np.float32), SamplingParams(temperature=1.0, top_k=2))
    assert np.flatnonzero(p).tolist() == [1, 2, 3]


def test_min_p_is_relative_to_the_likeliest():
    logits = np.log(np.array([0.5, 0.26, 0.24, 0.0004]))
    for min_p, kept in [(0.0, 4), (0.0007, 4), (0.01, 3), (0.47, 3), (0.5, 2), (0.6, 1), (1.0, 1)]:
        assert np.count_nonzero(probabilities(logits, SamplingParams(temperature=1.0, min_p=min_p))) == kept
    assert np.count_nonzero(probabilities(np.zeros(5), SamplingParams(temperature=1.0, min_p=1.0))) == 5


def test_top_p_keeps_the_smallest_set_that_reaches_p():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05]))
    for top_p, kept in [(0.0, 1), (0.4, 1), (0.6, 2), (0.79, 2), (0.81, 3), (0.96, 4)]:
        assert np.count_nonzero(probabilities(logits, SamplingParams(temperature=1.0, top_p=top_p))) == kept


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 5e-324])
def test_a_tiny_temperature_is_greedy(temperature):
    logits = logits_of(4, 50)
    assert (Sampler(SamplingParams(temperature=temperature))(logits) == logits.argmax(1)).all()


def test_a_batch_equals_single_runs_with_the_same_seed():
    steps = logits_of(30, 5, 100)
    params = SamplingParams(temperature=1.2, top_k=40, top_p=0.95, seed=11)
    batch = Sampler(params)
    together = np.stack([batch(step) for step in steps])
    for b in range(5):
        single = Sampler(params)
        assert [single(step[b : b + 1])[0] for step in steps] == together[:, b].tolist()


def test_seeds():
    steps = logits_of(40, 1, 100)

    def run(seed):
        sampler = Sampler(SamplingParams(temperature=1.0, seed=seed))
        return [int(sampler(step)[0]) for step in steps]

    assert run(1) == run(1)
    assert run(1) != run(2)
    assert run(None) != run(None)


def test_rows_without_a_seed_differ():
    logits = np.zeros((2, 1000), np.float32)
    sampler = Sampler(SamplingParams(temperature=1.0))
    drawn = np.stack([sampler(logits) for _ in range(8)])
    assert (drawn[:, 0] != drawn[:, 1]).any()


def test_frequencies_pass_chi_square():
    logits = np.array([[2.0, 1.0, 0.0, -1.0, 0.5, -np.inf]], np.float32)
    params = SamplingParams(temperature=0.8, top_k=4, seed=5)
    sampler = Sampler(params)
    counts = np.bincount([sampler(logits)[0] for _ in range(8000)], minlength=6)
    expected = probabilities(logits[0], params) * 8000
    kept = expected > 0
    assert counts[~kept].sum() == 0
    # 3 degrees of freedom: 16.27 is the 0.999 quantile; the seed is fixed, so this does not flicker.
    assert ((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum() < 16.27


@pytest.mark.parity
def test_the_order_of_the_warpers_is_that_of_generate():
    """What transformers' generate builds from the same options, in its own order."""
    import torch
    from transformers import GenerationConfig, LogitsProcessorList, PretrainedConfig
    from transformers.generation.utils import GenerationMixin

    options = {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.3}
    config = GenerationConfig(do_sample=True, **options)
    model = GenerationMixin()
    model.config = PretrainedConfig()
    processors = model._get_logits_processor(config, input_ids_seq_length=50)
    names = ["RepetitionPenaltyLogitsProcessor", *(f"{n}LogitsWarper" for n in ("Temperature", "TopK", "TopP", "MinP"))]
    assert [type(p).__name__ for p in processors] == names

    rng = np.random.default_rng(9)
    rows = logits_of(20, 300)
    ids = rng.integers(0, 300, (20, 50))
    # The penalty in float32, as in generate; the rest in float64, so that ties are not a matter of rounding.
    penalised = processors[0](torch.from_numpy(ids), torch.from_numpy(rows))
    warpers = LogitsProcessorList(processors[1:])
    want = warpers(torch.from_numpy(ids), penalised.double()).softmax(-1).numpy()
    params = SamplingParams(**options, seed=3)
    got = np.stack([probabilities(row, params) for row in penalised.numpy()])
    np.testing.assert_array_equal(got > 0, want > 0)
    np.testing.assert_allclose(got, want, atol=1e-12)
    expected = [inverse_transform(3, [p])[0] for p in want]
    assert Sampler(params, ids)(rows).tolist() == expected


@pytest.mark.parity
@pytest.mark.parametrize("penalty", [0.5, 1.1, 1.3, 2.0])
def test_the_repetition_penalty_equals_transformers_step_by_step(penalty):
    """Greedy, over prompt and answer; float32 to the bit, or the answer would change at the first tie."""
    import torch
    from transformers import RepetitionPenaltyLogitsProcessor

    processor = RepetitionPenaltyLogitsProcessor(penalty)
    steps = logits_of(40, 4, 60, seed=4)
    ids = np.random.default_rng(5).integers(0, 60, (4, 10))
    sampler = Sampler(SamplingParams(repetition_penalty=penalty), ids)
    plain = steps.argmax(axis=2)
    chosen = []
    for logits in steps:
        want = processor(torch.from_numpy(ids), torch.from_numpy(logits)).argmax(-1).numpy()
        before = logits.copy()
        assert sampler(logits).tolist() == want.tolist()
        np.testing.assert_array_equal(logits, before)
        ids = np.concatenate([ids, want[:, None]], axis=1)
        chosen.append(want)
    assert (np.stack(chosen) != plain).any()


@pytest.mark.parity
def test_penalised_logits_equal_transformers_to_the_bit():
    import torch
    from transformers import RepetitionPenaltyLogitsProcessor

    for penalty in (0.3, 1.1, 1.7):
        rows, ids = logits_of(5, 1000), np.random.default_rng(1).integers(0, 1000, (5, 700))
        want = RepetitionPenaltyLogitsProcessor(penalty)(torch.from_numpy(ids), torch.from_numpy(rows)).numpy()
        for row, seen in zip(rows, ids, strict=True):
            _penalise(row, set(seen.tolist()), penalty)
        np.testing.assert_array_equal(rows, want)


def test_the_penalty_is_once_an_id_and_ignores_ids_beyond_the_vocabulary():
    logits = np.array([[2.0, 1.5, -1.0]], np.float32)
    params = SamplingParams(repetition_penalty=1.25)
    assert Sampler(params, [[0, 0, 0, 0]])(logits).tolist() == [0]  # 1.6; twice it would be 1.28
    assert Sampler(params, [[-1, 3, 99]])(logits).tolist() == [0]
    assert Sampler(SamplingParams(repetition_penalty=1.4), [[0]])(logits).tolist() == [1]


def test_a_penalty_that_overflows_is_refused():
    logits = np.array([[3e38, 1.0]], np.float32)
    with pytest.raises(FlashVLMError, match="row 0: expected finite values, found inf"):
        Sampler(SamplingParams(repetition_penalty=0.5), [[0]])(logits)


def inverse_transform(seed, distributions):
    """The token of each step, by one uniform number a step from numpy's default generator."""
    stream = np.random.default_rng(seed)
    tokens = []
    for p in distributions:
        u = stream.random()
        tokens.append(int(np.argmax(np.cumsum(p) > u * p.sum())))
    return tokens


def test_the_random_stream():
    """One uniform number a token, whatever the options: seeds keep their answers over versions."""
    steps = logits_of(30, 1, 100)
    for options in ({}, {"top_k": 10}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 20, "top_p": 0.9, "min_p": 0.02}):
        params = SamplingParams(temperature=0.9, seed=12, **options)
        sampler = Sampler(params)
        want = inverse_transform(12, [probabilities(step[0], params) for step in steps])
        assert [int(sampler(step)[0]) for step in steps] == want


def test_rows_of_a_server_have_params_of_their_own():
    """Requests that come and go, each with its own params: every one gets the tokens it would get alone."""
    steps = logits_of(24, 4, 80, seed=6)
    params = [
        SamplingParams(),
        SamplingParams(temperature=1.1, seed=3, top_p=0.9),
        SamplingParams(repetition_penalty=1.8),
        SamplingParams(temperature=0.7, seed=3, repetition_penalty=0.6, min_p=0.1),
    ]
    prompts = [[1, 2], [], [5, 6, 7], [8]]
    lives = [(0, 24), (2, 10), (5, 24), (0, 7)]  # steps in which each is there
    rows = [RowSampler(p, ids) for p, ids in zip(params, prompts, strict=True)]
    together = [[] for _ in rows]
    for t, step in enumerate(steps):
        here = [b for b, (start, stop) in enumerate(lives) if start <= t < stop]
        for b, token in zip(here, draw(step[here], [rows[b] for b in here]), strict=True):
            together[b].append(int(token))
    for b, (start, stop) in enumerate(lives):
        alone = Sampler(params[b : b + 1], prompts[b : b + 1])
        assert [int(alone(step[b : b + 1])[0]) for step in steps[start:stop]] == together[b]


def test_a_refused_row_moves_no_stream():
    params = SamplingParams(temperature=1.0, seed=2, repetition_penalty=1.2)
    rows, fresh = [RowSampler(params), RowSampler(params)], RowSampler(params)
    logits = logits_of(2, 50)
    with pytest.raises(FlashVLMError, match="row 1"):
        draw(np.stack([logits[0], np.full(50, np.nan, np.float32)]), rows)
    assert draw(logits[:1], rows[:1]).tolist() == draw(logits[:1], [fresh]).tolist()


def test_as_many_rows_as_logits():
    with pytest.raises(ValueError, match="zip"):
        Sampler([SamplingParams()])(logits_of(2, 5))
    with pytest.raises(ValueError, match="zip"):
        Sampler([SamplingParams()], [[1], [2]])


@pytest.mark.parity
def test_logprobs_equal_torch():
    import torch

    for row in logits_of(20, 300):
        want = torch.from_numpy(row).double().log_softmax(-1)
        values, ids = want.topk(5)
        found = token_logprob(row, 7, 5)
        assert found.token_id == 7
        assert found.logprob == pytest.approx(float(want[7]), abs=1e-12)
        assert [i for i, _ in found.top] == ids.tolist()
        assert [v for _, v in found.top] == pytest.approx(values.tolist(), abs=1e-12)


def test_logprobs_at_the_edges():
    ties = np.zeros(6, np.float32)
    assert [i for i, _ in token_logprob(ties, 5, 3).top] == [0, 1, 2]
    assert token_logprob(ties, 5).top == ()
    assert token_logprob(ties, np.int64(5), 20).logprob == pytest.approx(-np.log(6))
    assert len(token_logprob(ties, 5, 20).top) == 6
    masked = np.array([-np.inf, 3.0, -np.inf, 80.0], np.float32)
    found = token_logprob(masked, 1, 4)
    assert found.top == ((3, 0.0), (1, -77.0))
    assert isinstance(found.token_id, int)
    assert isinstance(found.logprob, float)
    huge = np.array([3e38, -3e38], np.float32)
    assert token_logprob(huge, 0, 1) == token_logprob(huge, np.int64(0), 1)
    assert token_logprob(huge, 0, 1).logprob == 0.0
