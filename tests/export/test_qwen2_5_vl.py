"""Qwen2.5-VL equals transformers: images of two sizes, one of them with windows cut short at its edges, and positions
on three axes."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from family_proof import STEPS, Reference, published
from sized_video_proof import SizedVideoProof
from test_parity import Recorded
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor
from transformers.vision_utils import get_vision_window_index

from flashvlm.errors import CheckpointError, FlashVLMError
from flashvlm_export.families import family_of, qwen2_5_vl
from flashvlm_export.families.contract import VisualOptions
from flashvlm_export.plan import PlanOptions, plan
from flashvlm_export.testing.presets.qwen2_5_vl import TINY


class TestQwen25VL(SizedVideoProof):
    family = qwen2_5_vl
    preset = "tiny-qwen2.5-vl"
    sizes = ((112, 168), (140, 84))  # 4 x 6 and 5 x 3 tokens, in windows of 2 x 2: those of the second are cut short
    patch = 14
    frames = 4
    video_token = "<|video_pad|>"
    processor_class = Qwen2_5_VLProcessor

    def shown(self) -> list[int]:
        return [0, 2, 5, 8]  # two a second of 11 in 2.2 s: the starts of four parts, 0, 2.75, 5.5, 8.25

    def more_inputs(self) -> dict[str, Any]:
        return {"second_per_grid_ts": [2 / (4 / 2.2)]}  # two frames a unit, of four in 2.2 s

    def image_signals(self, reference: Reference, image: np.ndarray) -> tuple[Tensor, Tensor]:
        found, weights, grid = self.tower(reference, image, block=1)  # the last whose patches see all others
        window_index, _ = get_vision_window_index(grid, 2, 56, 14)
        reading = torch.argsort(window_index)
        features = found.last_hidden_state.unflatten(0, (-1, 4)).mean(dim=1)
        received = weights.mean(dim=0).unflatten(0, (-1, 4)).mean(dim=1)
        return features[reading], received[reading]

    def test_a_repetition_penalty_is_that_of_transformers(self, recorded: Recorded, reference: Reference) -> None:
        """generation_config.json has one of 1.05, which a bundle leaves to the caller; a larger one tells more."""
        ours, theirs, images = self.prompt("one")
        inputs = reference.inputs(theirs, images)
        penalised = reference.generate(inputs, repetition_penalty=1.5)[0]
        assert penalised != reference.generate(inputs)[0]
        answer = recorded.chat(ours, budget="all", max_new_tokens=1 + STEPS, repetition_penalty=1.5)
        assert list(answer.token_ids) == penalised


def with_vision(**change: Any) -> dict[str, Any]:
    return TINY | {"vision_config": TINY["vision_config"] | change}


NESTED = {
    "model_type": "qwen2_5_vl",
    "image_token_id": TINY["image_token_id"],
    "video_token_id": TINY["video_token_id"],
    "tie_word_embeddings": True,
    "vision_config": TINY["vision_config"] | {"model_type": "qwen2_5_vl"},
    "text_config": {
        "model_type": "qwen2_5_vl_text",
        **{key: TINY[key] for key in TINY if key not in ("model_type", "vision_config", "rope_theta", "rope_scaling")},
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 3, 2], "rope_theta": 1e6},
    },
}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (TINY | {"quantization_config": {}}, "the checkpoint is quantized"),
        (TINY | {"use_sliding_window": True}, "the language model.sliding_window is 32, which limits attention"),
        (TINY | {"layer_types": ["sliding_attention"] * 2}, "layer_types has 'sliding_attention'"),
        (TINY | {"rope_scaling": {"type": "longrope"}}, "rope_scaling is of type 'longrope'"),
        (TINY | {"rope_scaling": {"type": "mrope", "mrope_section": [1, 2, 2]}}, r"mrope_section is \[1, 2, 2\]"),
        (TINY | {"rope_scaling": {"type": "default"}}, "mrope_section is None; expected three numbers"),
        (TINY | {"image_token_id": 9999}, "image_token_id is 9999; expected one of the 520 tokens"),
        (TINY | {"vision_config": None}, "vision_config is missing"),
        (with_vision(model_type="siglip"), "vision_config.model_type is 'siglip'"),
        (with_vision(patch_size=[14, 14]), r"patch_size is \[14, 14\]; expected a whole number"),
        (with_vision(temporal_patch_size=1), "temporal_patch_size is 1; family qwen2_5_vl supports 2"),
        (with_vision(in_chans=1), "in_chans is 1"),
        (with_vision(out_hidden_size=64), "out_hidden_size is 64; family qwen2_5_vl supports 48"),
        (with_vision(num_heads=16), "16 heads for 32 channels"),
        (with_vision(window_size=50), "window_size is 50; expected a multiple of 28"),
        (with_vision(fullatt_block_indexes=[]), r"fullatt_block_indexes is \[\]; expected some of the 3 blocks"),
        (with_vision(fullatt_block_indexes=[3]), r"fullatt_block_indexes is \[3\]"),
        (NESTED | {"text_config": NESTED["text_config"] | {"use_sliding_window": True}}, "text_config.sliding_window"),
    ],
)
def test_variants_are_refused_by_name(config: dict[str, Any], expected: str) -> None:
    with pytest.raises(CheckpointError, match=expected):
        qwen2_5_vl.read_config(config)


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_omni"])
def test_relatives_are_refused_by_name(model_type: str) -> None:
    with pytest.raises(CheckpointError, match=rf"model_type '{model_type}' is not supported \("):
        family_of({"model_type": model_type})


def test_flat_and_nested_configurations_are_one_model() -> None:
    flat, nested = qwen2_5_vl.read_config(TINY), qwen2_5_vl.read_config(NESTED)
    assert qwen2_5_vl.language_spec(flat) == qwen2_5_vl.language_spec(nested)
    assert flat.text_config.rope_parameters["mrope_section"] == nested.text_config.rope_parameters["mrope_section"]
    assert qwen2_5_vl.tied_head(flat) == qwen2_5_vl.tied_head(nested) == "lm_head.weight"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (VisualOptions(image_sizes=((448, 450),)), "--image-size 448x450: .* multiples of 28 .* such as 448x448"),
        (VisualOptions(image_sizes=((0, 28),)), "such as 28x28"),
        (VisualOptions(image_sizes=((28, 4116),)), "up to 4096"),
        (VisualOptions(max_tiles=2), "--max-tiles 2: family qwen2_5_vl has no tiles"),
    ],
)
def test_sizes_that_are_no_whole_tokens(options: VisualOptions, expected: str) -> None:
    with pytest.raises(FlashVLMError, match=expected):
        qwen2_5_vl.tower_specs(qwen2_5_vl.read_config(TINY), options)


def test_a_size_asked_for_twice_is_one() -> None:
    options = VisualOptions(image_sizes=((112, 168), (112, 168)))
    assert len(qwen2_5_vl.tower_specs(qwen2_5_vl.read_config(TINY), options)) == 1


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        ("qwen2.5-vl-3b", 3_754_622_976),
        ("qwen2.5-vl-7b", 8_292_166_656),
        ("qwen2.5-vl-32b", 33_452_718_336),
        ("qwen2.5-vl-72b", 73_410_777_344),
    ],
)
def test_parameters_are_as_many_as_published(model: str, parameters: int) -> None:
    assert plan(PlanOptions(model, (64,))).parameters == parameters


def test_names_of_a_model_that_transformers_saved() -> None:
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(qwen2_5_vl.read_config(TINY))
    for name, _ in model.named_parameters(remove_duplicate=False):
        assert qwen2_5_vl.canonical_name(name) == name
    assert qwen2_5_vl.canonical_name("visual.rotary_pos_emb.inv_freq") is None


def test_the_published_configuration_and_names() -> None:
    folder = published("Qwen__Qwen2.5-VL-3B-Instruct")
    config = qwen2_5_vl.read_config(json.loads((folder / "config.json").read_text()))
    known = qwen2_5_vl.read_config(qwen2_5_vl.CONFIGS["qwen2.5-vl-3b"])
    assert qwen2_5_vl.language_spec(config) == qwen2_5_vl.language_spec(known)
    assert qwen2_5_vl.tower_specs(config, VisualOptions()) == qwen2_5_vl.tower_specs(known, VisualOptions())
    with torch.device("meta"):
        model = qwen2_5_vl.build(config, torch.bfloat16)
    expected = dict(model.named_parameters(remove_duplicate=False))
    names = (folder / "model.safetensors.index.tail.txt").read_text().split()
    assert {qwen2_5_vl.canonical_name(name) for name in names} <= {*expected}
    assert names
