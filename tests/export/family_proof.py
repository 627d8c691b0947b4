"""What every model family has to show, against transformers' own model and processor in float32.

A test file a family subclasses ``FamilyProof``, and says literally what is the family's own: how its processor is put
together, what its tower attends to, which of its visual tokens are never selected. The rest is the same for all.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from test_parity import TOLERANCE, Recorded, picture
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import rename_source_key

from flashvlm import Pipeline
from flashvlm.bundle import Bundle
from flashvlm.graph_io import DialectName
from flashvlm.images import load_image
from flashvlm.preprocess import tile
from flashvlm_export.checkpoint import open_checkpoint
from flashvlm_export.exporter import ExportOptions, export
from flashvlm_export.families import FAMILIES
from flashvlm_export.families.contract import Family, VisualOptions
from flashvlm_export.selection import SelectionParams, select
from flashvlm_export.testing import checkpoints

STEPS = 16
QUESTION = "What is it that you see on the left of the others?"
Message = dict[str, Any]


def part(image: Any = None) -> dict[str, Any]:
    return {"type": "image"} if image is None else {"type": "image", "image": image}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def user(*parts: dict[str, Any]) -> Message:
    return {"role": "user", "content": [*parts]}


# Images are numbers of ``FamilyProof.images``.
PROMPTS: dict[str, Callable[[Callable[[int], dict[str, Any]]], list[Message]]] = {
    "text": lambda image: [user(text(QUESTION))],
    "one": lambda image: [user(image(0), text(QUESTION))],
    "two": lambda image: [user(text("Look:"), image(0), text("and then"), image(1), text(QUESTION))],
    "conversation": lambda image: [
        {"role": "system", "content": [text("You are brief.")]},
        user(image(1), text("What is it?")),
        {"role": "assistant", "content": [text("A cat.")]},
        user(text(QUESTION)),
    ],
}


def without_video(processor: type, *args: Any, **settings: Any) -> Any:
    """transformers' processor without the part for videos, which needs torchvision; it checks for one."""
    unchecked = {"check_argument_for_proper_class": lambda *_: None}
    return type(processor.__name__, (processor,), unchecked)(*args, **settings)


def published(folder: str) -> Path:
    """A published model's own files, which are not part of this project; skips where there are none."""
    beside = Path(__file__).resolve().parents[2].parent / "shared" / "published"
    found = Path(os.environ.get("FLASHVLM_PUBLISHED", beside)) / folder
    if not found.is_dir():
        pytest.skip(f"no {found}; FLASHVLM_PUBLISHED names the folder that has it")
    return found


