import base64
import contextlib
import copy
import io
import os
from collections import UserDict
from pathlib import Path
from unittest import mock

import numpy as np
import PIL.Image
import pytest
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st

from flashvlm.errors import PromptError
from flashvlm.images import load_image
from flashvlm.messages import ImagePart, Message, TextPart, normalise
from flashvlm.text.processor import MAX_CHARACTERS, MAX_PARTS

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)


def png():
    out = io.BytesIO()
    PIL.Image.fromarray(PIXELS).save(out, "PNG")
    return out.getvalue()


PNG = png()
BASE64 = base64.b64encode(PNG).decode()
DATA_URL = f"data:image/png;base64,{BASE64}"


def user(*parts):
    return [{"role": "user", "content": list(parts)}]


def source_of(part, **options):
    (message,) = normalise(user(part), **options)
    (source,) = message.images
    return source


def refusal_of(messages, *arguments, **options):
    with pytest.raises(PromptError) as refusal:
        normalise(messages, *arguments, **options)
    text = str(refusal.value)
    assert "\n" not in text
    assert len(text) < 400
    return text


# --- what is taken ---


def test_a_conversation_as_openai_has_it():
    messages = [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "name": "Ann",
            "content": [
                {"type": "text", "text": "What is this?"},
                {"type": "image_url", "image_url": {"url": DATA_URL, "detail": "low"}},
            ],
        },
        # What the openai package gives for an answer: its other keys are None or empty.
        {
            "role": "assistant",
            "content": "Noise.",
            "refusal": None,
            "annotations": [],
            "tool_calls": None,
            "audio": None,
        },
        {"role": "user", "content": "Of which colour?"},
    ]
    system, question, answer, last = normalise(messages)
    assert system == Message("system", (TextPart("Be brief."),))
    assert question.parts[0] == TextPart("What is this?")
    assert question.images == (PNG,)
    assert answer == Message("assistant", (TextPart("Noise."),))
    assert last == Message("user", (TextPart("Of which colour?"),))


def test_a_conversation_as_openais_responses_have_it():
    messages = [
        {"type": "message", "role": "user", "content": [
            {"type": "input_text", "text": "What is this?"},
            {"type": "input_image", "image_url": DATA_URL, "detail": "auto", "file_id": None},
        ]},
        {"type": "message", "id": "msg_1", "status": "completed", "role": "assistant",
         "content": [{"type": "output_text", "text": "Noise.", "annotations": [], "logprobs": []}]},
    ]  # fmt: skip
    question, answer = normalise(messages)
    assert question.parts[0] == TextPart("What is this?")
    assert question.images == (PNG,)
    assert answer.parts == (TextPart("Noise."),)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": DATA_URL},
        {"type": "image", "url": DATA_URL},
        {"type": "image", "base64": BASE64},
        {"type": "image", "base64": BASE64.encode()},
        {"type": "image", "base64": DATA_URL},
        {"type": "image", "base64": "\n".join([BASE64[:20], BASE64[20:]]) + "\n"},
        {"type": "image", "base64": BASE64.rstrip("=")},
        {"type": "image", "image": PNG},
        {"type": "image", "image": bytearray(PNG), "path": None},
        {"type": "image_url", "image_url": {"url": DATA_URL.replace("data:image/png", "DATA:IMAGE/PNG;charset=x")}},
        {"type": "image_url", "image_url": {"url": "data:;base64," + BASE64.replace("+", "%2B").replace("/", "%2F")}},
        {"type": "image_url", "image_url": DATA_URL},
        {"type": "input_image", "image_url": DATA_URL},
    ],
)
@pytest.mark.parametrize("files", [True, False])
def test_images_as_bytes(part, files):
    source = source_of(part, files=files)
    assert bytes(source) == PNG
    np.testing.assert_array_equal(np.asarray(load_image(source)), PIXELS)


@pytest.mark.parametrize("files", [True, False])
def test_images_in_memory(tmp_path, files):
    (tmp_path / "cat.png").write_bytes(PNG)
    with open(tmp_path / "cat.png", "rb") as file:
        for image in (PIL.Image.fromarray(PIXELS), PIXELS, memoryview(PNG), io.BytesIO(PNG), file):
            source = source_of({"type": "image", "image": image}, files=files)
            assert source is image
            np.testing.assert_array_equal(np.asarray(load_image(source)), PIXELS)


