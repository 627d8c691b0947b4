"""Idefics3, and the first SmolVLMs, which are its small sizes (arXiv 2408.12637)."""

from __future__ import annotations

from typing import Any

from transformers import Idefics3Config

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

NAME = "idefics3"
ALIASES = {
    "smolvlm-256m": "HuggingFaceTB/SmolVLM-256M-Instruct",
    "smolvlm-500m": "HuggingFaceTB/SmolVLM-500M-Instruct",
    "smolvlm-2.2b": "HuggingFaceTB/SmolVLM-Instruct",
    "idefics3-8b": "HuggingFaceM4/Idefics3-8B-Llama3",
}
REFUSED: dict[str, str] = {}
_SO400M = siglip.SO400M | {"num_hidden_layers": 27}
CONFIGS = {
    "smolvlm-256m": sizes(NAME, (576, 30, 9, 3, 1536), BASE, 4),
    "smolvlm-500m": sizes(NAME, (960, 32, 15, 5, 2560), BASE, 4),
    "smolvlm-2.2b": sizes(NAME, (2048, 24, 32, 32, 8192), _SO400M, 3, 49155, 49153, 16384),
    "idefics3-8b": sizes(NAME, (4096, 32, 32, 8, 14336), _SO400M | {"image_size": 364}, 2, 128259, 128257, 131072),
}


def read_config(config: dict[str, Any]) -> Idefics3Config:
    """Parses and checks a ``config.json``. Raises CheckpointError for a variant that is not covered."""
    # Published ones call their vision section by the model's own name.
    parsed: Idefics3Config = read(config, Idefics3Config, ("idefics3_vision", NAME))
    return parsed
