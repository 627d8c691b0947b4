"""LLaVA-NeXT equals transformers: a thumbnail, then rows over all tiles without their padding, a newline each."""

from __future__ import annotations

import json
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from family_proof import FamilyProof, Reference, published
from test_parity import picture
from torch import Tensor
from transformers import AutoImageProcessor, LlavaNextProcessor
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from flashvlm.errors import CheckpointError, FlashVLMError
from flashvlm.tilings import AnyRes
from flashvlm_export.families import family_of, llava_next
from flashvlm_export.families.contract import VisualOptions
from flashvlm_export.plan import PlanOptions, plan
from flashvlm_export.testing.presets.llava_next import TINY
from flashvlm_export.testing.presets.llava_next import image_processor as make_processor

SIDE, PINPOINTS = 56, TINY["image_grid_pinpoints"]


class TestLlavaNext(FamilyProof):
    family = llava_next
    preset = "tiny-llava-next"
    # Two tiles, most of them padding; 2 x 2 of them, full; three above each other.
    images: ClassVar[list[np.ndarray]] = [picture((31, 100), 1), picture((130, 130), 2), picture((170, 50), 3)]

    def processor(self, image_processor: Any, tokenizer: Any) -> Any:
        return LlavaNextProcessor(
            image_processor, tokenizer, patch_size=14, vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        )  # fmt: skip

    def reference_pixels(self, reference: Reference, inputs: Any) -> np.ndarray:
        units = [image_size_to_num_patches(size, PINPOINTS, SIDE) for size in inputs["image_sizes"]]
        return np.concatenate([np.asarray(p)[:n] for p, n in zip(inputs["pixel_values"], units, strict=True)])

    def signals(self, reference: Reference, image: np.ndarray) -> tuple[Tensor, Tensor]:
        inputs = reference.processor.image_processor(image, return_tensors="pt")
        tower = reference.model.model.vision_tower(
            inputs["pixel_values"][0], output_attentions=True, output_hidden_states=True
        )
        # hidden_states[-2] is what block -2 gives, as the first of them is the embedding.
        features, weights = tower.hidden_states[-2][:, 1:], tower.attentions[-2]
        seen = weights.mean(1)[:, 0, 1:, None]
        return self.packed(reference, image, features), self.packed(reference, image, seen)[:, 0]

    def valid(self, reference: Reference, image: np.ndarray, count: int) -> Tensor:
        units = image_size_to_num_patches(list(image.shape[:2]), PINPOINTS, SIDE)
        return self.packed(reference, image, torch.ones(units, 16, 1))[:, 0] > 0

    def packed(self, reference: Reference, image: np.ndarray, tokens: Tensor) -> Tensor:
        """[U,16,*] -> [n,*] as transformers packs them, zeros for each newline."""
        newline = torch.zeros(tokens.shape[-1])
        packed, _ = reference.model.model.pack_image_features(
            [tokens], torch.tensor([image.shape[:2]]), "default", newline
        )
        return packed[0]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"vision_feature_layer": [-2, -5]}, r"vision_feature_layer is \[-2, -5\]; expected one block of the 3"),
        ({"vision_feature_select_strategy": "full"}, "family llava_next supports default"),
        ({"image_token_index": 9999}, "image_token_index is 9999; expected one of the 520 tokens"),
        ({"image_grid_pinpoints": [[56, 100]]}, r"image_grid_pinpoints has \[56, 100\]; expected"),
        ({"image_grid_pinpoints": [[56, -112]]}, r"image_grid_pinpoints has \[56, -112\]; expected"),
        ({"image_grid_pinpoints": [56, 112]}, "image_grid_pinpoints has 56; expected"),
        ({"image_grid_pinpoints": []}, "image_grid_pinpoints has 0 sizes; expected 1 to 64"),
        ({"image_grid_pinpoints": [[56, 56]] * 65}, "image_grid_pinpoints has 65 sizes; expected 1 to 64"),
        ({"use_image_newline_parameter": False}, "use_image_newline_parameter is False"),
        ({"vision_config": TINY["vision_config"] | {"model_type": "siglip_vision_model"}}, "'siglip_vision_model'"),
        ({"text_config": TINY["text_config"] | {"model_type": "gpt_oss"}}, "text_config.model_type is 'gpt_oss'"),
        ({"text_config": TINY["text_config"] | {"sliding_window": 8}}, "text_config.sliding_window is 8"),
        ({"quantization_config": {}}, "the checkpoint is quantized"),
    ],
)
def test_variants_are_refused_by_name(change: dict[str, Any], expected: str) -> None:
    with pytest.raises(CheckpointError, match=expected):
        llava_next.read_config(TINY | change)


@pytest.mark.parametrize("relative", llava_next.REFUSED)
def test_relatives_are_refused(relative: str) -> None:
    with pytest.raises(CheckpointError, match=f"model_type '{relative}' is not supported .*(videos|-hf conversion)"):
        family_of({"model_type": relative})


