"""The processor folder's files together, from a reader of any kind, and the messages that users send."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tokenizer_files import llama, put
from tokenizers import Tokenizer

from flashvlm.errors import BundleError, PromptError
from flashvlm.text.processor import MAX_CHARACTERS, MAX_PARTS, TextProcessor

IMAGE = {"image": "<image>"}

CHAT = (
    "{% for m in messages %}{% for p in m.content %}{{ '<image>' if p.type == 'image' else p.text }}{% endfor %}"
    "{% endfor %}"
)


def files(**changes: bytes) -> dict[str, bytes]:
    content = {"tokenizer.json": json.dumps(llama()).encode(), "tokenizer_config.json": b"{}"}
    return {**content, "chat_template.jinja": CHAT.encode(), **{k.replace("__", "."): v for k, v in changes.items()}}


def processor(rows: int | None = None, **changes: bytes) -> TextProcessor:
    return TextProcessor.from_files(files(**changes).__getitem__, "place", rows)


def ask(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]


def test_files_from_anywhere() -> None:
    prompt = processor(266).encode(ask("ab a"), IMAGE)
    assert prompt.text_mask.tolist() == [False, False, True, True, True]  # BOS, the image, the question
    with pytest.raises(BundleError, match=r"place/tokenizer.json: .* beyond the table of 100 rows"):
        processor(100)
    with pytest.raises(BundleError, match=r"place/chat_template.jinja: expected UTF-8"):
        processor(chat_template__jinja=b"\xff")
    with pytest.raises(BundleError, match=r"place/chat_template.jinja: expected a Jinja template, found: SyntaxError"):
        processor(chat_template__jinja=b"{% for a in b %}" * 30 + b"{% endfor %}" * 30)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (b'{"bos_token": 7}', "expected text in bos_token, found 7"),
        (b'{"bos_token": []}', "expected text in bos_token, found []"),
        (b'{"eos_token": {"content": 3}}', "expected text in eos_token, found 3"),
        (b'{"pad_token": {}}', "expected text in pad_token, found None"),
        (b'{"unk_token": false}', "expected text in unk_token, found False"),
        (b"[]", "expected a tokenizer configuration, found a list"),
        (b"7", "expected a tokenizer configuration, found a int"),
        (b'{"a":' * 60_000, "expected a tokenizer configuration, found: nested"),
        (b'{"bos_token": NaN}', "expected a tokenizer configuration, found: NaN"),
        (b'{"bos_token": ' + b"9" * 5000 + b"}", "expected a tokenizer configuration"),
        (b"\xff", "expected a tokenizer configuration, found: expected UTF-8"),
    ],
)
def test_hostile_configurations(config: bytes, words: str) -> None:
    with pytest.raises(BundleError, match=r"place/tokenizer_config.json: ") as refusal:
        processor(tokenizer_config__json=config)
    assert words in str(refusal.value)


def test_tokens_without_rows_are_not_encoded() -> None:
    beyond = put(llama(), "post_processor.special_tokens.<s>.ids", [9_999_999])
    with pytest.raises(PromptError, match="expected tokens of the table of 300 rows, found id 9999999"):
        processor(300, tokenizer__json=json.dumps(beyond).encode()).encode(ask("a"), IMAGE)


@pytest.mark.parametrize("image", [-1, 2**32, 2**70, 10**6, "<video>", ""])
def test_no_such_placeholder(image: int | str) -> None:
    with pytest.raises(PromptError, match="image placeholder: expected a token of the vocabulary"):
        processor().encode(ask("a"), {"image": image})


class Panic(BaseException):
    """As a panic of the library arrives in Python."""


class Failing:
    def __init__(self, tokenizer: Tokenizer, error: type[BaseException]) -> None:
        self._tokenizer = tokenizer
        self._error = error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def encode(self, *_: object, **__: object) -> None:
        raise self._error("index out of bounds")

    decode = encode


@pytest.mark.parametrize("error", [Panic, RuntimeError])
def test_panics_that_remain(error: type[BaseException]) -> None:
    text = processor()
    text.tokenizer = Failing(text.tokenizer, error)
    with pytest.raises(PromptError, match=r"the tokenizer fails: .*index out of bounds; export the bundle again"):
        text.encode(ask("a"), IMAGE)
    with pytest.raises(PromptError, match=r"the tokenizer fails: .*index out of bounds"):
        text.decode([1, 2])


def test_interruptions_go_through() -> None:
    text = processor()
    text.tokenizer = Failing(text.tokenizer, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        text.decode([1, 2])


def test_negative_ids_are_not_decoded() -> None:
    with pytest.raises(PromptError, match="the tokenizer fails"):
        processor().decode([-1])


# --- what users send -------------------------------------------------------------------------------------------------


def test_long_messages() -> None:
    text = processor()
    with pytest.raises(PromptError, match=f"messages: expected at most {MAX_CHARACTERS:,} characters, found 400,005"):
        text.encode(ask("a" * (MAX_CHARACTERS + 1)), IMAGE)
    with pytest.raises(PromptError, match="messages: expected at most"):
        text.render([{"role": "a" * (MAX_CHARACTERS + 1), "content": "x"}])
    with pytest.raises(PromptError, match=f"messages: expected at most {MAX_PARTS} with their parts, found 1002"):
        text.render(ask("a") * 334)
    wordy = processor(chat_template__jinja=("{{ 'x' * 400000 }}" + CHAT).encode())
    with pytest.raises(PromptError, match="prompt: expected at most 400,000 characters, found 400,008"):
        wordy.encode(ask("a"), IMAGE)


def test_as_long_as_messages_may_be() -> None:
    prompt = processor().encode(ask("ab " * (MAX_CHARACTERS // 3 - 5)), IMAGE)
    assert prompt.question_mask.sum() > MAX_CHARACTERS // 3


def test_marks_for_private_use() -> None:
    prompt = processor().encode(ask("\ue000" * 20_000 + "a"), IMAGE)
    assert prompt.question_mask.sum() == 3 * 20_000 + 2  # with the space in front
