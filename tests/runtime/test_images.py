import contextlib
import io
import subprocess
import sys
import warnings

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashvlm.errors import ImageError
from flashvlm.images import MAX_PIXELS, image_digest, load_image


def noise(height, width, channels=3, seed=0):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(image, format, **kwargs):
    out = io.BytesIO()
    image.save(out, format, **kwargs)
    return out.getvalue()


@pytest.fixture(scope="module")
def convert_to_rgb():
    from transformers.image_transforms import convert_to_rgb

    return lambda image: convert_to_rgb(image, return_numpy=True)


@pytest.mark.parity
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"])
def test_modes_equal_transformers(convert_to_rgb, mode):
    image = PIL.Image.fromarray(noise(20, 31, 4))
    image = image.convert("RGB").convert("P").convert("PA") if mode == "PA" else image.convert(mode)
    np.testing.assert_array_equal(np.asarray(load_image(image)), convert_to_rgb(image))


@pytest.mark.parity
@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_png_transparency_equals_transformers(convert_to_rgb, mode):
    image = PIL.Image.fromarray(noise(20, 31)).convert(mode)
    colour = image.getpixel((3, 3))
    data = encoded(image, "PNG", transparency=bytes([0, 128]) if mode == "P" else colour)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = load_image(data)
    np.testing.assert_array_equal(np.asarray(got), convert_to_rgb(PIL.Image.open(io.BytesIO(data))))
    if mode == "RGB":
        assert got.getpixel((3, 3)) == (255, 255, 255)


def test_premultiplied_alpha_and_file_formats():
    image = PIL.Image.fromarray(noise(20, 31, 4))
    assert load_image(image.convert("RGBa")).mode == "RGB"
    assert load_image(image.convert("LA").convert("La")).mode == "RGB"
    rgb = image.convert("RGB")
    for format, exact in [
        ("PNG", True),
        ("BMP", True),
        ("TIFF", True),
        ("PPM", True),
        ("JPEG", False),
        ("GIF", False),
    ]:
        got = load_image(encoded(rgb, format))
        assert got.size == rgb.size
        assert not exact or got.tobytes() == rgb.tobytes()
    assert load_image(encoded(rgb.convert("CMYK"), "JPEG")).mode == "RGB"


@pytest.mark.parametrize("format", ["PNG", "TIFF", "array"])
def test_16_bit_gray_is_scaled(format):
    deep = PIL.Image.fromarray(np.array([[0, 256, 257, 32768, 65535]], np.uint16))
    got = load_image(deep if format == "array" else encoded(deep, format))
    assert np.asarray(got)[0, :, 1].tolist() == [0, 1, 1, 128, 255]


def test_32_bit_gray():
    assert load_image(PIL.Image.fromarray(np.array([[0, 65535]], np.int32))).getpixel((1, 0)) == (
        255,
        255,
        255,
    )
    assert load_image(PIL.Image.fromarray(np.array([[0.0, 1.0]], np.float32))).getpixel((1, 0)) == (
        255,
        255,
        255,
    )
    with pytest.raises(ImageError, match=r"0\.\.65535, found -1\.\.7"):
        load_image(PIL.Image.fromarray(np.array([[-1, 7]], np.int32)))
    with pytest.raises(ImageError, match=r"floats in \[0, 1\], found 0\.\.300"):
        load_image(PIL.Image.fromarray(np.array([[0.0, 300.0]], np.float32)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation):
    upright = PIL.Image.fromarray(noise(4, 6))
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    got = load_image(encoded(upright, "PNG", exif=exif))
    assert got.size == ((6, 4) if orientation < 5 else (4, 6))
    where = {1: (0, 0), 2: (5, 0), 3: (5, 3), 4: (0, 3), 5: (0, 0), 6: (3, 0), 7: (3, 5), 8: (0, 5)}[orientation]
    assert got.getpixel(where) == upright.getpixel((0, 0))
    assert load_image(got).tobytes() == got.tobytes()


def test_first_frame_of_an_animation():
    frames = [PIL.Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert load_image(data).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_arrays(channels):
    array = noise(5, 7, channels)
    image = load_image(array)
    assert image.mode == "RGB"
    assert image.size == (7, 5)
    assert image.tobytes() == load_image((array / 255).astype(np.float32)).tobytes()
    assert image.tobytes() == load_image(array[::1, ::-1][:, ::-1]).tobytes()  # not contiguous
    if channels == 1:
        assert image.tobytes() == load_image(array[..., None]).tobytes()


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((3, 8, 8), np.uint8), "channels last"),
        (np.zeros((8, 8, 2), np.uint8), "found shape"),
        (np.zeros(8, np.uint8), "found shape"),
        (np.zeros((1, 8, 8, 3), np.uint8), "found shape"),
        (np.zeros((8, 8), np.int64), "found int64"),
        (np.zeros((8, 8), bool), "found bool"),
        (np.full((8, 8), 200.0), r"found 200\.\.200"),
        (np.full((8, 8), -0.1), r"found -0.1"),
        (np.full((8, 8), np.nan), "found nan"),
        (np.full((8, 8), np.inf), "found inf"),
        (np.zeros((0, 8, 3), np.uint8), "found 8 x 0"),
        (np.zeros((0, 8, 3), np.float32), "found 8 x 0"),
        (np.zeros((1, 201), np.uint8), "201 x 1"),
    ],
)
def test_bad_arrays_are_refused(array, words):
    with pytest.raises(ImageError, match=words):
        load_image(array)


