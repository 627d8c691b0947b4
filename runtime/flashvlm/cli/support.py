"""What every command line of the project shares: one-line refusals, exit codes, stdin, progress."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from flashvlm.errors import FlashVLMError, printable
from flashvlm.sizes import format_size

# click's own base class; recent typer carries a private copy of click, so it is reached through what typer exports.
ClickException: type[Any] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

REFUSED = 2  # bad input, as for usage errors
FAILED = 1
BUG = 70  # EX_SOFTWARE of sysexits.h: the input may be bad, but this is no refusal of it
INTERRUPTED = 130
TERMINATED = 143
DEBUG = "FLASHVLM_DEBUG"


def run(app: typer.Typer, name: str) -> None:
    """Runs a typer app; a refusal is one line on stderr and exit status 2, never a traceback.

    What is neither a refusal nor a result is a bug, and one line too; FLASHVLM_DEBUG=1 shows where it comes from.
    """
    with contextlib.suppress(ValueError):  # not in the main thread: whoever runs it there has its own
        # By exception, so that what is half written is taken away.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    try:
        status = app(prog_name=name, standalone_mode=False)
        sys.stdout.flush()
    except FlashVLMError as error:
        status = _fail(str(error), REFUSED)
    except ClickException as error:
        status = _fail(f"{error.format_message()} (see {name} --help)", REFUSED)
    except (KeyboardInterrupt, typer.Abort):  # older typer; newer ones return the status
        status = INTERRUPTED
    except SystemExit as end:
        status = end.code
    except MemoryError:
        status = _fail("out of memory; close other programs, or take a smaller image, batch or model", FAILED)
    except BaseException as error:  # libraries in Rust panic with classes that are no Exception
        if isinstance(error, OSError) and error.filename is None:
            status = _lost_output(error)
        elif os.environ.get(DEBUG):
            raise
        else:
            status = _fail(f"internal error: {type(error).__name__}: {error}; set {DEBUG}=1 to see where", BUG)
    if status == INTERRUPTED:
        typer.echo("interrupted", err=True)
    sys.exit(status if isinstance(status, int) else 0)


def _lost_output(error: OSError) -> int:
    """The reader of our output went away (| head), or its disk is full."""
    # Python would complain once more while closing stdout.
    os.dup2(os.open(os.devnull, os.O_RDWR), sys.stdout.fileno())
    if isinstance(error, BrokenPipeError):
        return FAILED
    return _fail(f"cannot write the output: {error.strerror or error}", FAILED)


def _fail(message: str, status: int) -> int:
    with contextlib.suppress(OSError):  # nowhere left to say it
        typer.echo(f"error: {printable(message)}", err=True)
    return status


def for_terminal(text: str) -> str:
    """Text of a model or a file for stdout: on a terminal, control characters that it would obey become escapes."""
    if not sys.stdout.isatty():
        return text
    obeyed = {c for c in text if unicodedata.category(c) == "Cc"} - {"\n", "\t"}
    return text.translate({ord(c): c.encode("unicode_escape").decode() for c in obeyed})


class _App(typer.Typer):
    """Whose commands know ``-h`` as well."""

    def command(self, *arguments: Any, **options: Any) -> Any:
        options.setdefault("context_settings", {"help_option_names": ["-h", "--help"]})
        return super().command(*arguments, **options)


def new_app() -> typer.Typer:
    """An app for one command, with ``--install-completion`` and ``--show-completion``."""
    return _App(rich_markup_mode=None, pretty_exceptions_enable=False)


# --- stdin ---------------------------------------------------------------------------------------------------------

MAX_IMAGE, MAX_TEXT = 1 << 30, 1 << 20  # bytes: of an image as of an image file, and of a question


def on_terminal() -> bool:
    """Whether someone types at stdin and reads at stdout."""
    return sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()


def read_stdin(flag: str, limit: int = MAX_IMAGE) -> bytes:
    """All of stdin.

    Raises:
        FlashVLMError: there is none, or more than ``limit`` bytes of it.
    """
    if sys.stdin is None:
        raise FlashVLMError(f"{flag}: stdin is closed; give a file")
    content = sys.stdin.buffer.read(limit + 1)
    if len(content) > limit:
        raise FlashVLMError(f"{flag}: expected at most {format_size(limit)} on stdin, found more")
    return content


def read_stdin_text(flag: str) -> str:
    """All of stdin as UTF-8, without the blanks around it."""
    try:
        return read_stdin(flag, MAX_TEXT).decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise FlashVLMError(f"{flag}: expected UTF-8 text on stdin, found another kind ({error.reason})") from None


# --- progress ------------------------------------------------------------------------------------------------------


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
