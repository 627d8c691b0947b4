"""LLaVA-OneVision equals transformers: one image of a thumbnail and tiles, several in one piece each."""

from __future__ import annotations

import functools
import json
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from family_proof import QUESTION, Message, Recorded, Reference, published
from test_parity import picture
from torch import Tensor
from transformers import AutoImageProcessor, LlavaOnevisionProcessor
from transformers.models.llava_onevision.modeling_llava_onevision import image_size_to_num_patches
from video_proof import VideoProof

from flashvlm.errors import CheckpointError, FlashVLMError
from flashvlm.images import load_image
from flashvlm.preprocess import tile
from flashvlm.tilings import AnyRes
from flashvlm_export.families import family_of, llava_onevision
from flashvlm_export.families.contract import VisualOptions
from flashvlm_export.plan import PlanOptions, plan
from flashvlm_export.testing.presets.llava_onevision import TINY
from flashvlm_export.testing.presets.llava_onevision import image_processor as make_processor

SIDE, PINPOINTS = 58, TINY["image_grid_pinpoints"]


class Processor(LlavaOnevisionProcessor):
    """Images as ``apply_chat_template`` hands them over, a list for each prompt: it counts those of a prompt."""

    def check_argument_for_proper_class(self, *_: Any) -> None:
        """None: the part for videos is left out."""

    def __call__(self, images: Any = None, **more: Any) -> Any:
        return super().__call__(images=[images] if images else None, **more)


