"""A `tokenizer.json`, checked before the tokenizers library sees it.

The library is written for files that it wrote itself. Of others it may panic, abort the process, or take time and
memory without bound. So the file has to be what the model families of this project use: a BPE vocabulary, and of the
steps around it those that are listed here, with options that were seen to be harmless.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable, Mapping
from typing import Any

from tokenizers import Tokenizer

from flashvlm.errors import BundleError, no_panic
from flashvlm.files import refuse_constant
from flashvlm.text.split_pattern import MAX_LENGTH as MAX_PATTERN
from flashvlm.text.split_pattern import check_pattern

MAX_STEPS = 8  # normalizers, pre-tokenizers and so on, of each; published files have up to 5
MAX_NESTED = 4  # sequences in sequences; published files have 1
MAX_ID = 10_000_000  # where no table says how many there are; the largest published vocabularies have 262,144
MAX_ADDED = 10_000  # added tokens; published files have up to 1,100
MAX_CHARACTERS = 1000  # of an added token
MAX_AFFIX = 16  # characters that a step puts in, takes off or splits at

_Check = Callable[[dict[str, Any], str], None]


def load_tokenizer(content: bytes, path: str, rows: int | None = None) -> Tokenizer:
    """The tokenizer of a file.

    Args:
        content: of the `tokenizer.json`.
        path: where it is, for messages.
        rows: of the embedding table; every token has to have one.

    Raises:
        BundleError: it is malformed, of a kind that is not supported, or has tokens beyond the table.
    """
    try:
        text = content.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_without_twins, parse_constant=refuse_constant)
        vocabulary = _check_file(value)
        with no_panic():
            tokenizer = Tokenizer.from_str(text)
            added = {token.content: i for i, token in tokenizer.get_added_tokens_decoder().items()}
        if rows is not None:
            _check_rows(vocabulary, rows)
            _check_rows(added, rows)
        return tokenizer
    except UnicodeDecodeError:
        raise BundleError(f"{path}: expected UTF-8 text, found other bytes; export the bundle again") from None
    except RecursionError:
        raise BundleError(f"{path}: expected a tokenizer, found lists in lists without end") from None
    except Exception as error:  # tokenizers raises plain Exception
        raise BundleError(f"{path}: expected a tokenizer, found: {str(error)[:300]}; export the bundle again") from None


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of a key that occurs twice, the library might take the other value than was checked."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key that occurs twice")
    return found


def _check_rows(ids: Mapping[str, int], rows: int) -> None:
    if max(ids.values(), default=0) >= rows:
        token = max(ids, key=ids.__getitem__)
        raise ValueError(f"token {token[:MAX_CHARACTERS]!r} has id {ids[token]}, beyond the table of {rows} rows")


def _check_file(value: Any) -> dict[str, int]:
    """Checks all of a file but its flags, which the library does. Returns the vocabulary."""
    file = _object(value, "the file")
    for name in ("truncation", "padding"):  # the reader turns them off
        _object(file.get(name) or {}, name)
    vocabulary = _check_model(_object(file.get("model"), "model"))
    for number, token in enumerate(_list(file.get("added_tokens", []), "added_tokens", MAX_ADDED)):
        _check_added(token, f"added_tokens[{number}]")
    _check_steps(file.get("normalizer"), "normalizer", "normalizers", _NORMALIZERS)
    _check_steps(file.get("pre_tokenizer"), "pre_tokenizer", "pretokenizers", _PRE_TOKENIZERS)
    _check_steps(file.get("post_processor"), "post_processor", "processors", _POST_PROCESSORS)
    _check_steps(file.get("decoder"), "decoder", "decoders", _DECODERS)
    return vocabulary


# --- values ----------------------------------------------------------------------------------------------------------


def _refusal(field: str, expected: str, found: Any) -> ValueError:
    shown = {"type": found["type"]} if isinstance(found, dict) and "type" in found else found
    return ValueError(f"{field}: expected {expected}, found {reprlib.repr(shown)}")


def _object(value: Any, field: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _refusal(field, "an object", value)
    return value


def _list(value: Any, field: str, most: int) -> list[Any]:
    if not isinstance(value, list):
        raise _refusal(field, "a list", value)
    if len(value) > most:
        raise ValueError(f"{field}: expected at most {most:,}, found {len(value):,}")
    return value


def _text(value: Any, field: str, most: int = MAX_AFFIX) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= most:
        raise _refusal(field, f"a text of up to {most:,} characters", value)
    return value


def _number(value: Any, field: str, most: int) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise _refusal(field, f"a number from 0 to {most:,}", value)
    return value


# --- the vocabulary --------------------------------------------------------------------------------------------------


def _check_model(model: dict[str, Any]) -> dict[str, int]:
    """Returns the vocabulary. It may have 262,144 tokens, and as many merges: no loop over them is one of Python."""
    if model.get("type") != "BPE":
        raise _refusal("model.type", "BPE", model.get("type"))
    vocabulary = _object(model.get("vocab"), "model.vocab")
    ids = vocabulary.values()
    if set(map(type, ids)) != {int}:
        raise ValueError("model.vocab: expected tokens with numbers as ids, found others or none")
    for number in (min(ids), max(ids)):
        _number(number, "model.vocab", MAX_ID)
    merges = _list(model.get("merges"), "model.merges", MAX_ID)
    if set(map(type, merges)) == {str}:
        merges = [merge.split(" ") for merge in merges]
    if not set(map(type, merges)) <= {list} or not set(map(len, merges)) <= {2}:
        raise ValueError("model.merges: expected pairs of tokens, found others")
    # The library takes room for the longest token of the vocabulary, and panics at a merge that makes a longer one.
    if not _make_tokens(merges, vocabulary):
        raise ValueError("model.merges: expected pairs that make tokens of the vocabulary, found others")
    unknown = model.get("unk_token")
    if unknown is not None and _text(unknown, "model.unk_token", MAX_CHARACTERS) not in vocabulary:
        raise _refusal("model.unk_token", "a token of the vocabulary", unknown)
    # It cuts the prefix off by bytes: within a character that is a panic while another is handled, which is an abort.
    for name in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(name):
            raise _refusal(f"model.{name}", "null", model[name])
    return vocabulary


def _make_tokens(merges: list[list[Any]], vocabulary: dict[str, int]) -> bool:
    try:
        return all(map(vocabulary.__contains__, map("".join, merges)))
    except TypeError:  # pairs of something else
        return False


def _check_added(token: Any, field: str) -> None:
    _text(_object(token, field).get("content"), f"{field}.content", MAX_CHARACTERS)
    _number(token.get("id"), f"{field}.id", MAX_ID)


# --- the steps around it ---------------------------------------------------------------------------------------------


def _check_steps(value: Any, field: str, children: str, known: Mapping[str, _Check], nested: int = 0) -> int:
    """A step, a sequence of them, or null. Returns how many there are."""
    if value is None and not nested:
        return 0
    step = _object(value, field)
    kind = step.get("type")
    if kind == "Sequence":
        if nested == MAX_NESTED:
            raise ValueError(f"{field}: expected at most {MAX_NESTED} sequences in sequences, found more")
        count = 0
        for number, inner in enumerate(_list(step.get(children), f"{field}.{children}", MAX_STEPS)):
            count += _check_steps(inner, f"{field}.{children}[{number}]", children, known, nested + 1)
        if count > MAX_STEPS:
            raise ValueError(f"{field}: expected at most {MAX_STEPS} steps, found {count}")
        return count
    if not isinstance(kind, str) or kind not in known:
        raise _refusal(f"{field}.type", f"Sequence, {', '.join(sorted(known))}", kind)
    known[kind](step, field)
    return 1


def _check_flags(step: dict[str, Any], field: str) -> None:
    """All options are flags or names, which the library checks."""


def _check_prepend(step: dict[str, Any], field: str) -> None:
    """Of nothing to prepend the library panics."""
    _text(step.get("prepend"), f"{field}.prepend")


def _check_replace(step: dict[str, Any], field: str) -> None:
    """The library panics at an expression that matches nothing, and text that grows would in every step again."""
    pattern = _object(step.get("pattern"), f"{field}.pattern")
    if set(pattern) != {"String"}:
        raise ValueError(f"{field}.pattern: expected a String, found {sorted(pattern)}")
    old = _text(pattern["String"], f"{field}.pattern.String")
    _text(step.get("content"), f"{field}.content", len(old))


def _check_split(step: dict[str, Any], field: str) -> None:
    pattern = _object(step.get("pattern"), f"{field}.pattern")
    if set(pattern) == {"String"}:
        _text(pattern["String"], f"{field}.pattern.String")
    elif set(pattern) == {"Regex"}:
        try:
            check_pattern(_text(pattern["Regex"], f"{field}.pattern.Regex", MAX_PATTERN))
        except ValueError as error:
            raise ValueError(f"{field}.pattern: expected one that splits in linear time, found {error}") from None
    else:
        raise ValueError(f"{field}.pattern: expected a String or a Regex, found {sorted(pattern)}")


def _check_template(step: dict[str, Any], field: str) -> None:
    """The library panics at a special token that is not defined, and at a template that its text is not in once."""
    tokens = _object(step.get("special_tokens"), f"{field}.special_tokens")
    for name, value in tokens.items():
        token = _object(value, f"{field}.special_tokens.{name[:MAX_AFFIX]}")
        for number in _list(token.get("ids"), f"{field}.special_tokens.ids", MAX_STEPS):
            _number(number, f"{field}.special_tokens.ids", MAX_ID)
    for name, wanted in (("single", ["A"]), ("pair", ["A", "B"])):
        sequences = []
        for piece in _list(step.get(name), f"{field}.{name}", MAX_STEPS):
            for kind, value in _object(piece, f"{field}.{name}").items():
                i = _text(_object(value, f"{field}.{name}").get("id"), f"{field}.{name}.id", MAX_CHARACTERS)
                if kind == "Sequence":
                    sequences.append(i)
                elif i not in tokens:
                    raise _refusal(f"{field}.{name}", "tokens of special_tokens", i)
        if sorted(sequences) != wanted:
            raise _refusal(f"{field}.{name}", f"{' and '.join(wanted)} once", sequences)


def _check_strip(step: dict[str, Any], field: str) -> None:
    """The library panics where there is less than it is to take off the end."""
    _text(step.get("content"), f"{field}.content", 1)
    _number(step.get("start"), f"{field}.start", MAX_AFFIX)
    _number(step.get("stop"), f"{field}.stop", 0)


_NORMALIZERS: dict[str, _Check] = {"NFC": _check_flags, "Prepend": _check_prepend, "Replace": _check_replace}
_PRE_TOKENIZERS: dict[str, _Check] = {
    "ByteLevel": _check_flags,
    "Digits": _check_flags,
    "Metaspace": _check_flags,
    "Split": _check_split,
}
_POST_PROCESSORS: dict[str, _Check] = {"ByteLevel": _check_flags, "TemplateProcessing": _check_template}
_DECODERS: dict[str, _Check] = {
    "ByteFallback": _check_flags,
    "ByteLevel": _check_flags,
    "Fuse": _check_flags,
    "Metaspace": _check_flags,
    "Replace": _check_replace,
    "Strip": _check_strip,
}
