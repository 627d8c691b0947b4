"""flashvlm-run and Pipeline refuse bad input in one line that names it and the way out."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flashvlm import FlashVLMError, Pipeline
from flashvlm.cli.run import main
from flashvlm.extras import install
from refusals import assert_refused, run

QUESTION = ("--prompt", "What is it?")


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "picture.png"
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


# --- flags ---

FLAGS: list[tuple[list[str], tuple[str, ...]]] = [
    (["--budget", "5"], ("budget 5 is not in this bundle", "has 4, 7, all", "export with --budget 5")),
    (["--budget", "0"], ("--budget 0", "expected at least 1 token, or all")),
    (["--budget", "-4"], ("--budget -4", "expected at least 1 token")),
    (["--budget", "4,7"], ("--budget '4,7'", "expected a whole number")),
    (["--budget", "17"], ("budget 17 is not in this bundle", "take one of these")),
    (["--budget", "most"], ("--budget 'most'", "whole number", "all")),
    (["--budget", ""], ("--budget ''", "whole number")),
    (["--max-new-tokens", "0"], ("max_new_tokens", ">= 1", "found 0")),
    (["--max-new-tokens", "-1"], ("max_new_tokens", ">= 1", "found -1")),
    (["--max-new-tokens", "all"], ("--max-new-tokens", "valid integer")),
    (["--temperature", "-1"], ("temperature", ">= 0", "-1.0")),
    (["--temperature", "nan"], ("temperature", "finite", "nan")),
    (["--temperature", "inf"], ("temperature", "finite", "inf")),
    (["--top-k", "-1"], ("top_k", ">= 0", "-1")),
    (["--top-p", "2"], ("top_p", "0..1", "2.0")),
    (["--seed", "-1"], ("seed", ">= 0", "-1")),
    (["--threads", "0"], ("--threads", "greater than or equal to 1")),
    (["--provider", "tpu"], ("unknown provider 'tpu'", "auto, cpu, cuda, tensorrt, tensorrt-rtx")),
    (["--show", "kept.bmp"], ("--show kept.bmp", ".png, .jpg or .webp")),
    (["--show", "kept"], ("--show kept", ".png, .jpg or .webp")),
    (["--show", "nowhere/kept.png"], ("the folder nowhere does not exist", "create it")),
    (["--budget", "most", "--backend", "tensorrt"], ("--budget 'most'",)),  # before anything is loaded
    (["--revision", "main"], ("revision main", "is no name on the Hub")),
    (["--stop", ""], ("stop: expected", "found ''")),
    (["--min-p", "2"], ("min_p: expected a number in 0..1",)),
    (["--colour", "red"], ("No such option: --colour", "flashvlm-run --help")),
]


@pytest.mark.parametrize(("flags", "expected"), FLAGS, ids=lambda value: " ".join(value))
def test_flags(flags: list[str], expected: tuple[str, ...], tiny_bundle: Path, picture: Path) -> None:
    ran = run(main, tiny_bundle, "--image", picture, *QUESTION, *flags)
    assert_refused(ran, *expected)
    assert ran.stdout == ""


def test_a_bad_budget_is_refused_before_the_bundle_is_read() -> None:
    assert_refused(run(main, "no/such/bundle", *QUESTION, "--budget", "abc"), "--budget 'abc'")


@pytest.mark.parametrize("flags", [["--json"], ["--show", "kept.png"]])
def test_flags_that_need_a_prompt(flags: list[str], tiny_bundle: Path, picture: Path) -> None:
    assert_refused(run(main, tiny_bundle, "--image", picture, *flags), "--json and --show need a --prompt")


def test_show_does_not_replace_the_image(tiny_bundle: Path, picture: Path, tmp_path: Path) -> None:
    before = picture.read_bytes()
    (tmp_path / "link.png").symlink_to(picture)
    for name in (picture, tmp_path / "link.png"):
        ran = run(main, tiny_bundle, "--image", picture, *QUESTION, "--show", name)
        assert_refused(ran, "is an input itself", "choose another name")
    (tmp_path / "kept-2.png").symlink_to(picture)  # where the second picture would go
    ran = run(main, tiny_bundle, "--image", picture, "--image", picture, *QUESTION, "--show", tmp_path / "kept.png")
    assert_refused(ran, "kept-2.png is an input itself")
    assert picture.read_bytes() == before


def test_show_needs_an_image(tiny_bundle: Path) -> None:
    assert_refused(
        run(main, tiny_bundle, *QUESTION, "--show", "kept.png"), "--show draws an image or video, found none; give one"
    )


def test_no_bundle() -> None:
    assert_refused(run(main), "Missing argument", "flashvlm-run --help")


# --- prompts ---


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("", ("the prompt is empty", "expected a question")),
        (" \n\t", ("the prompt is empty",)),
        ("What is in <image> there?", ("control token <image>", "remove it")),
        ("Bye.</s>", ("control token </s>", "remove it")),
        ("a\udcffb", ("Unicode",)),
    ],
)
def test_prompt(prompt: str, expected: tuple[str, ...], tiny_bundle: Path, picture: Path) -> None:
    assert_refused(run(main, tiny_bundle, "--image", picture, "--prompt", prompt), *expected)


def test_prompt_beyond_the_capacity(tiny_bundle: Path, picture: Path) -> None:
    ran = run(main, tiny_bundle, "--image", picture, "--prompt", "long " * 5000)
    assert_refused(ran, "tokens long with its image; this bundle holds 4096", "a smaller budget", "--max-seq")


# --- images ---


def truncated(path: Path) -> None:
    whole = path.with_name("whole.jpg")
    Image.new("RGB", (300, 300), "red").save(whole)
    path.write_bytes(whole.read_bytes()[:1200])


def header_of_a_huge_image(path: Path) -> None:
    """20,000 x 20,000 pixels, of which only the header is there: nothing may be decoded."""
    path.write_bytes(b"P6 20000 20000 255\n")


IMAGES: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "missing": (lambda path: None, ("found nothing there", "check the path")),
    "folder": (Path.mkdir, ("found a folder", "name a file in it")),
    "text": (lambda path: path.write_text("not a picture"), ("expected an image", "another kind of file")),
    "empty": (Path.touch, ("expected an image",)),
    "truncated": (truncated, ("expected a complete image", "damaged", "save it again")),
    "huge": (header_of_a_huge_image, ("expected at most 178,956,970 pixels", "downscale it")),
    "strip": (lambda path: Image.new("L", (20_000, 90)).save(path, "PNG"), ("up to 200:1", "20000 x 90", "crop")),
}


@pytest.mark.parametrize(("make", "expected"), IMAGES.values(), ids=IMAGES)
def test_image(make: Callable[[Path], object], expected: tuple[str, ...], tiny_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "image"
    make(path)
    ran = run(main, tiny_bundle, "--image", path, *QUESTION, "--show", tmp_path / "kept.png")
    assert_refused(ran, str(path), *expected)
    assert not (tmp_path / "kept.png").exists()
    # The same in a conversation, before the first question.
    ran = run(main, tiny_bundle, "--image", path)
    assert_refused(ran, str(path), *expected)


def test_url(tiny_bundle: Path) -> None:
    ran = run(main, tiny_bundle, "--image", "https://x.org/cat.jpg", *QUESTION)
    assert_refused(ran, "https://x.org/cat.jpg", "URLs are not fetched")


@pytest.mark.parametrize("size", [(1, 1), (20_000, 100)])
def test_odd_images_that_work(size: tuple[int, int], tiny_bundle: Path, tmp_path: Path) -> None:
    Image.new("RGB", size, "teal").save(tmp_path / "odd.png")
    ran = run(main, tiny_bundle, "--image", tmp_path / "odd.png", *QUESTION, "--max-new-tokens", "2")
    assert (ran.code, ran.stderr) == (0, "")
    assert ran.stdout.strip()


def test_picture_that_cannot_be_written(tiny_bundle: Path, picture: Path, tmp_path: Path) -> None:
    (tmp_path / "kept.png").mkdir()
    show = tmp_path / "kept.png"
    assert_refused(run(main, tiny_bundle, "--image", picture, *QUESTION, "--show", show), f"--show {show}", "written")
    assert os.listdir(tmp_path) == ["kept.png"]


# --- the installation ---


def test_onnxruntime_not_installed(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert_refused(run(main, tiny_bundle, *QUESTION), "ONNX Runtime is not installed", install("cpu"))


def test_no_cuda(tiny_bundle: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    ran = run(main, tiny_bundle, *QUESTION, "--provider", "cuda")
    assert_refused(ran, "no cuda provider", install("gpu"))


# --- signals and pipes, in processes of their own ---


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "flashvlm.cli.run", *map(str, arguments)]


def test_nobody_reads_the_answer(tiny_bundle: Path, picture: Path) -> None:
    """As with ``| head -c 1``, here with a reader that left before."""
    read, write = os.pipe()
    os.close(read)
    process = subprocess.Popen(
        command(tiny_bundle, "--image", picture, *QUESTION), stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    assert process.communicate()[1] == ""
    assert process.returncode == 1


def test_a_whole_process(tiny_bundle: Path) -> None:
    done = subprocess.run(command(tiny_bundle, "--prompt", ""), capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: the prompt is empty; expected a question\n"


# --- Python ---


@pytest.fixture(scope="module")
def pipeline(tiny_bundle: Path) -> Pipeline:
    return Pipeline.from_bundle(tiny_bundle)


GRAY = np.zeros((20, 20), dtype=np.uint8)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"image": 123}, "expected a path, bytes, an open file, a PIL image or an array .*, found 123"),
        ({"image": GRAY.astype(np.int64)}, "expected uint8 or float"),
        ({"image": []}, "expected an image, a list of them or None, found an empty list"),
        ({"image": [GRAY], "prompt": ["a", "b"]}, "expected 2 image.* for 2 prompt.*, found 1"),
        ({"prompt": None}, "expected a question or a list of them, found None"),
        ({"prompt": 5}, "expected a question or a list of them, found 5"),
        ({"prompt": b"what"}, "expected a question or a list of them, found b'what'"),
        ({"prompt": []}, r"expected a question or a list of them, found \[\]"),
        ({"prompt": [None]}, "expected a question as a str, found None"),
        ({"prompt": ["a", ""]}, "the prompt is empty"),
        ({"budget": True}, "budget True is not in this bundle, which has 4, 7, all; take one of these"),
        ({"budget": 3.5}, "budget 3.5 is not in this bundle"),
        ({"budget": 4.0}, "budget 4.0 is not in this bundle"),
        ({"budget": [4]}, r"budget \[4\] is not in this bundle"),
        ({"budget": "4"}, "budget '4' is not in this bundle"),
        ({"max_new_tokens": 2.5}, "max_new_tokens: expected an integer >= 1, found 2.5"),
        ({"max_new_tokens": True}, "max_new_tokens: expected an integer >= 1, found True"),
        ({"max_new_tokens": "8"}, "max_new_tokens: expected an integer >= 1, found '8'"),
        ({"max_new_tokens": None}, "max_new_tokens: expected an integer >= 1, found None"),
        ({"temperature": "hot"}, "temperature: expected a finite number"),
        ({"temperature": math.nan}, "temperature: expected a finite number"),
        ({"top_p": None}, "top_p: expected a number"),
        ({"seed": 1.5}, "seed: expected an integer"),
    ],
)
def test_generate(arguments: dict[str, Any], expected: str, pipeline: Pipeline) -> None:
    with pytest.raises(FlashVLMError, match=expected) as refusal:
        pipeline.generate(**{"image": GRAY, "prompt": "What is it?", "max_new_tokens": 2, **arguments})
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("prompt", [None, 5, ["a"], ""])
def test_stream(prompt: Any, pipeline: Pipeline) -> None:
    with pytest.raises(FlashVLMError, match="prompt"):
        pipeline.stream(GRAY, prompt)
    conversation = pipeline.conversation(GRAY)
    with pytest.raises(FlashVLMError, match="prompt"):
        conversation.ask(prompt)
    assert conversation.messages == ()