class TestLlavaOneVision(VideoProof):
    family = llava_onevision
    preset = "tiny-llava-onevision"
    # Two tiles, most of them padding; 2 x 2 of them; three above each other; smaller than a tile.
    images: ClassVar[list[np.ndarray]] = [
        picture((31, 100), 1),
        picture((130, 120), 10),
        picture((180, 50), 3),
        picture((20, 33), 4),
    ]
    options = VisualOptions(frames=3)
    several = False  # whether ``signals`` and ``valid`` are of one of several images

    def processor(self, image_processor: Any, tokenizer: Any) -> Any:
        return Processor(image_processor, tokenizer, num_image_tokens=64, vision_feature_select_strategy="full")

    def chosen(
        self, reference: Reference, messages: list[Message], images: list[np.ndarray], inputs: Any,
        counts: list[int], budget: int,
    ) -> list[Tensor]:  # fmt: skip
        self.several = len(images) > 1
        return super().chosen(reference, messages, images, inputs, counts, budget)

    def shown(self) -> list[int]:
        return [0, 3, 7]  # of 11, the starts of three parts: 0, 3.7, 7.3

    def visual_rows(self, reference: Reference, ids: Tensor) -> Tensor:
        config = reference.model.config
        return torch.isin(ids, torch.tensor([config.image_token_id, config.video_token_id]))

    def video_inputs(self, reference: Reference, messages: list[Message], frames: list[np.ndarray]) -> Any:
        # LlavaOnevisionProcessor.replace_video_token: 4 x 4 tokens a frame, and a newline.
        rendered = reference.rendered(messages).replace("<video>", "<video>" * (3 * 16 + 1))
        return {**reference.tokenizer(rendered, return_tensors="pt"), "pixel_values_videos": self.seen(frames)[None]}

    def seen(self, frames: Any) -> Tensor:
        """[F,3,H,W]: each frame resized as an image's thumbnail."""
        stock = make_processor(SIDE, PINPOINTS)
        return torch.stack([stock([[frame]], return_tensors="pt")["pixel_values"][0][0] for frame in frames])

    def video_signals(self, reference: Reference, frames: np.ndarray) -> tuple[Tensor, Tensor]:
        """Pooled as the tokens are; zeros for the newline behind all."""
        model = reference.model.model
        tower = model.vision_tower(self.seen(frames), output_attentions=True, output_hidden_states=True)
        received = tower.attentions[-1].mean((1, 2))[..., None]
        pooled = [model.apply_pooling(x).flatten(0, 1) for x in (tower.hidden_states[-1], received)]
        features, saliency = (torch.cat([x, torch.zeros(1, x.shape[1])]) for x in pooled)
        return features, saliency[:, 0]

    def signals(self, reference: Reference, image: np.ndarray) -> tuple[Tensor, Tensor]:
        if image.ndim == 4:
            return self.video_signals(reference, image)
        images = [[image, image]] if self.several else [[image]]
        units = reference.processor.image_processor(images, return_tensors="pt")["pixel_values"][0]
        tower = reference.model.model.vision_tower(units, output_attentions=True, output_hidden_states=True)
        received = tower.attentions[-1].mean((1, 2))[..., None]
        return self.packed(reference, image, tower.hidden_states[-1]), self.packed(reference, image, received)[:, 0]

    def valid(self, reference: Reference, image: np.ndarray, count: int) -> Tensor:
        if image.ndim == 4:
            return torch.arange(count) < count - 1
        units = 1 if self.several else image_size_to_num_patches(list(image.shape[:2]), PINPOINTS, SIDE)
        return self.packed(reference, image, torch.ones(units, 64, 1))[:, 0] > 0

    def packed(self, reference: Reference, image: np.ndarray, tokens: Tensor) -> Tensor:
        """[U,64,*] -> [n,*] as transformers packs them, zeros for each newline."""
        newline = torch.zeros(tokens.shape[-1])
        packed, _ = reference.model.model.pack_image_features([tokens], torch.tensor([image.shape[:2]]), newline)
        return packed[0]

    @pytest.mark.parametrize("number", range(4))
    def test_one_image_alone(self, number: int, recorded: Recorded, reference: Reference) -> None:
        image = self.images[number]
        spec, _ = recorded.pipeline.bundle.manifest.visual
        found, _ = tile(load_image(image), spec.pixels)
        units = reference.processor.image_processor([[image]], return_tensors="np")["pixel_values"][0]
        np.testing.assert_array_equal(found, units)
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
        answer = recorded.run(image, QUESTION, budget="all", max_new_tokens=1)
        assert answer.prompt_tokens == reference.inputs(messages, [image])["input_ids"].shape[1]

    def test_an_image_alone_and_among_several(self, recorded: Recorded) -> None:
        """In one batch, and known again in neither way for the other."""
        first, second = map(load_image, self.images[:2])
        prompts: list[Any] = [[first, second], first, [second, first]]
        for budget in ("all", self.budgets[0]):
            together = recorded.run(prompts, [QUESTION] * 3, budget=budget, max_new_tokens=4)
            assert [[one.count for one in answer.selections] for answer in together] == [[65] * 2, [132], [65] * 2]
            for images, found in zip(prompts, together, strict=True):
                alone = recorded.run(images, QUESTION, budget=budget, max_new_tokens=4)
                assert found.token_ids == alone.token_ids
                for a, b in zip(found.selections, alone.selections, strict=True):
                    assert a.kept.tolist() == b.kept.tolist()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"vision_feature_layer": -2}, "vision_feature_layer is -2; family llava_onevision supports -1"),
        ({"vision_feature_layer": [-1, -2]}, "vision_feature_layer is .*; family llava_onevision supports -1"),
        ({"vision_feature_select_strategy": "default"}, "family llava_onevision supports full"),
        ({"vision_aspect_ratio": "square"}, "vision_aspect_ratio is 'square'; .* supports anyres_max_9"),
        ({"vision_aspect_ratio": "anyres_max_0"}, "vision_aspect_ratio is 'anyres_max_0'"),
        ({"image_token_index": 9999}, "image_token_index is 9999; expected one of the 520 tokens"),
        ({"image_grid_pinpoints": [[58, 100]]}, r"image_grid_pinpoints has \[58, 100\]; expected"),
        ({"vision_config": TINY["vision_config"] | {"model_type": "clip_vision_model"}}, "'clip_vision_model'"),
        ({"text_config": TINY["text_config"] | {"model_type": "gpt_oss"}}, "text_config.model_type is 'gpt_oss'"),
        ({"text_config": TINY["text_config"] | {"use_sliding_window": True, "sliding_window": 8}}, "sliding_window is"),
        ({"quantization_config": {}}, "the checkpoint is quantized"),
    ],
)
def test_variants_are_refused_by_name(change: dict[str, Any], expected: str) -> None:
    with pytest.raises(CheckpointError, match=expected):
        llava_onevision.read_config(TINY | change)


