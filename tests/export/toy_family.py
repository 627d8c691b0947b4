"""A family that is unlike LLaVA-1.5 in all that a family may be: one file, and no line elsewhere knows of it.

    images     one or two tiles and a thumbnail, with text around each: several runs of visual tokens an image
    positions  on three axes, time, height and width, kept when tokens are selected
    stream     "deepstack", added to the hidden states after the first two layers
    head       tied to the embedding table

Its config.json is flat; its model is transformers' Llama layers between code of its own.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

from flashvlm.errors import CheckpointError
from flashvlm.graph_io import VISION
from flashvlm.tilings import GridTiles
from flashvlm.visual import TextLayout, VisualSpec
from flashvlm_export.config_bounds import INTEGERS, checked_config, refuse_unlike_attention
from flashvlm_export.families.common.tiles import in_reading_order
from flashvlm_export.families.contract import LanguageSpec, TowerSpec, VisualOptions
from flashvlm_export.testing.tokenizer import CHAT_TEMPLATE, make_tokenizer

NAME = "toy"
CONFIGS: dict[str, dict[str, Any]] = {}
ALIASES: dict[str, str] = {}
REFUSED = {"toy_next": "it dreams"}

PATCH, MAX_TILES = 4, 2
DEEP = 2  # layers that take a part of the stream
AXES = (0, 1, 2, 0, 1, 2, 0, 1)  # of each pair of channels of a head: time, height, width
TEXT = TextLayout(whole="{v}", tile="row {r} column {c}: {v}", row_end="\n", last="all: {v}")
TEXT_TOKENS = 512


# --- the model -------------------------------------------------------------------------------------------------------


class ToyConfig(LlamaConfig):
    model_type = NAME

    def __init__(self, tower_width: int = 24, tower_layers: int = 2, tile_side: int = 16, **more: Any) -> None:
        self.tower_width, self.tower_layers, self.tile_side = tower_width, tower_layers, tile_side
        self.image_token_id = more.pop("image_token_id", TEXT_TOKENS)
        super().__init__(**more)


class Block(nn.Module):
    """Tokens of a tile [U,n,Dv] see each other by their mean."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Linear(width, width)
        self.mlp = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + torch.tanh(self.mlp(y) + self.mix(y.mean(dim=1, keepdim=True)))


class Tower(nn.Module):
    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        width, hidden = config.tower_width, config.hidden_size
        self.patches = nn.Linear(3 * PATCH * PATCH, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(config.tower_layers))
        self.salience = nn.Linear(width, 1)
        self.project = nn.Linear(width, hidden)
        self.deep = nn.Linear(width, DEEP * hidden)
        self.newline = nn.Parameter(torch.empty(hidden))

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """[U,3,H,W] -> image_tokens [U,n,D], features [U,n,Dv], saliency [U,n], deepstack [U,n,DEEP*D]."""
        _, channels, height, width = pixel_values.shape
        rows, columns = height // PATCH, width // PATCH
        x = pixel_values.to(self.patches.weight.dtype).reshape(-1, channels, rows, PATCH, columns, PATCH)
        x = self.patches(x.permute(0, 2, 4, 1, 3, 5).reshape(-1, rows * columns, channels * PATCH * PATCH))
        for block in self.blocks:
            x = block(x)
        saliency = torch.softmax(self.salience(x).squeeze(-1).float(), dim=-1)
        return self.project(x), x, saliency, self.deep(x)


class Language(nn.Module):
    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LlamaDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor,
        past_key_values: Any = None,
        use_cache: bool = False,
        deepstack: Tensor | None = None,
    ) -> Any:
        half = len(AXES)
        inverse = 10_000.0 ** (-torch.arange(half).float() / half)
        places = torch.stack([position_ids[:, axis] for axis in AXES], dim=-1)  # [B,S,d/2]
        angles = torch.cat([places * inverse] * 2, dim=-1)  # [B,S,d]
        rotary = angles.cos().to(inputs_embeds.dtype), angles.sin().to(inputs_embeds.dtype)
        hidden, width = inputs_embeds, inputs_embeds.shape[-1]
        for i, layer in enumerate(self.layers):
            hidden = layer(
                hidden,
                attention_mask=attention_mask,
                position_embeddings=rotary,
                past_key_values=past_key_values,
                use_cache=use_cache,
            )
            if deepstack is not None and i < DEEP:
                hidden = hidden + deepstack[..., i * width : (i + 1) * width]
        return SimpleNamespace(last_hidden_state=self.norm(hidden))


class Toy(PreTrainedModel):
    config_class = ToyConfig

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.tower = Tower(config)
        self.language = Language(config)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)


