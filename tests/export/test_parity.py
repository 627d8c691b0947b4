"""The exported graphs against transformers' own model, in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from flashvlm import Pipeline
from flashvlm.images import load_image
from flashvlm.preprocess import tile
from flashvlm_export.selection import select

TOLERANCE = 2e-4  # absolute, on logits (DESIGN section 6)
STEPS = 16
PROMPTS = ("What colour is the ball?", "Is there anything to the left of the big wooden table, and why?", "hi")
SIZES = ((31, 47), (224, 336), (90, 61))


class Recorded:
    """A pipeline that keeps the logits of every chunk it decodes."""

    def __init__(self, bundle: Path) -> None:
        self.pipeline = Pipeline.from_bundle(bundle)
        self.logits: list[np.ndarray] = []
        self.chunks: list[dict[str, np.ndarray]] = []
        decode = self.pipeline._session.decode

        def recording(*arrays: Any) -> np.ndarray:
            self.logits.append(decode(*arrays).copy())
            self.chunks.append({"embeds": arrays[0]["inputs_embeds"].copy(), "positions": arrays[1].copy()})
            return self.logits[-1]

        self.pipeline._session.decode = recording  # type: ignore[method-assign]

    def run(self, image: Any, prompt: Any, **options: Any) -> Any:
        self.logits.clear()
        self.chunks.clear()
        return self.pipeline.generate(image, prompt, **options)

    def chat(self, messages: Any, **options: Any) -> Any:
        self.logits.clear()
        self.chunks.clear()
        return self.pipeline.chat(messages, **options)


class Reference:
    """transformers' model and processor."""

    def __init__(self, checkpoint: Path) -> None:
        self.model = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self.model.set_attn_implementation("eager")  # the only one that returns attention weights
        self.processor = AutoProcessor.from_pretrained(checkpoint, backend="pil")

    def inputs(self, image: Any, prompt: str) -> Any:
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        return self.chat([{"role": "user", "content": content}], image)

    def chat(self, messages: Any, images: Any) -> Any:
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        return self.processor(images=images, text=text, return_tensors="pt")

    @torch.no_grad()
    def greedy(self, steps: int, **inputs: Any) -> tuple[list[int], np.ndarray]:
        """Tokens and logits [1 + steps, V] of plain greedy decoding with transformers' own cache."""
        out = self.model(**inputs, use_cache=True)
        logits = [out.logits[0, -1]]
        for _ in range(steps):
            token = logits[-1].argmax().view(1, 1)
            out = self.model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
            logits.append(out.logits[0, -1])
        return [int(row.argmax()) for row in logits], torch.stack(logits).numpy()


@pytest.fixture(scope="module", params=["tiny", "tiny_gqa", "tiny_gqa_legacy"])
def pair(request: pytest.FixtureRequest) -> tuple[Recorded, Reference]:
    bundle = request.getfixturevalue(f"{request.param}_bundle")
    return Recorded(bundle), Reference(request.getfixturevalue(f"{request.param.removesuffix('_legacy')}_checkpoint"))


