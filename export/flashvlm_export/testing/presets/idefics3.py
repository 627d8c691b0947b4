"""Checkpoints in the shape of Idefics3 and the first SmolVLMs."""

from __future__ import annotations

import functools
from typing import Any

from flashvlm_export.families.idefics3 import CONFIGS
from flashvlm_export.testing.presets import smolvlm


def image_processor(side: int, edge: int) -> Any:
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    return Idefics3ImageProcessorPil(size={"longest_edge": edge}, max_image_size={"longest_edge": side})


_preset = functools.partial(smolvlm.preset, model="Idefics3ForConditionalGeneration", processor=image_processor)
TINY: dict[str, Any] = smolvlm.TINY | {
    "model_type": "idefics3",
    "vision_config": smolvlm.TINY["vision_config"] | {"model_type": "idefics3"},
}
PRESETS = {
    "tiny-idefics3": _preset(TINY, 2, "float32"),
    **{name: _preset(config) for name, config in CONFIGS.items()},
}
