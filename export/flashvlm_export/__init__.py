"""FlashVLM export: checkpoint to bundle. The torch half of the project."""

from flashvlm import __version__

__all__ = ["__version__"]
