"""What ``SizedProof`` and ``VideoProof`` ask together: videos whose frames are read two by two."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from family_proof import Message, Reference
from sized_proof import SizedProof
from torch import Tensor
from video_proof import VideoProof


class SizedVideoProof(VideoProof, SizedProof):
    """video_token: what stands for a visual token of a video."""

    video_token: str

    def image_signals(self, reference: Reference, image: np.ndarray) -> tuple[Tensor, Tensor]:
        """Of an image, or of one pair of frames: transformers sees each by itself."""
        raise NotImplementedError

    def signals(self, reference: Reference, image: np.ndarray) -> tuple[Tensor, Tensor]:
        units = [image] if image.ndim == 3 else np.split(image, len(image) // 2)
        found = [self.image_signals(reference, unit) for unit in units]
        return torch.cat([features for features, _ in found]), torch.cat([saliency for _, saliency in found])

    def visual_rows(self, reference: Reference, ids: Tensor) -> Tensor:
        config = reference.model.config
        return torch.isin(ids, torch.tensor([config.image_token_id, config.video_token_id]))

    def video_inputs(self, reference: Reference, messages: list[Message], frames: list[np.ndarray]) -> Any:
        pixel_values, grid = self.patches(reference, np.stack(frames))
        rendered = self.shown_text(reference.rendered(messages), grid[0].tolist())
        inputs = reference.tokenizer(rendered, return_tensors="pt")
        video = inputs["input_ids"] == reference.model.config.video_token_id
        return {
            **inputs,
            "mm_token_type_ids": 2 * video.int(),  # text, image, video
            "pixel_values_videos": pixel_values,
            "video_grid_thw": grid,
            **self.more_inputs(),
        }

    def shown_text(self, rendered: str, grid: list[int]) -> str:
        """The prompt with what the processor writes for the video."""
        units, rows, columns = grid
        return rendered.replace(self.video_token, self.video_token * (units * rows * columns // 4))

    def more_inputs(self) -> dict[str, Any]:
        return {}
