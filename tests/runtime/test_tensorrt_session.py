"""The TensorRT session answers as ONNX Runtime does, keeps tensors on the device and replays decode steps as one graph.

On the stand-in of tensorrt_standin.py: what is tested is the session, not TensorRT.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_standin import Driver
from tensorrt_standin import build, install

from flashvlm import Answer, FlashVLMError, Pipeline
from flashvlm.errors import PromptError

QUESTIONS = ["What is the colour of the apple on the left?", "hi", "Is there a table?"]
BUNDLES = ["tiny_bundle", "tiny_gqa_bundle", "tiny_gqa_legacy_bundle", "tiny_gqa_half_bundle"]
TARGETS = ["tensorrt", "tensorrt-rtx"]


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (61, 90, 3), dtype=np.uint8)


@pytest.fixture
def compiled(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Pipeline, Driver, Any]]:
    """compiled(bundle, target, **flags): a pipeline on the stand-in, and both of its halves."""

    def make(name: str = "tiny_gqa_bundle", target: Any = "tensorrt", **flags: Any) -> tuple[Pipeline, Driver, Any]:
        folder = tmp_path / f"{name}-{target}"
        shutil.copytree(request.getfixturevalue(name), folder)
        build(folder, target, **flags)
        driver, trt = install(monkeypatch, target)
        return Pipeline.from_bundle(folder, backend=target), driver, trt

    return make


def reference(request: pytest.FixtureRequest, name: str = "tiny_gqa_bundle") -> Pipeline:
    return Pipeline.from_bundle(request.getfixturevalue(name), backend="onnxruntime", verify=False)


def assert_same(found: Answer, wanted: Answer) -> None:
    assert found.token_ids == wanted.token_ids
    assert found.text == wanted.text
    assert (found.prompt_tokens, found.image_tokens) == (wanted.prompt_tokens, wanted.image_tokens)
    if wanted.kept is None:
        assert found.kept is None
        return
    assert found.kept.tolist() == wanted.kept.tolist()
    assert found.is_top.tolist() == wanted.is_top.tolist()
    np.testing.assert_array_equal(found.scores, wanted.scores)


@pytest.mark.parametrize(
    ("name", "target"), [*((name, "tensorrt") for name in BUNDLES), ("tiny_gqa_bundle", "tensorrt-rtx")]
)
def test_answers_equal_onnx_runtime(
    name: str, target: str, compiled: Any, request: pytest.FixtureRequest, image: np.ndarray
) -> None:
    pipeline, driver, _ = compiled(name, target)
    plain = reference(request, name)
    other = image[::-1]
    for budget in (*plain.bundle.manifest.selection.budgets, "all"):
        options: dict[str, Any] = {"budget": budget, "max_new_tokens": 6}
        assert_same(pipeline.generate(image, QUESTIONS[0], **options), plain.generate(image, QUESTIONS[0], **options))
        # Prompts of unequal lengths, two images, one row without any.
        images = [image, other, None]
        both = [p.generate(images, QUESTIONS, **options) for p in (pipeline, plain)]
        for found, wanted in zip(*both, strict=True):
            assert_same(found, wanted)
        # The cache of another batch size is a new one; what an answer left in it does not show.
        assert_same(pipeline.generate(other, QUESTIONS[2], **options), plain.generate(other, QUESTIONS[2], **options))
    assert driver.calls["launch"] > 0


@pytest.mark.parametrize("name", ["tiny_gqa_bundle", "tiny_gqa_legacy_bundle"])
def test_conversations_equal_onnx_runtime(
    name: str, compiled: Any, request: pytest.FixtureRequest, image: np.ndarray
) -> None:
    pipeline, _, trt = compiled(name)
    talks = [p.conversation(image) for p in (pipeline, reference(request, name))]
    for question in QUESTIONS:
        found, wanted = (talk.ask(question, max_new_tokens=5) for talk in talks)
        assert_same(found, wanted)
    assert trt.runs["vision"] == 1
    assert trt.runs["select-k5"] == 3


def test_threads_share_the_session(compiled: Any, request: pytest.FixtureRequest, image: np.ndarray) -> None:
    pipeline, _, _ = compiled()
    wanted = [reference(request).generate(image, question, max_new_tokens=4) for question in QUESTIONS]
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(pipeline.generate, image, question, max_new_tokens=4) for question in QUESTIONS * 4]
        for found, want in zip(asked, wanted * 4, strict=True):
            assert_same(found.result(), want)


def test_only_what_an_answer_reports_comes_back(compiled: Any, image: np.ndarray) -> None:
    pipeline, driver, _ = compiled()
    model = pipeline.bundle.manifest.model
    steps, budget = 6, 5
    pipeline.generate(image, QUESTIONS[0], max_new_tokens=steps)
    reported = budget * (8 + 1) + pipeline.bundle.manifest.candidates * 4
    assert driver.bytes["to host"] == steps * model.vocab_size * 4 + reported
    assert max(driver.downloads) == model.vocab_size * 4
    # Up go pixels, the prompt's text once each for selection and prefill, and a row a step.
    before = driver.bytes["to device"]
    pipeline.generate(image, QUESTIONS[0], max_new_tokens=steps)
    text = 4 * model.hidden_size * pipeline.generate(None, QUESTIONS[0], max_new_tokens=1).prompt_tokens
    assert driver.bytes["to device"] - before < 3 * text + steps * (4 * model.hidden_size + 100) + 1000


def test_budget_all_brings_no_features_back(compiled: Any, image: np.ndarray) -> None:
    pipeline, driver, _ = compiled()
    pipeline.generate(image, QUESTIONS[0], budget="all", max_new_tokens=2)
    assert driver.downloads == [pipeline.bundle.manifest.model.vocab_size * 4] * 2


def test_a_step_is_captured_once_and_then_launched(compiled: Any, image: np.ndarray) -> None:
    pipeline, driver, trt = compiled()
    pipeline.generate(image, QUESTIONS[0], max_new_tokens=6)  # prefill and 5 steps: the first is not captured
    assert (driver.calls["capture"], driver.calls["launch"]) == (1, 4)
    pipeline.generate(image, QUESTIONS[0], max_new_tokens=6)
    allocated = driver.calls["allocate"]
    pipeline.generate(image, QUESTIONS[0], max_new_tokens=6)
    assert (driver.calls["capture"], driver.calls["launch"]) == (1, 14)
    assert driver.calls["allocate"] == allocated  # an answer finds all of its memory in the pool
    assert trt.runs["decoder"] == 3 * 6
    pipeline.generate([image] * 2, QUESTIONS[:2], max_new_tokens=6)
    assert driver.calls["capture"] == 2
    gc.collect()
    assert len(driver.graphs) == 1  # the graph went with the cache it was of


def test_two_answers_at_once_have_caches_of_their_own(
    compiled: Any, request: pytest.FixtureRequest, image: np.ndarray
) -> None:
    pipeline, _, _ = compiled()
    plain = reference(request)
    first = pipeline.stream(image, QUESTIONS[0], max_new_tokens=8)
    second = pipeline.stream(image, QUESTIONS[2], max_new_tokens=8)
    pieces: list[list[str]] = [[], []]
    for a, b in zip(first, second, strict=False):
        pieces[0].append(a)
        pieces[1].append(b)
    for stream in (first, second):
        list(stream)
    for stream, question in ((first, QUESTIONS[0]), (second, QUESTIONS[2])):
        assert_same(stream.answer, plain.generate(image, question, max_new_tokens=8))


@pytest.mark.parametrize("target", TARGETS)
def test_without_graphs_the_answer_is_the_same(
    target: Any, compiled: Any, request: pytest.FixtureRequest, image: np.ndarray
) -> None:
    pipeline, driver, _ = compiled(target=target, plan={"decoder": {"uncapturable": target == "tensorrt-rtx"}})
    driver.refuse_capture = target == "tensorrt"
    found = pipeline.generate(image, QUESTIONS[0], max_new_tokens=6)
    assert_same(found, reference(request).generate(image, QUESTIONS[0], max_new_tokens=6))
    assert driver.calls["launch"] == 0


def test_rtx_compiles_decode_kernels_for_their_shapes(compiled: Any, image: np.ndarray) -> None:
    pipeline, _, trt = compiled(target="tensorrt-rtx")
    pipeline.generate(image, QUESTIONS[0], max_new_tokens=2)
    made = [getattr(how, "dynamic_shapes_kernel_specialization_strategy", None) for _, how in trt.contexts]
    assert [name.name for name in made if name] == ["EAGER"]  # of the one context whose runs are captured


def test_legacy_rows_are_placed_on_the_device(compiled: Any, image: np.ndarray) -> None:
    pipeline, driver, _ = compiled("tiny_gqa_legacy_bundle")
    pipeline.generate(image, QUESTIONS[0], max_new_tokens=4)
    layers = pipeline.bundle.manifest.model.num_layers
    assert driver.calls["copy rows"] == 2 * layers * 4
    assert max(driver.downloads) == pipeline.bundle.manifest.model.vocab_size * 4


def test_closing_gives_all_memory_back(compiled: Any, image: np.ndarray) -> None:
    pipeline, driver, _ = compiled()
    with pipeline:
        pipeline.generate([image] * 2, QUESTIONS[:2], max_new_tokens=4)
        assert driver.memory
        assert driver.host
    assert not driver.memory
    assert (driver.calls["retain"], driver.calls["release"]) == (1, 1)
    del pipeline
    gc.collect()
    assert not driver.host
    assert not driver.graphs


def test_a_forgotten_pipeline_gives_its_memory_back(compiled: Any, image: np.ndarray) -> None:
    pipeline, driver, _ = compiled()
    pipeline.generate(image, QUESTIONS[0], max_new_tokens=4)
    del pipeline
    gc.collect()
    assert not driver.memory
    assert driver.calls["release"] == 1


def test_no_room_is_a_refusal(compiled: Any, image: np.ndarray) -> None:
    pipeline, driver, _ = compiled()
    pipeline.generate(image, QUESTIONS[0], max_new_tokens=2)
    driver.room = 1000
    with pytest.raises(FlashVLMError, match=r"out of memory: .*B wanted, .* free on Stand-in GPU; build .*--max-seq"):
        pipeline.generate([image] * 3, QUESTIONS, max_new_tokens=2)
    driver.room = 1 << 30
    assert pipeline.generate(image, QUESTIONS[0], max_new_tokens=2).token_ids


# --- requests beyond the engines ---


def test_more_prompts_than_the_engines_take(compiled: Any, image: np.ndarray) -> None:
    pipeline, _, _ = compiled()
    with pytest.raises(FlashVLMError, match=r"4 prompts at once: these engines hold 3; .* --max-batch 4"):
        pipeline.generate(image, [QUESTIONS[1]] * 4)


def test_a_longer_prompt_than_the_engines_take(compiled: Any, image: np.ndarray) -> None:
    pipeline, _, _ = compiled(max_seq=40)
    with pytest.raises(
        PromptError, match=r"these engines hold 40: .* build larger ones with: flashvlm-compile .*--max-seq"
    ):
        pipeline.generate(image, QUESTIONS[0] * 3, budget="all")
    answer = pipeline.generate(None, "hi", max_new_tokens=100)  # ends where the cache does
    assert answer.prompt_tokens + len(answer.token_ids) == 41


def test_a_longer_question_than_the_engines_take(compiled: Any, image: np.ndarray) -> None:
    pipeline, _, _ = compiled(max_query=4)
    with pytest.raises(FlashVLMError, match=r"query of \d+: .*select-k5.engine takes up to 4; .* --max-query \d+"):
        pipeline.generate(image, QUESTIONS[0])


# --- engines that are not what they should be ---

PLANS: dict[str, tuple[dict[str, Any], str]] = {
    "names": ({"decoder": {"drop": "num_tokens"}}, "other inputs and outputs .*: num_tokens"),
    "dtype": ({"decoder": {"retype": ("position_ids", "int32")}}, "has position_ids as int32 .*, expected int64"),
    "shape": ({"vision": {"reshape": ("features", ["batch", 25, 3])}}, "has features as float32 .*, expected float32"),
    "range": ({"decoder": {"max_batch": 2}}, r"takes inputs_embeds up to \(2, .*, expected \(3, "),
    "capacity": ({"decoder": {"capacity": 64}}, r"has past_key_values.0.key as .* 64, .* expected .* 128, "),
    "host": ({"decoder": {"host": ["cache_position"]}}, "wants cache_position in host memory"),
}


def spoiled(bundle: Path, plan: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The plans' tensors changed as ``drop``, ``retype`` and ``reshape`` say."""
    from flashvlm.bundle import Bundle

    out = {}
    for name, change in plan.items():
        graph = Bundle(bundle, verify=False).graph(name).model_dump()
        for tensors in (graph["inputs"], graph["outputs"]):
            for tensor in tensors:
                if tensor["name"] == change.get("retype", ("",))[0]:
                    tensor["dtype"] = change["retype"][1]
                if tensor["name"] == change.get("reshape", ("",))[0]:
                    tensor["shape"] = change["reshape"][1]
        graph["inputs"] = [tensor for tensor in graph["inputs"] if tensor["name"] != change.get("drop")]
        out[name] = {key: value for key, value in change.items() if key in ("max_batch", "capacity", "host")}
        out[name]["graph"] = graph
    return out


