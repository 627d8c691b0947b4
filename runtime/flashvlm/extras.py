"""The line that installs what is missing: one that works here, whether or not an index has this project."""

from __future__ import annotations

import importlib.metadata
import re
import shlex
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # of a clone; anything else where the package is installed without one


def install(*extras: str) -> str:
    """``pip install`` for optional parts, such as ``gpu`` or ``export``.

    In a clone it installs that again with the extras; elsewhere it names their packages, as the installed package
    itself lists them.

    Example:
        >>> install("cpu")  # doctest: +SKIP
        "pip install -e '/home/me/flashvlm[cpu]'"
    """
    if (ROOT / "pyproject.toml").is_file():
        names = ",".join(extras)
        return f"pip install -e {shlex.quote(f'{ROOT}[{names}]')}"
    return "pip install " + " ".join(shlex.quote(package) for package in _packages(extras))


def upgrade() -> str:
    """How to get a newer version of this project."""
    if (ROOT / "pyproject.toml").is_file():
        return f"git -C {shlex.quote(str(ROOT))} pull"
    return "a newer clone, and in it: pip install ."


def _packages(extras: tuple[str, ...]) -> list[str]:
    """``onnxruntime>=1.31`` and so on, from lines such as ``onnxruntime>=1.31; extra == 'cpu'``."""
    found = []
    for line in importlib.metadata.requires("flashvlm") or ():
        package, _, condition = line.partition(";")
        if (extra := re.search(r"""extra\s*==\s*['"]([^'"]+)""", condition)) and extra[1] in extras:
            found.append(package.strip())
    return found
