"""A conversation in a real terminal: Ctrl-C and Ctrl-D, keys that are no text, and what each answer cost."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

# With random weights an end token is as likely as any other; where it comes before Ctrl-C, the next question is tried.
QUESTIONS = ("What is it?", "Where is it?", "Who is it?", "Why is it?")


class Terminal:
    """A child on a terminal of its own, which turns its Ctrl-C into SIGINT for it."""

    def __init__(self, *arguments: object, **environment: str) -> None:
        self.ours, theirs = pty.openpty()

        def take_terminal() -> None:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in the background
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        self.child = subprocess.Popen(
            [sys.executable, "-m", "flashvlm.cli.run", *map(str, arguments)],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=take_terminal,
            env=os.environ | {"TERM": "xterm", "COLUMNS": "200", **environment},
        )
        os.close(theirs)
        self.seen = self.log = ""

    def until(self, pattern: str, seconds: float = 60) -> str:
        """What is shown up to the first match."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.seen)):
            ready, _, _ = select.select([self.ours], [], [], max(0.0, end - time.monotonic()))
            try:
                block = os.read(self.ours, 4096) if ready else b""
            except OSError:  # the child is gone
                block = b""
            if not block:
                raise AssertionError(f"no {pattern!r} in {self.seen!r}")
            self.seen += (text := block.decode(errors="replace"))
            self.log += text
        shown, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return shown

    def send(self, text: str) -> None:
        os.write(self.ours, text.encode())

    def end(self) -> int:
        try:
            return self.child.wait(timeout=30)
        finally:
            self.child.kill()
            self.child.wait()
            os.close(self.ours)


@pytest.fixture
def chat(tiny_bundle: Path) -> Iterator[Terminal]:
    terminal = Terminal(tiny_bundle, "--max-new-tokens", "3", "--stats")
    terminal.until("> ")
    yield terminal
    terminal.child.kill()


def test_every_answer_has_its_table_and_ctrl_d_ends(chat: Terminal) -> None:
    for _ in range(2):
        chat.send("What is it?\r")
        shown = chat.until(r"ONNX Runtime [^\n]*\n")
        assert re.search(r"prefill .*\d\.\d\d", shown)
        assert re.search(r"total +\d new", shown)
        chat.until("> ")
    chat.send("\x04")
    assert chat.end() == 0


def test_arrow_keys_edit_the_line(chat: Terminal) -> None:
    pytest.importorskip("readline")
    chat.send("hat is it?\x1b[D\x1b[D\x1b[1~\x01W\r")  # left, left, home, to the start of the line
    chat.until("new")
    chat.until("> ")
    chat.send("\x1b[A")  # up: the last question again, as it was edited
    assert chat.until("What is it\\?")
    chat.send("\x15\r")
    assert chat.end() == 0


def test_keys_are_no_question_without_readline(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "readline.py").write_text("raise ImportError('none here')")
    path = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    terminal = Terminal(tiny_bundle, "--max-new-tokens", "2", PYTHONPATH=path)
    terminal.until("> ")
    terminal.send("\x1b[A\x1bOP\r")
    terminal.until("> ")  # asked again: neither a question nor the end
    terminal.send("What\x1b[D is it?\r")
    terminal.until("> ")
    terminal.send("\r")
    assert terminal.end() == 0
    assert "error" not in terminal.log


def test_ctrl_c_ends_the_answer_and_then_the_conversation(tiny_bundle: Path) -> None:
    terminal = Terminal(tiny_bundle, "--max-new-tokens", "4000", "--temperature", "2", "--seed", "5")
    terminal.until("> ")
    for question in QUESTIONS:
        terminal.send(f"{question}\r")
        terminal.until(rf"{re.escape(question)}\r\n")
        shown = terminal.until(r"\S")
        terminal.send("\x03")
        if "stopped" in (shown + terminal.until("> ")):
            break
    else:
        raise AssertionError("every answer ended before Ctrl-C came")
    terminal.send(f"{question}\r")  # the conversation goes on
    terminal.until(rf"{re.escape(question)}\r\n")
    terminal.until(r"\S")
    terminal.send("\x03")
    terminal.until("stopped")  # a prompt alone may be the one before, drawn again with what was typed
    terminal.until("> ")
    for _ in range(10):  # Python's readline overlooks a signal that comes between the prompt and its first wait
        terminal.send("\x03")
        with contextlib.suppress(AssertionError):
            terminal.until("interrupted", seconds=3)
            break
    assert terminal.end() == 130
