"""What the tests of chats, streams and conversations share."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image

from flashvlm import Answer

QUESTION = "What is the colour of the apple?"


def png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def asked(*parts: Any) -> list[Any]:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": QUESTION}]}]


def same(found: Answer, wanted: Answer) -> bool:
    return (found.text, found.token_ids) == (wanted.text, wanted.token_ids)
