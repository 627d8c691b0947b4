"""Input for a measurement: a prompt of a given number of tokens, and images that were not seen before."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image

from flashvlm.budget import Budget
from flashvlm.bundle import Bundle
from flashvlm.encoder import nearest
from flashvlm.errors import PromptError
from flashvlm.manifest import PROCESSOR, Manifest
from flashvlm.preprocess import Grid, grid_of
from flashvlm.prompt import Arrangement, arrange, expand
from flashvlm.text.processor import RUN, EncodedPrompt, TextProcessor
from flashvlm.visual import VisualSpec

PHOTO = (640, 480)  # pixels, width and height; preprocessing resizes it
WORDS = ["what", "is", "in", "this", "picture", "and", "where", "are", "the", "people", "who", "stand", "near", "it"]
# Most tokenizers make one token of at least one of these after any text.
FILLERS = (" a", ".", " ?", "!", " x")


def synthetic_prompt(bundle: Bundle, tokens: int, photo: tuple[int, int] = PHOTO) -> tuple[str, EncodedPrompt]:
    """A question whose prompt has ``tokens`` tokens of text with the template around it, one image aside.

    Where no filler of the tokenizer adds exactly one token, the prompt comes out shorter by as little as possible.

    Raises:
        PromptError: the template alone takes as many tokens.
    """
    text = TextProcessor.from_files(bundle.read_processor, bundle.path / PROCESSOR, bundle.manifest.model.vocab_size)
    seen = synthetic_sight(bundle.manifest, photo)

    def encode(question: str) -> EncodedPrompt:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        messages = [{"role": "user", "content": content}]
        return text.encode(messages, bundle.manifest.placeholders, [seen.text], bundle.manifest.markers)

    def size(question: str) -> int:
        return len(encode(question).input_ids) - seen.runs

    def words(count: int) -> str:
        return " ".join(WORDS[i % len(WORDS)] for i in range(count))

    shortest = size(words(1))
    if tokens < shortest:
        raise PromptError(
            f"--prompt-tokens {tokens}: the chat template and a question of one word take {shortest}; "
            f"expected at least {shortest}"
        )
    low, high = 1, tokens + 1  # size(words(low)) <= tokens < size(words(high)): a word has at least one token
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(words(middle)) <= tokens else (low, middle)
    question = words(low)
    while (have := size(question)) < tokens:
        longer = next((question + f for f in FILLERS if have < size(question + f) <= tokens), None)
        if longer is None:
            break
        question = longer
    return question, encode(question)


class SyntheticSight(NamedTuple):
    """What a bundle makes of a photo: its spec and tiles, and the tokens of its image."""

    spec: VisualSpec
    grid: Grid
    arrangement: Arrangement

    @property
    def text(self) -> str:
        """What stands for it in a prompt."""
        return expand(self.spec, self.grid)

    @property
    def runs(self) -> int:
        """Placeholders it has in a prompt."""
        return self.text.count(RUN)

    def tokens(self, budget: Budget) -> int:
        """Visual tokens that go to the language model."""
        return self.spec.kept_of(self.arrangement.count, self.grid.units, budget)


def synthetic_sight(manifest: Manifest, photo: tuple[int, int] = PHOTO) -> SyntheticSight:
    """``photo``: its size in pixels, width and height."""
    size = photo[1], photo[0]
    spec = nearest(manifest, "image", size)
    grid = grid_of(size, spec.pixels)
    return SyntheticSight(spec, grid, arrange(spec, grid))


def synthetic_photo(seed: int) -> Image.Image:
    """A blurry RGB image of ``PHOTO`` size; each seed gives another, so that no cached features are used."""
    width, height = PHOTO
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 32, width // 32, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(PHOTO, Image.Resampling.BICUBIC)


def variations(image: Image.Image) -> Callable[[int], Image.Image]:
    """The image with one corner pixel that differs with each seed below 2^24: another one to the feature cache."""

    def vary(seed: int) -> Image.Image:
        varied = image.copy()
        varied.putpixel((0, 0), (seed & 255, seed >> 8 & 255, seed >> 16 & 255))
        return varied

    return vary
