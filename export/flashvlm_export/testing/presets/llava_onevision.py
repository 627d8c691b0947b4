"""Checkpoints in the shape of LLaVA-OneVision."""

from __future__ import annotations

import functools
from typing import Any

from flashvlm_export.families.llava_onevision import CONFIGS
from flashvlm_export.testing.folder import LLAVA_NAMES, FolderPreset
from flashvlm_export.testing.tokenizer import make_byte_level_tokenizer

SPECIAL = ("<|endoftext|>", "<|im_end|>", "<|im_start|>", "<image>", "<video>")
NAMED = {"image_token": "<image>", "video_token": "<video>"}
TEXT_TOKENS = 512
# Images and videos stand before all text of their turn, whatever the order of its parts.
TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + ' ' -}}
{%- for part in message['content'] if part['type'] == 'image' -%}{{- '<image>' -}}{%- endfor -%}
{%- for part in message['content'] if part['type'] == 'video' -%}{{- '<video>' -}}{%- endfor -%}
{%- for part in message['content'] if part['type'] == 'text' -%}{{- '\\n' + part['text'] -}}{%- endfor -%}
{{- '<|im_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def image_processor(side: int, pinpoints: list[list[int]]) -> Any:
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

    return LlavaOnevisionImageProcessorPil(
        size={"height": side, "width": side}, image_grid_pinpoints=pinpoints, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )


def _preset(config: dict[str, Any], dtype: str) -> FolderPreset:
    text_tokens = config["image_token_index"] - SPECIAL.index("<image>")
    return FolderPreset(
        model="LlavaOnevisionForConditionalGeneration",
        config=config,
        tokenizer=functools.partial(
            make_byte_level_tokenizer, text_tokens, config["text_config"]["max_position_embeddings"], SPECIAL, NAMED
        ),
        image_processor=functools.partial(
            image_processor, config["vision_config"]["image_size"], config["image_grid_pinpoints"]
        ),
        template=TEMPLATE,
        spoken=(256, text_tokens),
        renames=((r"^model\.vision_tower\.", "vision_tower.vision_model."), *LLAVA_NAMES),
        stop=(text_tokens + 1,),
        dtype=dtype,
    )


# Tiles of 8 x 8 patches, which do not fill their 58 pixels, as 27 of 14 do not fill 384; tied embeddings as 0.5b's.
TINY = {
    "model_type": "llava_onevision",
    "image_token_index": TEXT_TOKENS + SPECIAL.index("<image>"),
    "video_token_index": TEXT_TOKENS + SPECIAL.index("<video>"),
    "image_grid_pinpoints": [[58, 58], [58, 116], [58, 174], [116, 58], [116, 116], [174, 58]],
    "vision_aspect_ratio": "anyres_max_9",
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full",
    "tie_word_embeddings": True,
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 58,
        "patch_size": 7,
        "vision_use_head": False,
    },
    "text_config": {
        "model_type": "qwen2",
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": TEXT_TOKENS + 8,
        "max_position_embeddings": 2048,
        "rope_theta": 1e6,
        "use_sliding_window": False,
        "sliding_window": 131072,
        "tie_word_embeddings": True,
    },
}

PRESETS = {"tiny-llava-onevision": _preset(TINY, "float32")} | {
    name: _preset(config, "float16") for name, config in CONFIGS.items()
}
