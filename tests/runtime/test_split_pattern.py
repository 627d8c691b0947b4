"""Which expressions may split a text: those of published tokenizers, and none that takes more than linear time."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from flashvlm.text.split_pattern import check_pattern

QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = {
    "GPT-2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "Qwen2": QWEN2,
    "Llama-3": QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|"),
    "cl100k": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]"
    r"|\s+(?!\S)|\s+",
    "Tekken": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "o200k": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lo}]*[\p{Ll}\p{Lo}]+(?i:'s|'t|'re)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lo}]+[\p{Ll}\p{Lo}]*(?i:'s|'t|'re)?|\p{N}{1,3}|\s*[\r\n]+|\s+(?!\S)|\s+",
    "DeepSeek": r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_published_patterns(pattern: str) -> None:
    check_pattern(pattern)


@pytest.mark.parametrize(
    "pattern",
    r"""(a+)+b
(a|a)*b
(?:a*)*b
(?:a|b){3}
(?:(?:a))
(?i:a+)
a*a*a*c
a+b+c+|a+
(.*)*x
\1(a)
(?<n>a)\k<n>
(?<n>a|\g<n>b)
(?<!a+)b
(?>a+)b
(?=a)*
(?!a+)b
(?#comment)a
(?~abc)
x*
.?
a|
a**
a+?b
a+b
.*x|.
a+b|c?a+
\s*[\r\n]+|.|\s+
a{2,1}
a{0}
a{1,1000000}
a{3}{3}
a?a?a?a?a?a?a?a?a?aaaaaaaaa
(?:a|b|c|d)(?:a|b|c|d)(?:a|b|c|d)(?:a|b|c|d)(?:a|b|c|d)
^a
a$
\ba
\X
\R
\x{41}
\p{L
[a&&b]
[[:alpha:]]
[
(
)
\
*""".splitlines(),
)  # fmt: skip
def test_patterns_that_may_take_long(pattern: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        check_pattern(pattern)


def test_long_patterns() -> None:
    for pattern in ("a" * 5000, "a|" * 100 + "a", "(" * 2000, "[" * 2000):
        with pytest.raises(ValueError, match=r"over the limit|unknown syntax"):
            check_pattern(pattern)


SPLITS = """
import json, resource, sys
resource.setrlimit(resource.RLIMIT_DATA, (1 << 30, 1 << 30))
from tokenizers import Regex, pre_tokenizers
for pattern in json.load(sys.stdin):
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    for text in ("a", " ", "\\n", "aB", "a ", " \\n", "1", "!", "'", "\\u00e9\\u0301"):
        split.pre_tokenize_str(text * (20000 // len(text)) + "x")
"""


def test_what_passes_splits_long_texts() -> None:
    """In quadratic time, one of these would take minutes."""
    patterns = [*PATTERNS.values(), "a+b|a+", r"\s*x|\s+|.", "a?b*c+|a?b+", "[ab]+(?!a)|[ab]+"]
    for pattern in patterns:
        check_pattern(pattern)
    command = [sys.executable, "-c", SPLITS]
    ran = subprocess.run(command, input=json.dumps(patterns), capture_output=True, text=True, timeout=120, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
