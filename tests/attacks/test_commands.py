"""Whatever happens, a command ends in one line: a full disk, a panic, names that a terminal would obey."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import typer
from PIL import Image

from flashvlm import FlashVLMError
from flashvlm.cli import run as cli
from flashvlm.cli import support as cli_support
from flashvlm.errors import printable
from refusals import assert_refused, copy_of, run

QUESTION = ("--prompt", "What is it?", "--max-new-tokens", "1")


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "flashvlm.cli.run", *map(str, arguments)]


def raising(error: BaseException) -> NoReturn:
    app = cli_support.new_app()

    @app.command()
    def fail() -> None:
        raise error

    cli_support.run(app, "fail")
    raise AssertionError


class PanicException(BaseException):
    """As PyO3 has it: no Exception."""


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (FlashVLMError("one\ntwo"), 2, "error: one two\n"),
        (
            PanicException("index 7 of\n3"),
            70,
            "error: internal error: PanicException: index 7 of 3; set",
        ),
        (KeyError("x"), 70, "error: internal error: KeyError: 'x'; set FLASHVLM_DEBUG"),
        (RecursionError("deep"), 70, "error: internal error: RecursionError"),
        (MemoryError(), 1, "error: out of memory"),
        (OSError(28, "No space left on device"), 1, "error: cannot write the output: No space left on device"),
        (BrokenPipeError(), 1, ""),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (typer.Abort(), 130, "interrupted\n"),
        (SystemExit(143), 143, ""),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_one_line_whatever_is_raised(error: BaseException, code: int, line: str) -> None:
    ran = run(lambda: raising(error))
    assert ran.code == code
    assert ran.stderr.startswith(line)
    assert ran.stderr.count("\n") <= 1


def test_where_a_bug_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHVLM_DEBUG", "1")
    with pytest.raises(KeyError):
        run(lambda: raising(KeyError("x")))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("flags", [QUESTION, (*QUESTION, "--json"), ("--help",)])
def test_a_full_disk_under_stdout(flags: tuple[str, ...], tiny_bundle: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(command(tiny_bundle, *flags), stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr == "error: cannot write the output: No space left on device\n"


@pytest.mark.parametrize("threads", ["0", "-1", "513", "100000", "1" * 30])
def test_threads(threads: str, tiny_bundle: Path) -> None:
    assert_refused(run(cli.main, tiny_bundle, *QUESTION, "--threads", threads), "--threads")


@pytest.mark.parametrize("threads", [100_000, 0, -3])
def test_threads_of_a_pipeline(threads: int, tiny_bundle: Path) -> None:
    from flashvlm import Pipeline

    with pytest.raises(FlashVLMError, match="threads: expected 1 to 512"):
        Pipeline.from_bundle(tiny_bundle, threads=threads)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[31mred\x07", "a\\x1b[31mred\\x07"),
        ("right\u202eto left", "right\\u202eto left"),
        ("no\udcfftext", "no\\udcfftext"),
        ("line\nbreak\r\n  and  blanks", "line break and blanks"),
        ("café 日本", "café 日本"),
    ],
)
def test_messages_are_one_printable_line(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert str(FlashVLMError(text)) == shown


def test_names_that_a_terminal_would_obey(tiny_bundle: Path, tmp_path: Path) -> None:
    name = "\x1b]0;owned\x07\x1b[2J.png"
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / name)
    ran = run(cli.main, tiny_bundle, "--image", tmp_path / name, *QUESTION, "--show", tmp_path / f"kept{name}")
    assert ran.code == 0, ran
    assert "\x1b" not in ran.stderr
    assert "wrote " in ran.stderr
    ran = run(cli.main, tiny_bundle, "--image", tmp_path / f"none{name}", *QUESTION)
    assert_refused(ran, "\\x1b]0;owned\\x07")
    assert "\x1b" not in ran.stderr
    bundle = copy_of(tiny_bundle, tmp_path, f"bundle{name}")
    (bundle / "vision.data").unlink()
    ran = run(cli.main, bundle, *QUESTION)
    assert_refused(ran, "vision.data is missing")
    assert "\x1b" not in ran.stderr


def test_an_answer_that_a_terminal_would_obey(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal its escapes are shown; a file or a pipe gets the text as it is."""
    text = "a\x1b[2Jb\n\tc\x9b31m"
    assert cli_support.for_terminal(text) == text
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert cli_support.for_terminal(text) == "a\\x1b[2Jb\n\tc\\x9b31m"


def test_an_answer_on_a_terminal(tiny_bundle: Path) -> None:
    ours, theirs = pty.openpty()
    child = subprocess.Popen(command(tiny_bundle, *QUESTION), stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    try:
        while block := os.read(ours, 4096):
            shown += block
    except OSError:  # the terminal is gone with the child
        pass
    os.close(ours)
    assert child.wait(timeout=60) == 0, shown
    assert b"error" not in shown
    assert shown.strip()
