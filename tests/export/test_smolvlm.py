"""SmolVLM2 equals transformers: tiles with text between them, the whole image behind, patches joined by the square."""

from __future__ import annotations

import json
from typing import Any, ClassVar
from unittest.mock import patch

import numpy as np
import pytest
import torch
from family_proof import FamilyProof, Message, Reference, published, without_video
from test_parity import Recorded, picture
from torch import Tensor
from transformers import Idefics3Processor, SmolVLMProcessor
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from video_proof import VideoProof

from flashvlm.errors import CheckpointError, FlashVLMError
from flashvlm_export.families import idefics3, smolvlm
from flashvlm_export.families.common.idefics3 import places
from flashvlm_export.families.contract import VisualOptions
from flashvlm_export.plan import PlanOptions, plan
from flashvlm_export.testing.presets import idefics3 as first
from flashvlm_export.testing.presets.smolvlm import TINY, image_processor

SIDE, FACTOR = 25, 5  # patches along an edge of a tile, and of a visual token


class Tower:
    """What both families share: the images, and what their tower gives."""

    # Two tiles side by side; two by two; two above each other.
    images: ClassVar[list[np.ndarray]] = [picture((60, 130), 1), picture((99, 101), 2), picture((150, 40), 3)]

    def units(self, reference: Reference, image: np.ndarray) -> Tensor:
        units: Tensor = reference.processor.image_processor(image, return_tensors="pt")["pixel_values"][0]
        return units

    def frames(self, reference: Reference, frames: Any) -> Tensor:
        """[F,3,H,W]: each frame as an image that is not cut, its longer edge that of a tile."""
        whole = {"do_image_splitting": False, "size": {"longest_edge": 76}, "return_tensors": "pt"}
        stock = reference.processor.image_processor
        return torch.cat([stock(frame, **whole)["pixel_values"][0] for frame in frames])

    def signals(self, reference: Reference, image: np.ndarray) -> tuple[Tensor, Tensor]:
        units = self.frames(reference, image) if image.ndim == 4 else self.units(reference, image)
        tower = reference.model.model.vision_model(units, output_attentions=True)
        features, saliency = [], []
        for patches, weights in zip(tower.last_hidden_state, tower.attentions[-1], strict=True):
            received = weights.mean(dim=(0, 1))
            for row in range(0, SIDE, FACTOR):
                for column in range(0, SIDE, FACTOR):
                    of = [SIDE * (row + y) + column + x for y in range(FACTOR) for x in range(FACTOR)]
                    features.append(patches[of].mean(0))
                    saliency.append(received[of].mean())
        return torch.stack(features), torch.stack(saliency)


class TestSmolVLM(Tower, VideoProof):
    family = smolvlm
    preset = "tiny-smolvlm"
    options = VisualOptions(frames=3)
    fps = 2.75

    def processor(self, image_processor: Any, tokenizer: Any) -> Any:
        with patch.object(processing_smolvlm, "num2words", str):  # it spells the frames of a video
            return without_video(SmolVLMProcessor, image_processor, tokenizer, None, image_seq_len=25)

    def shown(self) -> list[int]:
        return [0, 5, 10]  # no more than three of 11 in four seconds, from the first to the last

    def video_inputs(self, reference: Reference, messages: list[Message], frames: list[np.ndarray]) -> Any:
        # SmolVLMProcessor.replace_video_token.
        run = f"<fake_token_around_image><global-img>{'<image>' * 25}<fake_token_around_image>"
        head = "You are provided the following series of three frames from a 0:00:04 [H:MM:SS] video.\n"
        each = "".join(f"\nFrame from {time}:{run}" for time in ("00:00", "00:01", "00:03"))
        rendered = reference.rendered(messages).replace("<video>", f"{head}{each}\n\n")
        return {
            **reference.tokenizer(rendered, return_tensors="pt"),
            "pixel_values": self.frames(reference, frames)[None],
        }

    def test_video_with_too_few_frames(self, recorded: Recorded) -> None:
        """One is enough."""
        answer = recorded.chat(self.messages(self.video[:1]), budget="all", max_new_tokens=1)
        assert [selection.count for selection in answer.selections] == [25]


@pytest.mark.thorough  # the same modules of the same sizes
class TestIdefics3(Tower, FamilyProof):
    family = idefics3
    preset = "tiny-idefics3"

    def processor(self, image_processor: Any, tokenizer: Any) -> Any:
        return Idefics3Processor(image_processor, tokenizer, image_seq_len=25)


