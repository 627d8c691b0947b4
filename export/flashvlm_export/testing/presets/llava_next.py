"""Checkpoints in the shape of LLaVA-NeXT (1.6)."""

from __future__ import annotations

import functools
from typing import Any

from flashvlm_export.families.llava_next import CONFIGS
from flashvlm_export.testing.folder import LLAVA_NAMES, FolderPreset
from flashvlm_export.testing.tokenizer import FIXED_TOKENS, make_tokenizer

TEXT_TOKENS = 512
# As 1.6-mistral's: no start of sequence, which the tokenizer adds, and nothing that asks for an answer.
TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}{{- ' ' + message['content'][0]['text'] + '</s> ' -}}
{%- elif message['role'] == 'system' -%}{{- '<<SYS>>\\n' + message['content'][0]['text'] + '\\n<</SYS>>\\n\\n' -}}
{%- else -%}{{- '[INST] ' -}}
{%- for part in message['content'] if part['type'] == 'image' -%}{{- '<image>\\n' -}}{%- endfor -%}
{%- for part in message['content'] if part['type'] == 'text' -%}{{- part['text'] -}}{%- endfor -%}
{{- ' [/INST]' -}}
{%- endif -%}
{%- endfor -%}
"""


def image_processor(side: int, pinpoints: list[list[int]]) -> Any:
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    return LlavaNextImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}, image_grid_pinpoints=pinpoints
    )


def _preset(config: dict[str, Any], dtype: str) -> FolderPreset:
    image, text = config["image_token_index"], config["text_config"]
    return FolderPreset(
        model="LlavaNextForConditionalGeneration",
        config=config,
        tokenizer=functools.partial(make_tokenizer, image, text["max_position_embeddings"]),
        image_processor=functools.partial(
            image_processor, config["vision_config"]["image_size"], config["image_grid_pinpoints"]
        ),
        template=TEMPLATE,
        spoken=(len(FIXED_TOKENS), image),
        renames=((r"^model\.vision_tower\.", "vision_tower.vision_model."), *LLAVA_NAMES),
        stop=(2,),
        dtype=dtype,
    )


TINY = {
    "model_type": "llava_next",
    "image_token_index": TEXT_TOKENS,
    "image_grid_pinpoints": [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]],
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "tie_word_embeddings": False,
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 56,
        "patch_size": 14,
        "projection_dim": 32,
    },
    "text_config": {
        "model_type": "mistral",
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": TEXT_TOKENS + 8,
        "max_position_embeddings": 1024,
        "sliding_window": None,
    },
}

PRESETS = {"tiny-llava-next": _preset(TINY, "float32")} | {
    name: _preset(config, "float16") for name, config in CONFIGS.items()
}
