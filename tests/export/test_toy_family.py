"""A second family goes all the way, and equals its own torch model: export, bundle, ONNX Runtime, TensorRT."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import PIL.Image
import pytest
import torch
import toy_family
from test_parity import TOLERANCE, Recorded, picture
from transformers import AutoTokenizer

from flashvlm import Pipeline
from flashvlm.bundle import Bundle
from flashvlm.cli.run import main as flashvlm_run
from flashvlm.errors import CheckpointError, FlashVLMError
from flashvlm.graph_io import DECODER
from flashvlm.images import load_image
from flashvlm.kept_picture import MARGIN, PANEL
from flashvlm.manifest import EMBEDDINGS
from flashvlm.preprocess import tile
from flashvlm_export.exporter import ExportOptions, export
from flashvlm_export.families import family_of, registered
from flashvlm_export.families.contract import VisualOptions
from flashvlm_export.plan import PlanOptions, plan
from flashvlm_export.selection import select
from refusals import run

BUDGETS = (7, 20)
STEPS = 5
UNIT = 16  # visual tokens of a tile, 4 x 4
QUESTION = "What is it that you see on the left of the others?"
SQUARE, WIDE = picture((33, 31), 1), picture((30, 61), 2)  # one piece; two tiles and a thumbnail
SHOWN = {33: "<image>", 30: "row 1 column 1: <image>row 1 column 2: <image>\nall: <image>"}  # by height


@pytest.fixture(scope="module", autouse=True)
def known() -> Iterator[None]:
    with registered(toy_family):
        yield


@pytest.fixture(scope="session")
def checkpoint(once: Any) -> Path:
    return once("toy", toy_family.write_checkpoint)


@pytest.fixture(scope="session")
def toy_bundle(once: Any, checkpoint: Path) -> Any:
    """toy_bundle(dialect): at both budgets."""

    def make(dialect: Any) -> Path:
        def write(out: Path) -> None:
            with registered(toy_family):
                export(ExportOptions(str(checkpoint), out, budgets=BUDGETS, dialect=dialect))

        return once(f"toy-{dialect}", write)

    return make


# --- parity ----------------------------------------------------------------------------------------------------------


class Reference:
    """The torch model over whole sequences, without a cache; prompts and positions put together here."""

    def __init__(self, folder: Path) -> None:
        self.model = toy_family.write_checkpoint(folder)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def vision(self, image: np.ndarray, pixels: Any) -> list[torch.Tensor]:
        """image_tokens, features, saliency, deepstack of every candidate, padding last: [1,N,*]."""
        units = torch.from_numpy(tile(load_image(image), pixels)[0])
        found = [tokens.flatten(0, 1)[None] for tokens in self.model.tower(units)]
        padding = (toy_family.MAX_TILES + 1) * UNIT - found[0].shape[1]
        newline = self.model.tower.newline.expand(1, padding, -1)
        padded = [torch.cat([found[0], newline], dim=1)]
        padded += [torch.cat([t, t.new_zeros(1, padding, *t.shape[2:])], dim=1) for t in found[1:]]
        return padded

    def choose(self, found: list[torch.Tensor], query: torch.Tensor, valid: torch.Tensor, budget: int) -> torch.Tensor:
        """Indices of the candidates that a budget keeps."""
        if budget >= (count := int(valid.sum())):
            return torch.arange(count)
        return select(*found[:3], query, valid=valid, budget=budget).kept[0]

    @torch.no_grad()
    def greedy(self, recorded: Recorded, images: Sequence[np.ndarray], budget: int | None) -> tuple[Any, ...]:
        """Tokens, logits [1 + STEPS, V] and what is kept of each image."""
        (spec,) = recorded.pipeline.bundle.manifest.visual
        embed = self.model.language.embed
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": QUESTION}]
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        question = text.index(QUESTION), text.index(QUESTION) + len(QUESTION)
        spans = self.tokenizer(text, return_offsets_mapping=True)
        asked = [
            i
            for i, (a, b) in zip(spans.input_ids, spans.offset_mapping, strict=True)
            if b > question[0] and a < question[1]
        ]
        kept, tokens, stream = [], [], []
        for image in images:
            found = self.vision(image, spec.pixels)
            count = (1 if len(image) == 33 else 3) * UNIT
            valid = torch.arange(spec.candidates)[None] < count
            query = embed(torch.tensor([asked]))
            kept.append(torch.arange(count) if budget is None else self.choose(found, query, valid, budget))
            tokens.append(found[0][0])
            stream.append(found[3][0])
        before, *rest = text.split("<image>")
        text = before + "".join(SHOWN[len(image)] + part for image, part in zip(images, rest, strict=True))
        embeds, deep, positions, cursor = [], [], [], 0
        runs = [(i, unit) for i, image in enumerate(images) for unit in range(SHOWN[len(image)].count("<image>"))]
        for token in self.tokenizer(text).input_ids:
            if token == toy_family.TEXT_TOKENS:
                i, unit = runs.pop(0)
                cells = [int(k) for k in kept[i] if k // UNIT == unit]
                embeds.append(tokens[i][cells])
                deep.append(stream[i][cells])
                places = [(cursor, cursor + k % UNIT // 4, cursor + k % 4) for k in cells]
                positions.extend(places)
                cursor += 4
                continue
            embeds.append(embed(torch.tensor([token])))
            deep.append(torch.zeros(1, stream[0].shape[1] if stream else 128))
            positions.append((cursor,) * 3)
            cursor += 1
        return *self.decode(embeds, deep, positions, cursor), kept

    def decode(
        self, embeds: list[torch.Tensor], deep: list[torch.Tensor], positions: list[tuple[int, ...]], cursor: int
    ) -> tuple[list[int], np.ndarray]:
        """Greedy tokens and logits [1 + STEPS, V] after a prompt, a tensor of tokens a piece; ``cursor``: the first new
        position."""
        embed = self.model.language.embed
        said, logits = [], []
        for _ in range(1 + STEPS):
            row = torch.cat(embeds)[None]
            length = row.shape[1]
            mask = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)[None, None]
            out = self.model.language(
                inputs_embeds=row,
                position_ids=torch.tensor(positions).T[None],
                attention_mask=mask,
                deepstack=torch.cat(deep)[None],
            ).last_hidden_state
            logits.append(self.model.head(out[0, -1]))
            said.append(int(logits[-1].argmax()))
            embeds.append(embed(torch.tensor(said[-1:])))
            deep.append(torch.zeros(1, deep[0].shape[1]))
            positions.append((cursor,) * 3)
            cursor += 1
        return said, torch.stack(logits).numpy()


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(tmp_path_factory.mktemp("reference") / "toy")


# The slow tier has both. The fast one has the family in one dialect, and the other dialect with LLaVA (test_parity,
# test_compile, test_tensorrt_session).
BOTH = ["modern", "legacy"]


@pytest.fixture(scope="module", params=BOTH)
def recorded(request: pytest.FixtureRequest, toy_bundle: Any) -> Recorded:
    return Recorded(toy_bundle(request.param))


@pytest.mark.parametrize("images", [(), (SQUARE,), (WIDE,), (SQUARE, WIDE)], ids=["text", "square", "wide", "both"])
@pytest.mark.parametrize("budget", ["all", *BUDGETS])
def test_equal_to_torch(recorded: Recorded, reference: Reference, budget: Any, images: tuple[np.ndarray, ...]) -> None:
    if not images and budget != "all":
        pytest.skip("nothing to select")
    parts = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": QUESTION}]
    answer = recorded.chat([{"role": "user", "content": parts}], budget=budget, max_new_tokens=1 + STEPS)
    said, logits, kept = reference.greedy(recorded, images, None if budget == "all" else budget)
    assert [selection.kept.tolist() for selection in answer.selections] == [each.tolist() for each in kept]
    assert list(answer.token_ids) == said
    assert len(set(said)) > 1 or not images
    assert np.abs(np.concatenate(recorded.logits) - logits).max() <= TOLERANCE


def test_positions_have_three_axes(recorded: Recorded) -> None:
    recorded.run(WIDE, QUESTION, budget="all", max_new_tokens=2)
    prefill, step = (chunk["positions"] for chunk in recorded.chunks)
    assert prefill.shape[1] == 3
    assert (prefill[0, 0] != prefill[0, 2]).any()
    assert step.shape == (1, 3, 1)
    assert len({*step[0, :, 0].tolist()}) == 1


def test_a_picture_of_each_image(toy_bundle: Any, tmp_path: Path) -> None:
    """Of the second, which is cut into tiles, also one panel of its thumbnail."""
    files = [tmp_path / "square.png", tmp_path / "wide.png"]
    for file, image in zip(files, (SQUARE, WIDE), strict=True):
        PIL.Image.fromarray(image).save(file)
    images = [word for file in files for word in ("--image", file)]
    command = [toy_bundle("legacy"), *images, "--prompt", QUESTION, "--budget", 7, "--max-new-tokens", 1]
    ran = run(flashvlm_run, *command, "--show", tmp_path / "kept.png")
    assert ran.code == 0, ran
    assert [line.rpartition("/")[2] for line in ran.stderr.splitlines()] == ["kept.png", "kept-2.png"]
    widths = [PIL.Image.open(tmp_path / name).width for name in ("kept.png", "kept-2.png")]
    assert [(width - MARGIN) // (PANEL + MARGIN) for width in widths] == [3, 4]


# --- bundle ----------------------------------------------------------------------------------------------------------


def test_the_manifest_says_all_of_it(toy_bundle: Any) -> None:
    manifest = Bundle(toy_bundle("modern")).manifest
    assert (manifest.model.position_axes, manifest.model.streams) == (3, {"deepstack": 128})
    assert manifest.selection.positions == "keep"
    assert manifest.graphs["vision"].inputs[0].shape == ("units", 3, 16, 16)
    assert manifest.graphs["select-k7"].outputs[-1].name == "visual_deepstack"
    assert manifest.graphs[DECODER].inputs[1].shape == ("batch", 3, "sequence")
    assert manifest.graphs[DECODER].data == ("decoder.data", EMBEDDINGS)  # a tied table, once
    assert not manifest.unused_tensors
    assert "toy" not in manifest.model_dump_json(include={"visual", "graphs", "selection"})


def test_a_plan_is_what_an_export_writes(toy_bundle: Any, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = plan(PlanOptions(str(checkpoint), BUDGETS, text_tokens=2, new_tokens=2))
    manifest = Bundle(toy_bundle("modern")).manifest
    assert found.candidates == manifest.candidates == 48
    for part, file in (("vision", "vision.data"), ("decoder", "decoder.data"), ("embedding", EMBEDDINGS)):
        assert abs((found.parts[part].file_bytes or 0) - manifest.files[file].size) < 4096
    # A short name of which nothing is on the Hub.
    config = family_config(checkpoint)
    monkeypatch.setitem(toy_family.CONFIGS, "toy-1", config)
    named = plan(PlanOptions("toy-1", BUDGETS, text_tokens=2, new_tokens=2))
    assert named.parameters == found.parameters


def family_config(checkpoint: Path) -> dict[str, Any]:
    from flashvlm_export.checkpoint import read_config

    return read_config(checkpoint / "config.json")


@pytest.mark.slow
def test_graphs_of_several_sizes_share_one_file(checkpoint: Path, reference: Reference, tmp_path: Path) -> None:
    visual = VisualOptions(image_sizes=((8, 8), (16, 16)), max_tiles=1)
    manifest = export(ExportOptions(str(checkpoint), tmp_path / "out", budgets=(16,), visual=visual)).manifest
    # 8 pixels have 4 tokens, too few for a budget of 16.
    assert {*manifest.graphs} == {"vision-8x8", "vision-16x16", DECODER, "select-16x16-k16"}
    assert manifest.graphs["vision-8x8"].data == manifest.graphs["vision-16x16"].data == ("vision.data",)
    places = []
    for name, side in (("vision-8x8", 8), ("vision-16x16", 16)):
        file = tmp_path / "out" / f"{name}.onnx"
        weights = onnx.load(file, load_external_data=False).graph.initializer
        places.append({w.name: {e.key: e.value for e in w.external_data} for w in weights if w.external_data})
        pixels = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(side))
        with torch.no_grad():
            tokens, *_ = reference.model.tower(pixels)
        order = 1 + np.arange(tokens.shape[1])
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        (found,) = session.run(["image_tokens"], {"pixel_values": pixels.numpy(), "order": order})
        assert np.abs(found - tokens.numpy()).max() < 1e-5
    assert places[0] == places[1]
    tower = sum(p.numel() for p in reference.model.tower.parameters())
    assert manifest.files["vision.data"].size < 4 * tower + 4096 * len(places[0])


# --- TensorRT --------------------------------------------------------------------------------------------------------


@pytest.mark.engines
@pytest.mark.parametrize("dialect", BOTH)
def test_the_stand_in_of_tensorrt_answers_alike(
    dialect: str, toy_bundle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "runtime")
    from tensorrt_standin import build, install

    folder = shutil.copytree(toy_bundle(dialect), tmp_path / "toy")
    plain = Pipeline.from_bundle(folder, backend="onnxruntime")
    build(folder, "tensorrt", max_seq=256)
    install(monkeypatch, "tensorrt")
    pipeline = Pipeline.from_bundle(folder, backend="tensorrt")
    for budget in ("all", *BUDGETS):
        images, questions = [WIDE, None, SQUARE], [QUESTION, "hi", "And this?"]
        both = [p.generate(images, questions, budget=budget, max_new_tokens=4) for p in (pipeline, plain)]
        for found, wanted in zip(*both, strict=True):
            assert found.token_ids == wanted.token_ids
            for a, b in zip(found.selections, wanted.selections, strict=True):
                assert a.kept.tolist() == b.kept.tolist()


@pytest.mark.engines
@pytest.mark.parametrize("dialect", ["modern", "legacy"])
def test_tensorrt_rtx_builds_it(dialect: Any, toy_bundle: Any, checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    from flashvlm_export.compile.engines import CompileOptions, compile_bundle

    folder = tmp_path / "toy"
    if dialect == "legacy":
        shutil.copytree(toy_bundle("legacy"), folder)
    else:  # TensorRT's attention has no float32
        export(ExportOptions(str(checkpoint), folder, budgets=BUDGETS, dtype="float16"))
    report = compile_bundle(CompileOptions(folder, "tensorrt-rtx", ("8.9",), max_seq=256, max_query=64))
    assert {*report.manifest.engines} == {*Bundle(folder).manifest.graphs}


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"positions": "renumber"}, "positions have 3 axes.* use --positions keep"),
        ({"layout": "fused"}, "--layout fused takes one image in one piece"),
        ({"budgets": (49,)}, "expected 1 to 48"),
        ({"visual": VisualOptions(image_sizes=((8, 12),))}, "image size 8 x 12: expected squares"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], expected: str, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(FlashVLMError, match=expected):
        export(ExportOptions(str(checkpoint), tmp_path / "out", **{"budgets": BUDGETS, **options}))
    assert not [*tmp_path.iterdir()]


def test_a_family_of_one_size_refuses_others(tiny_checkpoint: Path, tmp_path: Path) -> None:
    for visual, expected in (
        (
            VisualOptions(image_sizes=((28, 28),)),
            "--image-size 28x28: family llava has images of one size",
        ),
        (VisualOptions(max_tiles=3), "--max-tiles 3: family llava has no tiles; leave it out"),
        (VisualOptions(frames=8), "--frames 8: family llava has no videos; leave it out"),
    ):
        options = ExportOptions(str(tiny_checkpoint), tmp_path / "out", (4,), visual=visual)
        with pytest.raises(FlashVLMError, match=expected):
            export(options)


def test_ranges_of_its_own(checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tower_width is 10000; expected 1 to 1,024"):
        toy_family.read_config(family_config(checkpoint) | {"tower_width": 10_000})


def test_a_family_is_known_for_as_long_as_it_is_registered(checkpoint: Path) -> None:
    config = family_config(checkpoint)
    assert family_of(config) is toy_family
    with pytest.raises(CheckpointError, match=r"'toy_next' is not supported \(it dreams\); supported families: .*toy"):
        family_of({"model_type": "toy_next"})


def test_and_no_longer() -> None:
    from flashvlm_export import families

    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(families.FAMILIES, "toy")
        with registered(toy_family):
            pass
        with pytest.raises(CheckpointError, match=r"'toy' is not supported; supported families: [a-su-z]"):
            family_of({"model_type": "toy"})
