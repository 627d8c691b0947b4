"""The one exception base of both packages."""


class FlashVLMError(Exception):
    """A refusal the user can act on.

    The message is one line that names what was expected, what was found and, where one exists, the command
    or change that mends it. Command lines print it and exit with status 2; anything else that escapes is a bug.
    """


class CheckpointError(FlashVLMError):
    """A checkpoint is missing, incomplete, malformed or of a family that is not supported."""


class SelectionError(FlashVLMError):
    """A selection method, budget or input is invalid."""


class BundleError(FlashVLMError):
    """A bundle is missing, incomplete, altered or of another schema."""


class ImageError(FlashVLMError):
    """An image cannot be read or has a size that cannot be processed."""


class PromptError(FlashVLMError):
    """A prompt is empty, too long or does not match its images."""
