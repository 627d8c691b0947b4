"""Checkpoints in the shape of Qwen3-VL."""

from __future__ import annotations

import functools
from typing import Any

from flashvlm_export.families.qwen3_vl import CONFIGS
from flashvlm_export.testing.folder import FolderPreset, chatml
from flashvlm_export.testing.presets.qwen2_5_vl import SPECIAL
from flashvlm_export.testing.tokenizer import make_byte_level_tokenizer

TEMPLATE = chatml("<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>")
TEXT_TOKENS = 512


def image_processor(least: int) -> Any:
    """least: pixels of an image, to which smaller ones are enlarged."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil(
        patch_size=16,
        size={"shortest_edge": least, "longest_edge": 16777216},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )


def _preset(config: dict[str, Any], least: int, dtype: str) -> FolderPreset:
    text_tokens = config["image_token_id"] - SPECIAL.index("<|image_pad|>")
    return FolderPreset(
        model="Qwen3VLForConditionalGeneration",
        config=config,
        tokenizer=functools.partial(
            make_byte_level_tokenizer, text_tokens, config["text_config"]["max_position_embeddings"], SPECIAL
        ),
        image_processor=functools.partial(image_processor, least),
        template=TEMPLATE,
        spoken=(256, text_tokens),
        stop=(text_tokens + 1, text_tokens),
        dtype=dtype,
    )


# Sizes that are awkward together: a table of 4 x 4 position embeddings, heads wider than their share of the channels,
# two streams into the two layers there are.
TINY = {
    "model_type": "qwen3_vl",
    "image_token_id": TEXT_TOKENS + SPECIAL.index("<|image_pad|>"),
    "video_token_id": TEXT_TOKENS + SPECIAL.index("<|video_pad|>"),
    "vision_start_token_id": TEXT_TOKENS + SPECIAL.index("<|vision_start|>"),
    "vision_end_token_id": TEXT_TOKENS + SPECIAL.index("<|vision_end|>"),
    "tie_word_embeddings": False,
    "vision_config": {
        "model_type": "qwen3_vl",
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_heads": 2,
        "out_hidden_size": 48,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1],
    },
    "text_config": {
        "model_type": "qwen3_vl_text",
        "bos_token_id": TEXT_TOKENS + SPECIAL.index("<|endoftext|>"),
        "eos_token_id": TEXT_TOKENS + SPECIAL.index("<|im_end|>"),
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": TEXT_TOKENS + 8,
        "max_position_embeddings": 1024,
        "rope_theta": 5e6,
        "rope_scaling": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [3, 3, 2]},
        "rms_norm_eps": 1e-6,
    },
}

PRESETS = {
    "tiny-qwen3-vl": _preset(TINY, 1024, "float32"),
    **{name: _preset(config, 65536, "bfloat16") for name, config in CONFIGS.items()},
}
