"""Checkpoints in the shape of InternVL3-hf."""

from __future__ import annotations

import functools
from typing import Any

from flashvlm_export.families.internvl import CONFIGS
from flashvlm_export.testing.folder import LLAVA_NAMES, FolderPreset, chatml
from flashvlm_export.testing.tokenizer import make_byte_level_tokenizer

SPECIAL = ("<|endoftext|>", "<|im_end|>", "<|im_start|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>")
NAMED = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
TEXT_TOKENS = 512


def image_processor(side: int, tiles: int) -> Any:
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    return GotOcr2ImageProcessorPil(
        size={"height": side, "width": side},
        crop_to_patches=True,
        max_patches=tiles,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )


def _preset(config: dict[str, Any], tiles: int, dtype: str) -> FolderPreset:
    text_tokens = config["image_token_id"] - SPECIAL.index("<IMG_CONTEXT>")
    side = config["vision_config"]["image_size"][0]
    return FolderPreset(
        model="InternVLForConditionalGeneration",
        config=config,
        tokenizer=functools.partial(
            make_byte_level_tokenizer, text_tokens, config["text_config"]["max_position_embeddings"], SPECIAL, NAMED
        ),
        image_processor=functools.partial(image_processor, side, tiles),
        template=chatml("<IMG_CONTEXT>\n", "<video>\n"),
        spoken=(256, text_tokens),
        renames=LLAVA_NAMES,
        stop=(text_tokens + 1,),
        dtype=dtype,
    )


# Sizes that are awkward together: 16 tokens a tile, heads that share keys, a rotary embedding that would grow.
TINY = {
    "model_type": "internvl",
    "image_token_id": TEXT_TOKENS + SPECIAL.index("<IMG_CONTEXT>"),
    "image_seq_length": 16,
    "downsample_ratio": 0.5,
    "tie_word_embeddings": False,
    "vision_config": {
        "model_type": "internvl_vision",
        "attention_bias": True,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": [112, 112],
        "patch_size": [14, 14],
    },
    "text_config": {
        "model_type": "qwen2",
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": TEXT_TOKENS + 8,
        "max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6},
        "tie_word_embeddings": False,
    },
}

PRESETS = {
    "tiny-internvl": _preset(TINY, 4, "float32"),
    **{name: _preset(config, 12, "bfloat16") for name, config in CONFIGS.items()},
}
