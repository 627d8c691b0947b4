"""Checkpoints in the shape of SmolVLM2."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from flashvlm_export.families.common.idefics3 import BORDER, TILES, WHOLE
from flashvlm_export.families.smolvlm import CONFIGS
from flashvlm_export.testing.folder import FolderPreset
from flashvlm_export.testing.tokenizer import make_byte_level_tokenizer

_TILES = (f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))
SPECIAL = ("<|im_end|>", "<end_of_utterance>", "<|im_start|>", WHOLE, *_TILES, BORDER, "<image>")
NAMED = {
    "image_token": "<image>",
    "fake_image_token": BORDER,
    "global_image_token": WHOLE,
    "end_of_utterance_token": "<end_of_utterance>",
}
TEXT_TOKENS = 512
# One start for all turns; no space where a turn begins with its image.
TEMPLATE = """\
<|im_start|>
{%- for message in messages -%}
{{- message['role'] | capitalize -}}
{%- if message['content'] is string -%}{{- ': ' + message['content'] -}}
{%- else -%}
{{- ':' if message['content'][0]['type'] == 'image' else ': ' -}}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{- '<image>' -}}
{%- elif part['type'] == 'video' -%}{{- '<video>' -}}
{%- elif part['type'] == 'text' -%}{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<end_of_utterance>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Assistant:' -}}{%- endif -%}
"""


def image_processor(side: int, edge: int) -> Any:
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    return SmolVLMImageProcessorPil(size={"longest_edge": edge}, max_image_size={"longest_edge": side})


def preset(
    config: dict[str, Any],
    tiles: int = TILES,
    dtype: str = "bfloat16",
    model: str = "SmolVLMForConditionalGeneration",
    processor: Callable[[int, int], Any] = image_processor,
) -> FolderPreset:
    text_tokens = config["image_token_id"] - SPECIAL.index("<image>")
    side = config["vision_config"]["image_size"]
    return FolderPreset(
        model=model,
        config=config,
        tokenizer=functools.partial(
            make_byte_level_tokenizer, text_tokens, config["text_config"]["max_position_embeddings"], SPECIAL, NAMED
        ),
        image_processor=functools.partial(processor, side, tiles * side),
        template=TEMPLATE,
        spoken=(256, text_tokens),
        stop=(text_tokens + 1,),
        dtype=dtype,
    )


# 25 patches along an edge: their rows in the table of positions are not 0 to 624. Heads that share keys, like 500M's.
TINY: dict[str, Any] = {
    "model_type": "smolvlm",
    "image_token_id": TEXT_TOKENS + SPECIAL.index("<image>"),
    "scale_factor": 5,
    "tie_word_embeddings": False,
    "vision_config": {
        "model_type": "smolvlm_vision",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 76,
        "patch_size": 3,
    },
    "text_config": {
        "model_type": "llama",
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "vocab_size": 560,
        "max_position_embeddings": 1024,
        "rope_theta": 100000,
        "pad_token_id": 512,
        "tie_word_embeddings": False,
    },
}

PRESETS = {
    "tiny-smolvlm": preset(TINY, 2, "float32"),
    **{name: preset(config) for name, config in CONFIGS.items()},
}