def test_bad_files_are_refused(tmp_path):
    good = encoded(PIL.Image.fromarray(noise(64, 64)), "PNG")
    (tmp_path / "cut.png").write_bytes(good[: len(good) // 2])
    (tmp_path / "cut.jpg").write_bytes(encoded(PIL.Image.fromarray(noise(64, 64)), "JPEG")[:900])
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty.png").write_bytes(b"")
    cases = {
        "missing.png": "found nothing there",
        ".": "found a folder",
        "cut.png": "damaged",
        "cut.jpg": "damaged",
        "text.png": "another kind of file",
        "empty.png": "an empty file",
        "nul\0.png": "null",
        "x" * 5000: "found: ",
    }
    for name, words in cases.items():
        with pytest.raises(ImageError, match=words) as refusal:
            load_image(f"{tmp_path}/{name}")
        assert "\n" not in str(refusal.value)
        assert len(str(refusal.value)) < 1000
    with pytest.raises(ImageError, match="found nothing there"):
        load_image("")
    for url in ("http://a.b/c.png", "https://a.b/c.png", "s3://a/b.png", "data:image/png;base64,AAAA"):
        with pytest.raises(ImageError, match="URLs are not fetched; download it and pass the path"):
            load_image(url)
    with pytest.raises(ImageError, match="found NoneType"):
        load_image(None)
    with pytest.raises(ImageError, match="found 0 x 5"):
        load_image(PIL.Image.new("RGB", (0, 5)))
    closed = PIL.Image.new("RGB", (5, 5))
    closed.close()
    with pytest.raises(ImageError):
        load_image(closed)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**9), st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP"]))
def test_damaged_files_are_read_or_refused(seed, format):
    rng = np.random.default_rng(seed)
    data = bytearray(encoded(PIL.Image.fromarray(noise(16, 16)), format))
    for _ in range(rng.integers(1, 6)):
        data[rng.integers(len(data))] = rng.integers(256)
    with contextlib.suppress(ImageError):
        assert load_image(bytes(data[: rng.integers(1, len(data) + 1)])).mode == "RGB"


def test_size_limits_are_checked_before_decoding():
    # A header alone: any attempt to decode would say "damaged" instead.
    for width, height in [(20_000, 20_000), (100_000, 1000), (13_377, 13_377)]:
        assert width * height > MAX_PIXELS / 2
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            words = "expected at most 178,956,970 pixels" if width == 20_000 else "damaged"
            with pytest.raises(ImageError, match=words):
                load_image(f"P5 {width} {height} 255\n".encode())
    with pytest.raises(ImageError, match="aspect ratio up to 200:1, found 20001 x 100"):
        load_image(b"P5 20001 100 255\n")
    assert load_image(PIL.Image.new("L", (20_000, 100))).size == (20_000, 100)


def test_paths(tmp_path):
    image = PIL.Image.fromarray(noise(5, 7))
    path = tmp_path / "bild ü.png"
    image.save(path)
    assert load_image(path).tobytes() == load_image(str(path)).tobytes() == image.tobytes()


def test_digest():
    a, b = PIL.Image.fromarray(noise(6, 6)), PIL.Image.fromarray(noise(6, 6, seed=1))
    assert image_digest(a) == image_digest(load_image(encoded(a, "PNG")))
    assert len({image_digest(i) for i in (a, b, a.resize((3, 12)), PIL.Image.new("RGB", (4, 9)), a.convert("L"))}) == 5


def test_importing_the_leaf_modules_needs_no_torch():
    code = (
        "import sys, flashvlm.images, flashvlm.messages, flashvlm.sampling, flashvlm.kept_picture;"
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_kinds_that_have_a_remedy_of_their_own(tmp_path):
    (tmp_path / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(200))
    with pytest.raises(ImageError, match="found HEIC; save it as JPEG, or open it with pillow-heif"):
        load_image(tmp_path / "phone.heic")
    with pytest.raises(ImageError, match="found an empty file"):
        load_image(b"")
    for url in ("https:/a.b/c.png", "https://a.b/c.png"):
        with pytest.raises(ImageError, match=r"^https://a\.b/c\.png: expected a file, found a URL"):
            load_image(url)
