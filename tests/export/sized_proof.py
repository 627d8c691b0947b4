"""What families show whose images take one of several sizes, where transformers keeps about the image's own.

transformers is given images of just those sizes, which its own resizing then leaves as they are.
"""

from __future__ import annotations

import copy
import math
from typing import Any, ClassVar

import numpy as np
import PIL.Image
import pytest
import torch
from family_proof import FamilyProof, Reference, without_video
from test_parity import Recorded, picture
from torch import Tensor
from transformers import AttentionInterface

from flashvlm.encoder import nearest
from flashvlm.errors import CheckpointError
from flashvlm.images import load_image
from flashvlm.preprocess import tile
from flashvlm_export.families.contract import VisualOptions

WEIGHTS: list[Tensor] = []  # of ``recording``


def recording(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, **_: Any
) -> tuple[Tensor, Tensor]:
    """Attention in full, which leaves its weights [B,H,T,T] in ``WEIGHTS``: Qwen's towers do not return them."""
    weights = torch.softmax(query @ key.transpose(2, 3) * scaling, dim=-1)
    WEIGHTS.append(weights)
    return (weights @ value).transpose(1, 2), weights


AttentionInterface.register("recording", recording)


class SizedProof(FamilyProof):
    """sizes: (height, width) in pixels; patch: of the tower, merged 2 x 2."""

    sizes: ClassVar[tuple[tuple[int, int], ...]] = ()
    patch: ClassVar[int]
    processor_class: ClassVar[type]
    images: ClassVar[list[np.ndarray]] = [picture((150, 230), 1), picture((300, 210), 2)]

    frames: ClassVar[int | None] = None

    def __init_subclass__(cls) -> None:
        cls.options = VisualOptions(image_sizes=cls.sizes, frames=cls.frames)

    def processor(self, image_processor: Any, tokenizer: Any) -> Any:
        stock = without_video(self.processor_class, image_processor, tokenizer)

        def sized(images: Any = None, **more: Any) -> Any:
            return stock(images=None if images is None else [self.sized(image) for image in images], **more)

        sized.image_processor = image_processor  # type: ignore[attr-defined]
        return sized

    def sized(self, image: np.ndarray) -> np.ndarray:
        """Of the size whose shape is nearest, [H,W,3]."""
        height, width = min(
            self.sizes, key=lambda size: abs(math.log(image.shape[0] * size[1] / image.shape[1] / size[0]))
        )
        return np.asarray(PIL.Image.fromarray(image).resize((width, height), PIL.Image.Resampling.BICUBIC))

    def patches(self, reference: Reference, image: np.ndarray) -> tuple[Tensor, Tensor]:
        """pixel_values and grid_thw of an image [H,W,3], or of frames [F,H,W,3] two by two."""
        stock = reference.processor.image_processor
        if image.ndim == 3:
            inputs = stock(self.sized(image), return_tensors="pt")
            return inputs["pixel_values"], inputs["image_grid_thw"]
        each = [stock(self.sized(frame), return_tensors="pt") for frame in image]
        _, rows, columns = each[0]["image_grid_thw"][0].tolist()
        # A patch's values are by channel, frame, row and column; an image stands there twice.
        split = [one["pixel_values"].unflatten(1, (3, 2, self.patch**2)) for one in each]
        pairs = [torch.stack([a[:, :, 0], b[:, :, 1]], dim=2) for a, b in zip(split[::2], split[1::2], strict=True)]
        return torch.cat(pairs).flatten(1), torch.tensor([[len(pairs), rows, columns]])

    def tower(self, reference: Reference, image: np.ndarray, block: int) -> tuple[Any, Tensor, Tensor]:
        """What the stock tower returns, the attention weights [T,T] of a block, averaged over heads, and grid_thw."""
        visual = reference.model.model.visual
        pixel_values, grid_thw = self.patches(reference, image)
        attention = visual.blocks[block].attn
        before, attention.config = attention.config, copy.copy(attention.config)
        attention.config._attn_implementation_internal = "recording"
        WEIGHTS.clear()
        found = visual(pixel_values, grid_thw=grid_thw)
        attention.config = before
        (weights,) = WEIGHTS
        return found, weights[0].mean(dim=0), grid_thw

    def test_pixels(self, recorded: Recorded, reference: Reference) -> None:
        seen = set()
        for image in self.images:
            spec = nearest(recorded.pipeline.bundle.manifest, "image", image.shape[:2])
            found = tile(load_image(image), spec.pixels)[0]
            theirs = reference.processor.image_processor(self.sized(image), return_tensors="np")
            _, rows, columns = theirs["image_grid_thw"][0]
            patches = theirs["pixel_values"].reshape(rows // 2, columns // 2, 2, 2, 3, 2, self.patch, self.patch)
            expected = patches.transpose(5, 4, 0, 2, 6, 1, 3, 7).reshape(1, 6, rows * self.patch, columns * self.patch)
            np.testing.assert_array_equal(found, expected)
            seen.add(spec.graph)
        assert len(seen) == len(self.sizes)

    def test_float16_is_refused_where_the_weights_are_bfloat16(self) -> None:
        config = self.family.read_config(next(iter(self.family.CONFIGS.values())))
        with torch.device("meta"), pytest.raises(CheckpointError, match=r"--dtype float16: .*use --dtype bfloat16"):
            self.family.build(config, torch.float16)
