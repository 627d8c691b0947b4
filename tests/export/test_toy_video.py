"""Videos go all the way, and equal torch: export, bundle, ONNX Runtime, TensorRT's stand-in."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import pytest
import torch
import toy_family
import toy_video
from test_parity import TOLERANCE, Recorded, picture
from test_toy_family import QUESTION, STEPS, Reference

from clips import decoded, scene, write_clip
from flashvlm import Pipeline
from flashvlm.bundle import Bundle
from flashvlm.cli.run import main as flashvlm_run
from flashvlm.errors import FlashVLMError, PromptError, VideoError
from flashvlm.images import load_image
from flashvlm.preprocess import stack, tile
from flashvlm.text.processor import TextProcessor
from flashvlm_export.exporter import ExportOptions, export
from flashvlm_export.selection import select
from refusals import assert_refused, run

BUDGETS = (7,)
IMAGE = picture((33, 31), 1)


class Case(NamedTuple):
    """A video at ``fps``, and what is to become of it, worked out by hand.

    chosen   frames
    text     with a <image> for each run
    run      positions (time, row, column) of one run
    after    where text goes on behind a run, from its start
    """

    frames: np.ndarray
    fps: float
    graph: str
    chosen: list[int]
    count: int
    text: str
    run: list[tuple[int, int, int]]
    after: int


def grid(rows: int, columns: int, time: int = 0) -> list[tuple[int, int, int]]:
    return [(time, row, column) for row in range(rows) for column in range(columns)]


CASES = {
    # Ten frames in two seconds: the middles of three parts.
    "square": Case(
        scene(10, (32, 40), 1),
        5.0,
        "vision-video-square",
        [1, 5, 8],
        48,
        "three frames, 0:00:02:\nframe 1 at 00:00: <image>,\nframe 2 at 00:01: <image>,\nframe 3 at 00:01: <image>\n\n",
        grid(4, 4),
        4,
    ),
    # Ten frames in ten seconds, two a second of them but no more than four: a pair each five seconds.
    "wide": Case(
        scene(10, (16, 64), 2),
        1.0,
        "vision-video-wide",
        [0, 2, 5, 7],
        32,
        "[<image>]",
        [*grid(2, 8), *grid(2, 8, 20)],
        8,
    ),
    # Two seconds at an odd number: three frames, an even number of which is two.
    "pair": Case(
        scene(3, (16, 64), 3), 2.0, "vision-video-wide", [0, 1], 16, "[<image>]", grid(2, 8), 8
    ),
    "tall": Case(
        scene(10, (64, 16), 4), 5.0, "vision-video-tall", [0, 5], 33, "<image>", [(i, i, i) for i in range(33)], 33
    ),
    # A video shorter than two frames has one.
    "short": Case(
        scene(1, (64, 16), 5), 5.0, "vision-video-tall", [0], 17, "<image>", [(i, i, i) for i in range(17)], 17
    ),
}  # fmt: skip
PLAIN = Case(IMAGE, 0, "vision", [0], 16, "<image>", grid(4, 4), 4)


@pytest.fixture(scope="session")
def checkpoint(once: Any) -> Path:
    return once("toy-video", toy_video.write_checkpoint)


@pytest.fixture(scope="session")
def video_bundle(once: Any, checkpoint: Path) -> Callable[[Any], Path]:
    """video_bundle(dialect)."""

    def make(dialect: Any) -> Path:
        def write(out: Path) -> None:
            with toy_video.with_video():
                export(ExportOptions(str(checkpoint), out, budgets=BUDGETS, dialect=dialect))

        return once(f"toy-video-{dialect}", write)

    return make


@pytest.fixture(scope="module", params=["modern", "legacy"])
def recorded(request: pytest.FixtureRequest, video_bundle: Callable[[Any], Path]) -> Recorded:
    return Recorded(video_bundle(request.param))


@pytest.fixture(scope="module")
def pipeline(video_bundle: Callable[[Any], Path]) -> Pipeline:
    return Pipeline.from_bundle(video_bundle("legacy"))


class Videos(Reference):
    """The torch model over whole sequences; prompts and positions as the cases have them."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.pairs = toy_video.Pairs(self.model.tower)

    def see(self, case: Case, spec: Any) -> list[torch.Tensor]:
        """image_tokens, features, saliency, deepstack, as many as there are: [1,count,*]."""
        if spec.modality == "image":
            units = tile(load_image(case.frames), spec.pixels)[0]
        else:
            units = stack([load_image(case.frames[i]) for i in case.chosen], spec.pixels)
        tower = self.pairs if units.shape[1] == 6 else self.model.tower
        found = [tokens.flatten(0, 1)[None] for tokens in tower(torch.from_numpy(units))]
        if spec.newline == "none":
            return found
        newlines = [self.model.tower.newline, *(torch.zeros(tokens.shape[2:]) for tokens in found[1:])]
        return [torch.cat([tokens, line[None, None]], 1) for tokens, line in zip(found, newlines, strict=True)]

    @torch.no_grad()
    def answer(self, recorded: Recorded, cases: list[Case], budget: int | None) -> tuple[Any, ...]:
        """Tokens, logits [1 + STEPS, V] and what is kept of each."""
        specs = {spec.graph: spec for spec in recorded.pipeline.bundle.manifest.visual}
        embed, zeros = self.model.language.embed, torch.zeros(1, 128)
        text = "USER: " + "".join(f"{case.text}\n" for case in cases)
        encoded = self.tokenizer(f"{text}{QUESTION} ASSISTANT:", return_offsets_mapping=True)
        tokens = [*zip(encoded.input_ids, encoded.offset_mapping, strict=True)]
        asked = [i for i, (a, b) in tokens if b > len(text) and a < len(text) + len(QUESTION)]
        query = embed(torch.tensor([asked]))
        kept, seen = [], []
        for case in cases:
            found = self.see(case, specs[case.graph])
            assert found[0].shape[1] == case.count
            lacking = specs[case.graph].candidates - case.count
            padded = [torch.cat([t, t.new_zeros(1, lacking, *t.shape[2:])], 1) for t in found]
            valid = torch.arange(padded[0].shape[1])[None] < case.count - (specs[case.graph].newline == "end")
            chosen = torch.arange(case.count)
            if budget is not None and budget < case.count:
                chosen = select(*padded[:3], query, valid=valid, budget=budget).kept[0]
            kept.append(chosen.tolist())
            seen.append((found[0][0], found[3][0]))
        runs = [(i, r) for i, case in enumerate(cases) for r in range(case.text.count("<image>"))]
        embeds, deep, positions, cursor, last = [], [], [], 0, 0
        for token, _ in tokens:
            if token != toy_family.TEXT_TOKENS:
                embeds.append(embed(torch.tensor([token])))
                deep.append(zeros)
                positions.append((cursor,) * 3)
                cursor += 1
                continue
            i, r = runs.pop(0)
            start = r * len(cases[i].run)
            cells = [k for k in kept[i] if start <= k < start + len(cases[i].run)]
            embeds.append(seen[i][0][cells])
            deep.append(seen[i][1][cells])
            positions += [tuple(cursor + axis for axis in cases[i].run[k - start]) for k in cells]
            last = max(last, *(cursor + axis + 1 for place in cases[i].run for axis in place))
            cursor += cases[i].after
        assert not runs
        return *self.decode(embeds, deep, positions, max(cursor, last)), kept


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Videos:
    return Videos(tmp_path_factory.mktemp("reference") / "toy")


