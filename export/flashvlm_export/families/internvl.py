"""InternVL3 in transformers' own layout (-hf): tiles and a thumbnail, a tower with a CLS token whose patches are merged
2 x 2, Qwen2 or another full-attention language model (arXiv 2504.10479)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import InternVLConfig

from flashvlm.errors import CheckpointError
from flashvlm.graph_io import VISION
from flashvlm.tilings import Frames, GridTiles
from flashvlm.visual import TextLayout, VisualSpec
from flashvlm_export.families.common import names, pixels, saliency
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
    from transformers import InternVLForConditionalGeneration

NAME = "internvl"
ALIASES = {f"internvl3-{size}": f"OpenGVLab/InternVL3-{size.upper()}-hf" for size in ("1b", "2b", "8b", "14b")}
REFUSED = {"interns1": "its language model is a mixture of experts"}
OPTIONS = ("max_tiles", "frames")
TEXT = TextLayout(whole="<img>{v}</img>")
VIDEO_TEXT = TextLayout(frame="Frame{i}: <img>{v}</img>", join="\n")
TILES = 12  # of an image, as published; and a thumbnail where there are several


def _sizes(hidden: int, layers: int, heads: int, kv_heads: int, inter: int) -> dict[str, Any]:
    vision = {
        "model_type": "internvl_vision",
        "attention_bias": True,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": [448, 448],
        "patch_size": [14, 14],
    }
    text = {
        "model_type": "qwen2",
        "hidden_size": hidden,
        "intermediate_size": inter,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": 151674,
        "max_position_embeddings": 32768,
    }
    return {
        "model_type": NAME,
        "dtype": "bfloat16",
        "image_token_id": 151667,
        "downsample_ratio": 0.5,
        "tie_word_embeddings": False,
        "vision_config": vision,
        "text_config": text,
    }


CONFIGS = {
    "internvl3-1b": _sizes(896, 24, 14, 2, 4864),
    "internvl3-2b": _sizes(1536, 28, 12, 2, 8960),
    "internvl3-8b": _sizes(3584, 28, 28, 4, 18944),
    "internvl3-14b": _sizes(5120, 48, 40, 8, 13824),
}


class Vision(nn.Module):
    """pixel_values [U,3,H,W], order [N] -> image_tokens [1,N,D], features [1,N,Dv], saliency [1,N] float32.

    A visual token is 2 x 2 patches: its features are their mean, its saliency that of the patches, from CLS's row in
    the last block.
    """

    def __init__(self, model: InternVLForConditionalGeneration) -> None:
        super().__init__()
        self.vision_tower = model.model.vision_tower
        self.multi_modal_projector = model.model.multi_modal_projector
        self.pixel_shuffle = model.model.pixel_shuffle
        self.ratio = model.config.downsample_ratio
        self.rows, self.columns = _patches(model.config)

    def forward(self, pixel_values: Tensor, order: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tower = self.vision_tower(pixel_values, output_attentions=True)
        patches = tower.last_hidden_state[:, 1:]  # [U,rows*columns,Dv], CLS dropped
        shuffled = self.pixel_shuffle(patches.unflatten(1, (self.rows, self.columns)), self.ratio).flatten(1, 2)
        seen = saliency.of_cls(tower.attentions[-1])
        return (
            in_reading_order(self.multi_modal_projector(shuffled), order),
            in_reading_order(self._merged(patches), order),
            in_reading_order(self._merged(seen[..., None]), order).squeeze(-1),
        )

    def _merged(self, patches: Tensor) -> Tensor:
        return saliency.merged(patches, self.rows, self.columns, round(1 / self.ratio))


def read_config(config: dict[str, Any]) -> InternVLConfig:
    """Parses and checks a ``config.json``.

    Raises:
        CheckpointError: a variant of InternVL this family does not cover.
    """
    parsed = InternVLConfig.from_dict(check_sections(config, NAME))
    tower = parsed.vision_config
    expect(
        NAME,
        ("vision_config.model_type", tower.model_type, ("internvl_vision",)),
        ("text_config.model_type", parsed.text_config.model_type, TEXT_TYPES),
        ("vision_feature_layer", parsed.vision_feature_layer, (-1,)),
        ("vision_feature_select_strategy", parsed.vision_feature_select_strategy, ("default",)),
        ("downsample_ratio", parsed.downsample_ratio, (1, 0.5, 0.25)),
    )
    check_token("image_token_id", parsed.image_token_id, parsed.text_config.vocab_size)
    (height, width), (down, across) = tower.image_size, tower.patch_size
    merge = round(1 / parsed.downsample_ratio)
    if height != width or down != across or height % (down * merge):
        raise CheckpointError(
            f"config.json: image_size is {[height, width]} and patch_size {[down, across]}; expected squares, and a "
            f"multiple of {merge} patches along an edge"
        )
    return parsed


def _patches(config: InternVLConfig) -> tuple[int, int]:
    """Rows and columns of a tile."""
    (height, width), (down, across) = config.vision_config.image_size, config.vision_config.patch_size
    return height // down, width // across


def _tokens(config: InternVLConfig) -> int:
    """Visual tokens along an edge of a tile."""
    return int(_patches(config)[0] * config.downsample_ratio)


def vision(model: InternVLForConditionalGeneration, spec: VisualSpec) -> nn.Module:
    return Vision(model)


def tower_specs(config: InternVLConfig, options: VisualOptions) -> list[TowerSpec]:
    options.refuse(NAME, but=OPTIONS)
    tower, tiles = config.vision_config, options.max_tiles or TILES
    return [
        TowerSpec(
            tokens=math.prod(_patches(config)) + 1,  # and CLS
            width=tower.hidden_size,
            heads=tower.num_attention_heads,
            intermediate=tower.intermediate_size,
            pixels=3 * math.prod(tower.image_size),
            candidates=units * _tokens(config) ** 2,
            features=tower.hidden_size,
            units=units,
        )
        for units in (tiles + (tiles > 1), options.frames)
        if units
    ]


def visual_specs(config: InternVLConfig, image_processor: Any, options: VisualOptions) -> list[VisualSpec]:
    options.refuse(NAME, but=OPTIONS)
    side, rows = config.vision_config.image_size[0], _tokens(config)
    if (size := pixels.square(image_processor.size, "size")) != side:
        raise CheckpointError(f"preprocessor_config.json: size is {size}; the vision tower takes {side} x {side}")
    normal = pixels.normalisation(image_processor)
    tiles = GridTiles(
        side=side,
        min_tiles=image_processor.min_patches,
        max_tiles=options.max_tiles or image_processor.max_patches,
        **normal,
    )
    image = VisualSpec(
        graph=VISION,
        placeholder_id=config.image_token_id,
        tokens_per_unit=rows * rows,
        grid=(rows, rows),
        candidates=tiles.max_units * rows * rows,
        feature_size=config.vision_config.hidden_size,
        pixels=tiles,
        text=TEXT,
    )
    if options.frames is None:
        return [image]
    frames = Frames(
        resize="exact",
        size=(side, side),
        count=options.frames,
        min_frames=options.frames,
        rule="middle",
        **normal,
    )
    changes = {
        "modality": "video",
        "graph": f"{VISION}-video",
        "marker": "<video>",
        "candidates": options.frames * rows * rows,
        "pixels": frames,
        "text": VIDEO_TEXT,
    }
    return [image, VisualSpec.model_validate(dict(image) | changes)]


def canonical_name(name: str) -> str | None:
    return names.renamed(name, names.LLAVA_RENAMES)


def is_unused(config: InternVLConfig, name: str) -> bool:
    return False
