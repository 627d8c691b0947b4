"""Videos: a file, its bytes, or a list of frames -> the frames that a bundle wants, RGB."""

from __future__ import annotations

import hashlib
import io
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import numpy as np
import PIL.Image

from flashvlm.errors import ImageError, VideoError, brief, one_line
from flashvlm.extras import install
from flashvlm.files import open_regular
from flashvlm.frames import Clip, clip_of
from flashvlm.images import MAX_PIXELS as MAX_FRAME
from flashvlm.images import ArrayLike, ImageSource, as_array, check_size, image_digest, is_source, is_url, load_image
from flashvlm.tilings import Frames

if TYPE_CHECKING:
    import av

MAX_BYTES = 1 << 33  # of a file
MAX_FRAMES = 1 << 20  # that are decoded of one: ten hours at 29 a second
MAX_PIXELS = 1 << 29  # of all frames that are shown, which are in memory together: 64 of 3840 x 2160
MAX_FPS = 1000.0
# What is demuxed. FFmpeg knows playlists as well, which would have other files read, and URLs.
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,m4v,h264,hevc,flv,ogg,asf,gif,ivf,av1,obu"

VideoSource = str | os.PathLike[str] | bytes | bytearray | Sequence[ImageSource] | np.ndarray | ArrayLike
Images = tuple[PIL.Image.Image, ...]
SOURCES = "a path, bytes, a list of frames or an array [T,H,W,3]"


class Video:
    """A video to take frames of. Those taken last are kept, so that a second question decodes nothing.

    name  for messages
    size  (height, width)
    """

    def __init__(self, name: str, size: tuple[int, int], read: Callable[[Frames], tuple[Clip, Images]]) -> None:
        self.name, self.size = name, size
        self._read = read
        self._last: tuple[Frames, Clip, Images, str] | None = None

    def shown(self, pixels: Frames) -> tuple[Clip, Images, str]:
        """The frames that ``pixels`` asks for, RGB, and a digest (hex) that is equal for equal frames.

        Raises:
            VideoError: there are too few, they are too large, or the file is damaged.
        """
        last = self._last  # another thread may take others meanwhile
        if last is None or last[0] != pixels:
            clip, images = self._read(pixels)
            digest = hashlib.sha256("".join(map(image_digest, images)).encode()).hexdigest()
            last = self._last = pixels, clip, images, digest
        return last[1:]


def load_video(source: VideoSource | Video, fps: float | None = None) -> Video:
    """Opens a video and looks at its first frame or header.

    Args:
        source: a file's path or bytes, a list of frames (each as ``load_image`` takes it) or an array [T,H,W,3].
        fps: frames a second of a list or array; None: those a bundle samples. A file has its own.

    Raises:
        VideoError: it cannot be read, or PyAV is missing; URLs are not fetched.
        ImageError: the first frame of a list cannot be read.

    Example:
        >>> load_video(np.zeros((4, 2, 3, 3), np.uint8), fps=2).size
        (2, 3)
    """
    if isinstance(source, Video):
        return source
    if isinstance(source, (str, os.PathLike)):
        return _file(os.fsdecode(source))
    if isinstance(source, (bytes, bytearray)):
        content = bytes(source)
        return _opened("video bytes", lambda: io.BytesIO(content))
    if isinstance(source, (list, tuple)):
        return _listed(source, fps)
    if isinstance(source, ArrayLike):
        array = as_array(source)
        if array.ndim != 4:
            raise VideoError(f"video: expected an array of shape [T,H,W,3], found {list(array.shape)}; stack frames so")
        return _listed(list(array), fps)
    raise VideoError(f"video: expected {SOURCES}, found {type(source).__name__}; convert it first")


def is_video_source(value: object) -> bool:
    """Whether ``load_video`` takes a value of this type."""
    if isinstance(value, (list, tuple)):
        return all(is_source(frame) for frame in value)
    return isinstance(value, (str, os.PathLike, bytes, bytearray, Video, ArrayLike)) and not isinstance(
        value, PIL.Image.Image
    )


def load_videos(source: object) -> list[Video]:
    """None, a video or several -> a list. Pictures in a list are frames of one; anything else in it is a video each."""
    if source is None:
        return []
    if isinstance(source, (list, tuple)):
        if not source:
            raise VideoError("video: expected a video, a list of them or None, found an empty list")
        if not all(map(_is_picture, source)):
            return [load_video(one) for one in source]
    return [load_video(cast("VideoSource | Video", source))]


def _is_picture(value: object) -> bool:
    if isinstance(value, PIL.Image.Image):
        return True
    return isinstance(value, ArrayLike) and getattr(value, "ndim", None) in (2, 3)


# --- frames in a list ------------------------------------------------------------------------------------------------


def _listed(frames: Sequence[Any], fps: float | None) -> Video:
    if not frames:
        raise VideoError("video: expected a list of frames, found an empty one; add them")
    if len(frames) > MAX_FRAMES:
        raise VideoError(f"video: expected at most {MAX_FRAMES:,} frames, found {len(frames):,}; leave some out")
    first = load_image(frames[0])

    def read(pixels: Frames) -> tuple[Clip, Images]:
        clip = clip_of(len(frames), fps, pixels)
        images: list[PIL.Image.Image] = []
        for index in clip.indices:
            try:
                images.append(load_image(frames[index]))
            except ImageError as error:
                raise VideoError(f"video: frame {index}: {error}") from None
            _check_room("video", images)
        return clip, tuple(images)

    return Video("video", (first.height, first.width), read)


