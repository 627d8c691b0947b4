"""FlashVLM runtime: bundle in, answers out. Never imports torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flashvlm.errors import FlashVLMError
    from flashvlm.pipeline import Answer, Conversation, Pipeline

__version__ = "0.1.0"
__all__ = ["Answer", "Conversation", "FlashVLMError", "Pipeline", "__version__"]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    """Loads the public names when first used: ``flashvlm-export`` needs the version, not the pipeline."""
    if name in ("Answer", "Conversation", "Pipeline"):
        from flashvlm import pipeline

        return getattr(pipeline, name)
    if name == "FlashVLMError":
        from flashvlm.errors import FlashVLMError

        return FlashVLMError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
