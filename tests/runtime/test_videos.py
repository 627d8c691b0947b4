"""Videos: every source gives the frames that were asked for, and bad ones one line."""

from __future__ import annotations

import sys
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import PIL.Image
import pytest

from clips import decoded, scene, write_clip
from flashvlm.errors import VideoError
from flashvlm.frames import choose_frames
from flashvlm.tilings import Frames
from flashvlm.videos import Video, load_video, load_videos

av = pytest.importorskip("av", reason="videos are read with PyAV")


def frames(count: int, **more: Any) -> Frames:
    return Frames(resize="exact", size=(8, 8), mean=(0, 0, 0), std=(1, 1, 1), count=count, **more)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", scene(23))


def arrays(images: tuple[PIL.Image.Image, ...]) -> list[np.ndarray]:
    return [np.asarray(image) for image in images]


def refusal_of(source: Any, pixels: Frames | None = None) -> str:
    with pytest.raises(VideoError) as refusal:
        load_video(source).shown(pixels or frames(2))
    text = str(refusal.value)
    assert "\n" not in text
    assert len(text) < 500
    return text


@pytest.mark.parametrize("rule", ["start", "middle", "ends"])
@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.mp4", "mpeg4"), ("a.mkv", "mpeg4"), ("a.avi", "mjpeg"), ("a.ts", "mpeg2video"), ("a.mov", "mpeg4")],
)
def test_files_give_the_frames_chosen(name: str, codec: str, rule: Any, tmp_path: Path) -> None:
    """Also where the container does not say how many it has, as Matroska and transport streams."""
    path = write_clip(tmp_path / name, scene(23), fps=25, codec=codec)
    every, pixels = decoded(path), frames(5, rule=rule)
    video = load_video(path)
    assert video.size == (32, 48)
    found, images, _ = video.shown(pixels)
    assert found.indices == choose_frames(len(every), 25.0, pixels)
    assert (found.total, found.fps) == (23, 25.0)
    np.testing.assert_array_equal(arrays(images), [every[i] for i in found.indices])


def test_a_rate_is_sampled_at(clip: Path) -> None:
    found, images, _ = load_video(clip).shown(frames(8, fps=2.0))
    assert found.indices == (0, 5, 11, 17)
    assert len(images) == 4
    assert found.times == pytest.approx([0, 0.5, 1.1, 1.7])


def test_bytes_are_the_file(clip: Path) -> None:
    one, two = load_video(clip).shown(frames(3)), load_video(clip.read_bytes()).shown(frames(3))
    assert one[0] == two[0]
    assert one[2] == two[2] != load_video(clip).shown(frames(2))[2]


def test_lists_and_arrays(tmp_path: Path) -> None:
    array = scene(6)
    paths = []
    for n, frame in enumerate(array):
        paths.append(tmp_path / f"{n}.png")
        PIL.Image.fromarray(frame).save(paths[-1])
    for source in (array, list(array), [PIL.Image.fromarray(frame) for frame in array], paths, array / 255.0):
        found, images, digest = load_video(source, fps=3.0).shown(frames(4))
        assert found.indices == (0, 1, 3, 4)
        assert (found.fps, found.total) == (3.0, 6)
        np.testing.assert_array_equal(arrays(images), array[[0, 1, 3, 4]])
        assert digest == load_video(array).shown(frames(4))[2]
    assert load_video(array).shown(frames(8, fps=2.0))[0].fps == 2.0


