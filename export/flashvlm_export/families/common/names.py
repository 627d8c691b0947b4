"""Names of parameters: what checkpoints on the Hub call them, and where transformers 5 has them."""

from __future__ import annotations

import re
from collections.abc import Sequence

# LLaVA and what was built like it.
LLAVA_RENAMES = (
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^(model\.)?(vision_tower|image_tower|video_tower)\.(vision_model\.)?", r"model.\2."),
    (r"^(multi_modal_projector\.|image_newline$)", r"model.\1"),
)
# Buffers that old transformers saved and new ones compute.
COMPUTED = re.compile(r"(embeddings\.position_ids|rotary_(pos_)?emb\.inv_freq)$")


def renamed(name: str, renames: Sequence[tuple[str, str]]) -> str | None:
    """A checkpoint's name by the first of the patterns that fits; None for a buffer that is computed."""
    if COMPUTED.search(name):
        return None
    for pattern, replacement in renames:
        new, count = re.subn(pattern, replacement, name)
        if count:
            return new
    return name
