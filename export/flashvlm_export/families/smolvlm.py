"""SmolVLM2: Idefics3's tower and text around tiles, in three small sizes (arXiv 2504.05299)."""

from __future__ import annotations

from typing import Any

from transformers import SmolVLMConfig

from flashvlm_export.families.common import siglip
from flashvlm_export.families.common.idefics3 import BASE, read, sizes
from flashvlm_export.families.common.idefics3 import build as build
from flashvlm_export.families.common.idefics3 import canonical_name as canonical_name
from flashvlm_export.families.common.idefics3 import embedding_name as embedding_name
from flashvlm_export.families.common.idefics3 import is_unused as is_unused
from flashvlm_export.families.common.idefics3 import language as language
from flashvlm_export.families.common.idefics3 import language_section as language_section
from flashvlm_export.families.common.idefics3 import language_spec as language_spec
from flashvlm_export.families.common.idefics3 import tied_head as tied_head
from flashvlm_export.families.common.idefics3 import tower_specs as tower_specs
from flashvlm_export.families.common.idefics3 import vision as vision
from flashvlm_export.families.common.idefics3 import visual_specs as visual_specs

NAME = "smolvlm"
ALIASES = {
    "smolvlm2-256m": "HuggingFaceTB/SmolVLM2-256M-Video-Instruct",
    "smolvlm2-500m": "HuggingFaceTB/SmolVLM2-500M-Video-Instruct",
    "smolvlm2-2.2b": "HuggingFaceTB/SmolVLM2-2.2B-Instruct",
}
REFUSED: dict[str, str] = {}
CONFIGS = {
    "smolvlm2-256m": sizes(NAME, (576, 30, 9, 3, 1536), BASE, 4),
    "smolvlm2-500m": sizes(NAME, (960, 32, 15, 5, 2560), BASE, 4),
    "smolvlm2-2.2b": sizes(NAME, (2048, 24, 32, 32, 8192), siglip.SO400M | {"num_hidden_layers": 27}, 3),
}


def read_config(config: dict[str, Any]) -> SmolVLMConfig:
    """Parses and checks a ``config.json``. Raises CheckpointError for a variant that is not covered."""
    parsed: SmolVLMConfig = read(config, SmolVLMConfig, ("smolvlm_vision",))
    return parsed
