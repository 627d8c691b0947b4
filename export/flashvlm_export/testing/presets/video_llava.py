"""Checkpoints in the shape of Video-LLaVA."""

from __future__ import annotations

import functools
from typing import Any

from flashvlm_export.families.video_llava import CONFIGS
from flashvlm_export.testing.folder import LLAVA_NAMES, FolderPreset
from flashvlm_export.testing.tokenizer import CHAT_TEMPLATE, FIXED_TOKENS, make_tokenizer

TEXT_TOKENS = 512
_IMAGES = "{%- for part in content if part['type'] == 'image' -%}{{ '<image>\\n' }}{%- endfor -%}"
# LLaVA-1.5's, with videos behind the images of a turn.
TEMPLATE = CHAT_TEMPLATE.replace(_IMAGES, f"{_IMAGES}\n{_IMAGES.replace('image', 'video')}")


def image_processor(side: int) -> Any:
    from transformers import VideoLlavaImageProcessor

    return VideoLlavaImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


def _preset(config: dict[str, Any], dtype: str) -> FolderPreset:
    image, text = config["image_token_index"], config["text_config"]
    return FolderPreset(
        model="VideoLlavaForConditionalGeneration",
        config=config,
        tokenizer=functools.partial(make_tokenizer, image, text["max_position_embeddings"], visual=("image", "video")),
        image_processor=functools.partial(image_processor, config["vision_config"]["image_size"]),
        template=TEMPLATE,
        spoken=(len(FIXED_TOKENS), image),
        renames=((r"^model\.(image|video)_tower\.", r"\1_tower.vision_model."), *LLAVA_NAMES),
        stop=(2,),
        dtype=dtype,
    )


# Features that leave block 2 of 4; 25 tokens an image.
TINY = {
    "model_type": "video_llava",
    "image_token_index": TEXT_TOKENS,
    "video_token_index": TEXT_TOKENS + 1,
    "vision_feature_layer": -3,
    "vision_feature_select_strategy": "default",
    "tie_word_embeddings": False,
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "image_size": 70,
        "patch_size": 14,
        "projection_dim": 32,
    },
    "text_config": {
        "model_type": "llama",
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": TEXT_TOKENS + 8,
        "max_position_embeddings": 1024,
    },
}

PRESETS = {"tiny-video-llava": _preset(TINY, "float32")} | {
    name: _preset(config, "float16") for name, config in CONFIGS.items()
}
