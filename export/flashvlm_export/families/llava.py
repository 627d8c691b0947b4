"""LLaVA-1.5: a CLIP tower with a CLS token, an MLP projector, a Llama language model (arXiv 2310.03744)."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, LlavaConfig, LlavaForConditionalGeneration

from flashvlm.errors import CheckpointError
from flashvlm.graph_io import VISION
from flashvlm.manifest import VisualSpec
from flashvlm.tilings import Single
from flashvlm_export.config_bounds import refuse_unlike_attention
from flashvlm_export.families.contract import LanguageSpec, TowerSpec, VisualOptions

NAME = "llava"
ALIASES = {"llava-1.5-7b": "llava-hf/llava-1.5-7b-hf", "llava-1.5-13b": "llava-hf/llava-1.5-13b-hf"}
REFUSED = {
    "llava_next": "it cuts images into tiles",
    "llava_next_video": "it cuts images into tiles",
    "llava_onevision": "it cuts images into tiles",
    "video_llava": "it has a second tower, for video",
    "vipllava": "it joins the features of several vision blocks",
}
VISION_TYPES = ("clip_vision_model",)
TEXT_TYPES = ("llama",)

# Names of checkpoints on the Hub (left) and of transformers 5 modules (right).
RENAMES = (
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^(model\.)?vision_tower\.(vision_model\.)?", "model.vision_tower."),
    (r"^multi_modal_projector\.", "model.multi_modal_projector."),
)
RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # PIL.Image.Resampling
# Buffers that old transformers saved and new ones compute.
COMPUTED = re.compile(r"(embeddings\.position_ids|rotary_emb\.inv_freq)$")


def _sizes(hidden: int, layers: int, heads: int, inter: int) -> dict[str, Any]:
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
        "projection_dim": 768,
    }
    text = {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inter,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": 32064,
        "max_position_embeddings": 4096,
    }
    return {
        "model_type": "llava",
        "dtype": "float16",
        "image_token_index": 32000,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
        "vision_config": vision,
        "text_config": text,
    }


# What decides sizes in the config.json of the models that have a short name, so that planning needs no network.
CONFIGS = {"llava-1.5-7b": _sizes(4096, 32, 32, 11008), "llava-1.5-13b": _sizes(5120, 40, 40, 13824)}


class Vision(nn.Module):
    """pixel_values [B,3,H,W] -> image_tokens [B,N,D], features [B,N,Dv], saliency [B,N] float32.

    Saliency is the CLS row of the block that yields the features, averaged over heads (arXiv 2512.20561, section 3).
    """

    def __init__(self, model: LlavaForConditionalGeneration, blocks: int) -> None:
        super().__init__()
        self.vision_tower = model.model.vision_tower
        self.multi_modal_projector = model.model.multi_modal_projector
        # Later blocks feed nothing: LLaVA-1.5 takes its features from block -2.
        self.vision_tower.encoder.layers = self.vision_tower.encoder.layers[:blocks]

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tower = self.vision_tower(pixel_values, output_attentions=True)
        features = tower.last_hidden_state[:, 1:]  # [B,N,Dv], CLS dropped
        saliency = tower.attentions[-1].mean(dim=1)[:, 0, 1:]  # [B,N]
        return self.multi_modal_projector(features), features, saliency


def read_config(config: dict[str, Any]) -> LlavaConfig:
    """Parses and checks a ``config.json``.

    Raises:
        CheckpointError: a variant of LLaVA this family does not cover.
    """
    for part in ("vision_config", "text_config"):
        if not isinstance(config.get(part), dict):
            found = repr(config[part]) if part in config else "missing"
            raise CheckpointError(f"config.json: {part} is {found}; family {NAME} has an object there")
    if "quantization_config" in config:
        raise CheckpointError("config.json: the checkpoint is quantized; expected float16, bfloat16 or float32 weights")
    refuse_unlike_attention(config["text_config"], "text_config")
    parsed = LlavaConfig.from_dict(config)
    for part, found, expected in (
        ("vision_config.model_type", parsed.vision_config.model_type, VISION_TYPES),
        ("text_config.model_type", parsed.text_config.model_type, TEXT_TYPES),
        ("vision_feature_select_strategy", parsed.vision_feature_select_strategy, ("default",)),
    ):
        if found not in expected:
            raise CheckpointError(f"config.json: {part} is {found!r}; family {NAME} supports {' or '.join(expected)}")
    token, rows = parsed.image_token_id, parsed.text_config.vocab_size
    if not isinstance(token, int) or not 0 <= token < rows:
        raise CheckpointError(f"config.json: image_token_index is {token!r}; expected one of the {rows:,} tokens")
    vision_blocks(parsed)
    return parsed


def vision_blocks(config: LlavaConfig) -> int:
    """How many vision blocks run before the features are taken."""
    layer, depth = config.vision_feature_layer, config.vision_config.num_hidden_layers
    if not isinstance(layer, int) or not -depth <= layer <= depth or layer == 0:
        raise CheckpointError(f"config.json: vision_feature_layer is {layer!r}; expected one block of the {depth}")
    return layer if layer > 0 else depth + 1 + layer


def build(config: LlavaConfig, dtype: torch.dtype) -> LlavaForConditionalGeneration:
    """transformers' own model, weights in ``dtype``; call under ``torch.device("meta")``."""
    # Not model.to(dtype): that would also round the rotary frequencies, which transformers keeps in float32.
    return AutoModelForImageTextToText.from_config(config, dtype=dtype)


