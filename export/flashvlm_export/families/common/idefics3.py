"""Idefics3 and the SmolVLMs built like it: tiles with text between them and the whole image behind them, a SigLIP tower
without a CLS token, whose patches are joined by the square, Llama (arXiv 2408.12637)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Idefics3Config, SmolVLMConfig
from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionEmbeddings

from flashvlm.errors import CheckpointError, FlashVLMError
from flashvlm.graph_io import VISION
from flashvlm.tilings import Frames, LongestEdge
from flashvlm.visual import TextLayout, VisualSpec
from flashvlm_export.config_bounds import checked_config
from flashvlm_export.families.common import names, pixels, saliency, siglip
from flashvlm_export.families.common.text import TEXT_TYPES, check_sections, check_token, expect
from flashvlm_export.families.common.text import build as build
from flashvlm_export.families.common.text import language_section as language_section
from flashvlm_export.families.common.text import language_spec as language_spec
from flashvlm_export.families.common.text import tied_head as tied_head
from flashvlm_export.families.common.tiles import in_reading_order
from flashvlm_export.families.contract import TowerSpec, VisualOptions

if TYPE_CHECKING:
    from transformers import Idefics3ForConditionalGeneration

BORDER, WHOLE = "<fake_token_around_image>", "<global-img>"
TEXT = TextLayout(
    whole=f"{BORDER}{WHOLE}{{v}}{BORDER}",
    tile=f"{BORDER}<row_{{r}}_col_{{c}}>{{v}}",
    row_end="\n",
    last=f"\n{BORDER}{WHOLE}{{v}}{BORDER}",
)
VIDEO_TEXT = TextLayout(
    head="You are provided the following series of {words} frames from a {hms} [H:MM:SS] video.\n",
    frame=f"\nFrame from {{mmss}}:{BORDER}{WHOLE}{{v}}{BORDER}",
    end="\n\n",
)
TILES = 4  # along the longer edge of an image, as published


BASE = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 512,
    "patch_size": 16,
}  # of SigLIP, as SO400M


def sizes(
    name: str,
    text: tuple[int, int, int, int, int],
    vision: dict[str, Any],
    scale: int,
    vocab: int = 49280,
    image_token: int = 49190,
    positions: int = 8192,
) -> dict[str, Any]:
    """A ``config.json``; ``text``: width, layers, heads, heads of keys, inner width."""
    hidden, layers, heads, kv_heads, inter = text
    return {
        "model_type": name,
        "dtype": "bfloat16",
        "image_token_id": image_token,
        "scale_factor": scale,
        "tie_word_embeddings": False,
        "vision_config": {"model_type": f"{name}_vision", **vision},
        "text_config": {
            "model_type": "llama",
            "hidden_size": hidden,
            "intermediate_size": inter,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": hidden // heads,
            "vocab_size": vocab,
            "max_position_embeddings": positions,
        },
    }


class Vision(nn.Module):
    """pixel_values [U,3,H,W], order [N] -> image_tokens [1,N,D], features [1,N,Dv], saliency [1,N] float32.

    A visual token is ``scale_factor`` x ``scale_factor`` patches: its features are their mean, its saliency that of
    the patches, what each receives in the last block. Its embedding is of all of them side by side, which would be
    12,288 channels to partition by.
    """

    def __init__(self, model: Idefics3ForConditionalGeneration) -> None:
        super().__init__()
        self.vision_model, self.connector = model.model.vision_model, model.model.connector
        self.factor, self.side = model.config.scale_factor, siglip.side(model.config)
        self.places = places(model.config.vision_config)
        saliency.receives(self.vision_model.encoder.layers[-1].self_attn)

    def forward(self, pixel_values: Tensor, order: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        patches, seen = self._tower(pixel_values)
        return (
            in_reading_order(self.connector(patches), order),
            in_reading_order(self._merged(patches), order),
            in_reading_order(self._merged(seen[..., None]), order).squeeze(-1),
        )

    def _tower(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Patches [U,T,Dv] and what each receives [U,T]. The stock tower masks patches of padding, and a tile has
        none."""
        embeddings = self.vision_model.embeddings
        pixel_values = pixel_values.to(embeddings.patch_embedding.weight.dtype)
        hidden = embeddings.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        hidden = hidden + embeddings.position_embedding(self.places)
        hidden, seen = siglip.through(self.vision_model.encoder.layers, hidden)
        return self.vision_model.post_layernorm(hidden), seen

    def _merged(self, patches: Tensor) -> Tensor:
        return saliency.merged(patches, self.side, self.side, self.factor)


def places(config: Idefics3VisionConfig) -> Tensor:
    """int64 [T]: the row of each patch of a whole tile in the table of positions.

    transformers finds it by fractions of an edge in float32, which do not give 0 to T - 1 at every size: asked of its
    own embeddings, where the table is the numbers of its rows.
    """
    side = config.image_size // config.patch_size
    small = Idefics3VisionConfig(hidden_size=1, num_channels=1, image_size=side, patch_size=1)
    with torch.device("cpu"), torch.no_grad():
        embeddings = Idefics3VisionEmbeddings(small)
        embeddings.position_embedding.weight.copy_(torch.arange(side * side)[:, None])
        nn.init.zeros_(embeddings.patch_embedding.bias)
        rows = embeddings(torch.zeros(1, 1, side, side), torch.ones(1, side, side, dtype=torch.bool))
        return rows.flatten().round().long()


