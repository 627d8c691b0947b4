"""Checkpoints in the shape of Qwen2.5-VL, flat as published."""

from __future__ import annotations

import functools
from typing import Any

from flashvlm_export.families.qwen2_5_vl import CONFIGS
from flashvlm_export.testing.folder import FolderPreset, chatml
from flashvlm_export.testing.tokenizer import make_byte_level_tokenizer

SPECIAL = (
    *("<|endoftext|>", "<|im_end|>", "<|im_start|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|image_pad|>", "<|video_pad|>"),
)
SYSTEM = (
    "{%- if messages[0]['role'] != 'system' -%}"
    "{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}{%- endif -%}"
)
TEMPLATE = chatml(
    "<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>", before=SYSTEM
)
NAMES = ((r"^model\.visual\.", "visual."), (r"^model\.language_model\.", "model."))
TEXT_TOKENS = 512


def image_processor() -> Any:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil()


def _preset(config: dict[str, Any], dtype: str) -> FolderPreset:
    text_tokens = config["image_token_id"] - SPECIAL.index("<|image_pad|>")
    return FolderPreset(
        model="Qwen2_5_VLForConditionalGeneration",
        config=config,
        tokenizer=functools.partial(make_byte_level_tokenizer, text_tokens, config["max_position_embeddings"], SPECIAL),
        image_processor=image_processor,
        template=TEMPLATE,
        spoken=(256, text_tokens),
        renames=NAMES,
        stop=(text_tokens + 1, text_tokens),
        dtype=dtype,
        text="",
    )


# Sizes that are awkward together: windows of 2 x 2 tokens, a block of windows behind the last that sees all, heads
# that share keys, a head tied to the table.
TINY = {
    "model_type": "qwen2_5_vl",
    "bos_token_id": TEXT_TOKENS + SPECIAL.index("<|endoftext|>"),
    "eos_token_id": TEXT_TOKENS + SPECIAL.index("<|im_end|>"),
    "image_token_id": TEXT_TOKENS + SPECIAL.index("<|image_pad|>"),
    "video_token_id": TEXT_TOKENS + SPECIAL.index("<|video_pad|>"),
    "vision_start_token_id": TEXT_TOKENS + SPECIAL.index("<|vision_start|>"),
    "vision_end_token_id": TEXT_TOKENS + SPECIAL.index("<|vision_end|>"),
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": TEXT_TOKENS + 8,
    "max_position_embeddings": 1024,
    "rope_theta": 1e6,
    "rope_scaling": {"type": "mrope", "mrope_section": [1, 3, 2]},
    "rms_norm_eps": 1e-6,
    "sliding_window": 32,
    "use_sliding_window": False,
    "tie_word_embeddings": True,
    "vision_config": {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_heads": 2,
        "in_chans": 3,
        "out_hidden_size": 48,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "window_size": 56,
        "fullatt_block_indexes": [1],
        "tokens_per_second": 2,
        "temporal_patch_size": 2,
    },
}

PRESETS = {
    "tiny-qwen2.5-vl": _preset(TINY, "float32"),
    **{name: _preset(config, "bfloat16") for name, config in CONFIGS.items()},
}
