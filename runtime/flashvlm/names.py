"""Names in a manifest that become names in the file system, or ask for a graph."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator


def named(pattern: str, what: str) -> AfterValidator:
    """A text that becomes a name in the file system: of this pattern, or refused as no ``what``."""

    def check(name: str) -> str:
        if not re.fullmatch(pattern, name, re.ASCII):
            raise ValueError(f"{name!r} is not {what}")
        return name

    return AfterValidator(check)


# Never absolute, never hidden, never upwards.
FileName = Annotated[
    str,
    named(
        r"(\w[\w.-]{0,99}/)?\w[\w.-]{0,99}",
        "the name of a file in the bundle (letters, digits, '.', '_', '-'; at most in one folder)",
    ),
]
_SIZE = r"(-[a-z0-9]{1,16}){0,2}"
VisionName = Annotated[str, named(rf"vision{_SIZE}", "a vision graph: vision, vision-448x672")]
GraphName = Annotated[
    str,
    named(
        rf"vision{_SIZE}|decoder|(select|prefill){_SIZE}-k[1-9][0-9]{{0,6}}",
        "a graph: vision, vision-448x672, decoder, select-k64, select-448x672-k64, prefill-k64",
    ),
]