def read(config: dict[str, Any], kind: type[Idefics3Config] | type[SmolVLMConfig], towers: tuple[str, ...]) -> Any:
    """Parses and checks a ``config.json`` as a ``kind``, whose vision section is one of ``towers``.

    Raises:
        CheckpointError: a variant that is not covered.
    """
    name = kind.model_type
    checked = check_sections(checked_config(config, integers={"scale_factor": (1, 64)}, reals={}), name)
    text, parsed = checked["text_config"], kind.from_dict(checked)
    tower = parsed.vision_config
    expect(
        name,
        ("vision_config.model_type", checked["vision_config"].get("model_type", towers[0]), towers),
        ("vision_config.num_channels", tower.num_channels, (3,)),
        ("text_config.model_type", parsed.text_config.model_type, TEXT_TYPES),
        # Of the code that they were trained with; transformers reads none of them.
        *((f"text_config.{key}", text.get(key, False), (False,)) for key in ("use_resampler", "qk_layer_norms")),
        ("text_config.rope_interleaved", text.get("rope_interleaved", False), (False,)),
    )
    check_token("image_token_id", parsed.image_token_id, parsed.text_config.vocab_size)
    if not isinstance(tower.image_size, int) or not isinstance(tower.patch_size, int):
        raise CheckpointError(
            f"config.json: image_size is {tower.image_size} and patch_size {tower.patch_size}; expected whole numbers"
        )
    side, factor = siglip.side(parsed), parsed.scale_factor
    if side % factor or not side:
        raise CheckpointError(
            f"config.json: an edge of {tower.image_size} has {side} patches of {tower.patch_size}; expected a multiple "
            f"of scale_factor {factor}"
        )
    return parsed


def _rows(config: Any) -> int:
    """Visual tokens along an edge of a tile."""
    return siglip.side(config) // config.scale_factor


def language(model: Any) -> tuple[nn.Module, nn.Module]:
    return model.model.text_model, model.lm_head


def embedding_name(config: Any) -> str:
    return "model.text_model.embed_tokens.weight"


def vision(model: Idefics3ForConditionalGeneration, spec: VisualSpec) -> nn.Module:
    return Vision(model)


def _tiles(config: Any, options: VisualOptions) -> int | None:
    """Along the longer edge of an image, where they are asked for. Raises FlashVLMError for a number that is no
    square."""
    videos = ["frames"] if config.model_type == SmolVLMConfig.model_type else []  # the first ones saw none
    options.refuse(config.model_type, but=["max_tiles", *videos])
    if options.max_tiles is None:
        return None
    edge = math.isqrt(options.max_tiles)
    if edge * edge != options.max_tiles:
        raise FlashVLMError(
            f"--max-tiles {options.max_tiles}: family {config.model_type} scales an image to whole tiles along its "
            f"longer edge; expected a square, such as {edge * edge or 1} or {(edge + 1) ** 2}"
        )
    return edge


def tower_specs(config: Any, options: VisualOptions) -> list[TowerSpec]:
    tiles = _tiles(config, options) or TILES
    units = tiles * tiles + (tiles > 1)
    items = [units, options.frames] if options.frames else [units]
    return [siglip.tower_spec(config, count * _rows(config) ** 2, count) for count in items]


def visual_specs(config: Any, image_processor: Any, options: VisualOptions) -> list[VisualSpec]:
    tiles, side, rows = _tiles(config, options), config.vision_config.image_size, _rows(config)
    if not image_processor.do_image_splitting:
        raise CheckpointError("preprocessor_config.json: do_image_splitting is off; expected tiles")
    if (found := pixels.longest_edge(image_processor.max_image_size, "max_image_size")) != side:
        raise CheckpointError(
            f"preprocessor_config.json: max_image_size is {found}; the vision tower takes {side} x {side}"
        )
    edge = pixels.longest_edge(image_processor.size, "size")
    normal = pixels.normalisation(image_processor)
    grid = LongestEdge(side=side, edge=tiles * side if tiles else edge, **normal)
    image = VisualSpec(
        graph=VISION,
        placeholder_id=config.image_token_id,
        tokens_per_unit=rows * rows,
        grid=(rows, rows),
        candidates=grid.max_units * rows * rows,
        feature_size=config.vision_config.hidden_size,
        pixels=grid,
        text=TEXT,
    )
    if options.frames is None:
        return [image]
    # As published: one frame a second, its longer edge that of a tile.
    frames = Frames(resize="longest_edge", size=(side, side), count=options.frames, rule="inside", fps=1.0, **normal)
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
    return names.renamed(name, ())


def is_unused(config: Any, name: str) -> bool:
    return False
