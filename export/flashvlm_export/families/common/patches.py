"""Towers that see an image at one of several sizes, in patches of which m x m become one visual token.

T patches of an image, N = T / (m * m) visual tokens. Patches are in the order of their tokens, so that those of a
token stand side by side: tokens in rows, and in each token its patches in rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from flashvlm.errors import CheckpointError, FlashVLMError
from flashvlm.graph_io import VISION
from flashvlm.tilings import Frames, Single
from flashvlm.visual import VisualSpec
from flashvlm_export.families.common import pixels
from flashvlm_export.families.common.tiles import in_reading_order
from flashvlm_export.families.contract import TowerSpec, VisualOptions

FRAMES: Literal[2] = 2  # that one patch spans: an image stands there twice
MIN_FRAMES = 4  # of a video, if there are as many, in transformers' video processors of Qwen
MAX_EDGE = 4096  # pixels, of a bundle's images
Size = tuple[int, int]  # (height, width)


@dataclass(frozen=True)
class Patches:
    """How a tower of these sizes cuts images. patch: an edge in pixels; merge: m; sizes: (height, width) in pixels;
    frames: of a video at most, None without videos."""

    patch: int
    merge: int
    sizes: tuple[Size, ...]
    frames: int | None = None

    def grid(self, size: Size) -> tuple[int, int]:
        """Rows and columns of patches."""
        return size[0] // self.patch, size[1] // self.patch

    def tokens(self, size: Size) -> tuple[int, int]:
        """Rows and columns of visual tokens."""
        rows, columns = self.grid(size)
        return rows // self.merge, columns // self.merge


def chosen(
    family: str, options: VisualOptions, patch: int, merge: int, default: tuple[Size, ...], videos: bool = False
) -> Patches:
    """Raises FlashVLMError for sizes that are not whole tokens, and for anything else that was asked for."""
    options.refuse(family, but=["image_sizes", "frames"] if videos else ["image_sizes"])
    if (options.frames or 0) % FRAMES:
        raise FlashVLMError(
            f"--frames {options.frames}: expected an even number, as family {family} reads them in pairs"
        )
    factor = patch * merge
    for height, width in options.image_sizes:
        if height % factor or width % factor or not 0 < min(height, width) <= max(height, width) <= MAX_EDGE:
            near = "x".join(str(min(max(round(edge / factor), 1) * factor, MAX_EDGE)) for edge in (height, width))
            raise FlashVLMError(
                f"--image-size {height}x{width}: expected multiples of {factor} up to {MAX_EDGE}, the edge of a visual "
                f"token of family {family}, such as {near}"
            )
    return Patches(patch, merge, tuple(dict.fromkeys(options.image_sizes)) or default, options.frames)


def check_tower(family: str, tower: Any, hidden: int) -> None:
    """What both sides of the projector have to be. Raises CheckpointError."""
    for name in ("patch_size", "spatial_merge_size"):  # transformers takes a list, too
        if not isinstance(edge := getattr(tower, name), int):
            raise CheckpointError(f"config.json: vision_config.{name} is {edge!r}; expected a whole number")
    channels = getattr(tower, "in_chans", tower.in_channels)  # the published name; transformers reads the other
    for name, found, expected in (
        ("temporal_patch_size", tower.temporal_patch_size, FRAMES),
        ("in_channels", tower.in_channels, 3),
        ("in_chans", channels, 3),
        ("out_hidden_size", tower.out_hidden_size, hidden),
    ):
        if found != expected:
            raise CheckpointError(
                f"config.json: vision_config.{name} is {found!r}; family {family} supports {expected} here"
            )
    if tower.hidden_size % (4 * tower.num_heads):
        raise CheckpointError(
            f"config.json: vision_config has {tower.num_heads} heads for {tower.hidden_size} channels; expected heads "
            f"of a multiple of 4, which are rotated by row and column"
        )


def check_blocks(name: str, tower: Any) -> None:
    """Raises CheckpointError unless a setting names some of the tower's blocks."""
    blocks = getattr(tower, name)
    if not blocks or not all(isinstance(i, int) and 0 <= i < tower.depth for i in blocks):
        raise CheckpointError(
            f"config.json: vision_config.{name} is {blocks!r}; expected some of the {tower.depth} blocks, from 0"
        )


