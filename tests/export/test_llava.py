"""LLaVA-1.5 shows what every family has to show, over the bundles that other tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from family_proof import FamilyProof, Reference
from test_parity import picture
from torch import Tensor
from transformers import LlavaProcessor

from flashvlm_export.families import llava
from flashvlm_export.selection import SelectionParams


class TestLlava(FamilyProof):
    family = llava
    preset = "tiny-gqa"
    budgets = (5,)
    params = SelectionParams()
    images: ClassVar[list[np.ndarray]] = [picture((31, 47), 1), picture((90, 61), 2)]

    @pytest.fixture(scope="class")
    @classmethod
    def checkpoint(cls, tiny_gqa_checkpoint: Path) -> Path:
        return tiny_gqa_checkpoint

    @pytest.fixture(scope="class", params=["modern", "legacy"])
    @classmethod
    def bundle(cls, request: pytest.FixtureRequest) -> Path:
        shared = {"modern": "tiny_gqa_bundle", "legacy": "tiny_gqa_legacy_bundle"}
        path: Path = request.getfixturevalue(shared[request.param])
        return path

    def processor(self, image_processor: Any, tokenizer: Any) -> Any:
        return LlavaProcessor(image_processor, tokenizer, 14, "default", num_additional_image_tokens=1)

    def signals(self, reference: Reference, image: np.ndarray) -> tuple[Tensor, Tensor]:
        pixels = reference.processor.image_processor(image, return_tensors="pt")["pixel_values"]
        tower = reference.model.model.vision_tower(pixels, output_attentions=True, output_hidden_states=True)
        # Of the block before the last one.
        return tower.hidden_states[-2][0, 1:], tower.attentions[-2][0, :, 0, 1:].mean(0)