class Reference:
    """transformers' model with eager attention, and what it computes of a prompt.

    Args:
        processor: (image processor, tokenizer) -> transformers' processor of the family.
    """

    def __init__(self, folder: Path, processor: Callable[[Any, Any], Any]) -> None:
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        self.model.set_attn_implementation("eager")  # the only one that returns attention weights
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.processor = processor(AutoImageProcessor.from_pretrained(folder, backend="pil"), self.tokenizer)

    def rendered(self, messages: list[Message]) -> str:
        rendered = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return str(rendered)

    def inputs(self, messages: list[Message], images: Sequence[np.ndarray]) -> Any:
        return self.processor(images=[*images] or None, text=[self.rendered(messages)], return_tensors="pt")

    @torch.no_grad()
    def generate(self, inputs: Any, repetition_penalty: float = 1.0) -> tuple[list[int], np.ndarray]:
        """Tokens and logits [1 + STEPS, V] of transformers' own greedy generation."""
        made = self.model.generate(
            **inputs, max_new_tokens=1 + STEPS, do_sample=False, repetition_penalty=repetition_penalty,
            eos_token_id=None, pad_token_id=0, return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        said = made.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        return said, torch.cat(made.logits).numpy()

    @torch.no_grad()
    def language_inputs(self, inputs: Any) -> dict[str, Any]:
        """What the model hands its language model for a prompt: embeddings, positions, streams."""
        seen: dict[str, Any] = {}

        def look(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            seen.update(kwargs)

        hook = self.model.model.get_decoder().register_forward_pre_hook(look, with_kwargs=True)
        self.model(**inputs)
        hook.remove()
        return seen

    @torch.no_grad()
    def decode(self, embeds: Tensor, positions: Tensor, after: int, streams: dict[str, Any]) -> Iterator[Tensor]:
        """Logits [V] of the prompt [1,S,D] at its positions [A,1,S], and then of each greedy token; ``after``: the
        position of the first."""
        decoder, cache = self.model.model.get_decoder(), None
        for step in range(1 + STEPS):
            # With a mask given, gaps between positions are not taken for borders of packed prompts.
            mask = torch.ones(1, embeds.shape[1] + (cache.get_seq_length() if cache else 0), dtype=torch.long)
            out = decoder(
                inputs_embeds=embeds, position_ids=positions if len(positions) > 1 else positions[0],
                attention_mask=mask, past_key_values=cache, use_cache=True, **(streams if cache is None else {}),
            )  # fmt: skip
            cache = out.past_key_values
            logits = self.model.get_output_embeddings()(out.last_hidden_state[0, -1])
            yield logits
            embeds = self.model.get_input_embeddings()(logits.argmax().view(1, 1))
            positions = torch.full((len(positions), 1, 1), after + step)


class FamilyProof:
    """Subclassed by a family's tests. ``images``: [H,W,3], of shapes that the family treats differently."""

    family: Family
    preset: str
    budgets: ClassVar[tuple[int, ...]] = (7,)
    images: ClassVar[list[np.ndarray]] = [picture((31, 47), 1), picture((130, 61), 2)]
    # With one iteration the selection is a graph of half the size; other tests have the default.
    params: ClassVar[SelectionParams] = SelectionParams(iterations=1)
    options: ClassVar[VisualOptions] = VisualOptions()
    real_options: ClassVar[VisualOptions] = VisualOptions()  # at the sizes of a published model

    # --- what a family says literally ---

    def processor(self, image_processor: Any, tokenizer: Any) -> Any:
        """transformers' processor of the family."""
        raise NotImplementedError

    def signals(self, reference: Reference, image: np.ndarray) -> tuple[Tensor, Tensor]:
        """features [n,Dv] and saliency [n] of an image's tokens in reading order, from the stock tower's outputs."""
        raise NotImplementedError

    def valid(self, reference: Reference, image: np.ndarray, count: int) -> Tensor:
        """bool [n]: which of an image's tokens may be selected."""
        return torch.ones(count, dtype=torch.bool)

    def visual_rows(self, reference: Reference, ids: Tensor) -> Tensor:
        """bool [T]: which tokens of the processor's ids stand for visual ones."""
        return ids == reference.model.config.image_token_id

    def reference_pixels(self, reference: Reference, inputs: Any) -> np.ndarray:
        """[U,C,H,W] of all images of a prompt, in their order, as ours are."""
        return np.asarray(inputs["pixel_values"]).reshape(-1, *inputs["pixel_values"].shape[-3:])

    # --- fixtures ---

    @pytest.fixture(scope="class")
    @classmethod
    def checkpoint(cls, once: Any) -> Path:
        return once(cls.preset, lambda out: checkpoints.write_checkpoint(cls.preset, out, dtype="float32"))

    @pytest.fixture(scope="class", params=["modern", pytest.param("legacy", marks=pytest.mark.thorough)])
    @classmethod
    def bundle(cls, request: pytest.FixtureRequest, once: Any, checkpoint: Path) -> Path:
        def write(out: Path) -> None:
            dialect: DialectName = request.param
            export(
                ExportOptions(str(checkpoint), out, cls.budgets, dialect=dialect, visual=cls.options, params=cls.params)
            )

        return once(f"{cls.preset}-{request.param}", write)

    @pytest.fixture(scope="class")
    @classmethod
    def recorded(cls, bundle: Path) -> Recorded:
        return Recorded(bundle)

    @pytest.fixture(scope="class")
    @classmethod
    def reference(cls, checkpoint: Path) -> Reference:
        return Reference(checkpoint, cls().processor)

    def prompt(self, name: str) -> tuple[list[Message], list[Message], list[np.ndarray]]:
        """A prompt as ours, as transformers' template takes it, and its images."""
        images: list[np.ndarray] = []

        def show(number: int) -> dict[str, Any]:
            images.append(self.images[number])
            return part(self.images[number])

        return PROMPTS[name](show), PROMPTS[name](lambda _: part()), images

    # --- tests ---

    def test_is_registered(self) -> None:
        assert FAMILIES[self.family.NAME] is self.family

    def test_names_are_those_of_transformers(self, checkpoint: Path, reference: Reference) -> None:
        """Each tensor of the checkpoint goes where transformers puts it."""
        theirs = get_model_conversion_mapping(reference.model)
        names = [tensor.name for tensor in open_checkpoint(str(checkpoint)).tensors.values()]
        assert names
        for name in names:
            assert self.family.canonical_name(name) == rename_source_key(name, theirs, [])[0]

    def test_pixels(self, recorded: Recorded, reference: Reference) -> None:
        _, theirs, images = self.prompt("two")
        expected = self.reference_pixels(reference, reference.inputs(theirs, images))
        manifest = recorded.pipeline.bundle.manifest
        spec = next(spec for spec in manifest.visual if spec.modality == "image")
        found = np.concatenate([tile(load_image(image), spec.pixels, len(images) > 1)[0] for image in images])
        np.testing.assert_array_equal(found, expected)

    @pytest.mark.parametrize("name", PROMPTS)
    def test_all_tokens(self, name: str, recorded: Recorded, reference: Reference) -> None:
        """The prompt's length, greedy tokens and logits at every step."""
        ours, theirs, images = self.prompt(name)
        inputs = reference.inputs(theirs, images)
        said, logits = reference.generate(inputs)
        answer = recorded.chat(ours, budget="all", max_new_tokens=1 + STEPS)
        assert answer.prompt_tokens == inputs["input_ids"].shape[1]
        assert list(answer.token_ids) == said
        assert len(set(said)) > 1
        assert np.abs(np.concatenate(recorded.logits) - logits).max() <= TOLERANCE

    @pytest.mark.parametrize("name", PROMPTS)
    def test_embeddings_and_positions(self, name: str, recorded: Recorded, reference: Reference) -> None:
        """Every token of text and every visual one is where transformers puts it."""
        ours, theirs, images = self.prompt(name)
        inputs = reference.inputs(theirs, images)
        seen = reference.language_inputs(inputs)
        recorded.chat(ours, budget="all", max_new_tokens=1)
        (chunk,) = recorded.chunks
        assert np.abs(chunk["embeds"] - seen["inputs_embeds"].numpy()).max() <= 1e-5
        length = inputs["input_ids"].shape[1]
        positions = seen.get("position_ids")
        positions = torch.arange(length)[None] if positions is None else positions
        expected = np.broadcast_to(positions.reshape(-1, length), (chunk["positions"].size // length, length))
        np.testing.assert_array_equal(chunk["positions"].reshape(-1, length), expected)

    @pytest.mark.parametrize("name", ["one", "two", "conversation"])
    def test_some_tokens(self, name: str, recorded: Recorded, reference: Reference) -> None:
        """What is kept, and transformers' language model over it."""
        ours, theirs, images = self.prompt(name)
        inputs = reference.inputs(theirs, images)
        for budget in self.budgets:
            answer = recorded.chat(ours, budget=budget, max_new_tokens=1 + STEPS)
            counts = [selection.count for selection in answer.selections]
            chosen = self.chosen(reference, theirs, images, inputs, counts, budget)
            assert [selection.kept.tolist() for selection in answer.selections] == [k.tolist() for k in chosen]
            keep = recorded.pipeline.bundle.manifest.selection.positions == "keep"
            logits = torch.stack([*self.pruned(reference, inputs, chosen, counts, keep)]).numpy()
            assert list(answer.token_ids) == logits.argmax(-1).tolist()
            assert np.abs(np.concatenate(recorded.logits) - logits).max() <= TOLERANCE

    @torch.no_grad()
    def chosen(
        self, reference: Reference, messages: list[Message], images: list[np.ndarray], inputs: Any,
        counts: list[int], budget: int,
    ) -> list[Tensor]:  # fmt: skip
        """int64 [K] of each image, by the torch selection."""
        ids = inputs["input_ids"][0]
        embeds = reference.language_inputs(inputs)["inputs_embeds"][0]
        tokens = embeds[self.visual_rows(reference, ids)].split(counts)
        asked = self.asked(reference, messages)
        query = reference.model.get_input_embeddings()(torch.tensor([asked]))
        chosen = []
        for image, projected in zip(images, tokens, strict=True):
            if len(projected) <= budget:
                chosen.append(torch.arange(len(projected)))
                continue
            features, saliency = self.signals(reference, image)
            valid = self.valid(reference, image, len(projected))
            kept = select(
                projected[None],
                features[None],
                saliency[None],
                query,
                valid=valid[None],
                budget=budget,
                params=self.params,
            ).kept[0]
            chosen.append(kept)
        return chosen

    def asked(self, reference: Reference, messages: list[Message]) -> list[int]:
        """Tokens of the text of the last message, wherever the template puts it."""
        rendered, end, spans = reference.rendered(messages), 0, []
        for words in (part["text"] for part in messages[-1]["content"] if part["type"] == "text"):
            start = rendered.index(words, end) if end else rendered.rindex(words)
            end = start + len(words)
            spans.append((start, end))
        tokens = reference.tokenizer(rendered, return_offsets_mapping=True)
        return [
            token
            for token, (a, b) in zip(tokens.input_ids, tokens.offset_mapping, strict=True)
            if any(a < end and b > start for start, end in spans)
        ]

    def pruned(
        self, reference: Reference, inputs: Any, chosen: list[Tensor], counts: list[int], keep: bool
    ) -> Iterator[Tensor]:
        """Logits of transformers' language model over the prompt without the visual tokens that were not chosen."""
        seen = reference.language_inputs(inputs)
        embeds, ids = seen["inputs_embeds"], inputs["input_ids"][0]
        visual = torch.cat([torch.isin(torch.arange(n), k) for k, n in zip(chosen, counts, strict=True)])
        rows = torch.ones(len(ids), dtype=torch.bool)
        rows[self.visual_rows(reference, ids)] = visual
        positions = seen.get("position_ids")
        positions = torch.arange(len(ids))[None] if positions is None else positions
        positions = positions.reshape(-1, 1, len(ids))
        after = int(positions.max()) + 1
        if not keep:
            positions, after = torch.arange(int(rows.sum())).expand(1, 1, -1), int(rows.sum())
        else:
            positions = positions[..., rows]
        streams = {}
        if seen.get("visual_pos_masks") is not None:
            streams["visual_pos_masks"] = seen["visual_pos_masks"][:, rows]
            streams["deepstack_visual_embeds"] = [stream[visual] for stream in seen["deepstack_visual_embeds"]]
        return reference.decode(embeds[:, rows], positions, after, streams)

    def test_a_batch_is_its_items(self, recorded: Recorded) -> None:
        images = [self.images[1], None, self.images[0]]
        questions = [QUESTION, "hi", "And what is this here?"]
        for budget in ("all", self.budgets[0]):
            together = recorded.run(images, questions, budget=budget, max_new_tokens=4)
            for image, question, found in zip(images, questions, together, strict=True):
                alone = recorded.run(image, question, budget=budget, max_new_tokens=4)
                assert found.token_ids == alone.token_ids
                for a, b in zip(found.selections, alone.selections, strict=True):
                    assert a.kept.tolist() == b.kept.tolist()

    @pytest.mark.engines
    def test_the_stand_in_of_tensorrt_answers_alike(
        self, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.syspath_prepend(Path(__file__).parents[1] / "runtime")
        from tensorrt_standin import build, install

        folder = shutil.copytree(bundle, tmp_path / "bundle")
        plain = Pipeline.from_bundle(folder, backend="onnxruntime")
        build(folder, "tensorrt", max_seq=512)
        install(monkeypatch, "tensorrt")
        pipeline = Pipeline.from_bundle(folder, backend="tensorrt")
        images, questions = [self.images[1], None, self.images[0]], [QUESTION, "hi", "And this?"]
        for budget in ("all", *self.budgets):
            both = [p.generate(images, questions, budget=budget, max_new_tokens=4) for p in (pipeline, plain)]
            for found, wanted in zip(*both, strict=True):
                assert found.token_ids == wanted.token_ids
                for a, b in zip(found.selections, wanted.selections, strict=True):
                    assert a.kept.tolist() == b.kept.tolist()

    def test_the_bundle_names_no_family(self, bundle: Path) -> None:
        manifest = Bundle(bundle).manifest
        assert self.family.NAME not in manifest.model_dump_json(include={"visual", "graphs", "selection"})

    def test_short_names_have_sizes(self) -> None:
        assert {*self.family.CONFIGS} == {*self.family.ALIASES}
        for config in self.family.CONFIGS.values():
            parsed = self.family.read_config(config)
            assert self.family.tower_specs(parsed, VisualOptions())[0].candidates > 0

    @pytest.mark.slow
    @pytest.mark.engines
    @pytest.mark.parametrize("dialect", ["modern", "legacy"])
    def test_real_sizes_compile(self, dialect: DialectName, tmp_path: Path) -> None:
        """The smallest published model's tower whole, and two layers of its language model."""
        pytest.importorskip("tensorrt_rtx")
        from flashvlm_export.compile.engines import CompileOptions, compile_bundle

        name = next(iter(self.family.ALIASES))
        model = checkpoints.write_checkpoint(name, tmp_path / "checkpoint", layers=2, dtype="float16").folder
        out = tmp_path / "bundle"
        export(ExportOptions(str(model), out, (64,), dialect=dialect, visual=self.real_options))
        report = compile_bundle(CompileOptions(out, "tensorrt-rtx", ("8.9",), max_seq=4096))
        assert {*report.manifest.engines} == {*Bundle(out).manifest.graphs}
