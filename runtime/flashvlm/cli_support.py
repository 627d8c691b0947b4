"""What every command line of the project shares: one-line refusals, exit codes, progress, units."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from flashvlm.errors import FlashVLMError

# click's own base class; recent typer carries a private copy of click, so it is reached through what typer exports.
ClickException: type[Any] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

REFUSED = 2  # bad input, as for usage errors
FAILED = 1
INTERRUPTED = 130


def run(app: typer.Typer, name: str) -> None:
    """Runs a typer app; a refusal is one line on stderr and exit status 2, never a traceback."""
    try:
        status = app(prog_name=name, standalone_mode=False)
    except FlashVLMError as error:
        status = _refuse(str(error))
    except ClickException as error:
        status = _refuse(f"{error.format_message()} (see {name} --help)")
    except (KeyboardInterrupt, typer.Abort):  # older typer; newer ones return the status
        status = INTERRUPTED
    except BrokenPipeError:
        # The reader of our output went away (| head); Python would complain once more while closing stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = FAILED
    if status == INTERRUPTED:
        typer.echo("interrupted", err=True)
    sys.exit(status if isinstance(status, int) else 0)


def _refuse(message: str) -> int:
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    return REFUSED


def new_app() -> typer.Typer:
    return typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


class Bars:
    """Progress bars on a terminal, one line a stage elsewhere. Goes to stderr, so that stdout stays the result."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress

    def start(self, stage: str, total: int) -> Callable[[int], None]:
        if self._progress is None:
            typer.echo(f"{stage} ...", err=True)
            return lambda _: None
        progress, task = self._progress, self._progress.add_task(stage, total=total)
        return lambda amount: progress.advance(task, amount)


@contextmanager
def bars(quiet: bool = False) -> Iterator[Bars]:
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield Bars(None) if not quiet else _Silent()
        return
    columns = (TextColumn("{task.description:>12}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        yield Bars(progress)


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """A spinner on a terminal, nothing elsewhere, for work whose length is not known."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(what):
        yield


class _Silent(Bars):
    def __init__(self) -> None:
        super().__init__(None)

    def start(self, stage: str, total: int) -> Callable[[int], None]:
        return lambda _: None


def megabytes(size: int) -> str:
    """Bytes as decimal MB or GB, as disks and model cards count."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"
