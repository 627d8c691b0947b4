"""The chat template and the tokenizer that checkpoints.py writes: LLaVA-1.5's conventions, our own words."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

# LLaVA-1.5's conversation: an optional system sentence, then turns; the image comes first in its turn.
# `{% generation %}` marks what the model itself is to produce, end-of-sequence included, for training masks.
CHAT_TEMPLATE = """\
{%- macro body(content) -%}
{%- if content is string -%}{{ content }}
{%- else -%}
{%- for part in content if part['type'] == 'image' -%}{{ '<image>\\n' }}{%- endfor -%}
{%- for part in content if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}{{ body(message['content']) + ' ' }}
{%- elif message['role'] == 'user' -%}{{ 'USER: ' + body(message['content']) + ' ' }}
{%- else -%}{{ 'ASSISTANT: ' }}
{%- generation -%}{{ body(message['content']) + eos_token }}{%- endgeneration -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}
"""

FIXED_TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
_CORPUS_SEED = 2512  # the tokenizer depends on the preset alone, so checkpoints of all seeds share it


def _words(text: str) -> list[str]:
    return text.split()


_NOUNS = _words("""
apple bag ball banana bench bicycle bird boat book bottle bowl box bridge building bus cake camera car card
cat chair child clock cloud coat cow cup desk dog door elephant fence field fish flower food fork fruit
giraffe glass grass hand hat horse house image kitchen kite knife lamp laptop lemon light man mirror mountain
mug orange oven paper park person phone photo pizza plane plant plate road room sandwich scene sea sheep shelf
shirt shoe sign sink sky snow sofa spoon station street sun table tower town toy train tree truck umbrella
vase wall water window woman wood zebra
""")
_ADJECTIVES = _words("""
big black blue bright brown calm clean cold cool dark deep dry empty fresh full glossy golden green grey happy
heavy high hot large left light little long low narrow new old open orange pale pink plain quiet red right
round sharp short simple small smooth soft square striped tall thin warm wet white wide wooden yellow young
""")
_VERBS = _words("""
ask bring carry catch close count cover cross describe draw drink drive eat fall find fly follow hang help
hold jump keep lean leave look move paint park place play point pull push rest ride run show sit sleep smile
stand stop take talk turn use walk wait watch wear work write
""")
_OTHERS = _words("""
a about above after all also an and any are at be before behind below beside between but by can color does
each for from front has have how in inside into is it its many more most near next no not of on one or other
out over same several some that the their them then there these they this three to two under up was were what
when where which while who why with you
""")
_ONSETS = _words("""
b c d f g h l m n p r s t v w br cl dr fl gr pl st tr th sh
""")
_VOWELS = ["a", "e", "i", "o", "u", "ai", "ea", "io", "ou"]
_CODAS = ["", "", "l", "n", "r", "s", "t", "nd", "st", "ck"]
_TEMPLATES = (
    "What is the {n} on the {a} {n}?",
    "The {a} {n} and the {a} {n} are near the {n}.",
    "Is there any {n} behind the {n}? Answer yes or no.",
    "How many {n}s can you see in this image?",
    "USER: Describe the image in detail. ASSISTANT: The image shows a {a} {n} that {v}s beside a {n}.",
    "A {n} {v}s, while {o} {n} {v}s {o} the {a} {n}, and {w}, of {w}, {v}s with {w}.",
    "A chat between a curious human and an artificial intelligence assistant. {w} {w} {w} {w}.",
    "In {y}, the {w} of {w} was {d} times as {a} as the {n} in the {a} {w}; {w} {o} {w}.",
)


def english(lines: int) -> Iterator[str]:
    """English-like sentences; invented words made of syllables keep a large vocabulary from running dry."""
    rng = random.Random(_CORPUS_SEED)
    stems = _NOUNS + _ADJECTIVES + _VERBS

    def invented() -> str:
        if rng.random() < 0.3:
            return rng.choice(stems) + rng.choice(("s", "ed", "ing", "er", "ly", "ness", "ful", "less", "able"))
        syllables = (rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(rng.randint(2, 3)))
        word = "".join(syllables)
        return word.capitalize() if rng.random() < 0.3 else word

    fillers: dict[str, Callable[[], str]] = {
        "n": lambda: rng.choice(_NOUNS),
        "a": lambda: rng.choice(_ADJECTIVES),
        "v": lambda: rng.choice(_VERBS),
        "o": lambda: rng.choice(_OTHERS),
        "w": invented,
        "y": lambda: str(rng.randint(1500, 2030)),
        "d": lambda: str(rng.randint(2, 99)),
    }
    for _ in range(lines):
        yield re.sub(r"\{(\w)\}", lambda slot: fillers[slot[1]](), rng.choice(_TEMPLATES))


def make_tokenizer(
    text_tokens: int, max_length: int, corpus: Iterable[str] | None = None, visual: Sequence[str] = ("image",)
) -> Any:
    """Train a byte-fallback BPE with Llama's conventions.

    Args:
        text_tokens: its size before ``<image>`` and ``<pad>``, which take the next ids.
        max_length: the longest input it declares.
        corpus: lines to learn the pieces from; invented English if not given.
        visual: what has a token of its own: ``<image>``, ``<video>``.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import AddedToken, LlamaTokenizer

    trained = Tokenizer(models.BPE())
    # No piece spans two words or holds a word with its punctuation, as in Llama's own vocabulary.
    trained.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
    trainer = trainers.BpeTrainer(vocab_size=text_tokens - len(FIXED_TOKENS), show_progress=False)
    # About 1.5 new words a line: enough for the merges a large vocabulary asks for.
    trained.train_from_iterator(english(max(2000, text_tokens)) if corpus is None else corpus, trainer)
    model = json.loads(trained.to_str())["model"]

    pieces = FIXED_TOKENS + sorted(model["vocab"], key=model["vocab"].get)
    pieces += [f"<unused{i}>" for i in range(text_tokens - len(pieces))]
    tokenizer = LlamaTokenizer(
        vocab={piece: index for index, piece in enumerate(pieces)},
        merges=[tuple(pair) for pair in model["merges"]],
        add_bos_token=True,
        model_max_length=max_length,
        extra_special_tokens={
            f"{kind}_token": AddedToken(f"<{kind}>", normalized=False, special=True) for kind in visual
        },
    )
    tokenizer.add_special_tokens({"pad_token": AddedToken("<pad>", normalized=False, special=True)})
    return tokenizer