def test_the_code_of_the_first_checkpoints_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"model_type 'llava_qwen' is not supported .*-hf conversion"):
        family_of({"model_type": "llava_qwen"})


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"size": {"height": 70, "width": 70}}, "size is .*70.*; the vision tower takes 58 x 58"),
        ({"image_grid_pinpoints": [[58, 116]]}, r"image_grid_pinpoints is \[\[58, 116\]\]; config.json has \[\[58"),
        ({"do_center_crop": True, "crop_size": {"height": 58, "width": 58}}, "do_center_crop is on"),
        ({"do_normalize": False}, "do_normalize is off"),
    ],
)
def test_an_image_processor_that_cuts_otherwise_is_refused(change: dict[str, Any], expected: str) -> None:
    processor = make_processor(SIDE, PINPOINTS)
    other = type(processor)(**{**processor.to_dict(), **change})
    with pytest.raises(CheckpointError, match=expected):
        llava_onevision.visual_specs(llava_onevision.read_config(TINY), other, VisualOptions())


def test_a_head_behind_the_tower_feeds_nothing() -> None:
    config = llava_onevision.read_config(TINY | {"vision_config": TINY["vision_config"] | {"vision_use_head": True}})
    with torch.device("meta"):
        names = [name for name, _ in llava_onevision.build(config, torch.float32).named_parameters()]
    unused = {name.split(".")[2] for name in names if llava_onevision.is_unused(config, name)}
    assert unused == {"head", "post_layernorm"}


def test_tiles_whose_tokens_would_be_shrunk_are_refused() -> None:
    """Against transformers' count of the tokens of a whole canvas: with 10 tiles it is still that of all of them."""
    config = llava_onevision.read_config(llava_onevision.CONFIGS["llava-onevision-0.5b"])
    processor = make_processor(384, llava_onevision.PINPOINTS)
    nine = SimpleNamespace(vision_aspect_ratio="anyres_max_9")
    theirs = functools.partial(LlavaOnevisionProcessor._get_unpadded_features, nine)
    found = {}
    for tiles in (None, 1, 9, 10):
        (spec,) = llava_onevision.visual_specs(config, processor, VisualOptions(max_tiles=tiles))
        assert isinstance(spec.pixels, AnyRes)
        (tower,) = llava_onevision.tower_specs(config, VisualOptions(max_tiles=tiles))
        assert (tower.units, tower.candidates) == (spec.pixels.max_units, spec.candidates)
        found[tiles] = spec.candidates
        for height, width in spec.pixels.pinpoints:
            rows, columns = height // 384, width // 384
            shown = theirs(height, width, 27, 27, rows, columns)
            assert shown == (27 * rows * 27 * columns, 27 * rows)
    assert found == {None: 3753, 1: 729 + 27 * 28, 9: 729 + 81 * 82, 10: 8154}
    with pytest.raises(FlashVLMError, match=r"--max-tiles 11: this model shrinks .* more than 10 tiles"):
        llava_onevision.visual_specs(config, processor, VisualOptions(max_tiles=11))
    assert theirs(1152, 1536, 27, 27, 3, 4)[1] < 81
    with pytest.raises(FlashVLMError, match="--image-size 384x384: family llava_onevision has images of one size"):
        llava_onevision.tower_specs(config, VisualOptions(image_sizes=((384, 384),)))


@pytest.mark.parametrize(("name", "parameters"), [("0.5b", 893_675_552), ("7b", 8_030_807_584)])
def test_planned_parameters(name: str, parameters: int) -> None:
    assert plan(PlanOptions(f"llava-onevision-{name}", (64,))).parameters == parameters


def test_published_files() -> None:
    folder = published("llava-hf__llava-onevision-qwen2-7b-ov-hf")
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    config = llava_onevision.read_config(llava_onevision.CONFIGS["llava-onevision-7b"])
    (spec,) = llava_onevision.visual_specs(config, processor, VisualOptions())
    settings = json.loads((folder / "processor_config.json").read_text())
    assert (spec.tokens_per_unit, spec.candidates) == (settings["num_image_tokens"], 3753)
    assert isinstance(spec.pixels, AnyRes)
    assert spec.pixels.border == (127, 127, 127)
