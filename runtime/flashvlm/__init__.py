"""FlashVLM runtime: bundle in, answers out. Never imports torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flashvlm.answers import Answer, AsyncStream, Stream
    from flashvlm.conversation import Conversation
    from flashvlm.errors import FlashVLMError
    from flashvlm.pipeline import Pipeline
    from flashvlm.sampling import SamplingParams
    from flashvlm.videos import Video, load_video

__version__ = "0.1.0"
_PLACES = {
    "Answer": "answers",
    "AsyncStream": "answers",
    "Conversation": "conversation",
    "FlashVLMError": "errors",
    "Pipeline": "pipeline",
    "SamplingParams": "sampling",
    "Stream": "answers",
    "Video": "videos",
    "load_video": "videos",
}
__all__ = [
    "Answer",
    "AsyncStream",
    "Conversation",
    "FlashVLMError",
    "Pipeline",
    "SamplingParams",
    "Stream",
    "Video",
    "__version__",
    "load_video",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    """Loads the public names when first used: ``flashvlm-export`` needs the version, not the pipeline."""
    if name in _PLACES:
        return getattr(importlib.import_module(f"flashvlm.{_PLACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
