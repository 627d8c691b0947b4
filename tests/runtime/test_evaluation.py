"""EvalRun answers as the pipeline does, once, and goes on where it was interrupted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashvlm import FlashVLMError, Pipeline
from flashvlm.errors import ImageError, PromptError, SelectionError
from flashvlm.evaluation import EvalRun, Item, Prediction, Task, runner, scores
from flashvlm.evaluation.results import bundle_parts
from flashvlm.sessions import Limits

IMAGES = {
    name: np.random.default_rng(seed).integers(0, 256, (61, 90, 3), dtype=np.uint8) for seed, name in enumerate("abcd")
}
WORDS = ("What is the colour of the apple?", "Where?", "hi")


def a_task(**changes: Any) -> Task:
    """Twelve questions about four images, one about two of them, one about none."""
    items = [Item(f"{name}{n}", (name,), text, ("x",), group=name) for name in IMAGES for n, text in enumerate(WORDS)]
    items += [Item("two", ("a", "d"), WORDS[0], ("x",)), Item("none", (), WORDS[2], ("x",))]
    return replace(Task("tiny", tuple(items), IMAGES.__getitem__, max_new_tokens=3, version="1"), **changes)


TASK = a_task()


@pytest.fixture(scope="module")
def pipeline(tiny_gqa_bundle: Path) -> Pipeline:
    return Pipeline.from_bundle(tiny_gqa_bundle)


def counted(pipeline: Pipeline, name: str, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images or rows each later call of a session's method has."""
    calls: list[int] = []
    inner: Callable[..., Any] = getattr(pipeline._session, name)

    def counting(*arguments: Any) -> Any:
        calls.append(len(arguments[0] if name == "assemble" else arguments[1]))
        return inner(*arguments)

    monkeypatch.setattr(pipeline._session, name, counting)
    return calls


def same(found: list[Prediction], wanted: list[Prediction]) -> bool:
    return [(p.item, p.text, p.kept) for p in found] == [(p.item, p.text, p.kept) for p in wanted]


def test_predictions_are_the_answers_of_the_pipeline(pipeline: Pipeline) -> None:
    alone: dict[Any, list[Any]] = {
        budget: [
            pipeline.generate([IMAGES[i] for i in item.images] or None, item.question, budget=budget, max_new_tokens=3)
            for item in TASK.items
        ]
        for budget in (5, "all")
    }
    right = a_task(items=tuple(replace(item, answers=(alone[5][0].text,)) for item in TASK.items))
    found = EvalRun(pipeline, right, keep_indices=True).predict([5, "all"])
    assert list(found) == [5, "all"]
    for budget, predictions in found.items():
        for item, prediction, answer in zip(TASK.items, predictions, alone[budget], strict=True):
            assert prediction.item == item.id
            assert prediction.text == answer.text
            assert prediction.right == (answer.text == alone[5][0].text)
            assert [list(kept) for kept in prediction.kept or ()] == [s.kept.tolist() for s in answer.selections]
    assert found[5][0].right
    assert scores(found[5]) == [float(p.right) for p in found[5]]
    assert [len(p.kept or ()) for p in found[5][-2:]] == [2, 0]
    assert EvalRun(pipeline, TASK).predict([5])[5][0].kept is None