def test_paths(tmp_path):
    path = tmp_path / "a cät #1?.png"
    path.write_bytes(PNG)
    name = os.fspath(path)
    cases = {
        "path": ({"type": "image", "path": name}, name),
        "path object": ({"type": "image", "path": path}, path),
        "image": ({"type": "image", "image": name}, name),
        "image object": ({"type": "image", "image": path}, path),
        "url": ({"type": "image", "url": path.as_uri()}, name),
        "image_url": ({"type": "image_url", "image_url": {"url": name}}, name),
        "localhost": ({"type": "image_url", "image_url": {"url": path.as_uri().replace("//", "//localhost", 1)}}, name),
        "short": ({"type": "input_image", "image_url": "FILE:" + path.as_uri()[7:]}, name),
    }
    for case, (part, want) in cases.items():
        source = source_of(part)
        assert source == want, case
        np.testing.assert_array_equal(np.asarray(load_image(source)), PIXELS)
        assert refusal_of(user(part), files=False) == (
            "message 0 (user), part 0: expected an image as a data: URL, found a path; files are not read here"
        )
    assert "files are not read here" in refusal_of(user({"type": "image"}), [name], files=False)


def test_no_file_is_opened(tmp_path):
    messages = user({"type": "image", "path": tmp_path / "not there"}, {"type": "image", "url": "file:///dev/zero"})
    with mock.patch("os.open") as opened, mock.patch("builtins.open") as opened_too:
        assert normalise(messages)[0].images == (tmp_path / "not there", "/dev/zero")
    assert not opened.called
    assert not opened_too.called


def test_images_given_beside_the_messages_are_taken_in_order():
    own, one, two = PIL.Image.new("RGB", (1, 1)), b"one", Path("two.png")
    messages = [
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "image", "image": own}, {"type": "text", "text": "?"}],
        },
        {"role": "assistant", "content": "!"},
        {"role": "user", "content": ({"type": "image", "image": None}, {"type": "text", "text": "??"})},
    ]
    first, _, last = normalise(messages, [one, two])
    assert first.images == (one, own)
    assert last.images == (two,)
    assert refusal_of(messages, [one]) == (
        "message 2 (user), part 0: expected an image, found none; add it to the part, or one more to the list of images"
    )
    assert refusal_of(messages, [one, two, own]).startswith("images: expected 2, one for each part without")
    assert refusal_of(messages, one).startswith("images: expected a list of them, found b'one'; put it in a list")
    assert "part 0: expected a path, bytes, an open file" in refusal_of(messages, [5, two])


def test_what_is_normal_stays_as_it_is():
    first = normalise([{"role": "system", "content": "x"}, *user({"type": "image", "image": PIXELS})])
    again = normalise(first)
    assert again[0] == first[0]
    assert again[1].images[0] is PIXELS
    mixed = normalise([*first, {"role": "user", "content": [TextPart("y"), ImagePart("z.png")]}])
    assert mixed[2].parts[0] == TextPart("y")
    assert mixed[2].images == ("z.png",)
    assert "a path" in refusal_of(mixed, files=False)
    assert "message 0 (system), part 0: expected a text" in refusal_of([Message("system", (TextPart(5),))])


def test_other_mappings_are_taken():
    (message,) = normalise([UserDict(role="user", content=[UserDict(type="text", text="x")])])
    assert message == Message("user", (TextPart("x"),))


def test_what_a_template_reads():
    (message,) = normalise(user({"type": "input_text", "text": "a"}, {"type": "image", "image": PIXELS}))
    assert message.plain() == {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}


