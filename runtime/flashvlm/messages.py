"""Messages as OpenAI's and transformers' users write them -> one internal form.

What is taken is written down in the TypedDicts; ``normalise`` checks it, as it may come from anyone, and decodes what
is given as base64. It opens no file: a path stays a path until the image or video is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict, cast

from flashvlm import images, videos
from flashvlm.data_urls import a_kind, data_url, decoded, file_url
from flashvlm.errors import PromptError, brief
from flashvlm.images import ImageSource, is_source, is_url
from flashvlm.text.processor import MAX_CHARACTERS, MAX_PARTS
from flashvlm.videos import MAX_FPS, Video, VideoSource, is_video_source

Kind = Literal["image", "video"]
Role = Literal["system", "user", "assistant"]
ROLES = ("system", "user", "assistant")

_TEXTS = ("text", "input_text", "output_text")
_SOURCES = {
    "image": ("image", "path", "url", "base64"),
    "image_url": ("image_url",),
    "input_image": ("image_url",),
    "video": ("video", "path", "url", "base64"),
    "video_url": ("video_url",),
    "input_video": ("video_url",),
}
_VIDEOS = ("video", "video_url", "input_video")
# What answers of an API carry with their text, and hints to a server's cache: none changes a prompt.
_IGNORED = ("detail", "annotations", "logprobs", "cache_control")


# --- what is taken --------------------------------------------------------------------------------------------------


class TextContent(TypedDict):
    type: Literal["text", "input_text", "output_text"]
    text: str


class _Detail(TypedDict, total=False):
    """``detail`` is ignored: a bundle has its own size of images."""

    detail: str


class ImageURL(_Detail):
    """``url``: a data: URL, a path or a file:// URL."""

    url: str


class _ImageContent(TypedDict):
    type: Literal["image"]


class ImageContent(_ImageContent, total=False):
    """As transformers has it, with one of ``image``, ``path``, ``url`` and ``base64``, or none: an image of the list.

    image   anything ``load_image`` takes, or a URL as for ``url``
    url     a data: URL, a path or a file:// URL
    """

    image: ImageSource
    path: str | os.PathLike[str]
    url: str
    base64: str | bytes


class ImageURLContent(TypedDict):
    """As OpenAI's chat completions have it."""

    type: Literal["image_url"]
    image_url: ImageURL


class InputImageContent(_Detail):
    """As OpenAI's responses have it."""

    type: Literal["input_image"]
    image_url: str


class _VideoContent(TypedDict):
    type: Literal["video"]


class VideoContent(_VideoContent, total=False):
    """As transformers has it, with one of ``video``, ``path``, ``url`` and ``base64``.

    video  anything ``load_video`` takes, or a URL as for ``url``
    url    a data: URL, a path or a file:// URL
    fps    frames a second of a list of frames
    """

    video: VideoSource | Video
    path: str | os.PathLike[str]
    url: str
    base64: str | bytes
    fps: float


class VideoURLContent(TypedDict):
    """``image_url`` of chat completions, with a video."""

    type: Literal["video_url"]
    video_url: ImageURL


class InputVideoContent(_Detail):
    """``input_image`` of responses, with a video."""

    type: Literal["input_video"]
    video_url: str


Content = (
    TextContent
    | ImageContent
    | ImageURLContent
    | InputImageContent
    | VideoContent
    | VideoURLContent
    | InputVideoContent
)


class ChatMessage(TypedDict):
    """One message, as users write it."""

    role: Role
    content: str | Sequence[Content]


# --- the internal form ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextPart:
    text: str


@dataclass(frozen=True, eq=False)
class ImagePart:
    """``source`` is what ``load_image`` takes: a path, or something in memory."""

    source: ImageSource


@dataclass(frozen=True, eq=False)
class VideoPart:
    """``source`` is what ``load_video`` takes; ``fps`` of a list of frames, if it is known."""

    source: VideoSource | Video
    fps: float | None = None


Part = TextPart | ImagePart | VideoPart


@dataclass(frozen=True)
class Message:
    """Who says what: text, images and videos in their order."""

    role: Role
    parts: tuple[Part, ...]

    @property
    def images(self) -> tuple[ImageSource, ...]:
        """The images among the parts, in their order."""
        return tuple(part.source for part in self.parts if isinstance(part, ImagePart))

    @property
    def visuals(self) -> tuple[ImagePart | VideoPart, ...]:
        """The images and videos among the parts, in their order."""
        return tuple(part for part in self.parts if not isinstance(part, TextPart))

    def plain(self) -> dict[str, object]:
        """What a chat template reads: strings, lists and dictionaries alone."""
        content = [
            {"type": "text", "text": part.text}
            if isinstance(part, TextPart)
            else {"type": "image" if isinstance(part, ImagePart) else "video"}
            for part in self.parts
        ]
        return {"role": self.role, "content": content}


# --- from one to the other ------------------------------------------------------------------------------------------


