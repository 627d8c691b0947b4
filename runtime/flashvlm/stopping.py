"""Stop strings: text that ends an answer wherever it appears, also when it arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence

from flashvlm.errors import PromptError, brief

MAX_STOPS = 16
MAX_STOP = 256  # characters of one


def parse_stop(value: object) -> tuple[str, ...]:
    """The option ``stop``: one string, a list or tuple of them, or None for none.

    Raises:
        PromptError: it is something else, has an empty string, more than ``MAX_STOPS`` strings or one of more than
            ``MAX_STOP`` characters.

    Example:
        >>> parse_stop("\\n\\n")
        ('\\n\\n',)
    """
    stops = () if value is None else (value,) if isinstance(value, str) else value
    expected = f"stop: expected at most {MAX_STOPS} strings of 1..{MAX_STOP} characters"
    if not isinstance(stops, (list, tuple)):
        raise PromptError(f"{expected}, found {brief(value)}")
    if len(stops) > MAX_STOPS:
        raise PromptError(f"{expected}, found {len(stops)} strings")
    for stop in stops:
        if not isinstance(stop, str) or not stop:
            raise PromptError(f"{expected}, found {brief(stop)}")
        if len(stop) > MAX_STOP:
            raise PromptError(f"{expected}, found one of {len(stop)} characters")
    return tuple(stops)


class StopStrings:
    """Ends streamed text before the first stop string.

    The stop string that is complete first wins; of several that end at the same character, the one that began first.
    So the result does not depend on how the text was cut into pieces, and an answer never waits for another token once
    it has ended. Text that may be the beginning of a stop string is held back until it is known.

    Example:
        >>> stops = StopStrings(["USER:", "\\n\\n"])
        >>> stops.push("On the sofa.\\n"), stops.push("\\nUSER: and?")
        ('On the sofa.', '')
        >>> stops.found
        '\\n\\n'
    """

    def __init__(self, stops: str | Sequence[str] | None) -> None:
        """Raises PromptError as ``parse_stop``."""
        self._stops = parse_stop(stops)
        self._held = ""
        self.found: str | None = None  #: the stop string that ended the text

    def push(self, piece: str) -> str:
        """The text that is safe to show with this piece. Nothing follows a stop string, nor is it part of the text."""
        if self.found is not None:
            return ""
        text = self._held + piece
        ends = [(start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if ends:
            _, start, self.found = min(ends)
            self._held = ""
            return text[:start]
        safe = len(text) - self._unsure(text)
        self._held = text[safe:]
        return text[:safe]

    def flush(self) -> str:
        """What was held back, at the end of the text: no stop string follows any more."""
        held, self._held = self._held, ""
        return held

    def _unsure(self, text: str) -> int:
        """How many characters at the end of ``text`` are the beginning of a stop string."""
        longest = max(map(len, self._stops), default=1) - 1
        tails = (text[-n:] for n in range(min(longest, len(text)), 0, -1))
        return next((len(tail) for tail in tails if any(stop.startswith(tail) for stop in self._stops)), 0)