# --- what is refused ---


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        (None, "messages: expected a list of them, found None"),
        ("What", "messages: expected a list of them, found 'What'"),
        (5, "messages: expected a list"),
        ({"role": "user", "content": "x"}, "put it in a list"),
        (iter([]), "messages: expected a list"),
        (({"role": "user", "content": "x"} for _ in range(2)), "messages: expected a list"),
        ([], "messages: expected at least one, found none"),
        ([None], "message 0: expected a dictionary with role and content, found None"),
        (["hi"], "message 0: expected a dictionary"),
        ([{}], "message 0: expected a role of system, user, assistant, found None"),
        ([{"role": "user", "content": "x"}, {"role": "tool", "content": "x"}], "message 1: .*'tool'; tools are not"),
        ([{"role": "User", "content": "x"}], "found 'User'"),
        ([{"role": ["user"], "content": "x"}], "expected a role"),
        ([{"role": "user"}], r"message 0 \(user\): expected a content of text or a list of parts, found None"),
        ([{"role": "user", "content": 5}], "found 5"),
        ([{"role": "user", "content": {"type": "text", "text": "x"}}], "a list of parts"),
        ([{"role": "user", "content": iter(["x"])}], "a list of parts"),
        ([{"role": "user", "content": "\ud800"}], "part 0: expected Unicode text, found a lone surrogate"),
        ([{"role": "assistant", "content": "x", "tool_calls": [{}]}], r"message 0 \(assistant\): .*found tool_calls"),
    ],
)
def test_bad_messages(messages, words):
    with pytest.raises(PromptError, match=words):
        normalise(messages)
    if not hasattr(messages, "__next__"):
        refusal_of(messages)


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (None, "expected a part of type text, image, .*, video, .*, found None"),
        ("text", "found 'text'"),
        ([{"type": "text"}], "expected a part of type"),
        ({}, "found {}"),
        ({"text": "x"}, "expected a part of type"),
        ({"type": None, "text": "x"}, "expected a part of type"),
        ({"type": ["text"], "text": "x"}, "expected a part of type"),
        ({"type": "audio"}, "found 'audio'"),
        ({"type": "video"}, "expected a video, found none; add it"),
        ({"type": "video_url"}, "expected a video_url, found none"),
        ({"type": "text"}, "expected a text, found None"),
        ({"type": "text", "text": 5}, "expected a text, found 5"),
        ({"type": "text", "text": "x", "txt": "y"}, "found 'txt'; leave it out"),
        ({"type": "image", "pth": "x"}, "expected the keys type, image, path, url, base64, found 'pth'"),
        ({"type": "image", "image": "x", "max_pixels": 5}, "found 'max_pixels'"),
        ({"type": "image", "image": "x", "path": "y"}, "expected one source of the image, found image and path"),
        ({"type": "image"}, "expected an image, found none"),
        ({"type": "image", "image": ""}, "expected the path of an image, found an empty text"),
        ({"type": "image", "image": 5}, "under 'image', found 5"),
        ({"type": "image", "image": ["a.png"]}, "under 'image'"),
        ({"type": "image", "image": {"url": "a.png"}}, "under 'image'"),
        ({"type": "image", "path": PNG}, "expected a path under 'path'"),
        ({"type": "image", "url": PNG}, "expected a URL as text under 'url'"),
        ({"type": "image", "base64": 5}, "expected text in base64"),
        ({"type": "image", "base64": ""}, "found nothing"),
        ({"type": "image", "base64": "===="}, "found nothing"),
        ({"type": "image", "base64": "a b c d e"}, "expected base64"),
        ({"type": "image", "base64": "ä" * 1000}, "expected base64"),
        ({"type": "image", "base64": "not-base64!"}, "expected base64"),
        ({"type": "image_url"}, "expected an image_url, found none"),
        ({"type": "image_url", "image_url": {}}, "expected a URL as text under 'image_url', found None"),
        ({"type": "image_url", "image_url": {"url": None}}, "found None"),
        ({"type": "image_url", "image_url": {"url": PNG}}, "expected a URL as text"),
        ({"type": "image_url", "image_url": {"uri": "x"}}, "found 'uri'"),
        ({"type": "image_url", "image_url": [DATA_URL]}, "expected a URL as text"),
        ({"type": "image_url", "url": DATA_URL}, "found 'url'"),
        ({"type": "input_image", "file_id": "file-1"}, "found 'file_id'"),
        ({"type": "input_image", "image_url": {"url": DATA_URL}}, "expected a URL as text"),
        ({"type": "image", "url": "data:"}, "expected data:image/...;base64,..., found 'data:'"),
        ({"type": "image", "url": "data:image/png,abc"}, "expected data:image"),
        ({"type": "image", "url": "data:image/png;base64,"}, "found nothing"),
        ({"type": "image", "url": "data:image/png;base64,%ff"}, "expected base64"),
        ({"type": "image", "url": f"data:video/mp4;base64,{BASE64}"}, "found 'video/mp4'"),
        ({"type": "image", "url": "file://other/a.png"}, "expected a file of this machine"),
        ({"type": "image", "url": "file:a.png"}, "expected file:// and a full path"),
        ({"type": "image", "url": "file:///\ud800"}, "expected the name of a file"),
    ],
)
def test_bad_parts(part, words):
    with pytest.raises(PromptError, match=r"message 0 \(user\), part 1: "):
        normalise(user({"type": "text", "text": "x"}, part))
    with pytest.raises(PromptError, match=words):
        normalise(user(part))
    refusal_of(user(part))


