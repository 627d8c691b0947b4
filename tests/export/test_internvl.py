"""InternVL3 equals transformers: tiles and a thumbnail, patches merged 2 x 2, ``<img>`` around each image."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from family_proof import Message, Reference, without_video
from test_parity import picture
from torch import Tensor
from transformers import InternVLProcessor
from video_proof import VideoProof

from flashvlm.errors import CheckpointError
from flashvlm_export.families import internvl
from flashvlm_export.families.contract import VisualOptions
from flashvlm_export.testing.presets.internvl import TINY


class TestInternVL(VideoProof):
    family = internvl
    preset = "tiny-internvl"
    # Two tiles side by side with their thumbnail; one tile; three above each other.
    images: ClassVar[list[np.ndarray]] = [picture((112, 230), 1), picture((60, 61), 2), picture((350, 110), 3)]

    options = VisualOptions(frames=3)

    def processor(self, image_processor: Any, tokenizer: Any) -> Any:
        return without_video(InternVLProcessor, image_processor, tokenizer, None, image_seq_length=16)

    def signals(self, reference: Reference, image: np.ndarray) -> tuple[Tensor, Tensor]:
        whole = image.ndim == 4  # frames are not cut into tiles
        images = [*image] if whole else image
        units = reference.processor.image_processor(images, crop_to_patches=not whole, return_tensors="pt")[
            "pixel_values"
        ]
        tower = reference.model.model.vision_tower(units, output_attentions=True)
        features, saliency = [], []
        for patches, weights in zip(tower.last_hidden_state, tower.attentions[-1], strict=True):
            for row in range(0, 8, 2):
                for column in range(0, 8, 2):
                    four = [1 + 8 * (row + y) + column + x for y in (0, 1) for x in (0, 1)]
                    features.append(patches[four].mean(0))
                    saliency.append(weights[:, 0, four].mean())
        return torch.stack(features), torch.stack(saliency)

    def shown(self) -> list[int]:
        return [1, 5, 9]  # the middles of three parts of 11: 1.8, 5.5, 9.2

    def video_inputs(self, reference: Reference, messages: list[Message], frames: list[np.ndarray]) -> Any:
        framed = [f"Frame{i}: <img>{'<IMG_CONTEXT>' * 16}</img>" for i in (1, 2, 3)]
        rendered = reference.rendered(messages).replace("<video>", "\n".join(framed))
        pixels = reference.processor.image_processor(frames, crop_to_patches=False, return_tensors="pt")
        return {**reference.tokenizer(rendered, return_tensors="pt"), "pixel_values": pixels["pixel_values"]}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"vision_feature_layer": -2}, "vision_feature_layer is -2; family internvl supports -1"),
        ({"downsample_ratio": 0.3}, "downsample_ratio is 0.3; family internvl supports 1 or 0.5 or 0.25"),
        ({"image_token_id": 9999}, "image_token_id is 9999; expected one of the 520 tokens"),
        ({"vision_config": TINY["vision_config"] | {"image_size": [112, 98]}}, "expected squares"),
        ({"text_config": TINY["text_config"] | {"model_type": "gpt_oss"}}, "text_config.model_type is 'gpt_oss'"),
        ({"quantization_config": {}}, "the checkpoint is quantized"),
    ],
)
def test_variants_are_refused_by_name(change: dict[str, Any], expected: str) -> None:
    with pytest.raises(CheckpointError, match=expected):
        internvl.read_config(TINY | change)


def test_within_its_positions_a_dynamic_rope_is_the_default() -> None:
    assert internvl.read_config(TINY).text_config.rope_parameters["rope_type"] == "default"
    assert TINY["text_config"]["rope_parameters"]["rope_type"] == "dynamic"