def normalise(messages: object, images: object = (), *, files: bool = True) -> tuple[Message, ...]:
    """Checks a list of messages, which may be from anyone, and brings it into one form.

    Args:
        messages: a list or tuple of ``ChatMessage``, or of ``Message``.
        images: for the parts ``{"type": "image"}`` that have none of their own, in their order.
        files: take paths and file:// URLs. A server turns it off, as whoever calls it would read its files.

    Keys of a message other than role and content, such as the name, are ignored. http(s) URLs are not fetched.

    Raises:
        PromptError: something else than such messages, or more than ``MAX_PARTS`` or ``MAX_CHARACTERS`` of them;
            it names the message and the part, counted from 0.

    Example:
        >>> normalise([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Who?"}]}], ["cat.png"])
        (Message(role='user', parts=(ImagePart(source='cat.png'), TextPart(text='Who?'))),)
    """
    if not isinstance(messages, (list, tuple)):
        remedy = "; put it in a list" if isinstance(messages, (Mapping, Message)) else ""
        raise PromptError(f"messages: expected a list of them, found {brief(messages)}{remedy}")
    if not messages:
        raise PromptError("messages: expected at least one, found none; add the question")
    if not isinstance(images, (list, tuple)):
        raise PromptError(f"images: expected a list of them, found {brief(images)}; put it in a list")
    reader = _Reader(images, files)
    reader.count(parts=len(messages))
    normal = tuple(reader.message(message, f"message {number}") for number, message in enumerate(messages))
    if reader.taken < len(images):
        raise PromptError(
            f"images: expected {reader.taken}, one for each part without an image of its own, found {len(images)}; "
            'add parts {"type": "image"} where they belong'
        )
    return normal


