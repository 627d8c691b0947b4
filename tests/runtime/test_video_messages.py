"""Videos in messages: what is taken, and what is refused."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from flashvlm.errors import PromptError
from flashvlm.messages import ImagePart, Message, TextPart, VideoPart, normalise
from flashvlm.videos import load_video

ARRAY = np.zeros((3, 4, 5, 3), np.uint8)
PICTURES = [PIL.Image.fromarray(frame) for frame in ARRAY]
BYTES = b"a video"
URL = f"data:video/mp4;base64,{base64.b64encode(BYTES).decode()}"


def part_of(part: dict[str, Any], **options: Any) -> VideoPart:
    (message,) = normalise([{"role": "user", "content": [{"type": "text", "text": "x"}, part]}], **options)
    found = message.parts[1]
    assert isinstance(found, VideoPart)
    return found


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ({"type": "video", "video": "a.mp4"}, "a.mp4"),
        ({"type": "video", "video": Path("a.mp4")}, Path("a.mp4")),
        ({"type": "video", "video": BYTES}, BYTES),
        ({"type": "video", "video": ARRAY}, ARRAY),
        ({"type": "video", "path": "a.mp4"}, "a.mp4"),
        ({"type": "video", "url": "file:///b/a%20b.mp4"}, "/b/a b.mp4"),
        ({"type": "video", "url": URL}, BYTES),
        ({"type": "video", "base64": base64.b64encode(BYTES)}, BYTES),
        ({"type": "video_url", "video_url": {"url": URL}}, BYTES),
        ({"type": "video_url", "video_url": "a.mp4"}, "a.mp4"),
        ({"type": "input_video", "video_url": URL}, BYTES),
    ],
)
def test_sources(part: dict[str, Any], source: Any) -> None:
    found = part_of(part)
    assert found.source is source or found.source == source
    assert found.fps is None


def test_a_list_of_frames_may_have_a_rate() -> None:
    found = part_of({"type": "video", "video": [PICTURES[0], "b.png", "file:///c.png"], "fps": 2})
    assert found.source == [PICTURES[0], "b.png", "/c.png"]
    assert found.fps == 2
    assert part_of({"type": "video", "video": ARRAY, "fps": 0.5}).fps == 0.5
    assert part_of({"type": "video", "video": load_video(ARRAY)}).fps is None


def test_images_and_videos_keep_their_order() -> None:
    content = [
        {"type": "image", "image": "a.png"},
        {"type": "video", "video": "b.mp4"},
        {"type": "text", "text": "x"},
        {"type": "image"},
    ]
    (message,) = normalise([{"role": "user", "content": content}], ["c.png"])
    kinds = [type(part) for part in message.parts]
    assert kinds == [ImagePart, VideoPart, TextPart, ImagePart]
    assert [part.source for part in message.visuals] == ["a.png", "b.mp4", "c.png"]
    assert message.images == ("a.png", "c.png")
    assert [part["type"] for part in message.plain()["content"]] == ["image", "video", "text", "image"]  # type: ignore[attr-defined]
    again = normalise([message])
    assert isinstance(again[0], Message)
    assert [part.source for part in again[0].visuals] == ["a.png", "b.mp4", "c.png"]


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (
            {"type": "video", "video": "a.mp4", "path": "a.mp4"},
            "expected one source of the video, found video and path",
        ),
        (
            {"type": "video", "video": 5},
            "expected a path, bytes, a list of frames or an array .* under 'video', found 5",
        ),
        ({"type": "video", "video": []}, "found an empty one"),
        ({"type": "video", "video": ["a.png", 5]}, "expected a path, bytes, an open file"),
        ({"type": "video", "video": PICTURES[0]}, "expected a path, bytes, a list of frames"),
        ({"type": "video", "video": "a.mp4", "fps": 2}, "found a file, which has its own"),
        ({"type": "video", "video": ["a.png"], "fps": 0}, "expected fps above 0, up to 1000, found 0"),
        ({"type": "video", "video": ["a.png"], "fps": "2"}, "expected fps above 0"),
        ({"type": "video", "video": ["a.png"], "fps": float("nan")}, "expected fps above 0"),
        ({"type": "video", "video": "a.mp4", "max_pixels": 5}, "found 'max_pixels'; leave it out"),
        ({"type": "video_url", "video_url": "a.mp4", "fps": 2}, "found 'fps'"),
        ({"type": "video", "video": "https://a.org/a.mp4"}, "expected a video, .* URLs are not fetched: download it"),
        ({"type": "video", "video": ""}, "expected the path of a video, found an empty text"),
        (
            {"type": "video", "url": "data:image/png;base64,AAAA"},
            "expected a video in the data: URL, found 'image/png'",
        ),
        ({"type": "video", "url": "data:"}, r"expected data:video/\.\.\.;base64"),
        ({"type": "video", "base64": ""}, "expected a video in base64, found nothing"),
        ({"type": "video_url", "video_url": {"uri": "x"}}, "found 'uri'"),
    ],
)
def test_bad_parts(part: dict[str, Any], words: str) -> None:
    with pytest.raises(PromptError, match=rf"message 0 \(user\), part 1(, frame \d)?: .*{words}") as refusal:
        part_of(part)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("part", [{"video": "a.mp4"}, {"video": Path("a.mp4")}, {"url": "file:///a.mp4"}])
def test_a_server_reads_no_files(part: dict[str, Any]) -> None:
    with pytest.raises(PromptError, match="expected a video as a data: URL, found a path; files are not read here"):
        part_of({"type": "video", **part}, files=False)
    with pytest.raises(PromptError, match="expected an image as a data: URL, found a path"):
        part_of({"type": "video", "video": ["a.png"]}, files=False)
    assert part_of({"type": "video", "url": URL}, files=False).source == BYTES
