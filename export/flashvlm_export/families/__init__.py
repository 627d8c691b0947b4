"""Model families: one module each, and nothing family-specific anywhere else.

A family module provides NAME, CONFIGS and the functions of ``llava.py``; see CONTRIBUTING.md for how to add one.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from flashvlm.errors import CheckpointError
from flashvlm_export.families import llava

FAMILIES: dict[str, ModuleType] = {module.NAME: module for module in (llava,)}
CONFIGS: dict[str, dict[str, Any]] = {name: c for family in FAMILIES.values() for name, c in family.CONFIGS.items()}


def family_of(config: dict[str, Any]) -> ModuleType:
    """The family a ``config.json`` belongs to, by its ``model_type``.

    Raises:
        CheckpointError: the family is not supported.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise CheckpointError(
            f"model_type {model_type!r} is not supported; supported families: {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[model_type]