def test_the_first_smolvlms_are_read() -> None:
    """Published ones say ``idefics3`` of their vision section, transformers writes ``idefics3_vision``."""
    for name in ("idefics3", "idefics3_vision"):
        config = idefics3.read_config(first.TINY | {"vision_config": TINY["vision_config"] | {"model_type": name}})
        (spec,) = idefics3.visual_specs(config, first.image_processor(76, 152), VisualOptions())
        ours = smolvlm.visual_specs(smolvlm.read_config(TINY), image_processor(76, 152), VisualOptions())
        assert [spec] == ours
    with pytest.raises(CheckpointError, match="family idefics3 supports idefics3_vision or idefics3"):
        idefics3.read_config(first.TINY | {"vision_config": TINY["vision_config"]})


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"vision_config": TINY["vision_config"] | {"model_type": "idefics3_vision"}}, "supports smolvlm_vision"),
        ({"vision_config": TINY["vision_config"] | {"num_channels": 1}}, "num_channels is 1; family smolvlm"),
        ({"vision_config": TINY["vision_config"] | {"image_size": 78}}, "26 patches of 3; expected a multiple of sc"),
        ({"vision_config": TINY["vision_config"] | {"image_size": [76, 76]}}, "expected whole numbers"),
        ({"vision_config": TINY["vision_config"] | {"patch_size": 77}}, "has 0 patches of 77"),
        ({"scale_factor": 0}, "scale_factor is 0; expected 1 to 64"),
        ({"scale_factor": "5"}, "scale_factor is '5'; expected a whole number"),
        ({"image_token_id": 9999}, "image_token_id is 9999; expected one of the 560 tokens"),
        ({"text_config": TINY["text_config"] | {"model_type": "gpt_oss"}}, "text_config.model_type is 'gpt_oss'"),
        ({"text_config": TINY["text_config"] | {"use_resampler": True}}, "use_resampler is True"),
        ({"text_config": TINY["text_config"] | {"qk_layer_norms": True}}, "qk_layer_norms is True"),
        ({"text_config": TINY["text_config"] | {"rope_interleaved": True}}, "rope_interleaved is True"),
        ({"text_config": TINY["text_config"] | {"sliding_window": 8}}, "sliding_window is 8"),
        ({"quantization_config": {}}, "the checkpoint is quantized"),
    ],
)
def test_variants_are_refused_by_name(change: dict[str, Any], expected: str) -> None:
    with pytest.raises(CheckpointError, match=expected):
        smolvlm.read_config(TINY | change)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ({"do_image_splitting": False}, "do_image_splitting is off"),
        ({"max_image_size": {"longest_edge": 64}}, "max_image_size is 64; the vision tower takes 76 x 76"),
        ({"size": {"height": 76, "width": 76}}, "expected a longest_edge"),
    ],
)
def test_other_image_processors_are_refused(setting: dict[str, Any], expected: str) -> None:
    settings = {"size": {"longest_edge": 152}, "max_image_size": {"longest_edge": 76}} | setting
    processor = SmolVLMImageProcessorPil(**settings)
    with pytest.raises(CheckpointError, match=expected):
        smolvlm.visual_specs(smolvlm.read_config(TINY), processor, VisualOptions())


def test_the_most_tiles_are_those_of_a_square() -> None:
    config, processor = smolvlm.read_config(TINY), image_processor(76, 152)
    found = {
        tiles: smolvlm.visual_specs(config, processor, VisualOptions(max_tiles=tiles))[0] for tiles in (None, 1, 4, 9)
    }
    assert [spec.candidates for spec in found.values()] == [25 * units for units in (5, 1, 5, 10)]
    for tiles, spec in found.items():
        (tower,) = smolvlm.tower_specs(config, VisualOptions(max_tiles=tiles or 4))
        assert (tower.candidates, tower.units) == (spec.candidates, spec.pixels.max_units)
    with pytest.raises(FlashVLMError, match="expected a square, such as 4 or 9"):
        smolvlm.visual_specs(config, processor, VisualOptions(max_tiles=5))


def test_positions_are_those_of_transformers() -> None:
    """Not the numbers of the patches at every size, and those at the sizes that are published."""
    found = places(smolvlm.read_config(TINY).vision_config).tolist()
    assert len(found) == SIDE**2
    assert found[21:25] == [21, 22, 22, 24]
    every = [smolvlm.read_config(config) for config in smolvlm.CONFIGS.values()]
    for parsed in (*every, *map(idefics3.read_config, idefics3.CONFIGS.values())):
        side = parsed.vision_config.image_size // parsed.vision_config.patch_size
        assert places(parsed.vision_config).tolist() == [*range(side * side)]


@pytest.mark.parametrize(
    ("name", "parameters", "candidates"),
    [
        ("smolvlm2-256m", 256_484_928, 1088),
        ("smolvlm2-500m", 507_482_304, 1088),
        ("smolvlm2-2.2b", 2_246_784_880, 1377),
        ("smolvlm-256m", 256_484_928, 1088),
        ("smolvlm-500m", 507_482_304, 1088),
        ("smolvlm-2.2b", 2_246_272_880, 1377),
        ("idefics3-8b", 8_462_086_384, 17 * 169),
    ],
)
def test_planned_parameters(name: str, parameters: int, candidates: int) -> None:
    found = plan(PlanOptions(name, (64,)))
    assert (found.parameters, found.candidates) == (parameters, candidates)


def test_published_files() -> None:
    path = published("HuggingFaceTB__SmolVLM2-500M-Video-Instruct__partial")
    config = smolvlm.read_config(json.loads((path / "config.json").read_text()))
    ours = smolvlm.read_config(smolvlm.CONFIGS["smolvlm2-500m"])
    assert smolvlm.language_spec(config) == smolvlm.language_spec(ours)
    assert smolvlm.tower_specs(config, VisualOptions()) == smolvlm.tower_specs(ours, VisualOptions())
    processor = SmolVLMImageProcessorPil(**json.loads((path / "preprocessor_config.json").read_text()))
    (spec,) = smolvlm.visual_specs(config, processor, VisualOptions())
    assert (spec.candidates, spec.tokens_per_unit, spec.placeholder_id) == (17 * 64, 64, 49190)
