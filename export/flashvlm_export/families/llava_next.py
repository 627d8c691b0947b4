"""LLaVA-NeXT (1.6): LLaVA-1.5's CLIP tower over a thumbnail and the tiles of the canvas that fits best. These are read
in rows over all tiles, without their padding and with a newline each (llava-vl.github.io, 2024-01-30)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import LlavaNextConfig

from flashvlm.graph_io import VISION
from flashvlm.tilings import AnyRes
from flashvlm.visual import VisualSpec
from flashvlm_export.families.common import anyres, clip, names, pixels
from flashvlm_export.families.common.text import TEXT_TYPES, check_sections, check_token, expect
from flashvlm_export.families.common.text import build as build
from flashvlm_export.families.common.text import embedding_name as embedding_name
from flashvlm_export.families.common.text import language as language
from flashvlm_export.families.common.text import language_section as language_section
from flashvlm_export.families.common.text import language_spec as language_spec
from flashvlm_export.families.common.text import tied_head as tied_head
from flashvlm_export.families.common.tiles import in_reading_order
from flashvlm_export.families.contract import TowerSpec, VisualOptions

if TYPE_CHECKING:
    from transformers import LlavaNextForConditionalGeneration

NAME = "llava_next"
ALIASES = {
    "llava-1.6-vicuna-7b": "llava-hf/llava-v1.6-vicuna-7b-hf",
    "llava-1.6-mistral-7b": "llava-hf/llava-v1.6-mistral-7b-hf",
    "llava-1.6-llama3-8b": "llava-hf/llama3-llava-next-8b-hf",
    "llava-1.6-vicuna-13b": "llava-hf/llava-v1.6-vicuna-13b-hf",
    "llava-1.6-34b": "llava-hf/llava-v1.6-34b-hf",
}
_OWN_CODE = "its code is not transformers'; take the -hf conversion, such as llava-hf/llava-v1.6-mistral-7b-hf"
REFUSED = {
    "llava_next_video": "it pools the tokens of its videos",
    "llava_llama": _OWN_CODE,
    "llava_mistral": _OWN_CODE,
}
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


def _sizes(
    kind: str, hidden: int, layers: int, heads: int, kv_heads: int, inter: int, tokens: int, positions: int = 4096
) -> dict[str, Any]:
    """``tokens``: of the tokenizer, before <image>."""
    text = {
        "model_type": kind,
        "hidden_size": hidden,
        "intermediate_size": inter,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": tokens + 64,
        "max_position_embeddings": positions,
    }
    return {
        "model_type": NAME,
        "dtype": "float16",
        "image_token_index": tokens,
        "image_grid_pinpoints": PINPOINTS,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
        "vision_config": clip.vit_l(336),
        "text_config": text | ({"sliding_window": None} if kind == "mistral" else {}),
    }


CONFIGS = {
    "llava-1.6-vicuna-7b": _sizes("llama", 4096, 32, 32, 32, 11008, 32000),
    "llava-1.6-mistral-7b": _sizes("mistral", 4096, 32, 32, 8, 14336, 32000, 32768),
    "llava-1.6-llama3-8b": _sizes("llama", 4096, 32, 32, 8, 14336, 128256, 8192),
    "llava-1.6-vicuna-13b": _sizes("llama", 5120, 40, 40, 40, 13824, 32000),
    "llava-1.6-34b": _sizes("llama", 7168, 60, 56, 8, 20480, 64000),
}


class Vision(nn.Module):
    """pixel_values [U,3,H,W], order [N] -> image_tokens [1,N,D], features [1,N,Dv], saliency [1,N] float32.

    A newline is the model's own embedding; its features and saliency are zeros, and it is never selected.
    """

    def __init__(self, model: LlavaNextForConditionalGeneration) -> None:
        super().__init__()
        self.vision_tower = clip.cut(model.model.vision_tower, model.config)
        self.multi_modal_projector = model.model.multi_modal_projector
        self.image_newline = model.model.image_newline

    def forward(self, pixel_values: Tensor, order: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features, saliency = clip.see(self.vision_tower, pixel_values)
        return (
            in_reading_order(self.multi_modal_projector(features), order, self.image_newline),
            in_reading_order(features, order),
            in_reading_order(saliency[..., None], order).squeeze(-1),
        )


def read_config(config: dict[str, Any]) -> LlavaNextConfig:
    """Parses and checks a ``config.json``.

    Raises:
        CheckpointError: a variant of LLaVA-NeXT this family does not cover.
    """
    parsed = LlavaNextConfig.from_dict(check_sections(config, NAME))
    expect(
        NAME,
        ("vision_config.model_type", parsed.vision_config.model_type, clip.TYPES),
        ("text_config.model_type", parsed.text_config.model_type, TEXT_TYPES),
        ("vision_feature_select_strategy", parsed.vision_feature_select_strategy, ("default",)),
        # What old conversions say of the newline; transformers always has one.
        ("use_image_newline_parameter", config.get("use_image_newline_parameter", True), (True,)),
    )
    check_token("image_token_index", parsed.image_token_id, parsed.text_config.vocab_size)
    clip.blocks(parsed)
    anyres.check_pinpoints(parsed)
    return parsed


def _canvases(config: LlavaNextConfig, options: VisualOptions) -> anyres.Canvases:
    options.refuse(NAME, but=["max_tiles"])
    return anyres.canvases(config, options.max_tiles)


def vision(model: LlavaNextForConditionalGeneration, spec: VisualSpec) -> nn.Module:
    return Vision(model)


def tower_specs(config: LlavaNextConfig, options: VisualOptions) -> list[TowerSpec]:
    canvases = _canvases(config, options)
    return [clip.tower_spec(config, anyres.candidates(canvases, clip.side(config)), anyres.units(canvases))]


def visual_specs(config: LlavaNextConfig, image_processor: Any, options: VisualOptions) -> list[VisualSpec]:
    canvases, side = _canvases(config, options), clip.side(config)
    anyres.check_processor(image_processor, config, "size", "crop_size")
    return [
        VisualSpec(
            graph=VISION,
            placeholder_id=config.image_token_id,
            tokens_per_unit=side * side,
            grid=(side, side),
            candidates=anyres.candidates(canvases, side),
            feature_size=config.vision_config.hidden_size,
            pixels=AnyRes(
                side=config.vision_config.image_size,
                pinpoints=anyres.pinpoints(config, canvases),
                **pixels.normalisation(image_processor),
            ),
            order="anyres",
        )
    ]


def canonical_name(name: str) -> str | None:
    return names.renamed(name, names.LLAVA_RENAMES)


def is_unused(config: LlavaNextConfig, name: str) -> bool:
    return clip.is_behind(config, name)
