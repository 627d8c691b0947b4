"""A tokenizer.json that would panic, abort or never end in the library is refused before it gets there."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flashvlm.errors import BundleError, PromptError, no_panic
from flashvlm.text.processor import TextProcessor
from flashvlm.text.split_pattern import check_pattern
from flashvlm.text.tokenizer_file import load_tokenizer

IMAGE = {"image": "<image>"}
DEMO = Path(__file__).resolve().parents[2] / "export" / "flashvlm_export" / "demo"
Change = Callable[[dict[str, Any]], object]

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


@pytest.fixture(scope="module")
def valid() -> dict[str, Any]:
    return json.loads((DEMO / "tokenizer.json").read_text(encoding="utf-8"))


def load(value: Any, rows: int | None = None) -> Any:
    return load_tokenizer(json.dumps(value).encode(), "tokenizer.json", rows)


def put(path: str, value: Any) -> Change:
    """Sets ``a.b.0`` of the file."""

    def change(file: dict[str, Any]) -> None:
        *parts, last = path.split(".")
        holder: Any = file
        for part in parts:
            holder = holder[int(part)] if isinstance(holder, list) else holder[part]
        holder[int(last) if isinstance(holder, list) else last] = value

    return change


def nested(kind: str, children: str, depth: int, leaf: dict[str, Any]) -> Change:
    value = leaf
    for _ in range(depth):
        value = {"type": "Sequence", children: [value]}
    return put(kind, value)


def split(pattern: dict[str, Any]) -> Change:
    step = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    return put("pre_tokenizer", step)


# Each panics, aborts, hangs or fills the memory in tokenizers 0.23 at loading, encoding or decoding, or is of a kind
# that no family here has.
HOSTILE: dict[str, tuple[Change, str]] = {
    "a model of another kind": (
        put("model", {"type": "Unigram", "vocab": [], "unk_id": 7}),
        "model.type: expected BPE",
    ),
    "no vocabulary": (put("model.vocab", {}), "model.vocab"),
    "ids that are texts": (put("model.vocab", {"a": "1"}), "model.vocab: expected tokens with numbers"),
    "an id below zero": (put("model.vocab", {"a": -1}), "model.vocab: expected a number from 0"),
    "an id of 10^9": (put("model.vocab", {"a": 10**9}), "model.vocab: expected a number from 0"),
    "merges into nothing": (put("model.merges", [["▁", "zzz"]]), "model.merges: expected pairs that make tokens"),
    "merges of three": (put("model.merges", [["a", "b", "c"]]), "model.merges: expected pairs"),
    "an unknown token that is not there": (put("model.unk_token", "none such"), "model.unk_token"),
    "a prefix within a character": (put("model.continuing_subword_prefix", "é"), "continuing_subword_prefix"),
    "dropout": (put("model.dropout", 0.5), "model.dropout: expected null"),
    "an empty added token": (put("added_tokens.0.content", ""), "added_tokens[0].content"),
    "an added token of 10^9": (put("added_tokens.0.id", 10**9), "added_tokens[0].id"),
    "added tokens without end": (
        lambda f: f["added_tokens"].extend(f["added_tokens"] * 9000),
        "added_tokens: expected",
    ),
    "normalizers in normalizers": (nested("normalizer", "normalizers", 5000, {"type": "NFC"}), ""),
    "a few normalizers in normalizers": (nested("normalizer", "normalizers", 6, {"type": "NFC"}), "sequences in"),
    "normalizers in a row": (
        put("normalizer", {"type": "Sequence", "normalizers": [{"type": "NFC"}] * 99}),
        "normalizers: expected at most",
    ),
    "a charsmap": (put("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}), "normalizer.type"),
    "nothing to prepend": (put("normalizer", {"type": "Prepend", "prepend": ""}), "normalizer.prepend"),
    "replacing nothing": (
        put("normalizer", {"type": "Replace", "pattern": {"String": ""}, "content": "x"}),
        "normalizer.pattern.String",
    ),
    "replacing by more, again and again": (
        put("normalizer", {"type": "Replace", "pattern": {"String": "a"}, "content": "aaaa"}),
        "normalizer.content",
    ),
    "replacing by an expression": (
        put("normalizer", {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "x"}),
        "normalizer.pattern: expected a String",
    ),
    "splitting exponentially": (split({"Regex": "(a+)+$"}), "expected one that splits in linear time"),
    "splitting at nothing": (split({"Regex": "a*"}), "may match nothing"),
    "splitting by a pattern without end": (split({"Regex": "a" * 5000}), "pre_tokenizer.pattern.Regex"),
    "a template with a token it lacks": (put("post_processor.special_tokens", {}), "post_processor.single"),
    "a template without the text": (put("post_processor.single", []), "post_processor.single: expected A once"),
    "taking more off than there is": (
        put("decoder", {"type": "Strip", "content": " ", "start": 0, "stop": 9}),
        "decoder.stop",
    ),
    "a decoder of another kind": (put("decoder", {"type": "CTC", "pad_token": "x"}), "decoder.type"),
}


@pytest.mark.parametrize(("change", "expected"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_files(change: Change, expected: str, valid: dict[str, Any], capfd: pytest.CaptureFixture[str]) -> None:
    value = copy.deepcopy(valid)
    change(value)
    try:
        content = json.dumps(value).encode()
    except RecursionError:  # deeper than json writes
        content = b'{"normalizer":' + b'{"type":"Sequence","normalizers":[' * 5000
    with pytest.raises(BundleError) as error:
        load_tokenizer(content, "tokenizer.json")
    assert expected in str(error.value)
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")  # a panic would have been told by the library


@pytest.mark.parametrize(
    "content", [b"", b"null", b"[]", b"{}", b"[" * 60_000, b'{"a":' * 60_000, b"\xff", b'{"model": NaN}', b"9" * 5000]
)
def test_what_is_no_tokenizer(content: bytes) -> None:
    with pytest.raises(BundleError, match="expected"):
        load_tokenizer(content, "tokenizer.json")


def test_a_key_twice(valid: dict[str, Any]) -> None:
    """The check and the library might each take another one."""
    content = json.dumps(valid).encode().replace(b'"model": {', b'"model": {"type": "Unigram"}, "model": {', 1)
    with pytest.raises(BundleError, match="a key that occurs twice"):
        load_tokenizer(content, "tokenizer.json")


def test_tokens_beyond_the_table(valid: dict[str, Any]) -> None:
    highest = max(*valid["model"]["vocab"].values(), *(token["id"] for token in valid["added_tokens"]))
    assert load(valid, rows=highest + 1).get_vocab_size() > 100
    with pytest.raises(BundleError, match=rf"has id {highest}, beyond the table of {highest} rows"):
        load(valid, rows=highest)
    value = copy.deepcopy(valid)
    value["added_tokens"].append(dict(value["added_tokens"][-1], id=99_999, content="<far>"))
    with pytest.raises(BundleError, match="beyond the table of"):
        load(value, rows=highest + 1)


@pytest.mark.parametrize("token", [7, ["</s>"], {"content": 3}, {"text": "x"}, True, {"content": ["x"]}])
@pytest.mark.parametrize("name", ["bos_token", "eos_token", "unk_token"])
def test_named_tokens_of_another_kind(name: str, token: Any) -> None:
    def read(file: str) -> bytes:
        content = (DEMO / file).read_bytes()
        return json.dumps(json.loads(content) | {name: token}).encode() if file == "tokenizer_config.json" else content

    with pytest.raises(BundleError, match=r"tokenizer_config\.json"):
        TextProcessor.from_files(read, DEMO)


@pytest.mark.parametrize("pattern", [GPT2, QWEN2, LLAMA3], ids=["gpt2", "qwen2", "llama3"])
def test_published_patterns_split(pattern: str, valid: dict[str, Any]) -> None:
    check_pattern(pattern)
    value = copy.deepcopy(valid)
    split({"Regex": pattern})(value)
    assert load(value).encode("What's on the sofa 123?").ids


@pytest.mark.parametrize(
    "pattern",
    [
        *("(a+)+$", "(a|a)*b", "(?:a?){50}a{50}", "a*a*b", "a+b", "(a)\\1", "(?<=a)b", "(?=a)*", "a{1,99999}", "(?R)"),
        *("[", "(", "a**", "a{2}{3}", "", "|", "a|", "x*", "(?i:a|b)+", "a+a+", "\\k<x>", "\\g<1>", "[[a]&&[b]]"),
    ],
)
def test_patterns_that_may_take_without_end(pattern: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        check_pattern(pattern)


def test_a_panic_is_an_error() -> None:
    class PanicException(BaseException):
        """As PyO3 has it."""

    def fail(error: BaseException) -> None:
        with no_panic():
            raise error

    with pytest.raises(RuntimeError, match="PanicException: index out of bounds"):
        fail(PanicException("index out of bounds"))
    for error in (KeyboardInterrupt(), SystemExit(3), GeneratorExit(), ValueError("x")):
        with pytest.raises(type(error)):
            fail(error)


def test_a_panic_of_the_library_itself() -> None:
    """Past the check of the shape: the guard around the library still makes an error of it."""
    code = """
import json, sys
from tokenizers import Tokenizer
from flashvlm.errors import no_panic

IMAGE = {"image": "<image>"}
value = json.load(open(sys.argv[1], encoding="utf-8"))
value["post_processor"]["special_tokens"] = {}
try:
    with no_panic():
        Tokenizer.from_str(json.dumps(value)).encode("what is it")
    print("no panic")
except Exception as error:
    print(type(error).__name__)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(DEMO / "tokenizer.json")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "RuntimeError"


def test_prompts_without_end() -> None:
    processor = TextProcessor.from_folder(DEMO)
    for text in ("a " * 300_000, "é" * 500_000):
        with pytest.raises(PromptError, match="400,000"):
            processor.encode([{"role": "user", "content": text}], IMAGE)
    assert len(processor.encode([{"role": "user", "content": "a " * 20_000}], IMAGE).input_ids) > 20_000
