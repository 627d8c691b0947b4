"""Qwen3-VL equals transformers: images of two sizes, positions on three axes by turns, and streams into the first
layers."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from family_proof import Reference, published
from sized_video_proof import SizedVideoProof
from test_parity import Recorded
from torch import Tensor
from transformers import Qwen3VLForConditionalGeneration, Qwen3VLProcessor

from flashvlm.errors import CheckpointError, FlashVLMError
from flashvlm_export.families import family_of, qwen3_vl
from flashvlm_export.families.common import axes
from flashvlm_export.families.contract import VisualOptions
from flashvlm_export.plan import PlanOptions, plan
from flashvlm_export.testing.presets.qwen3_vl import TINY


class TestQwen3VL(SizedVideoProof):
    family = qwen3_vl
    preset = "tiny-qwen3-vl"
    sizes = ((128, 192), (160, 96))  # 4 x 6 and 5 x 3 tokens
    patch = 16
    frames = 4
    video_token = "<|video_pad|>"
    processor_class = Qwen3VLProcessor

    def shown(self) -> list[int]:
        return [0, 3, 7, 10]  # two a second of 11 in 2.2 s: from the first to the last, 0, 3.3, 6.7, 10

    def shown_text(self, rendered: str, grid: list[int]) -> str:
        """Qwen3VLProcessor.replace_video_token: each pair of frames behind the middle of their times."""
        run = f"<|vision_start|>{self.video_token * (grid[1] * grid[2] // 4)}<|vision_end|>"
        return rendered.replace(self.video_token, f"<0.3 seconds>{run}<1.7 seconds>{run}")

    def test_video_with_too_few_frames(self, recorded: Recorded) -> None:
        """One is enough: it stands twice, as one pair."""
        answer = recorded.chat(self.messages(self.video[:1]), budget="all", max_new_tokens=1)
        assert [selection.count for selection in answer.selections] == [4 * 6]

    def image_signals(self, reference: Reference, image: np.ndarray) -> tuple[Tensor, Tensor]:
        found, weights, _ = self.tower(reference, image, block=2)
        features = found.last_hidden_state.unflatten(0, (-1, 4)).mean(dim=1)
        return features, weights.mean(dim=0).unflatten(0, (-1, 4)).mean(dim=1)


def with_vision(**change: Any) -> dict[str, Any]:
    return TINY | {"vision_config": TINY["vision_config"] | change}


def with_text(**change: Any) -> dict[str, Any]:
    return TINY | {"text_config": TINY["text_config"] | change}


def with_rope(**change: Any) -> dict[str, Any]:
    return with_text(rope_scaling=TINY["text_config"]["rope_scaling"] | change)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (TINY | {"quantization_config": {}}, "the checkpoint is quantized"),
        (TINY | {"text_config": None}, "text_config is None; family qwen3_vl has an object there"),
        (with_text(model_type="qwen3"), "text_config.model_type is 'qwen3'"),
        (with_text(sliding_window=16), "text_config.sliding_window is 16, which limits attention"),
        (with_text(layer_types=["linear_attention"] * 2), "layer_types has 'linear_attention'"),
        (with_rope(rope_type="longrope"), "rope_scaling is of type 'longrope'"),
        (with_rope(mrope_interleaved=False), "mrope_interleaved is False; family qwen3_vl supports True"),
        (with_rope(mrope_section=[3, 3, 3]), r"mrope_section is \[3, 3, 3\]; expected three numbers with a sum of 8"),
        (TINY | {"image_token_id": 9999}, "image_token_id is 9999; expected one of the 520 tokens"),
        (with_vision(model_type="qwen3_vl_moe"), "vision_config.model_type is 'qwen3_vl_moe'"),
        (with_vision(patch_size=[16, 16]), r"patch_size is \[16, 16\]; expected a whole number"),
        (with_vision(temporal_patch_size=1), "temporal_patch_size is 1; family qwen3_vl supports 2"),
        (with_vision(out_hidden_size=64), "out_hidden_size is 64; family qwen3_vl supports 48"),
        (with_vision(num_position_embeddings=17), "num_position_embeddings is 17; expected a square"),
        (with_vision(deepstack_visual_indexes=[]), r"deepstack_visual_indexes is \[\]; expected some of the 3 blocks"),
        (with_vision(deepstack_visual_indexes=[0, 3]), r"deepstack_visual_indexes is \[0, 3\]"),
    ],
)
def test_variants_are_refused_by_name(config: dict[str, Any], expected: str) -> None:
    with pytest.raises(CheckpointError, match=expected):
        qwen3_vl.read_config(config)


def test_experts_are_refused_by_name() -> None:
    with pytest.raises(CheckpointError, match=r"'qwen3_vl_moe' is not supported \(it is a mixture of experts"):
        family_of({"model_type": "qwen3_vl_moe"})


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (VisualOptions(image_sizes=((448, 512),), frames=3), "--frames 3: expected an even number"),
        (VisualOptions(image_sizes=((512, 500),)), "--image-size 512x500: .* multiples of 32 .* such as 512x512"),
    ],
)
def test_options_that_do_not_fit(options: VisualOptions, expected: str) -> None:
    with pytest.raises(FlashVLMError, match=expected):
        qwen3_vl.tower_specs(qwen3_vl.read_config(TINY), options)


@pytest.mark.parametrize("sections", [(24, 20, 20), (3, 3, 2), (4, 2, 2), (1, 1, 6)])
def test_axes_by_turns(sections: tuple[int, int, int]) -> None:
    """As transformers overwrites the frequencies of time with those of height and width."""
    expected = torch.zeros(sum(sections), dtype=torch.int64)
    for axis in (1, 2):
        expected[slice(axis, 3 * sections[axis], 3)] = axis
    assert axes.interleaved(sections) == expected.tolist()


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        ("qwen3-vl-2b", 2_127_532_032),
        ("qwen3-vl-4b", 4_437_815_808),
        ("qwen3-vl-8b", 8_767_123_696),
        ("qwen3-vl-32b", 33_357_390_064),
    ],
)
def test_parameters_are_as_many_as_published(model: str, parameters: int) -> None:
    assert plan(PlanOptions(model, (64,))).parameters == parameters


def test_names_of_a_model_that_transformers_saved() -> None:
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(qwen3_vl.read_config(TINY))
    for name, _ in model.named_parameters(remove_duplicate=False):
        assert qwen3_vl.canonical_name(name) == name
    assert qwen3_vl.canonical_name("model.visual.rotary_pos_emb.inv_freq") is None


@pytest.mark.parametrize("folder", ["Qwen__Qwen3-VL-8B-Instruct", "Qwen__Qwen3-VL-Embedding-8B"])
def test_published_configurations(folder: str) -> None:
    config = qwen3_vl.read_config(json.loads((published(folder) / "config.json").read_text()))
    known = qwen3_vl.read_config(qwen3_vl.CONFIGS["qwen3-vl-8b"])
    found, expected = qwen3_vl.language_spec(config), qwen3_vl.language_spec(known)
    assert {**vars(found), "max_seq": 0} == {**vars(expected), "max_seq": 0}  # one copy's was edited
    assert qwen3_vl.tower_specs(config, VisualOptions()) == qwen3_vl.tower_specs(known, VisualOptions())


def test_published_names() -> None:
    """Of the embedding model: the same but for its head, which it does without."""
    index = json.loads((published("Qwen__Qwen3-VL-Embedding-8B") / "model.safetensors.index.json").read_text())
    with torch.device("meta"):
        model = qwen3_vl.build(qwen3_vl.read_config(qwen3_vl.CONFIGS["qwen3-vl-8b"]), torch.bfloat16)
    expected = dict(model.named_parameters())
    assert {qwen3_vl.canonical_name(name) for name in index["weight_map"]} == {*expected} - {"lm_head.weight"}
    stored = sum(parameter.numel() for name, parameter in expected.items() if name != "lm_head.weight")
    assert index["metadata"]["total_parameters"] == stored
