"""LLaVA-OneVision: a thumbnail and tiles as LLaVA-NeXT's, of a SigLIP tower; images among several in one piece; Qwen2
(arXiv 2408.03326)."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlavaOnevisionConfig

from flashvlm.errors import CheckpointError, FlashVLMError
from flashvlm.graph_io import VISION
from flashvlm.tilings import AnyRes, Frames
from flashvlm.visual import VisualSpec
from flashvlm_export.families.common import anyres, names, pixels, saliency, siglip
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
    from transformers import LlavaOnevisionForConditionalGeneration

NAME = "llava_onevision"
ALIASES = {f"llava-onevision-{size}": f"llava-hf/llava-onevision-qwen2-{size}-ov-hf" for size in ("0.5b", "7b")}
REFUSED = {
    "llava_qwen": "its code is not transformers'; take the -hf conversion, such as "
    "llava-hf/llava-onevision-qwen2-7b-ov-hf",
}
TILES = 4  # of an image where --max-tiles says nothing: up to 3,753 visual tokens; 10 tiles have up to 8,154
PINPOINTS = [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)]


def _sizes(
    hidden: int, layers: int, heads: int, kv_heads: int, inter: int, vocab: int, tied: bool = False
) -> dict[str, Any]:
    return {
        "model_type": NAME,
        "dtype": "float16",
        "image_token_index": 151646,
        "video_token_index": 151647,
        "image_grid_pinpoints": PINPOINTS,
        "vision_aspect_ratio": "anyres_max_9",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "tie_word_embeddings": tied,
        "vision_config": {
            "model_type": "siglip_vision_model",
            "num_hidden_layers": 26,
            "vision_use_head": False,
            **siglip.SO400M,
        },
        "text_config": {
            "model_type": "qwen2",
            "hidden_size": hidden,
            "intermediate_size": inter,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "vocab_size": vocab,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": tied,
        },
    }


CONFIGS = {
    "llava-onevision-0.5b": _sizes(896, 24, 14, 2, 4864, 152000, tied=True),
    "llava-onevision-7b": _sizes(3584, 28, 28, 4, 18944, 152128),
}


class Vision(nn.Module):
    """pixel_values [U,3,H,W], order [N] -> image_tokens [1,N,D], features [1,N,Dv], saliency [1,N] float32.

    A newline is the model's own embedding; its features and saliency are zeros, and it is never selected.
    """

    def __init__(self, model: LlavaOnevisionForConditionalGeneration) -> None:
        super().__init__()
        self.vision_tower = model.model.vision_tower
        self.multi_modal_projector = model.model.multi_modal_projector
        self.image_newline = model.model.image_newline
        saliency.receives(self.vision_tower.encoder.layers[-1].self_attn)

    def see(self, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """pixel_values [U,3,H,W] -> tokens [U,T,D], features [U,T,Dv], saliency [U,T] of each tile or frame."""
        hidden = self.vision_tower.embeddings(pixel_values)
        features, seen = siglip.through(self.vision_tower.encoder.layers, hidden)  # without the tower's final norm
        return self.multi_modal_projector(features), features, seen

    def forward(self, pixel_values: Tensor, order: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tokens, features, seen = self.see(pixel_values)
        return (
            in_reading_order(tokens, order, self.image_newline),
            in_reading_order(features, order),
            in_reading_order(seen[..., None], order).squeeze(-1),
        )


class Videos(nn.Module):
    """pixel_values [U,3,H,W] of U frames, order [N] -> image_tokens [1,N,D], features [1,N,Dv], saliency [1,N] float32.

    Tokens are pooled to half of their rows and columns, and one newline stands behind all frames.
    """

    def __init__(self, image: Vision, side: int) -> None:
        super().__init__()
        self.image = image
        # Bilinear, as two products with a constant: the older dialect has no Resize.
        eye = torch.eye(side, device="cpu")[:, None]
        self.pooling = functional.interpolate(eye, size=math.ceil(side / 2), mode="linear")[:, 0].t()  # [m,n]

    def forward(self, pixel_values: Tensor, order: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tokens, features, seen = self.image.see(pixel_values)
        return (
            in_reading_order(self._pooled(tokens), order, self.image.image_newline),
            in_reading_order(self._pooled(features), order),
            in_reading_order(self._pooled(seen[..., None]), order).squeeze(-1),
        )

    def _pooled(self, x: Tensor) -> Tensor:
        """[U,n*n,*] -> [U,m*m,*]"""
        side, pooling = self.pooling.shape[1], self.pooling.to(x.dtype)
        rows = pooling @ x.reshape(x.shape[0], side, -1)  # [U,m,n*D]
        grid = pooling @ rows.unflatten(2, (side, -1))  # [U,m,n,D] -> [U,m,m,D]
        return grid.flatten(1, 2)


def read_config(config: dict[str, Any]) -> LlavaOnevisionConfig:
    """Parses and checks a ``config.json``.

    Raises:
        CheckpointError: a variant of LLaVA-OneVision this family does not cover.
    """
    parsed = LlavaOnevisionConfig.from_dict(check_sections(config, NAME))
    expect(
        NAME,
        ("vision_config.model_type", parsed.vision_config.model_type, ("siglip_vision_model",)),
        ("text_config.model_type", parsed.text_config.model_type, TEXT_TYPES),
        ("vision_feature_layer", parsed.vision_feature_layer, (-1,)),
        ("vision_feature_select_strategy", parsed.vision_feature_select_strategy, ("full",)),
    )
    check_token("image_token_index", parsed.image_token_id, parsed.text_config.vocab_size)
    check_token("video_token_index", parsed.video_token_id, parsed.text_config.vocab_size)
    _most_tiles(parsed)
    anyres.check_pinpoints(parsed)
    return parsed


def _most_tiles(config: LlavaOnevisionConfig) -> int:
    """How many tiles an image may have before its tokens are shrunk: by transformers' rule, a tenth more along an edge
    than what ``vision_aspect_ratio`` names.

    Raises:
        CheckpointError: it names no number of tiles.
    """
    ratio = config.vision_aspect_ratio
    named = re.fullmatch(r"anyres_max_(\d{1,2})", ratio, re.ASCII) if isinstance(ratio, str) else None
    if named is None or not int(named[1]):
        raise CheckpointError(
            f"config.json: vision_aspect_ratio is {ratio!r}; family {NAME} supports anyres_max_9 and other numbers"
        )
    return max(tiles for tiles in range(1, 2 * int(named[1]) + 1) if math.sqrt(tiles / int(named[1])) <= 1.1)


def _canvases(config: LlavaOnevisionConfig, options: VisualOptions) -> anyres.Canvases:
    options.refuse(NAME, but=["max_tiles", "frames"])
    most = _most_tiles(config)
    if options.max_tiles is not None and options.max_tiles > most:
        raise FlashVLMError(
            f"--max-tiles {options.max_tiles}: this model shrinks the tokens of more than {most} tiles, which the "
            f"vision graph does not; expected up to {most}"
        )
    return anyres.canvases(config, options.max_tiles or min(TILES, most))


def vision(model: LlavaOnevisionForConditionalGeneration, spec: VisualSpec) -> nn.Module:
    image = Vision(model)
    return Videos(image, siglip.side(model.config)) if spec.modality == "video" else image


def tower_specs(config: LlavaOnevisionConfig, options: VisualOptions) -> list[TowerSpec]:
    canvases = _canvases(config, options)
    image = siglip.tower_spec(config, anyres.candidates(canvases, siglip.side(config)), anyres.units(canvases))
    frames = options.frames
    return [image, siglip.tower_spec(config, frames * _pooled(config) ** 2 + 1, frames)] if frames else [image]


def _pooled(config: LlavaOnevisionConfig) -> int:
    """Visual tokens along an edge of a frame."""
    return math.ceil(siglip.side(config) / 2)


def visual_specs(config: LlavaOnevisionConfig, image_processor: Any, options: VisualOptions) -> list[VisualSpec]:
    canvases, side = _canvases(config, options), siglip.side(config)
    anyres.check_processor(image_processor, config, "size")
    if image_processor.do_center_crop:
        raise CheckpointError("preprocessor_config.json: do_center_crop is on; expected tiles without a crop")
    normal = pixels.normalisation(image_processor)
    red, green, blue = (int(255 * mean) for mean in normal["mean"])
    edge = config.vision_config.image_size
    image = VisualSpec(
        graph=VISION,
        placeholder_id=config.image_token_id,
        tokens_per_unit=side * side,
        grid=(side, side),
        candidates=anyres.candidates(canvases, side),
        feature_size=config.vision_config.hidden_size,
        pixels=AnyRes(
            side=edge,
            pinpoints=anyres.pinpoints(config, canvases),
            border=(red, green, blue),
            **normal,
        ),
        order="anyres",
    )
    if options.frames is None:
        return [image]
    rows, frames = _pooled(config), options.frames
    video = VisualSpec(
        modality="video",
        graph=f"{VISION}-video",
        placeholder_id=config.video_token_id,
        tokens_per_unit=rows * rows,
        grid=(rows, rows),
        candidates=frames * rows * rows + 1,
        feature_size=config.vision_config.hidden_size,
        pixels=Frames(resize="exact", size=(edge, edge), count=frames, min_frames=frames, **normal),
        newline="end",
    )
    return [image, video]


def canonical_name(name: str) -> str | None:
    return names.renamed(name, names.LLAVA_RENAMES)


def is_unused(config: LlavaOnevisionConfig, name: str) -> bool:
    """What SigLIP has behind its last block."""
    return name.startswith(("model.vision_tower.post_layernorm.", "model.vision_tower.head."))
