"""Checkpoints to write, one file a family: each module here has its ``PRESETS``, by name."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

PRESETS: dict[str, Any] = {}
for _module in pkgutil.iter_modules(__path__):
    PRESETS |= importlib.import_module(f"{__name__}.{_module.name}").PRESETS