def make_byte_level_tokenizer(
    text_tokens: int, max_length: int, special: Sequence[str], named: Mapping[str, str] | None = None
) -> Any:
    """Train a byte-level BPE with Qwen2's conventions.

    Args:
        text_tokens: its size before ``special``, control tokens that take the ids that follow. The first ends a text,
            the second a turn.
        max_length: the longest input it declares.
        named: what transformers' processor calls some of them, such as ``start_image_token``.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import AddedToken, Qwen2Tokenizer

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learnt = min(text_tokens, 1 << 13)  # a larger vocabulary is filled up: no test speaks it
    trainer = trainers.BpeTrainer(vocab_size=learnt, show_progress=False, initial_alphabet=alphabet)
    trained.train_from_iterator(english(max(2000, learnt)), trainer)
    model = json.loads(trained.to_str())["model"]
    vocab = dict(model["vocab"])
    vocab |= {f"<unused{i}>": i for i in range(len(vocab), text_tokens)}
    vocab |= {token: text_tokens + i for i, token in enumerate(special)}  # or the named ones would come first
    tokenizer = Qwen2Tokenizer(
        vocab=vocab,
        merges=[tuple(pair) for pair in model["merges"]],
        model_max_length=max_length,
        unk_token=None,
        pad_token=None,
        eos_token=None,
        extra_special_tokens=dict(named or {}),
    )
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=True) for token in special], special_tokens=True)
    tokenizer.add_special_tokens({"pad_token": special[0], "eos_token": special[1]})
    return tokenizer