def test_a_mistral_that_names_no_window_has_one() -> None:
    """As in transformers: 4,096 tokens."""
    text = {key: value for key, value in TINY["text_config"].items() if key != "sliding_window"}
    llava_next.read_config(TINY | {"text_config": text})  # of no effect within 1,024 positions
    with pytest.raises(CheckpointError, match=r"text_config.sliding_window is 4096"):
        llava_next.read_config(TINY | {"text_config": text | {"max_position_embeddings": 32768}})


def test_the_old_spelling_of_a_rope_is_read() -> None:
    text = TINY["text_config"] | {"rope_theta": 5e6, "rope_scaling": {"type": "linear", "factor": 2.0}}
    rope = llava_next.read_config(TINY | {"text_config": text}).text_config.rope_parameters
    assert (rope["rope_type"], rope["factor"], rope["rope_theta"]) == ("linear", 2.0, 5e6)


def test_fewer_tiles_leave_out_the_larger_canvases() -> None:
    config, processor = llava_next.read_config(TINY), make_processor(SIDE, PINPOINTS)
    (spec,) = llava_next.visual_specs(config, processor, VisualOptions(max_tiles=2))
    assert isinstance(spec.pixels, AnyRes)
    assert spec.pixels.pinpoints == ((56, 112), (112, 56))
    assert (spec.pixels.max_units, spec.candidates) == (3, 16 + 8 * 5)
    (tower,) = llava_next.tower_specs(config, VisualOptions(max_tiles=2))
    assert (tower.units, tower.candidates) == (3, 16 + 8 * 5)
    with pytest.raises(FlashVLMError, match="--max-tiles 1: expected 2 or more"):
        llava_next.visual_specs(config, processor, VisualOptions(max_tiles=1))
    with pytest.raises(FlashVLMError, match="--image-size 56x56: family llava_next has images of one size"):
        llava_next.visual_specs(config, processor, VisualOptions(image_sizes=((56, 56),)))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"size": {"shortest_edge": 70}}, "size is .*70.*; the vision tower takes 56 x 56"),
        ({"crop_size": {"height": 56, "width": 70}}, "crop_size is .*; the vision tower takes 56 x 56"),
        ({"image_grid_pinpoints": [[56, 112]]}, r"image_grid_pinpoints is \[\[56, 112\]\]; config.json has \[\[56"),
        ({"do_normalize": False}, "do_normalize is off"),
    ],
)
def test_an_image_processor_that_cuts_otherwise_is_refused(change: dict[str, Any], expected: str) -> None:
    processor = make_processor(SIDE, PINPOINTS)
    other = type(processor)(**{**processor.to_dict(), **change})
    with pytest.raises(CheckpointError, match=expected):
        llava_next.visual_specs(llava_next.read_config(TINY), other, VisualOptions())


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("vicuna-7b", 7_063_431_168),
        ("mistral-7b", 7_566_747_648),
        ("llama3-8b", 8_355_276_800),
        ("vicuna-13b", 13_351_499_776),
        ("34b", 34_752_083_968),
    ],
)
def test_planned_parameters(name: str, parameters: int) -> None:
    found = plan(PlanOptions(f"llava-1.6-{name}", (64,)))
    assert (found.parameters, found.candidates) == (parameters, 2928)


def test_published_configuration() -> None:
    folder = published("llava-hf__llava-v1.6-mistral-7b-hf")
    config = llava_next.read_config(json.loads((folder / "config.json").read_text()))
    ours = llava_next.read_config(llava_next.CONFIGS["llava-1.6-mistral-7b"])
    assert llava_next.language_spec(config) == llava_next.language_spec(ours)
    assert llava_next.tower_specs(config, VisualOptions()) == llava_next.tower_specs(ours, VisualOptions())
    assert config.text_config.rope_parameters == {"rope_type": "default", "rope_theta": 1e6}
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    (spec,) = llava_next.visual_specs(config, processor, VisualOptions())
    assert (spec.candidates, spec.placeholder_id, spec.pixels.max_units) == (2928, 32000, 5)


def test_published_names() -> None:
    """1.6-vicuna-7b's are LLaVA-1.5's and the newline's, which stands in an index of LLaVA-NeXT-Video."""
    index = "model.safetensors.index.json"
    found = {*json.loads((published("llava-hf__llava-1.5-7b-hf") / index).read_text())["weight_map"]}
    video = json.loads((published("llava-hf__LLaVA-NeXT-Video-7B__lora-bnb4-copy") / index).read_text())["weight_map"]
    found |= {name for name in video if "newline" in name}
    config = llava_next.read_config(llava_next.CONFIGS["llava-1.6-vicuna-7b"])
    with torch.device("meta"):
        expected = {name for name, _ in llava_next.build(config, torch.float16).named_parameters()}
    assert {llava_next.canonical_name(name) for name in found} - {None} == expected
    assert sum(llava_next.is_unused(config, name) for name in expected) == 16 + 2  # a block, and the final norm
