"""Images: any file, bytes, PIL image or array -> RGB."""

import hashlib
import io
import os
import re
import warnings
from collections.abc import Iterator
from typing import BinaryIO, Protocol, runtime_checkable

import numpy as np
import PIL.Image
import PIL.ImageOps

from flashvlm.errors import ImageError
from flashvlm.files import open_regular

# What is decoded. Pillow reads more than raster files, and hands some to other programs: EPS to Ghostscript.
COMMON = ("PNG", "JPEG", "GIF", "BMP", "DIB", "PPM")  # what Pillow has without loading its other plugins
OTHERS = ("WEBP", "TIFF", "AVIF", "JPEG2000", "TGA", "ICO")
MAX_BYTES = 1 << 30  # of a file: 178 megapixels of four bytes, and some room
READ = 1 << 24  # bytes of a file object at a time
BAND = 1 << 21  # pixels that are converted at a time, where a conversion takes copies

# Pillow's own decompression-bomb error threshold: above it `Image.open` raises whatever we would like.
MAX_PIXELS = 178_956_970
# Resizing the short edge of a 1 x 100,000 strip to 336 would ask for 11 gigapixels.
MAX_ASPECT = 200


@runtime_checkable
class ArrayLike(Protocol):
    """What numpy takes for an array: tensors of torch (on the CPU), of JAX, ..."""

    def __array__(self) -> np.ndarray: ...


@runtime_checkable
class Readable(Protocol):
    """A file opened for reading bytes."""

    def read(self, size: int, /) -> bytes | None: ...


ImageSource = (
    str | os.PathLike[str] | bytes | bytearray | memoryview | PIL.Image.Image | np.ndarray | ArrayLike | Readable
)

SOURCES = "a path, bytes, an open file, a PIL image or an array"


def load_image(source: ImageSource) -> PIL.Image.Image:
    """Read an image as RGB.

    `source` is a path, the bytes of an image file, a file opened for reading bytes (read from its start where
    it can seek), a PIL image or an array, [H,W] or [H,W,C] with C in 1, 3, 4, uint8 or float in [0, 1]. EXIF
    orientation is applied, the first frame of an animation is taken, transparency is composited on white (as
    transformers' `convert_to_rgb` does), and 16-bit gray is scaled to 8 bits (plain PIL would saturate it).

    Raises ImageError for anything that cannot be read, is empty, has more than MAX_PIXELS pixels (checked in
    the header, before decoding) or has one side over MAX_ASPECT times the other. URLs are not fetched.

    Example:
        >>> load_image(np.zeros((2, 3), np.uint8)).size
        (3, 2)
    """
    # Pillow warns about large images, odd EXIF and palettes with transparency; all three are handled below.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if isinstance(source, PIL.Image.Image):
            return _decode(source, "PIL image")
        if isinstance(source, np.ndarray):
            return _decode(_from_array(source), "array")
        if isinstance(source, (bytes, bytearray, memoryview)):
            return _open(io.BytesIO(_bytes(source)), "image bytes")
        if isinstance(source, (str, os.PathLike)):
            return _from_path(os.fspath(source))
        if isinstance(source, Readable):
            return _open(io.BytesIO(_read(source)), "image file")
        if isinstance(source, ArrayLike):
            return _decode(_from_array(_array(source)), "array")
    found = type(source).__name__
    raise ImageError(f"image: expected {SOURCES}, found {found}; convert it first")


def is_source(value: object) -> bool:
    """Whether `load_image` takes a value of this type."""
    known = (str, os.PathLike, bytes, bytearray, memoryview, PIL.Image.Image, ArrayLike, Readable)
    return isinstance(value, known)


def is_url(name: str) -> bool:
    """Whether a name is a URL rather than a path; Path() makes one slash of two."""
    return "://" in name[:16] or name.startswith(("data:", "http:/", "https:/"))


def image_digest(image: PIL.Image.Image) -> str:
    """sha256 (hex) of mode, size and pixels: equal for equal pictures, however they were stored."""
    digest = hashlib.sha256(f"{image.mode} {image.width}x{image.height}\n".encode())
    for box in _bands(image.size):
        digest.update(image.crop(box).tobytes())
    return digest.hexdigest()


