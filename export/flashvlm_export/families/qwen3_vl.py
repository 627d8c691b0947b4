"""Qwen3-VL: images at one of several sizes, patches merged 2 x 2, positions on three axes by turns, and features of
three blocks of the tower added to the first layers of the language model (DeepStack, arXiv 2406.04334; 2511.21631)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Qwen3VLConfig

from flashvlm.errors import CheckpointError
from flashvlm.visual import TextLayout, VisualSpec
from flashvlm_export.families.common import axes, names, patches, saliency, text
from flashvlm_export.families.common.text import check_sections, check_token, expect
from flashvlm_export.families.common.text import embedding_name as embedding_name
from flashvlm_export.families.common.text import language_section as language_section
from flashvlm_export.families.contract import LanguageSpec, TowerSpec, VisualOptions

if TYPE_CHECKING:
    from transformers import Qwen3VLForConditionalGeneration

NAME = "qwen3_vl"
ALIASES = {f"qwen3-vl-{size}": f"Qwen/Qwen3-VL-{size.upper()}-Instruct" for size in ("2b", "4b", "8b", "32b")}
# Of a video, as Qwen3VLVideoProcessor has it: how frames are chosen; each pair with its time before it.
RULE: dict[str, Any] = {"rule": "ends"}
VIDEO_TEXT = TextLayout(frame="<{seconds} seconds><|vision_start|>{v}<|vision_end|>")
REFUSED = {"qwen3_vl_moe": "it is a mixture of experts, for which the decoder graph has no routing; take a dense one"}
SIZES = ((512, 512),)  # 256 tokens, for the same reasons as Qwen2.5-VL's


def _sizes(
    hidden: int, layers: int, heads: int, inter: int, tower: tuple[int, int, int], deepstack: list[int]
) -> dict[str, Any]:
    """tower: blocks, width and feed-forward width."""
    depth, width, tower_inter = tower
    vision = {
        "model_type": NAME,
        "depth": depth,
        "hidden_size": width,
        "intermediate_size": tower_inter,
        "num_heads": 16,
        "out_hidden_size": hidden,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": deepstack,
    }
    language = {
        "model_type": "qwen3_vl_text",
        "dtype": "bfloat16",
        "hidden_size": hidden,
        "intermediate_size": inter,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 262144,
        "rope_theta": 5e6,
        "rope_scaling": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [24, 20, 20]},
        "rms_norm_eps": 1e-6,
    }
    return {
        "model_type": NAME,
        "image_token_id": 151655,
        "video_token_id": 151656,
        "tie_word_embeddings": hidden < 4096,
        "vision_config": vision,
        "text_config": language,
    }


SMALL, LARGE = (24, 1024, 4096), (27, 1152, 4304)
CONFIGS = {
    "qwen3-vl-2b": _sizes(2048, 28, 16, 6144, SMALL, [5, 11, 17]),
    "qwen3-vl-4b": _sizes(2560, 36, 32, 9728, SMALL, [5, 11, 17]),
    "qwen3-vl-8b": _sizes(4096, 36, 32, 12288, LARGE, [8, 16, 24]),
    "qwen3-vl-32b": _sizes(5120, 64, 64, 25600, LARGE, [8, 16, 24]),
}


class Vision(nn.Module):
    """pixel_values [B,6,H,W] -> image_tokens [B,N,D], features [B,N,Dv], saliency [B,N] float32, deepstack [B,N,L*D].

    A visual token is 2 x 2 patches: its features are their mean, its saliency that of the patches: what they receive
    in the last block. The table of position embeddings is interpolated to the grid of the size.
    """

    def __init__(self, model: Qwen3VLForConditionalGeneration, cut: patches.Patches, size: patches.Size) -> None:
        from transformers.vision_utils import get_vision_interpolation_indices_and_weights

        super().__init__()
        tower = model.model.visual
        self.blocks, self.merger, self.table = tower.blocks, tower.merger, tower.pos_embed
        self.deepstack_mergers = tower.deepstack_merger_list
        self.deepstack = tuple(tower.deepstack_visual_indexes)
        self.embedding, self.rotary = patches.Embedding(tower.patch_embed, cut), patches.Rotary(tower.rotary_pos_emb)
        saliency.receives(tower.blocks[-1].attn)
        self.unit = cut.merge**2  # patches of a token
        self.places = patches.places(*cut.grid(size), cut.merge)
        # [T,4] each: which four of the table a patch is between, and how near to each.
        self.corners, self.nearness = get_vision_interpolation_indices_and_weights(
            torch.tensor([[1, *cut.grid(size)]]),
            tower.num_grid_per_side,
            mode=tower.interpolation_mode,
            align_corners=tower.interpolation_align_corners,
            spatial_merge_size=cut.merge,
        )

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        hidden = self.embedding(pixel_values)
        # For each image anew: of constants alone, runtimes would compute all four of a patch when they load the graph,
        # and keep the result; what they may is bounded (``flashvlm.graph_check``).
        corners = self.corners.expand(hidden.shape[0], -1, -1)
        between = (self.table(corners) * self.nearness[..., None]).sum(dim=2)  # [B,T,Dv]
        hidden = hidden + between.to(hidden.dtype)
        rotary = self.rotary(self.places)
        streams, weights = [], hidden
        for i, block in enumerate(self.blocks):
            attended, weights = patches.attend(block.attn, block.norm1(hidden), rotary)
            hidden = hidden + attended
            hidden = hidden + block.mlp(block.norm2(hidden))
            if i in self.deepstack:
                streams.append(self._merged(self.deepstack_mergers[self.deepstack.index(i)], hidden))
        return (
            self._merged(self.merger, hidden),
            hidden.unflatten(1, (-1, self.unit)).mean(dim=2),
            saliency.of_received(weights).unflatten(1, (-1, self.unit)).mean(dim=2),
            torch.cat(streams, dim=-1),
        )

    def _merged(self, merger: Any, hidden: Tensor) -> Tensor:
        """Patches [B,T,Dv] -> [B,N,D]; the norm is of patches, or of tokens where a merger says so."""
        x = hidden if merger.use_postshuffle_norm else merger.norm(hidden)
        x = x.unflatten(1, (-1, self.unit)).flatten(2)
        x = merger.norm(x) if merger.use_postshuffle_norm else x
        return merger.linear_fc2(merger.act_fn(merger.linear_fc1(x)))


# --- configuration ---------------------------------------------------------------------------------------------------


def read_config(config: dict[str, Any]) -> Qwen3VLConfig:
    """Parses and checks a ``config.json``.

    Raises:
        CheckpointError: a variant of Qwen3-VL this family does not cover.
    """
    parsed = Qwen3VLConfig.from_dict(check_sections(config, NAME))
    tower, section = parsed.vision_config, parsed.text_config
    rope = section.rope_parameters
    expect(
        NAME,
        ("vision_config.model_type", tower.model_type, ("qwen3_vl_vision",)),
        ("text_config.model_type", section.model_type, ("qwen3_vl_text",)),
        ("mrope_interleaved", rope.get("mrope_interleaved", True), (True,)),
    )
    axes.check_sections_of_head(rope.get("mrope_section"), language_spec(parsed).head_dim)
    patches.check_tower(NAME, tower, section.hidden_size)
    patches.check_blocks("deepstack_visual_indexes", tower)
    check_token("video_token_id", parsed.video_token_id, section.vocab_size)
    check_token("image_token_id", parsed.image_token_id, section.vocab_size)
    if math.isqrt(tower.num_position_embeddings) ** 2 != tower.num_position_embeddings:
        raise CheckpointError(
            f"config.json: vision_config.num_position_embeddings is {tower.num_position_embeddings}; expected a square"
        )
    return parsed


def language_spec(config: Qwen3VLConfig) -> LanguageSpec:
    streams = len(config.vision_config.deepstack_visual_indexes)
    return text.language_spec(
        config, position_axes=axes.AXES, streams={"deepstack": streams * config.text_config.hidden_size}
    )


def tied_head(config: Qwen3VLConfig) -> str | None:
    return "lm_head.weight" if config.tie_word_embeddings else None


def tower_specs(config: Qwen3VLConfig, options: VisualOptions) -> list[TowerSpec]:
    return patches.tower_specs(config.vision_config, _cut(config, options))


def visual_specs(config: Qwen3VLConfig, image_processor: Any, options: VisualOptions) -> list[VisualSpec]:
    return patches.visual_specs(config, image_processor, _cut(config, options), RULE, text=VIDEO_TEXT)


def _cut(config: Qwen3VLConfig, options: VisualOptions) -> patches.Patches:
    tower = config.vision_config
    return patches.chosen(NAME, options, tower.patch_size, tower.spatial_merge_size, SIZES, videos=True)


# --- model -----------------------------------------------------------------------------------------------------------


def build(config: Qwen3VLConfig, dtype: torch.dtype) -> nn.Module:
    text.refuse_float16(NAME, config, dtype)
    return text.build(config, dtype)


def language(model: Qwen3VLForConditionalGeneration) -> tuple[nn.Module, nn.Module]:
    stock = model.model.language_model
    return axes.Language(stock, axes.interleaved(stock.config.rope_parameters["mrope_section"])), model.lm_head


def vision(model: Qwen3VLForConditionalGeneration, spec: VisualSpec) -> nn.Module:
    _, height, width = spec.pixels.unit_shape
    image = Vision(model, _cut(model.config, VisualOptions()), (height, width))
    return patches.InPairs(image) if spec.modality == "video" else image


def canonical_name(name: str) -> str | None:
    return names.renamed(name, ())


def is_unused(config: Qwen3VLConfig, name: str) -> bool:
    return False