def picture(size: tuple[int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


@pytest.mark.parametrize(("size", "prompt"), [*zip(SIZES, PROMPTS, strict=True)])
def test_all_tokens_equal_transformers(pair: tuple[Recorded, Reference], size: tuple[int, int], prompt: str) -> None:
    recorded, reference = pair
    image = picture(size)
    answer = recorded.run(image, prompt, budget="all", max_new_tokens=STEPS + 1)
    inputs = reference.inputs(image, prompt)
    tokens, logits = reference.greedy(STEPS, **inputs)
    assert answer.prompt_tokens == inputs["input_ids"].shape[1]
    assert list(answer.token_ids) == tokens
    assert np.abs(np.concatenate(recorded.logits) - logits).max() <= TOLERANCE


def test_text_alone_equals_transformers(pair: tuple[Recorded, Reference]) -> None:
    recorded, reference = pair
    recorded.run(None, "How are you?", max_new_tokens=STEPS + 1)
    messages = [{"role": "user", "content": [{"type": "text", "text": "How are you?"}]}]
    text = reference.processor.apply_chat_template(messages, add_generation_prompt=True)
    _, logits = reference.greedy(STEPS, **reference.processor(text=text, return_tensors="pt"))
    assert np.abs(np.concatenate(recorded.logits) - logits).max() <= TOLERANCE


def several(images: list[np.ndarray]) -> tuple[Any, Any]:
    """A conversation with text before, between and behind images, as ours and as transformers' processor takes it."""

    def part(image: np.ndarray | None) -> dict[str, Any]:
        return {"type": "image"} if image is None else {"type": "image", "image": image}

    def messages(first: Any, second: Any, third: Any) -> Any:
        return [
            {"role": "user", "content": [{"type": "text", "text": "Look:"}, part(first), part(second)]},
            {"role": "assistant", "content": [{"type": "text", "text": "Two pictures."}]},
            {"role": "user", "content": [part(third), {"type": "text", "text": "Which of them is darker?"}]},
        ]

    return messages(*images), messages(None, None, None)


def test_several_images_in_one_prompt_equal_transformers(pair: tuple[Recorded, Reference]) -> None:
    recorded, reference = pair
    images = [picture(size, seed) for seed, size in enumerate(SIZES)]
    ours, theirs = several(images)
    answer = recorded.chat(ours, budget="all", max_new_tokens=STEPS + 1)
    inputs = reference.chat(theirs, images)
    tokens, logits = reference.greedy(STEPS, **inputs)
    assert answer.prompt_tokens == inputs["input_ids"].shape[1]
    assert answer.image_tokens == 3 * recorded.pipeline.bundle.manifest.candidates
    assert list(answer.token_ids) == tokens
    assert np.abs(np.concatenate(recorded.logits) - logits).max() <= TOLERANCE


@torch.no_grad()
def test_a_budget_of_several_images_equals_transformers_fed_with_the_same_tokens(
    pair: tuple[Recorded, Reference],
) -> None:
    recorded, reference = pair
    manifest = recorded.pipeline.bundle.manifest
    images = [picture(size, seed) for seed, size in enumerate(SIZES)]
    ours, theirs = several(images)
    answer = recorded.chat(ours, max_new_tokens=1)
    inputs = reference.chat(theirs, images)
    model = reference.model.model
    projected = model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output
    ids = inputs["input_ids"][0]
    n = manifest.candidates
    first = (ids == reference.model.config.image_token_id).nonzero()[:, 0].reshape(3, n)[:, 0].tolist()
    pieces, positions, done = [], [], 0
    for at, features, selection in zip(first, projected, answer.selections, strict=True):
        kept = torch.from_numpy(selection.kept)
        assert len(kept) == manifest.selection.budgets[0]
        pieces += [model.get_input_embeddings()(ids[done:at]), features[kept]]
        positions += [torch.arange(done, at), at + kept]
        done = at + n
    pieces.append(model.get_input_embeddings()(ids[done:]))
    positions.append(torch.arange(done, len(ids)))
    embeds = torch.cat(pieces)[None]
    places = torch.cat(positions) if manifest.selection.positions == "keep" else torch.arange(embeds.shape[1])
    out = model.language_model(
        inputs_embeds=embeds, position_ids=places[None], attention_mask=torch.ones(embeds.shape[:2])
    )
    logits = reference.model.lm_head(out.last_hidden_state[:, -1])
    assert np.abs(recorded.logits[0] - logits.numpy()).max() <= TOLERANCE


@torch.no_grad()
def selected_by_torch(reference: Reference, recorded: Recorded, image: Any, prompt: str, budget: int) -> Any:
    """The selection as torch makes it, from transformers' features; and the text embeddings around the image."""
    manifest = recorded.pipeline.bundle.manifest
    inputs = reference.inputs(image, prompt)
    model = reference.model.model
    tower = model.vision_tower(inputs["pixel_values"], output_hidden_states=True, output_attentions=True)
    layer = reference.model.config.vision_feature_layer
    features = tower.hidden_states[layer][:, 1:]
    saliency = tower.attentions[layer].mean(1)[:, 0, 1:]
    ids = inputs["input_ids"][0]
    image_at = ids == reference.model.config.image_token_id
    if manifest.selection.query == "prompt":
        chosen = ids[~image_at & (ids != reference.processor.tokenizer.bos_token_id)]
    else:
        tokenizer = reference.processor.tokenizer
        text = tokenizer.decode(ids)
        start = text.index(prompt)
        spans = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
        chosen = torch.tensor(
            [
                i
                for i, (a, b) in zip(spans.input_ids, spans.offset_mapping, strict=True)
                if b > start and a < start + len(prompt)
            ]
        )
    embed = model.get_input_embeddings()
    projected = model.multi_modal_projector(features)
    selection = select(projected, features, saliency, embed(chosen)[None], budget=budget)
    first = int(image_at.nonzero()[0])
    return selection, embed(ids[:first]), embed(ids[~image_at][first:])


@pytest.mark.parametrize(("size", "prompt"), [*zip(SIZES, PROMPTS, strict=True)])
@torch.no_grad()
def test_a_budget_equals_transformers_fed_with_the_same_tokens(
    pair: tuple[Recorded, Reference], size: tuple[int, int], prompt: str
) -> None:
    recorded, reference = pair
    manifest = recorded.pipeline.bundle.manifest
    image = picture(size, seed=1)
    for budget in manifest.selection.budgets:
        answer = recorded.run(image, prompt, budget=budget, max_new_tokens=1)
        selection, before, after = selected_by_torch(reference, recorded, image, prompt, budget)
        assert answer.kept.tolist() == selection.kept[0].tolist()
        assert answer.is_top.tolist() == selection.is_top[0].tolist()
        assert answer.image_tokens == budget
        embeds = torch.cat([before, selection.visual_embeds[0], after])[None]
        p, n = len(before), manifest.candidates
        positions = torch.arange(embeds.shape[1])
        if manifest.selection.positions == "keep":
            positions = torch.cat([torch.arange(p), p + selection.kept[0], p + n + torch.arange(len(after))])
        out = reference.model.model.language_model(inputs_embeds=embeds, position_ids=positions[None])
        logits = reference.model.lm_head(out.last_hidden_state[:, -1])
        assert np.abs(recorded.logits[0] - logits.numpy()).max() <= TOLERANCE


@torch.no_grad()
def test_decoding_after_a_selection_equals_transformers_without_a_cache(pair: tuple[Recorded, Reference]) -> None:
    recorded, reference = pair
    recorded.run(picture((64, 64)), PROMPTS[1], max_new_tokens=STEPS + 1)
    # Every row the decoder was fed, as one sequence: transformers recomputes it all at once.
    embeds = np.concatenate([chunk["embeds"] for chunk in recorded.chunks], axis=1)
    positions = np.concatenate([chunk["positions"] for chunk in recorded.chunks], axis=1)
    out = reference.model.model.language_model(
        inputs_embeds=torch.from_numpy(embeds),
        position_ids=torch.from_numpy(positions),
        attention_mask=torch.ones(embeds.shape[:2]),  # without one, transformers takes a jump for a second sequence
        use_cache=False,
    )
    logits = reference.model.lm_head(out.last_hidden_state[0, -STEPS - 1 :]).numpy()
    assert np.abs(np.concatenate(recorded.logits) - logits).max() <= TOLERANCE


def test_a_batch_of_unequal_prompts_equals_single_runs(pair: tuple[Recorded, Reference]) -> None:
    recorded, _ = pair
    images = [picture((50, 40), seed) for seed in range(3)]
    batch = recorded.run(images, list(PROMPTS), max_new_tokens=8)
    batched = np.stack(recorded.logits)  # [steps, B, V]
    for b, (image, prompt) in enumerate(zip(images, PROMPTS, strict=True)):
        single = recorded.run(image, prompt, max_new_tokens=8)
        assert single.token_ids == batch[b].token_ids
        assert single.text == batch[b].text
        assert np.abs(np.concatenate(recorded.logits) - batched[:, b]).max() <= TOLERANCE


def test_the_fused_prefill_equals_the_three_graphs(tiny_gqa_bundle: Path) -> None:
    recorded = Recorded(tiny_gqa_bundle)
    pipeline, manifest = recorded.pipeline, recorded.pipeline.bundle.manifest
    image = picture((80, 33))
    answer = recorded.run(image, PROMPTS[0], max_new_tokens=1)
    seen = recorded.chunks[0]["embeds"][0]  # [T,D]

    encoder = pipeline.encoder
    encoded = encoder.text.encode(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROMPTS[0]}]}], manifest.placeholders
    )
    at = int(np.flatnonzero(encoded.input_ids == manifest.visual[0].placeholder_id)[0])
    query = encoder.embedding[encoded.input_ids[encoded.question_mask]][None]
    suffix = seen[at + answer.image_tokens :][None]
    spec = pipeline.bundle.graph("prefill-k5")
    inputs = {
        "pixel_values": tile(load_image(image), manifest.visual[0].pixels)[0],
        "prefix_embeds": seen[:at][None],
        "suffix_embeds": np.pad(suffix, ((0, 0), (0, 3), (0, 0))),  # right padding must not matter
        "num_tokens": np.array([suffix.shape[1]]),
        "query_embeds": np.asarray(query),
        "query_mask": np.ones(query.shape[:2], dtype=bool),
    }
    inputs |= {
        tensor.name: np.zeros([64 if d == "capacity" else 1 if d == "batch" else d for d in tensor.shape], np.float32)
        for tensor in spec.inputs
        if tensor.name.startswith("past")
    }
    session = onnxruntime.InferenceSession(pipeline.bundle.file(spec.file), providers=["CPUExecutionProvider"])
    logits, kept = session.run(["logits", "kept"], inputs)
    assert kept[0].tolist() == answer.kept.tolist()
    assert np.abs(logits - recorded.logits[0]).max() <= TOLERANCE


def test_float16_stays_close_to_float32(tiny_gqa_half_bundle: Path, tiny_gqa_bundle: Path) -> None:
    half, full = Recorded(tiny_gqa_half_bundle), Recorded(tiny_gqa_bundle)
    half.run(picture((50, 40)), PROMPTS[0], budget="all", max_new_tokens=1)
    full.run(picture((50, 40)), PROMPTS[0], budget="all", max_new_tokens=1)
    # 2^-11 relative a rounding, some 20 roundings deep, on logits of about 4.
    assert np.abs(half.logits[0] - full.logits[0]).max() <= 0.04