@pytest.mark.parametrize("url", ["http://a.b/c.png", "HTTPS://a.b/c.png", "s3://a/b.png", "https:/a.b/c.png"])
def test_urls_are_not_fetched(url):
    for part in (
        {"type": "image", "url": url},
        {"type": "image", "image": url},
        {"type": "image", "path": url},
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "input_image", "image_url": url},
    ):
        assert refusal_of(user(part)).endswith("URLs are not fetched: download it and pass the path")
        assert refusal_of(user(part), files=False).endswith("URLs are not fetched: send the image as a data: URL")


def test_too_much():
    short = {"role": "user", "content": "x"}
    assert len(normalise([short] * (MAX_PARTS // 2))) == MAX_PARTS // 2
    assert "at most 1000 with their parts" in refusal_of([short] * (MAX_PARTS // 2 + 1))
    assert "at most 1000 with their parts" in refusal_of(user(*[{"type": "text", "text": ""}] * MAX_PARTS))
    normalise([{"role": "user", "content": "x" * (MAX_CHARACTERS - 4)}])
    assert "at most 400,000 characters" in refusal_of([{"role": "user", "content": "x" * (MAX_CHARACTERS - 3)}])


def test_long_values_are_quoted_in_part():
    for value in ("x" * 10**6, b"x" * 10**6, ["x" * 1000] * 1000, {"k" * 1000: "v" * 1000}, [[[[[1]]]]], 10**5000):
        for messages in (value, [value], [{"role": value}], user(value), user({"type": "text", "text": value})):
            with contextlib.suppress(PromptError):
                normalise(messages)
                continue
            refusal_of(messages)


# --- whatever it is ---

KEYS = st.sampled_from(
    ["type", "text", "image", "path", "url", "base64", "image_url", "role", "content", "detail", "tool_calls", "x"]
)
URLS = st.sampled_from(
    ["", "data:image/png;base64,AA", "data:,", "file:", "file:///a%ff", "file://", "http://a", "a.png", "\ud800", "\0"]
)
LEAVES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), URLS)
JSON = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=12
)
GOOD = [
    {"type": "text", "text": "x"},
    {"type": "image", "base64": "AA=="},
    {"type": "image", "image": "a.png"},
    {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA", "detail": "low"}},
    {"type": "input_image", "image_url": "data:image/png;base64,AA"},
]


@st.composite
def nearly_messages(draw):
    """Good messages, of which up to two values are replaced by anything."""
    contents = draw(st.lists(st.lists(st.sampled_from(GOOD), max_size=3), min_size=1, max_size=3))
    messages = copy.deepcopy([{"role": "user", "content": content} for content in contents])
    for _ in range(draw(st.integers(0, 2))):
        place = messages
        while place:
            key = draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
            if not isinstance(place[key], (dict, list)) or draw(st.booleans()):
                place[key] = draw(JSON)
                break
            place = place[key]
    return messages


@settings(max_examples=300, deadline=None)
@given(JSON | nearly_messages(), st.booleans())
def test_anything_is_normalised_or_refused(value, files):
    try:
        messages = normalise(value, files=files)
    except PromptError:
        refusal_of(value, files=files)
        return
    assert [message.role for message in messages] == [message["role"] for message in value]
    for message in messages:
        assert all(isinstance(part, (TextPart, ImagePart)) for part in message.parts)
        if not files:
            assert all(isinstance(image, bytes) for image in message.images)


@pytest.mark.parametrize("kind", [bytes, str])
def test_the_fuzz_reaches_images(kind):
    """Or the test above would show nothing of them."""

    def has_image(value):
        try:
            return any(isinstance(image, kind) for message in normalise(value) for image in message.images)
        except PromptError:
            return False

    quick = settings(max_examples=50, database=None, phases=[Phase.generate])
    assert find(nearly_messages(), has_image, settings=quick)