class Vision(nn.Module):
    """The tower's tokens in reading order, behind the newline."""

    def __init__(self, tower: Tower) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, pixel_values: Tensor, order: Tensor) -> tuple[Tensor, ...]:
        image_tokens, features, saliency, deepstack = self.tower(pixel_values)
        return (
            in_reading_order(image_tokens, order, self.tower.newline),
            in_reading_order(features, order),
            in_reading_order(saliency[..., None], order).squeeze(-1),
            in_reading_order(deepstack, order),
        )


# --- the family ------------------------------------------------------------------------------------------------------


def read_config(config: dict[str, Any]) -> ToyConfig:
    checked = checked_config(config, integers={**INTEGERS, "tower_width": (1, 1024), "tile_side": (PATCH, 64)})
    refuse_unlike_attention(checked, "config")
    if checked.get("tile_side", 16) % PATCH:
        raise CheckpointError(f"config.json: tile_side is {checked['tile_side']}; expected a multiple of {PATCH}")
    return ToyConfig.from_dict(checked)


def language_section(config: dict[str, Any]) -> dict[str, Any]:
    return config


def language_spec(config: ToyConfig) -> LanguageSpec:
    return LanguageSpec(
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        intermediate=config.intermediate_size,
        vocab=config.vocab_size,
        max_seq=config.max_position_embeddings,
        position_axes=3,
        streams={"deepstack": DEEP * config.hidden_size},
    )


def tower_specs(config: ToyConfig, options: VisualOptions) -> list[TowerSpec]:
    tokens = (config.tile_side // PATCH) ** 2
    return [
        TowerSpec(
            tokens=tokens,
            width=config.tower_width,
            heads=1,
            intermediate=config.tower_width,
            pixels=3 * config.tile_side**2,
            candidates=(MAX_TILES + 1) * tokens,
            features=config.tower_width,
            units=MAX_TILES + 1,
        )
    ]


def visual_specs(config: ToyConfig, image_processor: Any, options: VisualOptions) -> list[VisualSpec]:
    tiles = options.max_tiles or MAX_TILES
    specs = []
    for height, width in options.image_sizes or [(config.tile_side, config.tile_side)]:
        if height != width or height % PATCH:
            raise CheckpointError(f"image size {height} x {width}: expected squares, in multiples of {PATCH}")
        pixels = GridTiles(
            side=height,
            min_tiles=1,
            max_tiles=tiles,
            mean=tuple(image_processor.image_mean),
            std=tuple(image_processor.image_std),
        )
        rows = height // PATCH
        specs.append(
            VisualSpec(
                graph=f"{VISION}-{height}x{width}" if options.image_sizes else VISION,
                placeholder_id=config.image_token_id,
                tokens_per_unit=rows * rows,
                grid=(rows, rows),
                candidates=pixels.max_units * rows * rows,
                feature_size=config.tower_width,
                pixels=pixels,
                text=TEXT,
                positions="mrope",
            )
        )
    return specs


def build(config: ToyConfig, dtype: torch.dtype) -> Toy:
    return Toy(config).to(dtype)


def language(model: Toy) -> tuple[nn.Module, nn.Module]:
    return model.language, model.head


def vision(model: Toy, spec: VisualSpec) -> nn.Module:
    return Vision(model.tower)


def embedding_name(config: ToyConfig) -> str:
    return "language.embed.weight"


def tied_head(config: ToyConfig) -> str | None:
    return "head.weight" if config.tie_word_embeddings else None


def canonical_name(name: str) -> str | None:
    return name.removeprefix("toy.")


def is_unused(config: ToyConfig, name: str) -> bool:
    return False


# --- a checkpoint ----------------------------------------------------------------------------------------------------


def write_checkpoint(folder: Path) -> Toy:
    """Writes a folder with seeded float32 weights and returns the model, its attention transformers' own."""
    from safetensors.torch import save_file
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    folder.mkdir(parents=True)
    config = ToyConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=2 * len(AXES),
        vocab_size=TEXT_TOKENS + 2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    model = Toy(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            if name.endswith("norm.weight"):
                drawn = 1 + 0.05 * drawn
            elif name.endswith("embed.weight"):
                drawn = 0.02 * drawn  # or the head, which is this table, would say the last token again and again
                # Tokens that a model never says: rows this faint never win.
                drawn[:259] /= 100
                drawn[config.image_token_id :] /= 100
            else:
                drawn = drawn * parameter.shape[-1] ** -0.5
            parameter.copy_(drawn)
        model.head.weight = model.language.embed.weight
    stored = {
        f"toy.{name}": tensor.contiguous() for name, tensor in model.state_dict().items() if name != "head.weight"
    }
    save_file(stored, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**config.to_dict(), "dtype": "float32"}))
    CLIPImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    make_tokenizer(TEXT_TOKENS, 512).save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return model