class _Reader:
    """One call of ``normalise``. ``where`` names what is read, for messages."""

    def __init__(self, images: Sequence[object], files: bool) -> None:
        self._images = images
        self._files = files
        self._parts = self._characters = 0
        self.taken = 0  # of the images

    def count(self, parts: int = 0, characters: int = 0) -> None:
        """Refuses too much of them before it is read."""
        self._parts += parts
        self._characters += characters
        if self._parts > MAX_PARTS:
            raise PromptError(
                f"messages: expected at most {MAX_PARTS} with their parts, found {self._parts} or more; join some"
            )
        if self._characters > MAX_CHARACTERS:
            found = f"{self._characters:,} or more"
            raise PromptError(
                f"messages: expected at most {MAX_CHARACTERS:,} characters, found {found}; shorten the messages"
            )

    def message(self, message: object, where: str) -> Message:
        if isinstance(message, Message):
            message = {"role": message.role, "content": message.parts}
        if not isinstance(message, Mapping):
            raise PromptError(f"{where}: expected a dictionary with role and content, found {brief(message)}")
        role = message.get("role")
        if not (isinstance(role, str) and role in ROLES):
            remedy = "; tools are not supported" if role in ("tool", "function") else ""
            raise PromptError(f"{where}: expected a role of {', '.join(ROLES)}, found {brief(role)}{remedy}")
        where = f"{where} ({role})"
        for key in ("tool_calls", "function_call"):
            if (calls := message.get(key)) is not None and not (isinstance(calls, (list, tuple)) and not calls):
                raise PromptError(f"{where}: expected text and images, found {key}; tools are not supported")
        self.count(characters=len(role))
        content = message.get("content")
        if isinstance(content, str):
            content = ({"type": "text", "text": content},)
        if not isinstance(content, (list, tuple)):
            raise PromptError(f"{where}: expected a content of text or a list of parts, found {brief(content)}")
        self.count(parts=len(content))
        parts = tuple(self._part(part, f"{where}, part {number}") for number, part in enumerate(content))
        return Message(cast(Role, str(role)), parts)

    def _part(self, part: object, where: str) -> Part:
        if isinstance(part, TextPart):
            return self._text(part.text, where)
        if isinstance(part, ImagePart):
            return ImagePart(self._source("image", part.source, where))
        if isinstance(part, VideoPart):
            return VideoPart(self._video_source("video", part.source, where), part.fps)
        kind = part.get("type") if isinstance(part, Mapping) else None
        if isinstance(part, Mapping) and isinstance(kind, str):
            if kind in _TEXTS:
                _refuse_others(part, ("text",), where)
                return self._text(part.get("text"), where)
            if kind in _VIDEOS:
                return self._video(part, kind, where)
            if kind in _SOURCES:
                _refuse_others(part, _SOURCES[kind], where)
                return self._image(part, kind, where)
        found = brief(part if kind is None else kind)
        raise PromptError(f"{where}: expected a part of type {', '.join((_TEXTS[0], *_SOURCES))}, found {found}")

    def _text(self, text: object, where: str) -> TextPart:
        if not isinstance(text, str):
            raise PromptError(f"{where}: expected a text, found {brief(text)}")
        self.count(characters=len(text))
        try:
            text.encode()
        except UnicodeEncodeError:
            raise PromptError(f"{where}: expected Unicode text, found a lone surrogate; mend the text") from None
        return TextPart(str(text))

    def _image(self, part: Mapping[object, object], kind: str, where: str) -> ImagePart:
        if (given := _given(part, kind, "image", where)) is not None:
            return ImagePart(self._source(*given, where))
        if kind != "image":
            raise PromptError(f"{where}: expected an image_url, found none; add it")
        if self.taken == len(self._images):
            raise PromptError(
                f"{where}: expected an image, found none; add it to the part, or one more to the list of images"
            )
        source = self._source("image", self._images[self.taken], where)
        self.taken += 1
        return ImagePart(source)

    def _video(self, part: Mapping[object, object], kind: str, where: str) -> VideoPart:
        _refuse_others(part, (*_SOURCES[kind], *(["fps"] if kind == "video" else [])), where)
        given = _given(part, kind, "video", where)
        if given is None:
            raise PromptError(f"{where}: expected a {kind.removeprefix('input_')}, found none; add it")
        source, fps = self._video_source(*given, where), part.get("fps")
        if fps is not None:
            if not isinstance(fps, (int, float)) or not 0 < fps <= MAX_FPS:
                raise PromptError(f"{where}: expected fps above 0, up to {MAX_FPS:g}, found {brief(fps)}")
            if isinstance(source, (str, os.PathLike, bytes, bytearray, Video)):
                raise PromptError(f"{where}: expected fps with a list of frames, found a file, which has its own")
        return VideoPart(source, fps)

    def _video_source(self, key: str, value: object, where: str) -> VideoSource | Video:
        if isinstance(value, (list, tuple)) and key == "video":
            if not value:
                raise PromptError(f"{where}: expected a list of frames, found an empty one; add them")
            return [self._source("image", frame, f"{where}, frame {n}") for n, frame in enumerate(value)]
        return cast("VideoSource | Video", self._source(key, value, where, "video"))

    def _source(self, key: str, value: object, where: str, kind: Kind = "image") -> ImageSource:
        """``key``: the name it was given under, which says what it may be."""
        if key == "base64" and isinstance(value, (str, bytes)):
            text = value if isinstance(value, str) else value.decode("latin-1")
            return data_url(text, where, kind) if text[:5].lower() == "data:" else decoded(text, where, kind)
        if isinstance(value, str) and key != "base64":
            return self._named(str(value), where, kind)
        if isinstance(value, os.PathLike) and key in (kind, "path"):
            self._refuse_file(where, kind)
            return value
        if key == kind and (is_source(value) if kind == "image" else is_video_source(value)):
            return cast(ImageSource, value)
        own = images.SOURCES if kind == "image" else videos.SOURCES
        expected = {kind: own, "path": "a path", "base64": "text in base64"}.get(key, "a URL as text")
        raise PromptError(f"{where}: expected {expected} under {key!r}, found {brief(value)}")

    def _named(self, name: str, where: str, kind: Kind) -> ImageSource:
        """A data: URL, a file: URL or a path."""
        if name[:5].lower() == "data:":
            return data_url(name, where, kind)
        if name[:5].lower() == "file:":
            self._refuse_file(where, kind)
            return file_url(name, where)
        if is_url(name.lower()):
            remedy = "download it and pass the path" if self._files else f"send the {kind} as a data: URL"
            raise PromptError(f"{where}: expected {a_kind(kind)}, found {brief(name)}; URLs are not fetched: {remedy}")
        self._refuse_file(where, kind)
        if not name:
            raise PromptError(f"{where}: expected the path of {a_kind(kind)}, found an empty text")
        return name

    def _refuse_file(self, where: str, kind: Kind) -> None:
        if not self._files:
            raise PromptError(f"{where}: expected {a_kind(kind)} as a data: URL, found a path; files are not read here")


def _given(part: Mapping[object, object], kind: str, what: Kind, where: str) -> tuple[str, object] | None:
    """The key under which a part has its source, and the source; None without one."""
    given = [key for key in _SOURCES[kind] if part.get(key) is not None]
    if len(given) > 1:
        raise PromptError(f"{where}: expected one source of the {what}, found {' and '.join(given)}; leave one")
    if not given:
        return None
    value = part[given[0]]
    if kind in ("image_url", "video_url") and isinstance(value, Mapping):
        _refuse_others(value, ("url",), where)
        value = value.get("url")
    return given[0], value


def _refuse_others(part: Mapping[object, object], known: tuple[str, ...], where: str) -> None:
    """A key that is not read may be misspelt, or ask for what we do not do."""
    for key, value in part.items():
        if value is not None and key not in ("type", *known, *_IGNORED):
            raise PromptError(f"{where}: expected the keys type, {', '.join(known)}, found {brief(key)}; leave it out")