def _check_room(name: str, images: Sequence[PIL.Image.Image]) -> None:
    if sum(image.width * image.height for image in images) > MAX_PIXELS:
        size = f"{images[-1].width} x {images[-1].height}"
        raise VideoError(
            f"{name}: expected at most {MAX_PIXELS:,} pixels in the frames that are shown, found more, of {size} each; "
            "downscale it: ffmpeg -i IN -vf scale=-2:720 OUT.mp4"
        )


# --- files -----------------------------------------------------------------------------------------------------------


def _file(path: str) -> Video:
    name = path if len(path) <= 200 else f"{path[:200]}..."
    if is_url(path):
        raise VideoError(f"{name}: expected a file, found a URL; URLs are not fetched: download it and pass the path")
    return _opened(name, lambda: open_regular(path, MAX_BYTES))


def _opened(name: str, source: Callable[[], BinaryIO]) -> Video:
    with _stream(name, source) as (container, stream):
        context = stream.codec_context
        try:
            check_size((context.width, context.height), name)
        except ImageError as error:
            raise VideoError(error) from None
        frame = next(container.decode(stream), None)
        if frame is None:
            raise VideoError(f"{name}: expected a video, found no frame in it; save it again")
        size = frame.height, frame.width
        if _turn(frame) % 180:
            size = size[::-1]
        fps, total = _rate(stream), stream.frames
    known = total if 0 < total <= MAX_FRAMES else None

    def read(pixels: Frames) -> tuple[Clip, Images]:
        nonlocal known
        if known is None:
            known = _count(name, source)
        clip = clip_of(known, fps, pixels)
        images, found = _decode(name, source, clip)
        if len(images) < len(clip.indices):  # the header promised more than there are
            known = found
            clip = clip_of(known, fps, pixels)
            images, _ = _decode(name, source, clip)
        return clip, tuple(images)

    return Video(name, size, read)


def _decode(name: str, source: Callable[[], BinaryIO], clip: Clip) -> tuple[list[PIL.Image.Image], int]:
    """The frames of a clip, and how many there were to find them; fewer than asked where the file has fewer."""
    wanted, images, last = {*clip.indices}, [], clip.indices[-1]
    found = 0
    for found, frame in enumerate(_frames(name, source), start=1):
        if found - 1 in wanted:
            images.append(_upright(frame))
            _check_room(name, images)
        if found - 1 == last:
            break
    return images, found


def _count(name: str, source: Callable[[], BinaryIO]) -> int:
    return sum(1 for _ in _frames(name, source))


def _upright(frame: av.VideoFrame) -> PIL.Image.Image:
    """Telephones store what they film as the sensor lies, and say how it is to be turned."""
    image: PIL.Image.Image = frame.to_image()  # type: ignore[no-untyped-call]
    return image.rotate(_turn(frame), expand=True) if _turn(frame) else image


def _turn(frame: av.VideoFrame) -> int:
    """Degrees against the clock; of right angles alone."""
    return int(frame.rotation) if frame.rotation % 90 == 0 else 0


def _frames(name: str, source: Callable[[], BinaryIO]) -> Iterator[av.VideoFrame]:
    with _stream(name, source) as (container, stream):
        for number, frame in enumerate(container.decode(stream)):
            if number == MAX_FRAMES:
                raise VideoError(f"{name}: expected at most {MAX_FRAMES:,} frames, found more; cut it")
            yield frame


def _rate(stream: Any) -> float | None:
    rate = stream.average_rate or stream.guessed_rate
    fps = float(rate) if rate else math.nan
    return fps if 0 < fps <= MAX_FPS else None


@contextmanager
def _stream(name: str, source: Callable[[], BinaryIO]) -> Iterator[tuple[Any, Any]]:
    """An open container and its first stream of video. Whatever FFmpeg finds wrong becomes one line."""
    try:
        import av
    except ImportError:
        raise VideoError(f"{name}: videos are read with PyAV, which is not installed: {install('video')}") from None

    # Nothing beside the file itself is opened, whatever stands in it.
    only = {"format_whitelist": FORMATS, "protocol_whitelist": "none"}
    try:
        with source() as file, av.open(file, mode="r", options=only, metadata_errors="replace") as container:
            if not container.streams.video:
                raise VideoError(f"{name}: expected a video, found a file without one; check the path")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise VideoError(f"{name}: expected a video that can be decoded, found an unknown codec; save it again")
            stream.thread_type = "AUTO"
            stream.codec_context.options = {"max_pixels": str(MAX_FRAME)}
            yield container, stream
    except FileNotFoundError:
        raise VideoError(f"{name}: expected a video file, found nothing there; check the path") from None
    except IsADirectoryError:
        raise VideoError(f"{name}: expected a video file, found a folder; name a file in it") from None
    except (av.error.FFmpegError, LookupError) as error:  # LookupError: streams that begin in the middle of a file
        reason = brief(getattr(error, "strerror", None) or one_line(error))
        raise VideoError(
            f"{name}: expected a video that can be decoded, found: {reason}; save it again: ffmpeg -i IN OUT.mp4"
        ) from None
    except (OSError, ValueError) as error:  # of the file: a device, too large, not to be read
        reason = getattr(error, "strerror", None) or one_line(error)
        raise VideoError(f"{name}: expected a readable video file, found: {reason}; check the path") from None
