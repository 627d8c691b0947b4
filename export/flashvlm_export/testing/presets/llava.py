"""Checkpoints in the shape of LLaVA-1.5: their sizes, files and tensor names, as on the Hub."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flashvlm_export.testing.tensors import Naming, Tensor, drawn
from flashvlm_export.testing.tokenizer import CHAT_TEMPLATE, FIXED_TOKENS, make_tokenizer


@dataclass(frozen=True)
class LlavaPreset:
    """The sizes of one checkpoint. ``text_tokens`` counts the tokenizer without ``<image>`` and ``<pad>``."""

    vision: dict[str, int]
    text: dict[str, Any]
    text_tokens: int
    vocab_multiple: int  # LLaVA pads its embedding rows to a multiple of 64: 32002 tokens, 32064 rows
    dtype: str
    rope_theta: float = 1e4

    @property
    def image_token_id(self) -> int:
        return self.text_tokens

    @property
    def pad_token_id(self) -> int:
        return self.text_tokens + 1

    @property
    def vocab_size(self) -> int:
        return -(-(self.text_tokens + 2) // self.vocab_multiple) * self.vocab_multiple

    def cut(self, layers: int) -> LlavaPreset:
        return replace(self, text={**self.text, "num_hidden_layers": layers})

    def write_files(self, folder: Path, dtype: str) -> None:
        make_config(self, dtype).save_pretrained(folder)
        generation_config(self).save_pretrained(folder)
        save_processor(self, folder)

    def tensors(self, dtype: str, naming: Naming) -> list[Tensor]:
        return list_tensors(make_config(self, dtype), naming)


def vision_sizes(image: int, hidden: int, layers: int, heads: int, inter: int, projection: int) -> dict[str, int]:
    return {
        "image_size": image,
        "patch_size": 14,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": inter,
        "projection_dim": projection,
    }


def text_sizes(hidden: int, layers: int, heads: int, inter: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": inter,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        **more,
    }


_CLIP_L_336 = vision_sizes(336, 1024, 24, 16, 4096, 768)
PRESETS: dict[str, LlavaPreset] = {
    "tiny": LlavaPreset(vision_sizes(56, 32, 3, 2, 64, 32), text_sizes(48, 2, 4, 96), 512, 1, "float32"),
    "tiny-gqa": LlavaPreset(
        vision_sizes(70, 36, 4, 3, 76, 20),
        text_sizes(72, 3, 6, 150, num_key_value_heads=2, head_dim=16),
        512,
        64,
        "float32",
    ),
    "small": LlavaPreset(vision_sizes(336, 192, 6, 3, 768, 128), text_sizes(256, 4, 4, 688), 4096, 64, "float16"),
    "llava-1.5-7b": LlavaPreset(_CLIP_L_336, text_sizes(4096, 32, 32, 11008), 32000, 64, "float16"),
    "llava-1.5-13b": LlavaPreset(_CLIP_L_336, text_sizes(5120, 40, 40, 13824), 32000, 64, "float16"),
}


# ---- configuration and processor


def make_config(preset: LlavaPreset, dtype: str) -> Any:
    """The ``LlavaConfig`` of a preset."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    vision = CLIPVisionConfig(**preset.vision, hidden_act="quick_gelu")
    text = LlamaConfig(
        **preset.text,
        vocab_size=preset.vocab_size,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=preset.pad_token_id,
        rope_parameters={"rope_type": "default", "rope_theta": preset.rope_theta},
        tie_word_embeddings=False,
    )
    return LlavaConfig(
        architectures=["LlavaForConditionalGeneration"],
        vision_config=vision,
        text_config=text,
        image_token_index=preset.image_token_id,
        image_seq_length=(preset.vision["image_size"] // preset.vision["patch_size"]) ** 2,
        pad_token_id=preset.pad_token_id,
        projector_hidden_act="gelu",
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
        dtype=getattr(torch, dtype),
    )


def generation_config(preset: LlavaPreset) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=preset.pad_token_id)


def save_processor(preset: LlavaPreset, folder: Path, tokenizer: Any = None) -> None:
    """Write tokenizer, image processor, processor and chat template in the layout of the hub's folders."""
    # The Pillow class is the one that exists without torchvision; both save as `CLIPImageProcessor`.
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    size = preset.vision["image_size"]
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}, resample=3
    )
    image_processor.save_pretrained(folder)
    if tokenizer is None:
        tokenizer = make_tokenizer(preset.text_tokens, preset.text["max_position_embeddings"])
    tokenizer.save_pretrained(folder)
    processor = {
        "image_token": "<image>",
        "num_additional_image_tokens": 1,  # CLS, which the "default" strategy then drops
        "patch_size": preset.vision["patch_size"],
        "processor_class": "LlavaProcessor",
        "vision_feature_select_strategy": "default",
    }
    # Not `LlavaProcessor.save_pretrained`: since transformers 5 that nests the image processor in this file,
    # while the folders on the hub keep it in preprocessor_config.json.
    (folder / "processor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


# ---- weights


def list_tensors(config: Any, naming: Naming = "hub") -> list[Tensor]:
    """Every tensor of the model class, in its own order, with the name it has under ``naming``."""
    import torch
    from transformers import LlavaForConditionalGeneration

    with torch.device("meta"):
        state = LlavaForConditionalGeneration(config).state_dict()
    tensors = []
    for module_name, value in state.items():
        # A trained model never says <image> or a padding row; rows this faint never win an argmax either. The
        # same for </s> and the byte tokens lets a generation run its full length and read as (meaningless)
        # text.
        spoken = (len(FIXED_TOKENS), config.image_token_index) if module_name == "lm_head.weight" else None
        names = rename(module_name, naming), rename(module_name, "hub")
        tensors.append(drawn(module_name, *names, tuple(value.shape), spoken))
    return tensors


def rename(module_name: str, naming: Naming) -> str:
    """A ``state_dict`` name in another naming.

    transformers 5 loads all three: its conversion table for "llava" maps the older prefixes, and the one for
    ``CLIPVisionModel`` drops ``vision_model``, a level that the class lost in the course of version 5.
    """
    if naming == "module":
        return module_name
    level = "vision_model." if naming == "hub" else ""
    for pattern, replacement in (
        (r"^model\.language_model\.", "language_model.model."),
        (r"^lm_head\.", "language_model.lm_head."),
        (r"^model\.vision_tower\.(vision_model\.)?", f"vision_tower.{level}"),
        (r"^model\.multi_modal_projector\.", "multi_modal_projector."),
    ):
        module_name = re.sub(pattern, replacement, module_name)
    return module_name
