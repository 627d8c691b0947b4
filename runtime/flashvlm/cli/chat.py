"""A conversation in the terminal: questions from stdin until it ends, answers as they come."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import typer

from flashvlm.cli import support
from flashvlm.cli.answers import print_answer, print_stats
from flashvlm.errors import PromptError

if TYPE_CHECKING:
    from flashvlm.answers import Stream
    from flashvlm.budget import Budget
    from flashvlm.images import ImageSource
    from flashvlm.pipeline import Pipeline
    from flashvlm.videos import Video

PROMPT = "> "
# What arrow, home and function keys send where no readline takes them: CSI and SS3 sequences of ECMA-48.
KEYS = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|O.)")


def chat(
    pipeline: Pipeline,
    images: Sequence[ImageSource],
    videos: Sequence[Video],
    budget: Budget | None,
    reselect: bool,
    system: str | None,
    options: dict[str, Any],
    stats: bool,
) -> None:
    """Answers until an empty line or the end of input.

    Ctrl-C during an answer ends that answer, which joins the conversation as far as it came; at the prompt it raises
    KeyboardInterrupt, as in any command.
    """
    conversation = pipeline.conversation(
        images or None, video=videos or None, budget=budget, reselect=reselect, system=system
    )
    typer.echo("Ask; Ctrl-C stops an answer, an empty line or Ctrl-D ends.", err=True)
    while (question := _read()) is not None:
        _answer(pipeline, partial(conversation.stream, question, **options), stats)


def _answer(pipeline: Pipeline, start: Callable[[], Stream], stats: bool) -> None:
    """The conversation goes on without a question that is refused, and after an answer that is stopped."""
    try:
        answer = print_answer(start)
        if stats:
            print_stats(pipeline, answer)
    except PromptError as error:
        typer.echo(f"error: {error}", err=True)
    except KeyboardInterrupt:
        typer.echo("\nstopped; ask on", err=True)


def _read() -> str | None:
    """The next question, or None at the end."""
    while True:
        try:
            line = input(_prompt())
        except EOFError:
            typer.echo("", err=True)
            return None
        except UnicodeDecodeError:
            raise PromptError("the question is not UTF-8 text; save it as UTF-8") from None
        typed = KEYS.sub("", line)
        if typed.strip():
            return typed
        if typed == line:
            return None
        # Nothing but keys that are no text: not a question, and not the empty line that ends.


def _prompt() -> str:
    """What ``input`` prints. Where both ends are a terminal, its lines are edited by readline, if Python has it."""
    if support.on_terminal():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # input() uses it once imported
        return PROMPT
    sys.stderr.write(PROMPT)  # stdout holds answers alone
    sys.stderr.flush()
    return ""
