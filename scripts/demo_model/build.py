"""Configuration, tokenizer and module of the demo model: LLaVA-1.5's architecture at 6 M parameters."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from flashvlm_export.testing.presets import llava
from flashvlm_export.testing.tokenizer import CHAT_TEMPLATE, english, make_tokenizer
from scenes.questions import KINDS, ask, vocabulary
from scenes.world import GRID, sample_scene

# 12 MB in float16: CLIP with 6 blocks of 192 over 576 patches, Llama with 6 layers of 256, 1,024 words. Layers rather
# than width: to compare two things takes finding both, then weighing, then copying a name.
PRESET = llava.LlavaPreset(
    vision=llava.vision_sizes(336, 192, 6, 3, 768, 128),
    text=llava.text_sizes(256, 6, 4, 184, max_position_embeddings=2048),
    text_tokens=1022,
    vocab_multiple=64,
    dtype="float16",
    rope_theta=1e6,  # most of a head's channels hardly turn over 600 tokens, so that a word finds its patch anywhere
)


def save_processor(folder: Path) -> None:
    """Tokenizer, image processor and chat template, as on the hub; the words are those of the questions."""
    tokenizer = make_tokenizer(PRESET.text_tokens, PRESET.text["max_position_embeddings"], _corpus())
    llava.save_processor(PRESET, folder, tokenizer)


def _corpus() -> Iterator[str]:
    """Questions and answers of training scenes; every naming word often enough to become one piece."""
    rng = random.Random(0)
    for _ in range(200):
        yield " ".join(vocabulary())
    for i in range(400):
        scene = sample_scene(f"tokenizer/{i}", training=True)
        for kind in KINDS:
            question = ask(scene, rng, kind)
            yield f"USER: {question.text} ASSISTANT: {question.answer}"
            yield f"?{question.text}"  # behind a newline a word has no space before it: pieces of its own
    yield CHAT_TEMPLATE
    yield from english(300)


def make_model() -> Any:
    """transformers' own module with fresh weights in float32.

    Word embeddings start large beside what the blocks add, blocks write little, and the head starts as the embeddings:
    looking up a word in the context and saying it is then close at hand. From transformers' own start the language
    model stays for hundreds of steps at guessing any colour for questions about colour. Likewise positions start as
    sines as loud as the patches, so that a patch can find its neighbours.
    """
    from transformers import LlavaForConditionalGeneration

    config = llava.make_config(PRESET, "float32")
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        embedding = model.model.language_model.embed_tokens.weight
        embedding.normal_(0, 0.5)
        model.lm_head.weight.copy_(embedding * 0.06)
        for layer in model.model.language_model.layers:
            layer.self_attn.o_proj.weight *= 0.35
            layer.mlp.down_proj.weight *= 0.35
        places = model.model.vision_tower.embeddings.position_embedding.weight
        places[1:] = 0.5 * _sines(GRID, places.shape[1])
    return model


def _sines(side: int, width: int) -> torch.Tensor:
    """[side * side, width]: half of the channels for the row and half for the column, wavelengths 6 to 150 patches."""
    rates = 2 * math.pi / torch.logspace(math.log10(6), math.log10(150), width // 4)
    angles = torch.arange(side)[:, None] * rates  # [side, width / 4]
    one = torch.cat([angles.sin(), angles.cos()], 1)  # [side, width / 2]
    grid = torch.cat([one[:, None].expand(-1, side, -1), one[None].expand(side, -1, -1)], 2)
    return grid.reshape(side * side, width)
