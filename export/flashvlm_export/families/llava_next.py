"""LLaVA-NeXT (1.6): LLaVA-1.5's CLIP tower over a thumbnail and the tiles of the canvas that fits best. These are read
in rows over all tiles, without their padding and with a newline each (llava-vl.github.io, 2024-01-30)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import LlavaNextConfig

from flashvlm.errors import CheckpointError, FlashVLMError, brief
from flashvlm.graph_io import VISION
from flashvlm.manifest import VisualSpec
from flashvlm.preprocess import AnyRes
from flashvlm_export.families.common import clip, names, pixels
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
    side, pinpoints = parsed.vision_config.image_size, parsed.image_grid_pinpoints
    if not 1 <= len(pinpoints) <= 64:
        raise CheckpointError(f"config.json: image_grid_pinpoints has {len(pinpoints):,} sizes; expected 1 to 64")
    for pair in pinpoints:
        if not (isinstance(pair, list) and len(pair) == 2 and all(_is_edge(edge, side) for edge in pair)):
            raise CheckpointError(
                f"config.json: image_grid_pinpoints has {brief(pair)}; expected [height, width] in multiples of "
                f"the tower's {side} pixels"
            )
    return parsed


def _is_edge(edge: Any, side: int) -> bool:
    return isinstance(edge, int) and 0 < edge <= 4096 and edge % side == 0


def _canvases(config: LlavaNextConfig, options: VisualOptions) -> tuple[tuple[int, int], ...]:
    """(height, width) in tiles of the canvases that an image may be put on."""
    options.refuse(NAME, but=["max_tiles"])
    side = config.vision_config.image_size
    every = [(height // side, width // side) for height, width in config.image_grid_pinpoints]
    allowed = tuple(
        canvas for canvas in every if options.max_tiles is None or canvas[0] * canvas[1] <= options.max_tiles
    )
    if not allowed:
        fewest = min(rows * columns for rows, columns in every)
        raise FlashVLMError(
            f"--max-tiles {options.max_tiles}: expected {fewest} or more, the tiles of this model's smallest canvas"
        )
    return allowed


def _candidates(config: LlavaNextConfig, canvases: tuple[tuple[int, int], ...]) -> int:
    """Visual tokens of the largest image: its thumbnail's, and those of its canvas with a newline for each row."""
    side = clip.side(config)
    return side * side + max(rows * side * (columns * side + 1) for rows, columns in canvases)


def vision(model: LlavaNextForConditionalGeneration, spec: VisualSpec) -> nn.Module:
    return Vision(model)


def tower_specs(config: LlavaNextConfig, options: VisualOptions) -> list[TowerSpec]:
    canvases = _canvases(config, options)
    units = 1 + max(rows * columns for rows, columns in canvases)
    return [clip.tower_spec(config, _candidates(config, canvases), units)]


def visual_specs(config: LlavaNextConfig, image_processor: Any, options: VisualOptions) -> list[VisualSpec]:
    canvases, side, patches = _canvases(config, options), config.vision_config.image_size, clip.side(config)
    _check_processor(image_processor, config)
    return [
        VisualSpec(
            graph=VISION,
            placeholder_id=config.image_token_id,
            tokens_per_unit=patches * patches,
            grid=(patches, patches),
            candidates=_candidates(config, canvases),
            feature_size=config.vision_config.hidden_size,
            pixels=AnyRes(
                side=side,
                pinpoints=tuple((rows * side, columns * side) for rows, columns in canvases),
                **pixels.normalisation(image_processor),
            ),
            order="anyres",
        )
    ]


def _check_processor(processor: Any, config: LlavaNextConfig) -> None:
    """Raises CheckpointError unless it cuts images as the model reads them."""
    side, size, crop = config.vision_config.image_size, dict(processor.size), dict(processor.crop_size)
    edges = {size[key] for key in ("shortest_edge", "height", "width") if size.get(key) is not None}
    for name, found, sizes in (("size", size, edges), ("crop_size", crop, {crop.get("height"), crop.get("width")})):
        if sizes != {side}:
            raise CheckpointError(
                f"preprocessor_config.json: {name} is {found}; the vision tower takes {side} x {side}"
            )
    theirs = [list(pair) for pair in processor.image_grid_pinpoints]
    if theirs != config.image_grid_pinpoints:
        raise CheckpointError(
            f"preprocessor_config.json: image_grid_pinpoints is {theirs}; config.json has {config.image_grid_pinpoints}"
        )


def canonical_name(name: str) -> str | None:
    return names.renamed(name, names.LLAVA_RENAMES)


def is_unused(config: LlavaNextConfig, name: str) -> bool:
    return clip.is_behind(config, name)
