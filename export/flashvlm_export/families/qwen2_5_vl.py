"""Qwen2.5-VL: images at one of several sizes, a tower most of whose blocks attend in windows, patches merged 2 x 2,
and positions on three axes (arXiv 2502.13923)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig

from flashvlm.errors import CheckpointError
from flashvlm.visual import VisualSpec
from flashvlm_export.config_bounds import refuse_unlike_attention
from flashvlm_export.families.common import axes, names, patches, saliency, text
from flashvlm_export.families.common.text import check_token, expect
from flashvlm_export.families.common.text import embedding_name as embedding_name
from flashvlm_export.families.contract import LanguageSpec, TowerSpec, VisualOptions

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLForConditionalGeneration

NAME = "qwen2_5_vl"
ALIASES = {f"qwen2.5-vl-{size}": f"Qwen/Qwen2.5-VL-{size.upper()}-Instruct" for size in ("3b", "7b", "32b", "72b")}
REFUSED = {
    "qwen2_5_omni": "it hears and speaks; take a Qwen2.5-VL",
    "qwen2_5_omni_thinker": "it hears; take a Qwen2.5-VL",
}
# Each further size is an engine with all weights of the tower, 1.37 GB in bfloat16: with one the 7B model takes 15.6 GB
# of a device, with three 18.4 GB (``--plan``). 448 pixels are whole windows and 256 tokens. Pages of print need more of
# both: --image-size 672x672,784x560,560x784 has some 570 tokens in three shapes.
SIZES = ((448, 448),)
# Of a video, as Qwen2VLVideoProcessor has it: how frames are chosen.
RULE: dict[str, Any] = {"rule": "start", "multiple": patches.FRAMES}
RENAMES = (
    (r"^visual\.", "model.visual."),
    (r"^model\.(?!language_model\.|visual\.)", "model.language_model."),
)


def _sizes(
    hidden: int, layers: int, heads: int, kv_heads: int, inter: int, vocab: int, tower_inter: int
) -> dict[str, Any]:
    vision = {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": tower_inter,
        "num_heads": 16,
        "out_hidden_size": hidden,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
        "temporal_patch_size": 2,
    }
    return {
        "model_type": NAME,
        "torch_dtype": "bfloat16",
        "image_token_id": 151655,
        "video_token_id": 151656,
        "hidden_size": hidden,
        "intermediate_size": inter,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": 128000,
        "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "rms_norm_eps": 1e-6,
        "sliding_window": 32768,
        "use_sliding_window": False,
        "tie_word_embeddings": hidden == 2048,
        "vision_config": vision,
    }


CONFIGS = {
    "qwen2.5-vl-3b": _sizes(2048, 36, 16, 2, 11008, 151936, 3420),
    "qwen2.5-vl-7b": _sizes(3584, 28, 28, 4, 18944, 152064, 3420),
    "qwen2.5-vl-32b": _sizes(5120, 64, 40, 8, 27648, 152064, 3456),
    "qwen2.5-vl-72b": _sizes(8192, 80, 64, 8, 29568, 152064, 3456),
}


class Vision(nn.Module):
    """pixel_values [B,6,H,W] -> image_tokens [B,N,D], features [B,N,Dv], saliency [B,N] float32.

    A visual token is 2 x 2 patches: its features are their mean, its saliency that of the patches: what they receive
    in the last block whose patches see all others.
    """

    def __init__(self, model: Qwen2_5_VLForConditionalGeneration, cut: patches.Patches, size: patches.Size) -> None:
        super().__init__()
        tower = model.model.visual
        self.blocks, self.merger = tower.blocks, tower.merger
        self.embedding, self.rotary = patches.Embedding(tower.patch_embed, cut), patches.Rotary(tower.rotary_pos_emb)
        self.whole = frozenset(tower.fullatt_block_indexes)
        self.last_whole = max(self.whole)
        saliency.receives(tower.blocks[self.last_whole].attn)
        self.unit = cut.merge**2  # patches of a token
        tokens, self.windows = _windows(*cut.tokens(size), tower.window_size // (cut.patch * cut.merge), self.unit)
        self.order, self.back = tokens, torch.argsort(tokens)  # int64 [N]: to windows, and back to reading order
        self.places = self._in_windows(patches.places(*cut.grid(size), cut.merge)[None])[0]

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = self._in_windows(self.embedding(pixel_values))
        rotary = self.rotary(self.places)
        seen = hidden
        for i, block in enumerate(self.blocks):
            windows = () if i in self.whole else self.windows
            attended, weights = patches.attend(block.attn, block.norm1(hidden), rotary, windows)
            if i == self.last_whole:
                seen = saliency.of_received(weights)
            hidden = hidden + attended
            hidden = hidden + block.mlp(block.norm2(hidden))
        joined = self.merger.ln_q(hidden).unflatten(1, (-1, self.unit)).flatten(2)  # [B,N,4*Dv]
        features = hidden.unflatten(1, (-1, self.unit)).mean(dim=2)
        return (
            torch.index_select(self.merger.mlp(joined), 1, self.back),
            torch.index_select(features, 1, self.back),
            torch.index_select(seen.unflatten(1, (-1, self.unit)).mean(dim=2), 1, self.back),
        )

    def _in_windows(self, x: Tensor) -> Tensor:
        """Patches [B,T,...] in the order of their tokens -> window after window."""
        return torch.index_select(x.unflatten(1, (-1, self.unit)), 1, self.order).flatten(1, 2)


def _windows(rows: int, columns: int, side: int, unit: int) -> tuple[Tensor, list[tuple[int, int]]]:
    """Tokens int64 [N] window after window, and how many windows there are of how many patches, run after run.

    The largest first, so that equal ones stand side by side and are one operator: transformers has those at the right
    and lower edge between the others.
    """
    grid = torch.arange(rows * columns, device="cpu").view(rows, columns)
    windows = [window.flatten() for band in grid.split(side) for window in band.split(side, dim=1)]
    windows.sort(key=len, reverse=True)
    runs: dict[int, int] = {}
    for window in windows:
        runs[len(window) * unit] = runs.get(len(window) * unit, 0) + 1
    return torch.cat(windows), [(count, length) for length, count in runs.items()]


# --- configuration ---------------------------------------------------------------------------------------------------


def read_config(config: dict[str, Any]) -> Qwen2_5_VLConfig:
    """Parses and checks a ``config.json``, flat as published or with a section of its own for the language model.

    Raises:
        CheckpointError: a variant of Qwen2.5-VL this family does not cover.
    """
    if not isinstance(config.get("vision_config"), dict):
        raise CheckpointError(f"config.json: vision_config is missing; family {NAME} has an object there")
    text.refuse_quantized(config)
    nested = isinstance(config.get("text_config"), dict)
    language = axes.settle_mrope(text.settle_rope(language_section(config)))
    refuse_unlike_attention(language, "text_config" if nested else "the language model")
    parsed = Qwen2_5_VLConfig.from_dict({**config, "text_config": language} if nested else {**config, **language})
    tower, section = parsed.vision_config, parsed.text_config
    expect(
        NAME,
        ("vision_config.model_type", tower.model_type, ("qwen2_5_vl_vision",)),
        ("text_config.model_type", section.model_type, ("qwen2_5_vl_text",)),
    )
    axes.check_sections_of_head(section.rope_parameters.get("mrope_section"), language_spec(parsed).head_dim)
    patches.check_tower(NAME, tower, section.hidden_size)
    check_token("image_token_id", parsed.image_token_id, section.vocab_size)
    check_token("video_token_id", parsed.video_token_id, section.vocab_size)
    if tower.window_size % (tower.patch_size * tower.spatial_merge_size):
        raise CheckpointError(
            f"config.json: vision_config.window_size is {tower.window_size}; expected a multiple of "
            f"{tower.patch_size * tower.spatial_merge_size} pixels, the edge of a visual token"
        )
    patches.check_blocks("fullatt_block_indexes", tower)
    return parsed


def language_section(config: dict[str, Any]) -> dict[str, Any]:
    section = config.get("text_config")
    return section if isinstance(section, dict) else config


def language_spec(config: Qwen2_5_VLConfig) -> LanguageSpec:
    return text.language_spec(config, position_axes=axes.AXES)


def tied_head(config: Qwen2_5_VLConfig) -> str | None:
    return "lm_head.weight" if config.tie_word_embeddings else None


def tower_specs(config: Qwen2_5_VLConfig, options: VisualOptions) -> list[TowerSpec]:
    return patches.tower_specs(config.vision_config, _cut(config, options))


def visual_specs(config: Qwen2_5_VLConfig, image_processor: Any, options: VisualOptions) -> list[VisualSpec]:
    return patches.visual_specs(
        config, image_processor, _cut(config, options), RULE, time_scale=config.vision_config.tokens_per_second
    )


def _cut(config: Qwen2_5_VLConfig, options: VisualOptions) -> patches.Patches:
    tower = config.vision_config
    return patches.chosen(NAME, options, tower.patch_size, tower.spatial_merge_size, SIZES, videos=True)


# --- model -----------------------------------------------------------------------------------------------------------


def build(config: Qwen2_5_VLConfig, dtype: torch.dtype) -> nn.Module:
    text.refuse_float16(NAME, config, dtype)
    return text.build(config, dtype)


def language(model: Qwen2_5_VLForConditionalGeneration) -> tuple[nn.Module, nn.Module]:
    stock = model.model.language_model
    return axes.Language(stock, axes.chunked(stock.config.rope_parameters["mrope_section"])), model.lm_head


def vision(model: Qwen2_5_VLForConditionalGeneration, spec: VisualSpec) -> nn.Module:
    _, height, width = spec.pixels.unit_shape
    image = Vision(model, _cut(model.config, VisualOptions()), (height, width))
    return patches.InPairs(image) if spec.modality == "video" else image


def canonical_name(name: str) -> str | None:
    return names.renamed(name, RENAMES)


def is_unused(config: Qwen2_5_VLConfig, name: str) -> bool:
    return False