def content(cases: list[Case]) -> list[dict[str, Any]]:
    def part(case: Case) -> dict[str, Any]:
        if not case.fps:
            return {"type": "image", "image": case.frames}
        return {"type": "video", "video": case.frames, "fps": case.fps}

    return [{"role": "user", "content": [*map(part, cases), {"type": "text", "text": QUESTION}]}]


MIXED = {name: [case] for name, case in CASES.items()} | {
    "mixed": [CASES["tall"], PLAIN, CASES["square"]],
    "two": [PLAIN, CASES["wide"], CASES["pair"]],
}


@pytest.mark.parity
@pytest.mark.parametrize("name", [*MIXED])
@pytest.mark.parametrize("budget", ["all", *BUDGETS])
def test_equal_to_torch(recorded: Recorded, reference: Videos, budget: Any, name: str) -> None:
    cases = MIXED[name]
    answer = recorded.chat(content(cases), budget=budget, max_new_tokens=1 + STEPS)
    said, logits, kept = reference.answer(recorded, cases, None if budget == "all" else budget)
    assert [selection.spec.graph for selection in answer.selections] == [case.graph for case in cases]
    clips = [selection.grid.clip for selection in answer.selections]
    assert [[*clip.indices] if clip else [0] for clip in clips] == [case.chosen for case in cases]
    assert [selection.kept.tolist() for selection in answer.selections] == kept
    assert list(answer.token_ids) == said
    assert np.abs(np.concatenate(recorded.logits) - logits).max() <= TOLERANCE