def _from_path(path: str | bytes) -> PIL.Image.Image:
    name = os.fsdecode(path)
    if is_url(name):
        remedy = "URLs are not fetched; download it and pass the path"
        url = re.sub(r"^([a-z0-9]+):/(?=[^/])", r"\1://", name)
        raise ImageError(f"{_short(url)}: expected a file, found a URL; {remedy}")
    try:
        with open_regular(path, MAX_BYTES) as file:
            return _open(file, _short(name))
    except FileNotFoundError:
        raise ImageError(f"{_short(name)}: expected an image file, found nothing there; check the path") from None
    except IsADirectoryError:
        raise ImageError(f"{_short(name)}: expected an image file, found a folder; name a file in it") from None
    except (OSError, ValueError) as error:
        reason = _reason(error)
        expected = reason if reason.startswith("expected") else f"expected a readable image file, found: {reason}"
        raise ImageError(f"{_short(name)}: {expected}; check the path") from None


def _bytes(source: bytes | bytearray | memoryview) -> bytes:
    try:
        return bytes(source)
    except ValueError as error:  # a view that was released
        raise ImageError(f"image bytes: expected bytes, found: {error}; keep the view open") from None


def _read(file: Readable) -> bytes:
    """What is in an open file, from its start if it can go there: `save` leaves one at its end."""
    try:
        if hasattr(file, "seekable") and file.seekable():
            file.seek(0)  # type: ignore[attr-defined]
        blocks = []
        left = MAX_BYTES + 1
        while left > 0 and (block := file.read(min(left, READ))):
            blocks.append(bytes(block))  # a TypeError for text
            left -= len(block)
    except Exception as error:  # of a file that is closed, is no file, or is of text
        raise ImageError(f"image file: expected one open in mode 'rb', found: {_reason(error)}; open it so") from None
    if left <= 0:
        raise ImageError(f"image file: expected at most {MAX_BYTES:,} bytes, found more; cut it")
    return b"".join(blocks)


def _array(source: ArrayLike) -> np.ndarray:
    try:
        return np.asarray(source)
    except Exception as error:  # tensors on a GPU, or with a gradient, say what to do
        raise ImageError(f"array: expected one that numpy reads, found: {_reason(error)}; convert it first") from None


def _open(file: BinaryIO, name: str) -> PIL.Image.Image:
    try:
        # Reads the header only; the plugins that look deeper may raise almost anything on a damaged file.
        image = _identify(file)
    except PIL.Image.DecompressionBombError:
        raise ImageError(f"{name}: expected at most {MAX_PIXELS:,} pixels, found more; downscale it first") from None
    except PIL.UnidentifiedImageError:
        raise ImageError(f"{name}: expected an image (PNG, JPEG, WebP, ...), found {_kind(file)}") from None
    except Exception as error:
        raise ImageError(f"{name}: expected an image, found a damaged file ({_reason(error)}); save it again") from None
    with image:
        return _decode(image, name, ours=True)


def _identify(file: BinaryIO) -> PIL.Image.Image:
    try:
        return PIL.Image.open(file, formats=COMMON)
    except PIL.UnidentifiedImageError:
        PIL.Image.init()
        file.seek(0)
        return PIL.Image.open(file, formats=[name for name in OTHERS if name in PIL.Image.OPEN])


def _kind(file: BinaryIO) -> str:
    """What a file is that is none of the images above, as far as its first bytes say."""
    file.seek(0)
    head = file.read(12)
    if not head:
        return "an empty file; check how it came here"
    if head[4:8] == b"ftyp" and head[8:12] in (b"heic", b"heix", b"hevc", b"mif1", b"msf1"):
        return "HEIC; save it as JPEG, or open it with pillow-heif and pass the PIL image"
    return "another kind of file"


