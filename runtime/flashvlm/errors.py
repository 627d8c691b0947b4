"""The one exception base of both packages."""

import reprlib
from collections.abc import Iterator
from contextlib import contextmanager


def printable(text: object) -> str:
    """Text on one line that a terminal takes for nothing but text: what it cannot show, or would obey, as an escape.

    Blanks and line breaks become one space each; control characters, bytes that are no text and what turns the
    direction of reading become ``\\x1b``, ``\\udcff``, ``\\u202e``.
    """
    joined = " ".join(str(text).split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in joined)


def brief(value: object) -> str:
    """What a message quotes of a value that may be anything: its ``repr``, at most some 100 characters of it."""
    try:
        return _BRIEF.repr(value[:80] if isinstance(value, (bytes, bytearray)) else value)
    except Exception:  # of objects that fail to say what they are, and integers of over 4300 digits
        return f"a value of type {type(value).__name__}"


_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = 80
_BRIEF.maxlist = _BRIEF.maxtuple = _BRIEF.maxdict = 3
_BRIEF.maxlevel = 2


def one_line(error: BaseException) -> str:
    """Libraries explain themselves over many lines; a refusal has one, of some 300 characters."""
    text = printable(error) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}..."


class FlashVLMError(Exception):
    """A refusal the user can act on.

    The message is one printable line, whatever it quotes, that names what was expected, what was found and, where one
    exists, the command or change that mends it. Command lines print it and exit with status 2; anything else that
    escapes is a bug.
    """

    def __init__(self, message: object) -> None:
        super().__init__(printable(message))


class CheckpointError(FlashVLMError):
    """A checkpoint is missing, incomplete, malformed or of a family that is not supported."""


class SelectionError(FlashVLMError):
    """A selection method, budget or input is invalid."""


class BundleError(FlashVLMError):
    """A bundle is missing, incomplete, altered or of another schema."""


class ImageError(FlashVLMError):
    """An image cannot be read or has a size that cannot be processed."""


class VideoError(FlashVLMError):
    """A video cannot be read, or has too few frames."""


class PromptError(FlashVLMError):
    """A prompt is empty, too long or does not match its images."""


@contextmanager
def no_panic() -> Iterator[None]:
    """Around calls of libraries in Rust: their panics are no ``Exception``, and become a RuntimeError here."""
    try:
        yield
    except (Exception, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise RuntimeError(f"{type(error).__name__}: {error}") from None