# --- every way to ask ------------------------------------------------------------------------------------------------


def test_a_file_is_its_frames(pipeline: Pipeline, tmp_path: Path) -> None:
    pytest.importorskip("av", reason="videos are read with PyAV")
    path = write_clip(tmp_path / "a.mp4", scene(12), fps=5)
    listed = content([CASES["square"]._replace(frames=np.stack(decoded(path)))])
    wanted = pipeline.chat(listed, max_new_tokens=4)
    assert pipeline.generate(None, QUESTION, video=path, max_new_tokens=4).token_ids == wanted.token_ids
    assert pipeline.stream(None, QUESTION, video=str(path), max_new_tokens=4).result().token_ids == wanted.token_ids
    found = asyncio.run(pipeline.generate_async(None, QUESTION, video=path.read_bytes(), max_new_tokens=4))
    assert found.token_ids == wanted.token_ids
    assert found.selections[0].grid.clip == wanted.selections[0].grid.clip
    assert found.timings.vision == 0  # the same frames were seen before


def test_images_then_videos(pipeline: Pipeline) -> None:
    tall, wide = CASES["tall"].frames, CASES["wide"].frames
    answer = pipeline.generate(IMAGE, QUESTION, video=[tall, wide], max_new_tokens=2)
    graphs = ["vision", "vision-video-tall", "vision-video-wide"]
    assert [selection.spec.graph for selection in answer.selections] == graphs
    several = pipeline.generate([IMAGE, None], [QUESTION, "hi"], video=[*map(load_image, tall)], max_new_tokens=2)
    assert [[one.spec.graph for one in each.selections] for each in several] == [graphs[:2], graphs[1:2]]