def _decode(image: PIL.Image.Image, name: str, ours: bool = False) -> PIL.Image.Image:
    """``ours``: nobody else has the image, so that it need not be copied; a large one has 700 MB."""
    check_size(image.size, name)
    try:
        if ours:
            PIL.ImageOps.exif_transpose(image, in_place=True)
            image.load()
        else:
            image = PIL.ImageOps.exif_transpose(image)
        return _to_rgb(image)
    except ImageError as error:
        raise ImageError(f"{name}: {error}") from None
    except MemoryError:
        raise ImageError(f"{name}: expected an image that fits in memory, found a larger one; downscale it") from None
    except Exception as error:
        # Decoders of damaged files raise OSError, SyntaxError, struct.error, zlib.error, IndexError, ...
        raise ImageError(
            f"{name}: expected a complete image, found a damaged one ({_reason(error)}); save it again"
        ) from None


def check_size(size: tuple[int, int], name: str) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ImageError(f"{name}: expected at least 1 x 1 pixels, found {width} x {height}")
    if width * height > MAX_PIXELS:
        found = f"{width} x {height} = {width * height:,}"
        raise ImageError(f"{name}: expected at most {MAX_PIXELS:,} pixels, found {found}; downscale it first")
    if max(size) > MAX_ASPECT * min(size):
        found = f"{width} x {height}"
        raise ImageError(f"{name}: expected an aspect ratio up to {MAX_ASPECT}:1, found {found}; crop or pad it first")


def _to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _deep_gray(image)
    if image.mode in ("La", "RGBa"):  # premultiplied alpha converts to straight alpha only
        image = image.convert(image.mode.upper())
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        return _on_white(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _on_white(image: PIL.Image.Image) -> PIL.Image.Image:
    """Transparency composited on white, in bands: whole, its copies take three times the image's own memory."""
    out = PIL.Image.new("RGB", image.size)
    for box in _bands(image.size):
        band = image.crop(box).convert("RGBA")
        white = PIL.Image.new("RGBA", band.size, (255, 255, 255, 255))
        out.paste(PIL.Image.alpha_composite(white, band).convert("RGB"), box)
    return out


def _bands(size: tuple[int, int]) -> Iterator[tuple[int, int, int, int]]:
    """Boxes (left, top, right, bottom) from top to bottom that make up an image of ``size``."""
    width, height = size
    rows = max(1, BAND // max(1, width))
    for top in range(0, height, rows):
        yield 0, top, width, min(top + rows, height)


def _deep_gray(image: PIL.Image.Image) -> PIL.Image.Image:
    """Gray of more than 8 bits -> RGB: "I;16", "I" (16-bit PNG before Pillow 11, PNM) and "F" in [0, 1]."""
    values = np.asarray(image)
    if image.mode == "F":
        return _from_array(values).convert("RGB")
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise ImageError(f"expected 16-bit gray values in 0..65535, found {low}..{high}; save it as 8 or 16 bits")
    gray = np.empty(values.shape, dtype=np.uint8)
    for _, top, _, bottom in _bands(image.size):
        gray[top:bottom] = (values[top:bottom].astype(np.uint32) * 255 + 32767) // 65535
    return PIL.Image.fromarray(gray).convert("RGB")


def _from_array(array: np.ndarray) -> PIL.Image.Image:
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        found = f"shape {array.shape}"
        raise ImageError(f"array: expected H x W or H x W x 1, 3 or 4, found {found}; put channels last")
    if array.dtype != np.uint8 and not np.issubdtype(array.dtype, np.floating):
        raise ImageError(f"array: expected uint8 or float in [0, 1], found {array.dtype}; convert it first")
    check_size((array.shape[1], array.shape[0]), "array")
    if array.dtype != np.uint8:
        low, high = array.min(), array.max()
        if not (low >= 0 and high <= 1):  # also refuses NaN
            raise ImageError(f"array: expected floats in [0, 1], found {low:g}..{high:g}; scale it first")
        array = np.rint(array.astype(np.float32) * 255).astype(np.uint8)
    return PIL.Image.fromarray(np.ascontiguousarray(array[..., 0] if array.shape[2:] == (1,) else array))


def _short(name: str) -> str:
    # Keep a message on one readable line, even for a data: URL or a name with line breaks.
    name = name.replace("\n", "\\n")
    return name if len(name) <= 200 else name[:200] + "..."


def _reason(error: Exception) -> str:
    # OSError's own text repeats the whole path.
    return _short(getattr(error, "strerror", None) or str(error) or type(error).__name__)
