"""Model families: one module each, and nothing of a family anywhere else.

``contract.py`` says what a family provides, ``common/`` has what several share; every other module here is a family,
known by being here. See CONTRIBUTING.md for how to add one.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from flashvlm.errors import CheckpointError
from flashvlm_export.families.contract import Family

FAMILIES: dict[str, Family] = {}
# Families that people ask for and that no module here is near to, each with what it needs that is not here.
_WINDOWS = "its masks are not causal in an image, and some of its layers attend to a window"
_EXPERTS = "it is a mixture of experts, for which the decoder graph has no routing"
REFUSED = {
    "gemma3": _WINDOWS,
    "gemma3n": _WINDOWS,
    "gemma4": _WINDOWS,
    "paligemma": "its mask is not causal in an image and the question",
    "qwen2_vl": "its tower has other blocks than Qwen2.5-VL's",
    "qwen3_5": "some of its layers are no attention but a recurrence",
    "qwen3_5_moe": _EXPERTS,
    "kimi_vl": _EXPERTS,
    "deepseek_vl_v2": _EXPERTS,
    "mllama": "its images come in by cross-attention",
    "internvl_chat": "its code is the checkpoint's own; take the -hf conversion, such as OpenGVLab/InternVL3-1B-hf",
    "idefics2": "its connector is a resampler, and its tower masks padding",
    "phi3_v": "its code is the checkpoint's own",
    "minicpmv": "its code is the checkpoint's own",
}


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


for _module in pkgutil.iter_modules(__path__):
    if _module.name not in ("contract", "common"):
        register(cast(Family, importlib.import_module(f"{__name__}.{_module.name}")))


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
    refused = {**REFUSED, **{name: reason for family in FAMILIES.values() for name, reason in family.REFUSED.items()}}
    reason = refused.get(model_type) if isinstance(model_type, str) else None
    why = f" ({reason})" if reason else ""
    raise CheckpointError(
        f"model_type {model_type!r} is not supported{why}; supported families: {', '.join(sorted(FAMILIES))}"
    )
