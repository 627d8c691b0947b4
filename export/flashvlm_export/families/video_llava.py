"""Video-LLaVA: a tower for images and one for frames, both CLIP's ViT, aligned before their one projector
(arXiv 2311.10122). Of a frame the token of CLS goes to the language model as well."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import VideoLlavaConfig

from flashvlm.graph_io import VISION
from flashvlm.tilings import Frames
from flashvlm.visual import VisualSpec
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
    from transformers import VideoLlavaForConditionalGeneration

NAME = "video_llava"
ALIASES = {"video-llava-7b": "LanguageBind/Video-LLaVA-7B-hf"}
REFUSED: dict[str, str] = {}
FRAMES = 8  # of a video, as it was trained
CONFIGS: dict[str, dict[str, Any]] = {
    "video-llava-7b": {
        "model_type": NAME,
        "dtype": "float16",
        "image_token_index": 32000,
        "video_token_index": 32001,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
        "vision_config": clip.vit_l(224),
        "text_config": {
            "model_type": "llama",
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "vocab_size": 32064,
            "max_position_embeddings": 4096,
        },
    }
}


class Images(nn.Module):
    """pixel_values [B,3,H,W] -> image_tokens [B,N,D], features [B,N,Dv], saliency [B,N] float32."""

    def __init__(self, model: VideoLlavaForConditionalGeneration) -> None:
        super().__init__()
        self.tower = clip.cut(model.model.image_tower, model.config)
        self.projector = model.model.multi_modal_projector

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features, saliency = clip.see(self.tower, pixel_values)
        return self.projector(features), features, saliency


class Videos(nn.Module):
    """pixel_values [U,3,H,W] of U frames, order [N] -> image_tokens [1,N,D], features [1,N,Dv], saliency [1,N] float32.

    CLS is the first token of each frame.
    """

    def __init__(self, model: VideoLlavaForConditionalGeneration) -> None:
        super().__init__()
        self.tower = clip.cut(model.model.video_tower, model.config)
        self.projector = model.model.multi_modal_projector

    def forward(self, pixel_values: Tensor, order: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        seen = self.tower(pixel_values, output_attentions=True)
        features = seen.last_hidden_state  # [U,1+n,Dv]
        saliency = seen.attentions[-1].mean(dim=1)[:, 0]  # [U,1+n], the row of CLS
        return (
            in_reading_order(self.projector(features), order),
            in_reading_order(features, order),
            in_reading_order(saliency[..., None], order).squeeze(-1),
        )


def read_config(config: dict[str, Any]) -> VideoLlavaConfig:
    """Parses and checks a ``config.json``.

    Raises:
        CheckpointError: a variant of Video-LLaVA this family does not cover.
    """
    parsed = VideoLlavaConfig.from_dict(check_sections(config, NAME))
    expect(
        NAME,
        ("vision_config.model_type", parsed.vision_config.model_type, clip.TYPES),
        ("text_config.model_type", parsed.text_config.model_type, TEXT_TYPES),
        ("vision_feature_select_strategy", parsed.vision_feature_select_strategy, ("default",)),
    )
    check_token("image_token_index", parsed.image_token_id, parsed.text_config.vocab_size)
    check_token("video_token_index", parsed.video_token_id, parsed.text_config.vocab_size)
    clip.blocks(parsed)
    return parsed


def vision(model: VideoLlavaForConditionalGeneration, spec: VisualSpec) -> nn.Module:
    return Videos(model) if spec.modality == "video" else Images(model)


def tower_specs(config: VideoLlavaConfig, options: VisualOptions) -> list[TowerSpec]:
    options.refuse(NAME, but=["frames"])
    patches, frames = clip.side(config) ** 2, options.frames or FRAMES
    return [clip.tower_spec(config, patches), clip.tower_spec(config, frames * (patches + 1), frames)]


def visual_specs(config: VideoLlavaConfig, image_processor: Any, options: VisualOptions) -> list[VisualSpec]:
    options.refuse(NAME, but=["frames"])
    side, frames = clip.side(config), options.frames or FRAMES
    cropped = pixels.cropped(image_processor, config.vision_config.image_size)
    image = VisualSpec(
        graph=VISION,
        placeholder_id=config.image_token_id,
        tokens_per_unit=side * side,
        grid=(side, side),
        candidates=side * side,
        feature_size=config.vision_config.hidden_size,
        pixels=cropped,
    )
    tokens = side * side + 1
    changes = {
        "modality": "video",
        "graph": f"{VISION}-video",
        "placeholder_id": config.video_token_id,
        "tokens_per_unit": tokens,
        "candidates": frames * tokens,
        "pixels": Frames(**dict(cropped) | {"tiling": "frames", "count": frames, "min_frames": frames}),
        "skip": "cls",
    }
    return [image, VisualSpec.model_validate(dict(image) | changes)]


def canonical_name(name: str) -> str | None:
    return names.renamed(name, names.LLAVA_RENAMES)


def is_unused(config: VideoLlavaConfig, name: str) -> bool:
    return clip.is_behind(config, name)
