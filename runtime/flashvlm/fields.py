"""The fields of a manifest: names that are safe as files, and numbers in the range of every model there is."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def _named(pattern: str, what: str) -> AfterValidator:
    """A text that becomes a name in the file system: of this pattern, or refused as no ``what``."""

    def check(name: str) -> str:
        if not re.fullmatch(pattern, name, re.ASCII):
            raise ValueError(f"{name!r} is not {what}")
        return name

    return AfterValidator(check)


# Never absolute, never hidden, never upwards.
FileName = Annotated[
    str,
    _named(
        r"(\w[\w.-]{0,99}/)?\w[\w.-]{0,99}",
        "the name of a file in the bundle (letters, digits, '.', '_', '-'; at most in one folder)",
    ),
]
_SIZE = r"(-[a-z0-9]{1,16}){0,2}"
VisionName = Annotated[str, _named(rf"vision{_SIZE}", "a vision graph: vision, vision-448x672")]
GraphName = Annotated[
    str,
    _named(
        rf"vision{_SIZE}|decoder|(select|prefill){_SIZE}-k[1-9][0-9]{{0,6}}",
        "a graph: vision, vision-448x672, decoder, select-k64, select-448x672-k64, prefill-k64",
    ),
]
StreamName = Annotated[str, _named(r"[a-z][a-z_]{0,31}", "a stream")]
Pattern = Annotated[str, Field(max_length=256)]
Marker = Annotated[str, Field(min_length=1, max_length=64)]
# Beyond every model there is, and small enough that no product of two allocates without end.
Tokens = Annotated[int, Field(gt=0, le=1 << 16)]
Width = Annotated[int, Field(gt=0, le=1 << 16)]
Layers = Annotated[int, Field(gt=0, le=1 << 10)]
Heads = Annotated[int, Field(gt=0, le=1 << 12)]
Vocabulary = Annotated[int, Field(gt=0, le=1 << 22)]
Slots = Annotated[int, Field(gt=0, le=1 << 24)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 22)]
MAX_PIXEL_VALUES = 1 << 27  # of all tiles of an image, float32: 537 MB
MAX_KV_VALUES = 1 << 24  # of a cache slot, keys and values of all layers: models have 10^4 to 10^6
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