def vision(model: LlavaForConditionalGeneration, spec: VisualSpec) -> nn.Module:
    return Vision(model, vision_blocks(model.config))


def language(model: LlavaForConditionalGeneration) -> tuple[nn.Module, nn.Module]:
    return model.model.language_model, model.lm_head


def language_section(config: dict[str, Any]) -> dict[str, Any]:
    return config["text_config"] if isinstance(config.get("text_config"), dict) else {}


def language_spec(config: LlavaConfig) -> LanguageSpec:
    text = config.text_config
    return LanguageSpec(
        hidden=text.hidden_size,
        layers=text.num_hidden_layers,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        head_dim=text.head_dim,
        intermediate=text.intermediate_size,
        vocab=text.vocab_size,
        max_seq=text.max_position_embeddings,
    )


def tower_specs(config: LlavaConfig) -> list[TowerSpec]:
    tower, patches = config.vision_config, _side(config) ** 2
    return [
        TowerSpec(
            tokens=patches + 1,  # and CLS
            width=tower.hidden_size,
            heads=tower.num_attention_heads,
            intermediate=tower.intermediate_size,
            pixels=3 * tower.image_size**2,
            candidates=patches,
            features=tower.hidden_size,
        )
    ]


def _side(config: LlavaConfig) -> int:
    """Patches along an edge."""
    return config.vision_config.image_size // config.vision_config.patch_size


def visual_specs(config: LlavaConfig, image_processor: Any, options: VisualOptions) -> list[VisualSpec]:
    options.refuse(NAME)
    side = _side(config)
    return [
        VisualSpec(
            graph=VISION,
            placeholder_id=config.image_token_id,
            tokens_per_unit=side * side,
            grid=(side, side),
            candidates=side * side,
            feature_size=config.vision_config.hidden_size,
            pixels=_pixels(image_processor, config.vision_config.image_size),
        )
    ]


def _pixels(p: Any, side: int) -> Single:
    """The image processor's settings in the bundle's own terms, checked against the tower's ``side`` in pixels."""
    size, crop = dict(p.size), dict(p.crop_size)
    if not (p.do_resize and p.do_center_crop and p.do_rescale and p.do_normalize) or "shortest_edge" not in size:
        raise CheckpointError(
            "preprocessor_config.json: expected resize by shortest edge, center crop, rescale and normalize"
        )
    if (crop["height"], crop["width"]) != (side, side):
        raise CheckpointError(f"preprocessor_config.json: crop_size is {crop}; the vision tower takes {side} x {side}")
    if p.resample not in RESAMPLE:
        raise CheckpointError(f"preprocessor_config.json: resample is {p.resample!r}; expected one of {RESAMPLE}")
    return Single(
        resize="shortest_edge",
        size=(size["shortest_edge"], size["shortest_edge"]),
        resample=RESAMPLE[int(p.resample)],  # type: ignore[arg-type]
        crop=(side, side),
        rescale=p.rescale_factor,
        mean=tuple(p.image_mean),
        std=tuple(p.image_std),
    )


def embedding_name(config: LlavaConfig) -> str:
    return "model.language_model.embed_tokens.weight"


def tied_head(config: LlavaConfig) -> str | None:
    return "lm_head.weight" if config.tie_word_embeddings or config.text_config.tie_word_embeddings else None


def canonical_name(name: str) -> str | None:
    if COMPUTED.search(name):
        return None
    for pattern, replacement in RENAMES:
        renamed, count = re.subn(pattern, replacement, name)
        if count:
            return renamed
    return name


def is_unused(config: LlavaConfig, name: str) -> bool:
    """The tower behind the block the features come from, and its final norm."""
    block = re.match(r"model\.vision_tower\.encoder\.layers\.(\d+)\.", name)
    if block:
        return int(block[1]) >= vision_blocks(config)
    return name.startswith("model.vision_tower.post_layernorm.")