def tower_specs(tower: Any, patches: Patches) -> list[TowerSpec]:
    specs = []
    items = [(1, size) for size in patches.sizes]
    if patches.frames:
        items.append((patches.frames // FRAMES, patches.sizes[0]))
    for units, size in items:
        rows, columns = patches.tokens(size)
        specs.append(
            TowerSpec(
                tokens=rows * columns * patches.merge**2,
                width=tower.hidden_size,
                heads=tower.num_heads,
                intermediate=tower.intermediate_size,
                pixels=3 * FRAMES * size[0] * size[1],
                candidates=units * rows * columns,
                features=tower.hidden_size,
                units=units,
            )
        )
    return specs


def visual_specs(
    config: Any, image_processor: Any, patches: Patches, rule: Mapping[str, Any], **video: Any
) -> list[VisualSpec]:
    """Of images one for each size: transformers resizes to about as many pixels as the image has, a graph to its own
    size. Of videos one at the first size, where there are ``frames``.

    rule: how frames are chosen, two a second; video: fields of its spec that are not those of an image.
    """
    tower = config.vision_config
    for name, expected in (
        ("patch_size", patches.patch),
        ("merge_size", patches.merge),
        ("temporal_patch_size", FRAMES),
    ):
        if (found := getattr(image_processor, name, None)) != expected:
            raise CheckpointError(f"preprocessor_config.json: {name} is {found!r}; config.json says {expected}")
    settings = pixels.normalisation(image_processor)
    specs = []
    for height, width in patches.sizes:
        rows, columns = patches.tokens((height, width))
        specs.append(
            VisualSpec(
                graph=VISION if len(patches.sizes) == 1 else f"{VISION}-{height}x{width}",
                placeholder_id=config.image_token_id,
                tokens_per_unit=rows * columns,
                grid=(rows, columns),
                candidates=rows * columns,
                feature_size=tower.hidden_size,
                pixels=Single(resize="exact", size=(height, width), repeat_time=FRAMES, **settings),
                positions="mrope",
            )
        )
    if patches.frames:
        specs.append(_video_spec(specs[0], patches.frames, rule, {"placeholder_id": config.video_token_id, **video}))
    return specs


def _video_spec(image: VisualSpec, frames: int, rule: Mapping[str, Any], more: Mapping[str, Any]) -> VisualSpec:
    """For videos of up to ``frames``, at one size alone: each graph is an engine with all the tower's weights. Two
    frames a unit, each pair seen by itself."""
    chosen = {"fps": 2.0, "min_frames": min(frames, MIN_FRAMES), **rule}
    cut = Frames(**dict(image.pixels) | {"tiling": "frames", "count": frames} | chosen)
    changes = {
        "modality": "video",
        "graph": f"{VISION}-video",
        "candidates": cut.max_units * image.tokens_per_unit,
        "pixels": cut,
    }
    return VisualSpec.model_validate(dict(image) | changes | dict(more))


class InPairs(nn.Module):
    """The module of an image over U pairs of frames: pixel_values [U,6,H,W], order [N] -> each [1,N,*]."""

    def __init__(self, image: nn.Module) -> None:
        super().__init__()
        self.image = image

    def forward(self, pixel_values: Tensor, order: Tensor) -> tuple[Tensor, ...]:
        image_tokens, features, saliency, *streams = self.image(pixel_values)
        return (
            in_reading_order(image_tokens, order),
            in_reading_order(features, order),
            in_reading_order(saliency[..., None], order).squeeze(-1),
            *(in_reading_order(stream, order) for stream in streams),
        )


def places(rows: int, columns: int, merge: int) -> Tensor:
    """int64 [T,2]: row and column of each patch, in the order of their tokens."""
    index = torch.arange(rows * columns, device="cpu").view(rows // merge, merge, columns // merge, merge)
    raster = index.transpose(1, 2).flatten()
    return torch.stack([raster // columns, raster % columns], dim=1)


class Embedding(nn.Module):
    """pixel_values [B,2*3,H,W], one frame after the other -> patches [B,T,Dv]."""

    def __init__(self, stock: nn.Module, patches: Patches) -> None:
        super().__init__()
        self.proj, self.patches = stock.proj, patches

    def forward(self, pixel_values: Tensor) -> Tensor:
        batch, _, height, width = pixel_values.shape
        patch, merge = self.patches.patch, self.patches.merge
        (rows, columns), projection = self.patches.grid((height, width)), self.proj
        x = pixel_values.unflatten(1, (FRAMES, 3)).transpose(1, 2)  # a patch's values: channel, frame, row, column
        # Eight dimensions, frames and channels in one: TensorRT has no more.
        x = x.reshape(batch, 3 * FRAMES, rows // merge, merge, patch, columns // merge, merge, patch)
        x = x.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(batch, rows * columns, 3 * FRAMES * patch**2)
        # A convolution whose windows do not overlap: torch's exporter gives Conv3d without a bias a wrong one.
        weight = projection.weight.flatten(1)
        return functional.linear(x.to(weight.dtype), weight, projection.bias)


class Rotary(nn.Module):
    """places int64 [T,2] -> cosine and sine, float32 [T,1,d/2]: half of the pairs turn by row, half by column."""

    def __init__(self, stock: nn.Module) -> None:
        super().__init__()
        self.stock = stock

    def forward(self, places: Tensor) -> tuple[Tensor, Tensor]:
        angles = (places[..., None].float() * self.stock.inv_freq).flatten(1)[:, None]
        return angles.cos(), angles.sin()


def attend(
    attention: Any, hidden: Tensor, rotary: tuple[Tensor, Tensor], windows: Sequence[tuple[int, int]] = ()
) -> tuple[Tensor, Tensor]:
    """A stock attention over patches [B,T,Dv] -> [B,T,Dv], and the weights of its last operator.

    transformers splits a packed sequence at the lengths of a tensor, which does not trace.

    windows: how many there are of how many patches, run after run; each is one operator. None: all see all.
    """
    batch, tokens, _ = hidden.shape
    heads = attention.num_heads
    query, key, value = (x.unflatten(-1, (heads, -1)) for x in attention.qkv(hidden).chunk(3, dim=-1))  # [B,T,H,d]
    query, key, value = (x.transpose(1, 2) for x in (_rotated(query, *rotary), _rotated(key, *rotary), value))
    interface = ALL_ATTENTION_FUNCTIONS[attention.config._attn_implementation]
    if not windows:
        output, weights = interface(attention, query, key, value, None, scaling=attention.scaling)
        return attention.proj(output.reshape(batch, tokens, -1)), weights
    outputs, start = [], 0
    for count, length in windows:
        run = slice(start, start + count * length)
        parts = (_in_windows(x[:, :, run], count, length) for x in (query, key, value))
        output, weights = interface(attention, *parts, None, scaling=attention.scaling)  # [B*count,length,H,d]
        outputs.append(output.reshape(batch, count * length, -1))
        start = run.stop
    return attention.proj(torch.cat(outputs, dim=1)), weights


def _in_windows(x: Tensor, count: int, length: int) -> Tensor:
    """[B,H,count*length,d] -> [B*count,H,length,d]"""
    batch, heads, _, size = x.shape
    return x.reshape(batch, heads, count, length, size).transpose(1, 2).reshape(batch * count, heads, length, size)


def _rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Each of the first half of the channels [B,T,H,d] with its like of the second, in float32."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cosine - b * sine, b * cosine + a * sine], dim=-1).to(x.dtype)