@pytest.mark.parametrize("problem", PLANS)
def test_an_engine_of_another_contract_is_refused(
    problem: str, compiled: Any, tiny_gqa_bundle: Path, image: np.ndarray
) -> None:
    plan, expected = PLANS[problem]
    pipeline, _, _ = compiled(plan=spoiled(tiny_gqa_bundle, plan))
    with pytest.raises(FlashVLMError, match=expected + r".*; build it with: flashvlm-compile .* --force"):
        pipeline.generate(image, QUESTIONS[0])


def test_an_edited_engine_is_refused(compiled: Any, image: np.ndarray) -> None:
    pipeline, _, _ = compiled()
    (engine,) = pipeline.bundle.path.glob("engines/*/vision.engine")
    raw = bytearray(engine.read_bytes())
    raw[0] ^= 1
    engine.write_bytes(raw)
    with pytest.raises(FlashVLMError, match=r"vision.engine was edited .* flashvlm-compile .* --force"):
        pipeline.generate(image, QUESTIONS[0])
    unverified = Pipeline.from_bundle(pipeline.bundle.path, backend="tensorrt", verify=False)
    with pytest.raises(
        FlashVLMError, match=r"vision.engine does not load \(TensorRT 10.13.0.35: magic tag does not match"
    ):
        unverified.generate(image, QUESTIONS[0])


