"""What is read as an input is a regular file of bounded size and a raster image; no other program is started for it."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from flashvlm.cli import run as cli
from flashvlm.errors import ImageError
from flashvlm.files import open_regular, parse_json, read_bytes
from flashvlm.images import MAX_BYTES, load_image
from refusals import assert_refused, copy_of, run

QUESTION = ("--prompt", "What is it?", "--max-new-tokens", "1")

EPS = """%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 50 50
%%EndComments
(MARKER) (w) file closefile
showpage
%%EOF
"""


@pytest.fixture
def odd_files(tmp_path: Path) -> Iterator[dict[str, Path]]:
    """Whatever a path may lead to that is no regular file."""
    os.mkfifo(tmp_path / "pipe")
    # The path of a socket has at most 107 bytes; that of a test's folder may have more.
    here = os.getcwd()
    os.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket")
        os.chdir(here)
        (tmp_path / "linked pipe").symlink_to(tmp_path / "pipe")
        yield {
            "a named pipe": tmp_path / "pipe",
            "a socket": tmp_path / "socket",
            "a device": Path("/dev/zero"),
            "a folder": tmp_path,
        }


def test_nothing_but_regular_files_is_opened(odd_files: dict[str, Path], tmp_path: Path) -> None:
    for kind, path in odd_files.items():
        with pytest.raises(OSError, match=rf"expected a (regular )?file, found {kind}"):
            open_regular(path)
        with pytest.raises(ImageError, match="found a"):
            load_image(path)
    with pytest.raises(OSError, match="expected a regular file, found a named pipe"):
        open_regular(tmp_path / "linked pipe")


def test_a_pipe_put_there_after_the_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    regular = tmp_path / "regular"
    regular.touch()
    os.mkfifo(tmp_path / "pipe")
    found = os.stat(regular)
    monkeypatch.setattr("flashvlm.files.os.stat", lambda *_, **__: found)
    with pytest.raises(OSError, match="found a named pipe"):
        open_regular(tmp_path / "pipe")


def test_files_have_an_end(tmp_path: Path) -> None:
    (tmp_path / "large").touch()
    os.truncate(tmp_path / "large", MAX_BYTES + 1)  # of holes alone
    with pytest.raises(ImageError, match="expected at most 1,073,741,824 bytes"):
        load_image(tmp_path / "large")
    with pytest.raises(OSError, match="expected at most 10 bytes"):
        read_bytes(tmp_path / "large", 10)
    with pytest.raises(OSError, match="expected at most 10 bytes"):
        read_bytes("/proc/self/status", 10)  # says that it is empty
    assert read_bytes("/proc/self/comm", 100)


@pytest.mark.commands
@pytest.mark.parametrize("name", ["bundle.json", "processor/tokenizer.json", "vision.onnx", "embed_tokens.safetensors"])
def test_odd_files_in_a_bundle(name: str, tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = copy_of(tiny_bundle, tmp_path)
    (bundle / name).unlink()
    os.mkfifo(bundle / name)
    assert_refused(run(cli.main, bundle, *QUESTION), Path(name).name)


@pytest.mark.commands
def test_odd_files_among_engines(tiny_gqa_half_bundle: Path, tmp_path: Path) -> None:
    bundle = copy_of(tiny_gqa_half_bundle, tmp_path)
    folder = bundle / "engines" / "tensorrt-10.3.0-sm89"
    folder.mkdir(parents=True)
    os.mkfifo(folder / "engine.json")
    ran = run(cli.main, bundle, *QUESTION, "--backend", "tensorrt")
    assert ran.code == 2, ran
    assert run(cli.main, bundle, *QUESTION).code == 0  # auto: passed over


# --- images ---


@pytest.mark.parametrize("name", ["picture.eps", "picture.png", "picture"])
def test_postscript_is_not_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow hands EPS to Ghostscript, whatever the name of the file says."""
    started: list[object] = []
    monkeypatch.setattr("subprocess.Popen", lambda *arguments, **_: started.append(arguments))
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", "gs", raising=False)
    PIL.Image.init()
    (tmp_path / name).write_text(EPS.replace("MARKER", str(tmp_path / "marker")))
    for source in (tmp_path / name, (tmp_path / name).read_bytes()):
        with pytest.raises(ImageError, match="another kind of file"):
            load_image(source)
    assert not started
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "PPM", "WEBP", "TIFF", "JPEG2000", "AVIF", "TGA", "ICO"])
def test_raster_formats_are_read(kind: str, tmp_path: Path) -> None:
    PIL.Image.init()
    if kind not in PIL.Image.SAVE:
        pytest.skip(f"this Pillow does not write {kind}")
    pixels = np.full((32, 32, 3), 200, dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(tmp_path / "picture", format=kind)
    assert abs(int(np.asarray(load_image(tmp_path / "picture"))[16, 16, 0]) - 200) < 8


@pytest.mark.parametrize("kind", ["PDF", "PCX", "SGI", "IM", "SPIDER", "ICNS", "MSP"])
def test_other_formats_are_not(kind: str, tmp_path: Path) -> None:
    PIL.Image.init()
    mode = {"SPIDER": "F", "MSP": "1"}.get(kind, "RGB")
    PIL.Image.new(mode, (32, 32)).save(tmp_path / "picture", format=kind)
    with pytest.raises(ImageError, match="another kind of file"):
        load_image(tmp_path / "picture")


def test_a_large_picture_with_transparency_takes_its_own_memory_and_little_more() -> None:
    """Composited whole it took four times as much; in bands the result is the same."""
    values = np.random.default_rng(0).integers(0, 256, (2000, 1500, 4), dtype=np.uint8)
    image = PIL.Image.fromarray(values)
    white = PIL.Image.new("RGBA", image.size, (255, 255, 255, 255))
    expected = PIL.Image.alpha_composite(white, image).convert("RGB")
    assert np.array_equal(np.asarray(load_image(image)), np.asarray(expected))
    deep = np.random.default_rng(1).integers(0, 65536, (2000, 1500), dtype=np.uint16)
    found = np.asarray(load_image(PIL.Image.fromarray(deep)))[..., 0]
    assert np.array_equal(found, ((deep.astype(np.uint64) * 255 + 32767) // 65535).astype(np.uint8))


# --- JSON ---


@pytest.mark.parametrize(
    "content",
    [b"[" * 60_000, b'{"a":' * 60_000, b"NaN", b"-Infinity", b"9" * 5000, b"\xff", b"", b"[" * 70 + b"]" * 70],
)
def test_json_that_is_none(content: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        parse_json(content)


def test_json() -> None:
    value = {"a": [1, 2.5, None, {"b": "c"}]}
    assert parse_json(json.dumps(value).encode()) == value
    assert parse_json(b"[" * 60 + b"]" * 60)
