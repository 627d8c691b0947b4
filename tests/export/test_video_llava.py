"""Video-LLaVA equals transformers: a tower for images, and one for frames, of which CLS is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from family_proof import Message, Reference, published, without_video
from test_parity import picture
from torch import Tensor
from transformers import VideoLlavaProcessor
from video_proof import VideoProof

from flashvlm.bundle import Bundle
from flashvlm.errors import CheckpointError, FlashVLMError
from flashvlm_export.families import video_llava
from flashvlm_export.families.contract import VisualOptions
from flashvlm_export.plan import PlanOptions, plan
from flashvlm_export.testing.presets.video_llava import TINY
from flashvlm_export.testing.presets.video_llava import image_processor as make_processor


class TestVideoLlava(VideoProof):
    family = video_llava
    preset = "tiny-video-llava"
    # Smaller than the tower, cut left and right by an odd number; taller, cut above and below.
    options = VisualOptions(frames=3)
    images: ClassVar[list[np.ndarray]] = [picture((31, 48), 1), picture((131, 61), 2)]

    def processor(self, image_processor: Any, tokenizer: Any) -> Any:
        return without_video(VideoLlavaProcessor, image_processor, None, tokenizer)

    def reference_pixels(self, reference: Reference, inputs: Any) -> np.ndarray:
        return np.asarray(inputs["pixel_values_images"])

    def visual_rows(self, reference: Reference, ids: Tensor) -> Tensor:
        return torch.isin(ids, torch.tensor([512, 513]))

    def signals(self, reference: Reference, image: np.ndarray) -> tuple[Tensor, Tensor]:
        """Of frames [F,H,W,3], those of CLS too."""
        model, video = reference.model.model, image.ndim == 4
        pixels = reference.processor.image_processor([*image] if video else image, return_tensors="pt")
        tower = model.video_tower if video else model.image_tower
        seen = tower(pixels["pixel_values_images"], output_attentions=True, output_hidden_states=True)
        # Block -3 of four: two are behind it, the embedding is the first hidden state.
        features, saliency = seen.hidden_states[-3], seen.attentions[-3].mean(1)[:, 0]
        if video:
            return features.flatten(0, 1), saliency.flatten()
        return features[0, 1:], saliency[0, 1:]

    def valid(self, reference: Reference, image: np.ndarray, count: int) -> Tensor:
        if image.ndim == 4:
            return torch.arange(count) % 26 != 0
        return super().valid(reference, image, count)

    def shown(self) -> list[int]:
        return [0, 3, 7]  # of 11, the starts of three parts: 0, 3.7, 7.3

    def video_inputs(self, reference: Reference, messages: list[Message], frames: list[np.ndarray]) -> Any:
        # VideoLlavaProcessor.replace_video_token: one for each patch of each frame, and for its CLS.
        rendered = reference.rendered(messages).replace("<video>", "<video>" * (3 * 26))
        pixels = reference.processor.image_processor(frames, return_tensors="pt")["pixel_values_images"]
        return {**reference.tokenizer(rendered, return_tensors="pt"), "pixel_values_videos": pixels[None]}

    def test_what_lies_behind_the_features_is_unused(self, bundle: Path) -> None:
        unused = Bundle(bundle).manifest.unused_tensors
        # Two blocks, and the norm behind them, of either tower.
        assert len([name for name in unused if name.startswith("video_tower.")]) == 2 * 16 + 2
        assert len([name for name in unused if name.startswith("image_tower.")]) == 2 * 16 + 2
        assert len(unused) == 2 * (2 * 16 + 2)

    def test_a_video_has_eight_frames_unless_asked(self) -> None:
        config = video_llava.read_config(TINY)
        _, video = video_llava.visual_specs(config, make_processor(70), VisualOptions())
        assert (video.pixels.max_units, video.candidates, video.skip) == (8, 8 * 26, "cls")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"vision_feature_layer": [-2, -5]}, r"vision_feature_layer is \[-2, -5\]; expected one block of the 4"),
        ({"vision_feature_select_strategy": "full"}, "family video_llava supports default"),
        ({"image_token_index": 9999}, "image_token_index is 9999; expected one of the 520 tokens"),
        ({"video_token_index": 9999}, "video_token_index is 9999; expected one of the 520 tokens"),
        ({"vision_config": TINY["vision_config"] | {"model_type": "siglip_vision_model"}}, "'siglip_vision_model'"),
        ({"text_config": TINY["text_config"] | {"model_type": "gpt_oss"}}, "text_config.model_type is 'gpt_oss'"),
        ({"quantization_config": {}}, "the checkpoint is quantized"),
    ],
)
def test_variants_are_refused_by_name(change: dict[str, Any], expected: str) -> None:
    with pytest.raises(CheckpointError, match=expected):
        video_llava.read_config(TINY | change)


def test_what_the_exporter_cannot_do_is_refused() -> None:
    config = video_llava.read_config(TINY)
    with pytest.raises(FlashVLMError, match="--max-tiles 2: family video_llava has no tiles"):
        video_llava.tower_specs(config, VisualOptions(max_tiles=2))
    with pytest.raises(CheckpointError, match=r"crop_size is .*56.*; the vision tower takes 70 x 70"):
        video_llava.visual_specs(config, make_processor(56), VisualOptions())


def test_planned_parameters() -> None:
    """LLaVA-1.5's at 224 x 224, and a second tower."""
    found = plan(PlanOptions("video-llava-7b", (64,)))
    assert found.candidates == 8 * 257
    llava, tower, positions = 7_063_427_072, 303_507_456, (577 - 257) * 1024
    assert found.parameters == llava + tower - 2 * positions


def test_published_names() -> None:
    """Those of LLaVA-1.5, whose tower is there twice."""
    index = published("llava-hf__llava-1.5-7b-hf") / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    found = {name.replace("vision_tower", f"{kind}_tower", 1) for name in names for kind in ("image", "video")}
    config = video_llava.read_config(video_llava.CONFIGS["video-llava-7b"])
    with torch.device("meta"):
        expected = {name for name, _ in video_llava.build(config, torch.float16).named_parameters()}
    assert {video_llava.canonical_name(name) for name in found} - {None} == expected