def test_stripped_engines_take_their_weights_from_the_bundle(
    compiled: Any, request: pytest.FixtureRequest, image: np.ndarray
) -> None:
    pipeline, _, trt = compiled(strip_weights=True)
    found = pipeline.generate(image, QUESTIONS[0], max_new_tokens=3)
    assert_same(found, reference(request).generate(image, QUESTIONS[0], max_new_tokens=3))
    assert sorted(trt.refits) == ["decoder.onnx", "select-k5.onnx", "vision.onnx"]


def test_streamed_weights_get_the_automatic_budget(compiled: Any, image: np.ndarray) -> None:
    pipeline, _, _ = compiled(weight_streaming=True)
    pipeline.generate(image, QUESTIONS[0], max_new_tokens=2)
    assert {e.engine.weight_streaming_budget_v2 for e in pipeline._session._loaded.values()} == {500}


def test_wrong_arrays_are_refused_when_bound(compiled: Any, image: np.ndarray) -> None:
    pipeline, _, _ = compiled()
    session, hidden = pipeline._session, pipeline.bundle.manifest.model.hidden_size
    with pytest.raises(FlashVLMError, match=r"pixel_values: expected float32 .*, found float64"):
        session.vision("vision", np.zeros((1, 3, 8, 8)))
    cache = session.new_cache(1, 64)
    one = np.ones(1, np.int64)
    good = ({"inputs_embeds": np.zeros((1, 1, hidden), np.float32)}, one[None], 0 * one, one)
    session.decode(*good, cache)
    for at, wrong in ((0, {"inputs_embeds": np.zeros((1, 1, hidden))}), (1, one), (3, one.astype(np.int32))):
        arrays = [*good]
        arrays[at] = wrong
        with pytest.raises(FlashVLMError, match="expected"):
            session.decode(*arrays, cache)
    with pytest.raises(FlashVLMError, match="129 tokens: these engines hold 128"):
        session.decode(good[0], good[1], 128 * one, one, cache)


def test_non_finite_scores_are_refused(compiled: Any, image: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, driver, _ = compiled()
    inner = pipeline._session.vision

    def overflowing(*arguments: Any) -> Any:
        (features,) = inner(*arguments)
        tokens = features.image_tokens
        driver.view(tokens.address, tokens.nbytes)[:] = 0xFF
        return [features]

    monkeypatch.setattr(pipeline._session, "vision", overflowing)
    with pytest.raises(FlashVLMError, match="not finite"):
        pipeline.generate(image, QUESTIONS[0])
