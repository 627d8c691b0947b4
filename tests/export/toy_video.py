"""Videos for the toy family, in the three ways that there are; which one is taken, the shape of a video says.

    square  each frame in a run of its own, with text around it
    wide    one run of pairs of frames, with their time on the first axis
    tall    one run with a newline at its end, in plain order

``<video>``, which the chat template writes, is no token; the visual tokens of images and videos are the same one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import toy_family
from torch import Tensor, nn

from flashvlm.tilings import Frames
from flashvlm.visual import TextLayout, VisualSpec
from flashvlm_export.families import registered
from flashvlm_export.testing.tokenizer import CHAT_TEMPLATE

PATCH = toy_family.PATCH
SQUARE = {"count": 3, "rule": "middle", "min_frames": 3}
WIDE = {"count": 4, "fps": 2.0, "multiple": 2, "repeat_time": 2}
TALL = {"count": 2}
TEMPLATE = CHAT_TEMPLATE.replace(
    "part['type'] == 'image' -%}{{ '<image>\\n' }}", "part['type'] != 'text' -%}{{ '<' + part['type'] + '>\\n' }}"
)
TEXT = TextLayout(head="{words} frames, {hms}:", frame="\nframe {i} at {mmss}: {v}", join=",", end="\n\n")


class Pairs(nn.Module):
    """A tower [U,6,H,W] over that of images: the tokens of the first frame and half those of the second."""

    def __init__(self, tower: toy_family.Tower) -> None:
        super().__init__()
        self.tower = tower

    @property
    def newline(self) -> Tensor:
        return self.tower.newline

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        both = zip(self.tower(pixel_values[:, :3]), self.tower(pixel_values[:, 3:]), strict=True)
        return tuple(first + second / 2 for first, second in both)


def visual_specs(config: Any, image_processor: Any) -> list[VisualSpec]:
    def spec(name: str, size: tuple[int, int], frames: dict[str, Any], **more: Any) -> VisualSpec:
        normal = {"mean": tuple(image_processor.image_mean), "std": tuple(image_processor.image_std)}
        pixels = Frames(resize="exact", size=size, **normal, **frames)
        grid = size[0] // PATCH, size[1] // PATCH
        return VisualSpec(
            modality="video",
            graph=f"vision-video-{name}",
            placeholder_id=config.image_token_id,
            marker="<video>",
            tokens_per_unit=grid[0] * grid[1],
            grid=grid,
            candidates=pixels.max_units * grid[0] * grid[1] + (more.get("newline") == "end"),
            feature_size=config.tower_width,
            pixels=pixels,
            **more,
        )

    return [
        spec("square", (16, 16), SQUARE, text=TEXT, positions="mrope"),
        spec("wide", (8, 32), WIDE, text=TextLayout(whole="[{v}]"), positions="mrope", time_scale=4),
        spec("tall", (32, 8), TALL, newline="end"),
    ]


@contextmanager
def with_video() -> Iterator[None]:
    """The toy family, which takes videos."""
    images, vision = toy_family.visual_specs, toy_family.vision

    def both(config: Any, image_processor: Any, options: Any) -> list[VisualSpec]:
        return [*images(config, image_processor, options), *visual_specs(config, image_processor)]

    def either(model: Any, spec: VisualSpec) -> nn.Module:
        return toy_family.Vision(Pairs(model.tower)) if spec.pixels.repeat_time == 2 else vision(model, spec)

    with pytest.MonkeyPatch.context() as patch, registered(toy_family):
        patch.setattr(toy_family, "visual_specs", both)
        patch.setattr(toy_family, "vision", either)
        yield


def write_checkpoint(folder: Path) -> toy_family.Toy:
    model = toy_family.write_checkpoint(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return model
