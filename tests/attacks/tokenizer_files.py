"""Small files of the tokenizers that the supported models have, and what tests put into them."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer

from flashvlm.text.tokenizer_file import load_tokenizer

QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def token(**fields: Any) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": 6, "content": "<image>", **flags, **fields}


def template(**fields: Any) -> dict[str, Any]:
    special, text = {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [special, text],
        "pair": [special, text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
        **fields,
    }


def llama() -> dict[str, Any]:
    """Spaces are marked by the normalizer, as in Llama's older files."""
    space = {"String": " "}
    replace = {"type": "Replace", "pattern": space, "content": "▁"}
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    model = {"type": "BPE", "unk_token": "<s>", "fuse_unk": True, "byte_fallback": True}
    letters = {"<s>": 0, "▁": 1, "a": 2, "b": 3, "ab": 4, "▁a": 5, "é": 7}
    vocabulary = {**letters, **{f"<0x{byte:02X}>": byte + 10 for byte in range(256)}}
    return {
        "version": "1.0",
        "added_tokens": [token(id=0, content="<s>"), token()],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]},
        "pre_tokenizer": None,
        "post_processor": template(),
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, strip]},
        "model": {**model, "vocab": vocabulary, "merges": [["a", "b"], ["▁", "a"]]},
    }


def qwen() -> dict[str, Any]:
    """Bytes as characters, split by an expression."""
    split = {"type": "Split", "pattern": {"Regex": QWEN2}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    model = {"type": "BPE", "continuing_subword_prefix": "", "end_of_word_suffix": "", "ignore_merges": False}
    return {
        "version": "1.0",
        "added_tokens": [token(id=0, content="<s>"), token()],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "post_processor": {"type": "Sequence", "processors": [level, template()]},
        "decoder": level,
        "model": {**model, "vocab": {"<s>": 0, "a": 1, "b": 2, "ab": 3, "Ġ": 4, "Ġa": 5}, "merges": ["a b", "Ġ a"]},
    }


def metaspace() -> dict[str, Any]:
    """What transformers 5 saves of Llama's; SmolLM's digits."""
    mark = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    digits = {"type": "Digits", "individual_digits": True}
    steps = {"type": "Sequence", "pretokenizers": [digits, mark]}
    return {**llama(), "normalizer": None, "pre_tokenizer": steps, "decoder": mark, "post_processor": None}


BASES = {"llama": llama, "qwen": qwen, "metaspace": metaspace}


def put(base: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    target = base
    *folders, last = path.split(".")
    for name in folders:
        target = target[name]
    target[last] = value
    return base


def load(value: dict[str, Any], rows: int | None = None) -> Tokenizer:
    return load_tokenizer(json.dumps(value).encode(), "tokenizer.json", rows)
