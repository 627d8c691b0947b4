"""Model families: one module each, and nothing of a family anywhere else.

``contract.py`` says what a family provides; see CONTRIBUTING.md for how to add one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from flashvlm.errors import CheckpointError
from flashvlm_export.families import llava
from flashvlm_export.families.contract import Family

FAMILIES: dict[str, Family] = {}


def register(family: Family) -> None:
    FAMILIES[family.NAME] = family


@contextmanager
def registered(family: Family) -> Iterator[None]:
    """A family that is known within the context alone."""
    before = dict(FAMILIES)
    register(family)
    try:
        yield
    finally:
        FAMILIES.clear()
        FAMILIES.update(before)


register(llava)


def configs() -> dict[str, dict[str, Any]]:
    """Sizes of every model that has a short name."""
    return {name: config for family in FAMILIES.values() for name, config in family.CONFIGS.items()}


def aliases() -> dict[str, str]:
    """Short names and the Hub ids they stand for."""
    return {name: repo for family in FAMILIES.values() for name, repo in family.ALIASES.items()}


def family_of(config: dict[str, Any]) -> Family:
    """The family a ``config.json`` belongs to, by its ``model_type``.

    Raises:
        CheckpointError: the family is not supported.
    """
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    refused = {name: reason for family in FAMILIES.values() for name, reason in family.REFUSED.items()}
    reason = refused.get(model_type) if isinstance(model_type, str) else None
    why = f" ({reason})" if reason else ""
    raise CheckpointError(
        f"model_type {model_type!r} is not supported{why}; supported families: {', '.join(sorted(FAMILIES))}"
    )