def test_an_image_is_seen_once_for_all_budgets(tiny_gqa_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = Pipeline.from_bundle(tiny_gqa_bundle)
    seen, written = counted(pipeline, "vision", monkeypatch), counted(pipeline, "assemble", monkeypatch)
    EvalRun(pipeline, TASK).predict([5, "all", 5])
    assert seen == [4]
    assert written == [14, 14]


def test_batches_change_no_answer(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = EvalRun(pipeline, TASK, keep_indices=True).predict([5, "all"])
    rows = counted(pipeline, "assemble", monkeypatch)
    one = EvalRun(pipeline, TASK, keep_indices=True, batch_tokens=1)
    assert all(same(found, wanted[budget]) for budget, found in one.predict([5, "all"]).items())
    assert rows == [1] * 28
    rows.clear()
    monkeypatch.setattr(pipeline._session, "limits", Limits(pipeline.limits.max_seq, max_batch=4))
    few = EvalRun(pipeline, TASK, keep_indices=True)
    assert all(same(found, wanted[budget]) for budget, found in few.predict([5, "all"]).items())
    assert rows == [4, 4, 4, 2] * 2
    monkeypatch.setattr(runner, "CHUNK_IMAGES", 2)
    assert same(EvalRun(pipeline, TASK, keep_indices=True).predict([5])[5], wanted[5])


def test_images_in_memory_are_few() -> None:
    items = [Item(str(n), (n // 5,), "?", ("",)) for n in range(200)]
    chunks = list(runner._chunks(items))
    assert [start for start, _ in chunks] == [0, *(stop for _, stop in chunks[:-1])]
    assert chunks[-1][1] == 200
    for start, stop in chunks:
        assert stop - start <= runner.CHUNK_ITEMS
        assert len({items[n].images for n in range(start, stop)}) <= runner.CHUNK_IMAGES
    many = [Item("a", tuple(range(40)), "?", ("",)), Item("b", (1,), "?", ("",))]
    assert list(runner._chunks(many)) == [(0, 1), (1, 2)]


# --- files -----------------------------------------------------------------------------------------------------------


def test_an_interrupted_run_goes_on(pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "CHUNK_ITEMS", 4)
    whole = EvalRun(pipeline, TASK, tmp_path / "whole", keep_indices=True)
    wanted = whole.predict([5, "all"])

    def cut(budget: object, count: int) -> None:
        done.append((budget, count))
        if len(done) == 5:
            raise KeyboardInterrupt

    done: list[Any] = []
    run = EvalRun(pipeline, TASK, tmp_path / "cut", keep_indices=True)
    with pytest.raises(KeyboardInterrupt):
        run.predict([5, "all"], cut)
    assert done == [(5, 0), ("all", 0), (5, 4), ("all", 4), (5, 4)]
    names = {run.file(budget).name for budget in (5, "all")}
    assert {path.name for path in (tmp_path / "cut").iterdir()} == {f"{name}.partial" for name in names}
    # A kill in the middle of writing: of the next batch, some predictions and half of one.
    partial = run.file("all").with_suffix(".jsonl.partial")
    assert len(partial.read_bytes().splitlines()) == 4
    partial.write_bytes(b"".join(whole.file("all").read_bytes().splitlines(keepends=True)[:7])[:-9])

    rows = counted(pipeline, "assemble", monkeypatch)
    done = [None] * 9
    assert run.predict([5, "all"], cut) == wanted
    assert done[9:] == [(5, 8), ("all", 4), ("all", 4), (5, 4), ("all", 4), (5, 2), ("all", 2)]
    assert rows == [4, 4, 4, 2, 2]
    assert {path.name for path in (tmp_path / "cut").iterdir()} == names
    for budget in (5, "all"):
        assert run.file(budget).read_bytes() == whole.file(budget).read_bytes()

    monkeypatch.setattr(pipeline.encoder, "read", None)  # nothing is asked again
    assert run.predict(["all", 5], cut) == wanted


def test_files_are_named_by_all_that_answers_depend_on(pipeline: Pipeline, tmp_path: Path) -> None:
    def names(task: Task = TASK, **options: Any) -> tuple[str, str]:
        run = EvalRun(pipeline, task, tmp_path, **options)
        return run.file(5).name, run.file("all").name

    known = {*names()}
    assert len(known) == 2
    assert all(name.startswith(("tiny-5-", "tiny-all-")) for name in known)
    other = replace(TASK.items[0], answers=("y",))
    for changed in (
        names(a_task(version="2")),
        names(a_task(max_new_tokens=4)),
        names(a_task(metric=max)),
        names(a_task(items=(other, *TASK.items[1:]))),
        names(keep_indices=True),
        names(batch_tokens=64),
    ):
        assert not known & {*changed}
        known |= {*changed}
    assert names() == names(a_task())
    assert not [*tmp_path.iterdir()]


def test_what_answers_at_a_budget_depend_on(pipeline: Pipeline) -> None:
    manifest = pipeline.bundle.manifest
    selection = manifest.selection
    method = manifest.model_copy(update={"selection": selection.model_copy(update={"method": "other"})})
    more = manifest.model_copy(update={"selection": selection.model_copy(update={"budgets": (7, 5), "default": 7})})
    assert bundle_parts(method, None) == bundle_parts(manifest, None) == bundle_parts(more, None)
    assert bundle_parts(more, 5) == bundle_parts(manifest, 5) != bundle_parts(method, 5)
    for name, changes in (("select-k5.onnx", {5}), ("decoder.onnx", {5, None}), ("prefill-k5.onnx", set())):
        file = manifest.files[name].model_copy(update={"sha256": "0" * 64})
        edited = manifest.model_copy(update={"files": manifest.files | {name: file}})
        assert {keep for keep in (5, None) if bundle_parts(edited, keep) != bundle_parts(manifest, keep)} == changes


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "expected 14 predictions, found 0; remove the file"),
        (b"{}\n" * 15, "expected 14 predictions, found 15; remove the file"),
        (b"nothing\n" * 14, "line 1: expected the prediction of item 'a0', found something else; remove the file"),
        (b'{"item": "b0", "text": "", "score": 1}\n' * 14, "line 1: expected the prediction of item 'a0'"),
        (b'{"item": "a0", "text": 3, "score": 1}\n' * 14, "line 1: expected the prediction of item 'a0'"),
        (b'{"item": "a0", "text": "", "score": "?"}\n' * 14, "line 1: expected the prediction of item 'a0'"),
        (b'{"item": "a0", "text": "", "score": 1, "kept": [3]}\n' * 14, "line 1: expected the prediction of item 'a0'"),
        (b"[" * 100_000 + b"\n" * 14, "line 1: expected the prediction of item 'a0'"),
    ],
    ids=["short", "long", "no JSON", "another item", "text", "score", "kept", "deep"],
)
def test_damaged_files_are_refused(pipeline: Pipeline, tmp_path: Path, content: bytes, words: str) -> None:
    run = EvalRun(pipeline, TASK, tmp_path)
    run.file(5).write_bytes(content)
    with pytest.raises(FlashVLMError) as refused:
        run.predict([5])
    assert words in str(refused.value)
    assert run.file(5).read_bytes() == content


def test_places_that_cannot_be_written(pipeline: Pipeline, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FlashVLMError, match=r"^cannot write .*; free space or choose another place$"):
        EvalRun(pipeline, TASK, tmp_path / "file").predict([5])
    fcntl = pytest.importorskip("fcntl")
    run = EvalRun(pipeline, TASK, tmp_path)
    with run.file(5).with_suffix(".jsonl.partial").open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(FlashVLMError, match="is being written by another run; wait for it, or choose another"):
            run.predict([5])


# --- what cannot be asked --------------------------------------------------------------------------------------------


def test_refusals_name_the_item(pipeline: Pipeline, tmp_path: Path) -> None:
    def refused(item: Item, budget: Any = 5, **task: Any) -> Exception:
        with pytest.raises(FlashVLMError) as error:
            EvalRun(pipeline, a_task(items=(item,), **task), tmp_path / "out").predict([budget])
        return error.value

    good = TASK.items[0]
    assert isinstance(refused(replace(good, question=" ")), PromptError)
    missing = refused(replace(good, images=(str(tmp_path / "no.png"),)), load=lambda path: path)
    assert isinstance(missing, ImageError)
    assert str(missing).startswith("task tiny, item a0: ")
    assert "expected an image file, found nothing there" in str(missing)
    assert "the prompt is" in str(refused(replace(good, question="apple " * 4000)))
    assert not [*(tmp_path / "out").glob("*.jsonl")]
    assert isinstance(refused(good, budget=6), SelectionError)
