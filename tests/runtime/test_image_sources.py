"""Images from open files, views of memory and what numpy takes for an array."""

import contextlib
import io
import os
import pathlib

import numpy as np
import PIL.Image
import pytest

from flashvlm.errors import ImageError
from flashvlm.images import is_source, load_image


def noise(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(height, width):
    out = io.BytesIO()
    PIL.Image.fromarray(noise(height, width)).save(out, "PNG")
    return out.getvalue()


def test_open_files(tmp_path):
    image = PIL.Image.fromarray(noise(5, 7))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")  # which leaves it at its end
    for _ in range(2):
        assert load_image(buffer).tobytes() == image.tobytes()
    (tmp_path / "a.png").write_bytes(buffer.getvalue())
    with open(tmp_path / "a.png", "rb") as file, open(tmp_path / "a.png", "rb", buffering=0) as raw:
        assert load_image(file).tobytes() == load_image(raw).tobytes() == image.tobytes()
    for view in (bytearray(buffer.getvalue()), memoryview(buffer.getvalue()), buffer.getbuffer()):
        assert load_image(view).tobytes() == image.tobytes()


def test_pipes_and_short_reads():
    """What cannot seek, and gives less than it is asked for, is read to its end."""
    data = png(50, 70)

    class Trickle:
        left = data

        def read(self, size):
            block, self.left = self.left[: min(size, 100)], self.left[min(size, 100) :]
            return block

    assert load_image(Trickle()).size == (70, 50)
    reading, writing = os.pipe()
    with open(reading, "rb") as pipe:
        with open(writing, "wb") as other:
            other.write(data[:9000])
        with contextlib.suppress(ImageError):
            assert load_image(pipe).size == (70, 50)


def test_files_without_an_end(monkeypatch):
    monkeypatch.setattr("flashvlm.images.MAX_BYTES", 1 << 20)
    with open("/dev/zero", "rb") as endless, pytest.raises(ImageError, match="expected at most 1,048,576 bytes"):
        load_image(endless)


def test_bad_open_files(tmp_path):
    (tmp_path / "a.png").write_bytes(png(5, 7))
    closed = io.BytesIO()
    closed.close()

    class Odd:
        def __init__(self, block):
            self.block = block

        def read(self, size):
            return self.block

    with open(tmp_path / "a.png") as text, open(tmp_path / "b", "wb") as for_writing:
        for file in (closed, text, io.StringIO("text"), for_writing, io.BytesIO, Odd("text"), Odd([1000])):
            with pytest.raises(ImageError, match=r"^image file: expected one open in mode 'rb', found: ") as refusal:
                load_image(file)
            assert "\n" not in str(refusal.value)
    for nothing in (io.BytesIO(), io.StringIO(), Odd(b""), Odd(None)):
        with pytest.raises(ImageError, match=r"image file: .* found an empty file"):
            load_image(nothing)
    view = memoryview(b"x")
    view.release()
    with pytest.raises(ImageError, match="image bytes: expected bytes, found: operation forbidden on released"):
        load_image(view)


def test_what_numpy_takes_for_an_array():
    import torch

    array = noise(5, 7)
    assert load_image(torch.from_numpy(array)).tobytes() == load_image(array).tobytes()
    with pytest.raises(ImageError, match=r"array: expected one that numpy reads, found: .*detach"):
        load_image(torch.zeros(5, 7, 3, requires_grad=True))
    with pytest.raises(ImageError, match="found int64"):
        load_image(torch.zeros(5, 7, dtype=torch.int64))
    with pytest.raises(ImageError, match="found shape"):
        load_image(np.float32(1))


def test_sources_are_known_by_their_type():
    good = [
        "a",
        b"",
        bytearray(),
        memoryview(b""),
        PIL.Image.new("L", (1, 1)),
        np.zeros(1),
        io.BytesIO(),
        pathlib.Path(),
    ]
    assert all(map(is_source, good))
    assert not any(map(is_source, [None, 1, 1.0, True, [], {}, ["a"], object(), (1, 2)]))