@pytest.mark.parametrize("reselect", [True, False])
def test_a_conversation_sees_a_video_once(pipeline: Pipeline, reselect: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline.encoder.forget_images()
    seen: list[str] = []
    vision = pipeline._session.vision
    monkeypatch.setattr(pipeline._session, "vision", lambda graph, *rest: seen.append(graph) or vision(graph, *rest))
    talk = pipeline.conversation(IMAGE, video=CASES["wide"].frames, reselect=reselect)
    for question in (QUESTION, "And then?"):
        answer = talk.ask(question, max_new_tokens=2)
        assert [one.spec.graph for one in answer.selections] == ["vision", "vision-video-wide"]
    assert seen == ["vision", "vision-video-wide"]


def test_a_template_may_write_all_images_first(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was selected comes in the order of the messages all the same."""
    both = "{%- for part in content if part['type'] != 'text' -%}{{ '<' + part['type'] + '>\\n' }}{%- endfor -%}"
    apart = "".join(both.replace("!= 'text'", f"== '{kind}'") for kind in ("image", "video"))
    template = toy_video.TEMPLATE.replace(both, apart)
    assert template != toy_video.TEMPLATE
    wanted = pipeline.chat(content([PLAIN, CASES["tall"]]), budget="all", max_new_tokens=4)
    text = pipeline.encoder.text
    monkeypatch.setattr(pipeline.encoder, "text", TextProcessor(text.tokenizer, template, text.named_tokens))
    found = pipeline.chat(content([CASES["tall"], PLAIN]), budget="all", max_new_tokens=4)
    assert found.token_ids == wanted.token_ids
    assert [len(one.kept) for one in found.selections] == [33, 16]
    assert [len(one.kept) for one in wanted.selections] == [16, 33]


def test_the_command_takes_videos(pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("av", reason="videos are read with PyAV")
    PIL.Image.fromarray(IMAGE).save(tmp_path / "a.png")
    path = write_clip(tmp_path / "a.mp4", scene(12), fps=5)
    wanted = pipeline.generate(IMAGE, QUESTION, video=path, budget=7, max_new_tokens=3)
    bundle = pipeline.bundle.path
    options = ["--image", tmp_path / "a.png", "--budget", 7, "--max-new-tokens", 3, "--prompt", QUESTION, "--json"]
    ran = run(flashvlm_run, bundle, "--video", path, *options, "--show", tmp_path / "kept.png")
    assert ran.code == 0, ran
    assert [line.rpartition("/")[2] for line in ran.stderr.splitlines()] == ["kept.png", "kept-2.png"]
    found = json.loads(ran.stdout)
    assert found["token_ids"] == [*wanted.token_ids]
    (image,), (video,) = found["images"], found["videos"]
    assert [image["kept"], video["kept"]] == [one.kept.tolist() for one in wanted.selections]
    assert (video["frames"], video["fps"], video["tokens"]) == ([2, 6, 10], 5.0, 48)
    ran = run(flashvlm_run, bundle, "--video", path, "--video", tmp_path / "a.png", "--prompt", QUESTION)
    assert_refused(ran, "a.png: expected a video that can be decoded")
    ran = run(flashvlm_run, bundle, "--image", "-", "--video", "-", "--prompt", "hi")
    assert_refused(ran, "--image - and --video - both read stdin")


# --- refusals --------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_one_line(pipeline: Pipeline) -> None:
    with pytest.raises(VideoError, match="at least 3 frames, found 2; take a longer one"):
        pipeline.generate(None, QUESTION, video=scene(2, (32, 40)))
    with pytest.raises(PromptError, match="expected plain text, found the control token <video>"):
        pipeline.generate(IMAGE, "what is <video>?")
    with pytest.raises(PromptError, match=r"the prompt is \d+ tokens long with the 528 of 16 images or videos; .* 512"):
        pipeline.generate(None, QUESTION, video=[CASES["tall"].frames] * 16, budget="all")


def test_a_bundle_without_videos_says_so(tiny_bundle: Path) -> None:
    pipeline = Pipeline.from_bundle(tiny_bundle)
    words = "expected images alone, which are all this bundle takes, found videos; export with --frames 8"
    with pytest.raises(FlashVLMError, match=words):
        pipeline.generate(None, QUESTION, video=CASES["square"].frames)


# --- bundle and engines ----------------------------------------------------------------------------------------------


def test_the_manifest_says_all_of_it(video_bundle: Callable[[Any], Path]) -> None:
    manifest = Bundle(video_bundle("legacy")).manifest
    assert manifest.placeholders == {"image": 512, "video": 512}
    assert manifest.markers == {"video": "<video>"}
    assert manifest.graphs["vision-video-wide"].inputs[0].shape == ("units", 6, 8, 32)
    assert manifest.graphs["vision-video-tall"].inputs[1].shape == (33,)
    assert manifest.graphs["vision-video-square"].data == ("vision.data",)
    assert (manifest.max_units("vision-video-square"), manifest.max_units("vision-video-wide")) == (3, 2)
    assert "toy" not in manifest.model_dump_json(include={"visual", "graphs", "selection"})


@pytest.mark.engines
def test_the_stand_in_of_tensorrt_answers_alike(
    video_bundle: Callable[[Any], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pipeline: Pipeline
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "runtime")
    from tensorrt_standin import build, install

    folder = shutil.copytree(video_bundle("legacy"), tmp_path / "toy")
    build(folder, "tensorrt", max_seq=256)
    install(monkeypatch, "tensorrt")
    engines = Pipeline.from_bundle(folder, backend="tensorrt")
    for budget in ("all", *BUDGETS):
        for name in ("mixed", "two", "short"):
            found, wanted = (p.chat(content(MIXED[name]), budget=budget, max_new_tokens=3) for p in (engines, pipeline))
            assert found.token_ids == wanted.token_ids
            for a, b in zip(found.selections, wanted.selections, strict=True):
                assert a.kept.tolist() == b.kept.tolist()