def test_what_was_taken_last_is_kept(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    video = load_video(clip)
    first = video.shown(frames(3))
    monkeypatch.setattr(av, "open", None)
    assert video.shown(frames(3)) == first
    assert load_video(video) is video


def test_one_video_or_several(clip: Path) -> None:
    array = scene(4)
    pictures = [PIL.Image.fromarray(frame) for frame in array]
    counts = [
        len(load_videos(source))
        for source in (None, clip, str(clip), array, list(array), pictures, [clip, clip], [array, clip], [pictures] * 3)
    ]
    assert counts == [0, 1, 1, 1, 1, 1, 2, 2, 3]
    assert all(isinstance(video, Video) for video in load_videos([load_video(clip), clip]))


def test_a_header_may_promise_more_than_there_is(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "more.avi", scene(23), codec="mjpeg")
    content = path.read_bytes()
    at = content.index(b"strh") + 8 + 32  # dwLength of the stream
    assert int.from_bytes(content[at : at + 4], "little") == 23
    path.write_bytes(content[:at] + (40).to_bytes(4, "little") + content[at + 4 :])
    found, images, _ = load_video(path).shown(frames(4, rule="ends"))
    assert (found.total, found.indices[-1], len(images)) == (23, 22, 4)
    np.testing.assert_array_equal(arrays(images)[-1], decoded(path)[-1])


def test_what_a_telephone_filmed_upright_stands_upright(clip: Path, tmp_path: Path) -> None:
    content = bytearray(clip.read_bytes())
    at = content.index(b"tkhd") + 4 + 40  # the matrix of the track
    quarter = (0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)  # clockwise
    content[at : at + 36] = b"".join(n.to_bytes(4, "big", signed=True) for n in quarter)
    (tmp_path / "turned.mp4").write_bytes(content)
    video = load_video(tmp_path / "turned.mp4")
    assert video.size == (48, 32)
    _, (first,), _ = video.shown(frames(1))
    np.testing.assert_array_equal(np.asarray(first), np.rot90(decoded(clip)[0], -1))


# --- refusals --------------------------------------------------------------------------------------------------------


def test_what_cannot_be_read(clip: Path, tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "cut.mp4").write_bytes(clip.read_bytes()[:900])
    for name in ("text.mp4", "empty.mp4", "cut.mp4"):
        assert "expected a video that can be decoded" in refusal_of(tmp_path / name)
    assert "found nothing there; check the path" in refusal_of(tmp_path / "none.mp4")
    assert "found a folder; name a file in it" in refusal_of(tmp_path)
    assert "URLs are not fetched" in refusal_of("https://example.org/a.mp4")
    assert "expected a readable video file" in refusal_of("a\0b.mp4")
    assert "expected a path, bytes, a list of frames or an array" in refusal_of(5)
    assert "found an empty one" in refusal_of([])
    assert "[T,H,W,3], found [2, 2, 3]" in refusal_of(np.zeros((2, 2, 3), np.uint8))
    with pytest.raises(VideoError, match="found an empty list"):
        load_videos([])


def test_sound_alone_is_no_video(tmp_path: Path) -> None:
    path = tmp_path / "sound.mka"
    with av.open(str(path), "w", format="matroska") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert "found a file without one" in refusal_of(path)


def test_a_playlist_reads_no_other_file(clip: Path, tmp_path: Path) -> None:
    for name, text in (
        ("list.m3u8", f"#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:2,\n{clip}\n#EXT-X-ENDLIST\n"),
        ("list.ffconcat", f"ffconcat version 1.0\nfile '{clip}'\n"),
    ):
        path = tmp_path / name
        path.write_text(text)
        assert "expected a video that can be decoded" in refusal_of(path)


def test_an_unknown_codec(clip: Path, tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mkv", scene(3))
    path.write_bytes(path.read_bytes().replace(b"V_MPEG4/ISO/ASP", b"V_MPEG9/ISO/ASP"))
    assert "found an unknown codec; save it again" in refusal_of(path)


@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "mpeg4"), ("a.mkv", "mpeg4"), ("a.avi", "mjpeg")])
def test_damaged_bytes_are_decoded_or_refused(name: str, codec: str, tmp_path: Path) -> None:
    """FFmpeg conceals some damage; nothing else than a refusal comes of the rest."""
    content, random = write_clip(tmp_path / name, scene(12), codec=codec).read_bytes(), Random(0)
    refused = 0
    for _ in range(25):
        damaged = bytearray(content)
        for _ in range(random.choice((1, 10, 100))):
            damaged[random.randrange(random.choice((600, len(damaged))))] = random.choice((0, 127, 255))
        try:
            load_video(bytes(damaged)).shown(frames(4, rule="ends"))
        except VideoError as error:
            assert "\n" not in str(error)  # noqa: PT017 - either is right
            refused += 1
    assert 0 < refused < 25


def test_too_few_too_many_too_large(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "at least 64 frames, found 23; take a longer one" in refusal_of(clip, frames(64, min_frames=64))
    monkeypatch.setattr("flashvlm.videos.MAX_PIXELS", 2 * 32 * 48)
    assert "in the frames that are shown, found more, of 48 x 32 each" in refusal_of(clip, frames(3))
    assert "found more" in refusal_of(scene(4), frames(3))
    monkeypatch.setattr("flashvlm.videos.MAX_FRAMES", 20)
    assert "expected at most 20 frames, found more" in refusal_of(clip, frames(1, rule="ends"))
    assert "expected at most 20 frames, found 30" in refusal_of(scene(30))
    with monkeypatch.context() as patch:
        patch.setattr("flashvlm.videos.MAX_FRAME", 100)  # of a frame that is larger than its header says
        assert "expected a video that can be decoded" in refusal_of(clip)
    monkeypatch.setattr("flashvlm.videos.MAX_BYTES", 100)
    assert "expected a readable video file, found: expected at most 100 bytes" in refusal_of(clip)


def test_a_frame_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "b.png").write_text("no picture")
    assert "video: frame 1: " in refusal_of([scene(1)[0], tmp_path / "b.png"])


def test_without_pyav(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    text = refusal_of(clip)
    assert "videos are read with PyAV, which is not installed: pip install" in text
    assert load_video(scene(2)).shown(frames(2))[0].total == 2
