"""Command lines run in this process, and what every refusal of theirs looks like."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock


@dataclass(frozen=True)
class Ran:
    code: int
    stdout: str
    stderr: str


def run(main: Callable[[], None], *arguments: object) -> Ran:
    """What a command line does with these arguments. Sees what native code prints too."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        saved = os.dup(1), os.dup(2)
        try:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            with (
                contextlib.redirect_stdout(out),
                contextlib.redirect_stderr(err),
                mock.patch.object(sys, "argv", ["command", *map(str, arguments)]),
            ):
                try:
                    main()
                    code = 0
                except SystemExit as end:
                    code = end.code if isinstance(end.code, int) else 1
        finally:
            for number, copy in enumerate(saved, start=1):
                os.dup2(copy, number)
                os.close(copy)
        texts = []
        for stream in (out, err):
            stream.flush()
            stream.seek(0)
            texts.append(stream.read())
    return Ran(code, *texts)


def assert_refused(ran: Ran, *expected: str) -> None:
    """Exit code 2 and one line that says why; only lines of progress ("tracing ...") may precede it."""
    assert ran.code == 2, ran
    assert "Traceback" not in ran.stderr + ran.stdout
    lines = [line for line in ran.stderr.splitlines() if line.strip() and not line.endswith(" ...")]
    assert len(lines) == 1, ran.stderr
    assert ran.stderr.splitlines()[-1] == lines[0]
    assert lines[0].startswith("error: ")
    for part in expected:
        assert part in lines[0], lines[0]


def copy_of(folder: Path, tmp_path: Path, name: str = "copy") -> Path:
    return Path(shutil.copytree(folder, tmp_path / name))
