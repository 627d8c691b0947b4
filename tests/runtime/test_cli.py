"""What all four commands have alike: version, help, completion, python -m; and stdin as image or question."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flashvlm import __version__
from flashvlm.cli import options
from flashvlm.cli import profile as cli_profile
from flashvlm.cli import run as cli_run
from flashvlm.sessions.providers import PROVIDERS
from flashvlm_export.cli import compile as cli_compile
from flashvlm_export.cli import export as cli_export
from refusals import run

MAINS = {
    "flashvlm-run": cli_run.main,
    "flashvlm-profile": cli_profile.main,
    "flashvlm-export": cli_export.main,
    "flashvlm-compile": cli_compile.main,
}
ASK = ("--max-new-tokens", "2")


def process(*arguments: object, content: bytes = b"", **environment: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", *map(str, arguments)]
    return subprocess.run(command, input=content, capture_output=True, env=os.environ | environment, timeout=120)


# --- alike ---


@pytest.mark.parametrize(("name", "main"), MAINS.items())
def test_version_and_help(name: str, main: Callable[[], None]) -> None:
    ran = run(main, "--version")
    assert (ran.code, ran.stdout, ran.stderr) == (0, f"{name} {__version__}\n", "")
    short, long = run(main, "-h"), run(main, "--help")
    assert short.code == 0
    assert short.stdout == long.stdout
    for option in ("--json", "--version", "--install-completion", "--show-completion"):
        assert option in long.stdout, option


@pytest.mark.parametrize("name", MAINS)
def test_one_thing_has_one_name(name: str) -> None:
    names = set(re.findall(r"(?<!\S)--[\w-]+", run(MAINS[name], "--help").stdout))
    assert not names & {"--budgets", "--plugin", "--static-plugin"}
    if name != "flashvlm-compile":
        assert "--budget" in names
    if name in ("flashvlm-run", "flashvlm-profile"):
        shared = {"--image", "--backend", "--provider", "--device", "--plugins", "--threads", "--engine-code"}
        assert shared <= names


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("flashvlm-run --bud", ["--budget"]),
        ("flashvlm-run b --backend tensorrt", ["tensorrt", "tensorrt-rtx"]),
        ("flashvlm-profile b --provider cu", ["cuda"]),
        ("flashvlm-export --dialect l", ["legacy"]),
        ("flashvlm-compile b --target tensorrt-", ["tensorrt-rtx"]),
    ],
)
def test_a_shell_completes(words: str, found: list[str]) -> None:
    name, *parts = words.split()
    package = "flashvlm_export" if name in ("flashvlm-export", "flashvlm-compile") else "flashvlm"
    variable = f"_{name.replace('-', '_').upper()}_COMPLETE"
    asked = {variable: "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(parts))}
    done = process(f"{package}.cli.{name.split('-')[1]}", **asked)
    assert done.stdout.decode().split() == found


def test_completion_asks_for_nothing_heavy() -> None:
    """Each press of the tab key starts the command once."""
    names = ", ".join(main.__module__ for main in MAINS.values())
    heavy = {"torch", "numpy", "PIL", "onnxruntime", "matplotlib", "pydantic"}
    code = f"import sys, {names}; sys.exit(', '.join({heavy} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_names_for_completion_are_those_that_are_taken() -> None:
    assert set(options.PROVIDERS) == {"auto", *PROVIDERS}


@pytest.mark.parametrize(("package", "command"), [("flashvlm", "run"), ("flashvlm_export", "compile")])
def test_python_m(package: str, command: str) -> None:
    assert process(package, command, "--version").stdout.decode() == f"flashvlm-{command} {__version__}\n"
    assert process(package, "--version").stdout.decode() == f"{package} {__version__}\n"
    helped, alone = process(package, "-h"), process(package)
    assert helped.returncode == 0
    assert f"flashvlm-{command}" in helped.stdout.decode()
    assert alone.returncode == 2
    assert alone.stderr == helped.stdout
    other = process(package, "dance\x1b")
    assert other.returncode == 2
    assert other.stderr.decode().startswith("error: no command 'dance\\x1b'; expected ")


# --- stdin ---


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stdin") / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(path)
    return path


def test_an_image_and_a_question_from_stdin(tiny_bundle: Path, picture: Path, tmp_path: Path) -> None:
    question = "What is it?"
    ask = ("flashvlm", "run", tiny_bundle, *ASK, "--json")
    plain = json.loads(process(*ask, "--image", picture, "--prompt", question).stdout)
    show = ("--show", tmp_path / "kept.png")
    by_image = process(*ask, "--image", "-", "--prompt", question, *show, content=picture.read_bytes())
    by_question = process(*ask, "--image", picture, "--prompt", "-", content=f"\ufeff {question}\n".encode())
    for done in (by_image, by_question):
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert (found["token_ids"], found["images"]) == (plain["token_ids"], plain["images"])
    assert (tmp_path / "kept.png").exists()


@pytest.mark.parametrize(
    ("flags", "content", "expected"),
    [
        (("--image", "-", "--prompt", "-"), b"", b"--image - and --prompt - both read stdin"),
        (("--image", "-"), b"", b"--image - and a conversation both read stdin"),
        (("--image", "-", "--prompt", "a"), b"", b"expected an image"),
        (("--image", "-", "--prompt", "a"), b"no picture", b"expected an image"),
        (("--prompt", "-"), b"", b"the prompt is empty"),
        (("--prompt", "-"), b"a\xff", b"--prompt -: expected UTF-8 text on stdin"),
        (("--prompt", "-"), b"a " * (1 << 19) + b"a", b"--prompt -: expected at most 1.05 MB on stdin"),
        ((), b"\xff\xfe?\n", b"the question is not UTF-8 text"),
    ],
)
def test_what_stdin_cannot_be(flags: tuple[str, ...], content: bytes, expected: bytes, tiny_bundle: Path) -> None:
    done = process("flashvlm", "run", tiny_bundle, *flags, content=content, PYTHONIOENCODING="utf-8")
    assert done.returncode == 2, done
    assert expected in done.stderr
    assert b"Traceback" not in done.stderr


def test_stdin_that_is_closed(tiny_bundle: Path) -> None:
    command = f'exec "{sys.executable}" -m flashvlm run "{tiny_bundle}" --prompt - <&-'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: --prompt -: stdin is closed; give a file\n"


def test_all_tokens_are_shown_too(tiny_bundle: Path, picture: Path, tmp_path: Path) -> None:
    show = tmp_path / "kept.png"
    ran = run(cli_run.main, tiny_bundle, "--image", picture, "--prompt", "a", *ASK, "--budget", "all", "--show", show)
    assert ran.code == 0, ran
    with Image.open(show) as drawn:
        assert drawn.width < 1300  # the image and what the model saw; no panel for a score that there is not
