"""What a model is asked: questions with their right answers. A benchmark is a function that gives a ``Task``."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np

from flashvlm.errors import FlashVLMError
from flashvlm.evaluation.metrics import Metric, exact_match
from flashvlm.images import ImageSource

ALL_KINDS = "all"


@dataclass(frozen=True)
class Item:
    """One question.

    id       its own within the task
    images   what it is about, in order, as ``Task.load`` takes them: paths, unless the task says otherwise
    answers  any of them is right, as the task's metric has it
    kind     of question, to sum up by; empty for none
    group    items of a group are not independent, such as those about one image: they are resampled together; empty
             for an item by itself
    """

    id: str
    images: tuple[Hashable, ...]
    question: str
    answers: tuple[str, ...]
    kind: str = ""
    group: str = ""


def as_it_is(image: Any) -> ImageSource:
    """``Task.load`` of tasks whose items name their images by path."""
    return image


@dataclass(frozen=True)
class Task:
    """Questions, and how their answers are judged.

    items           in the order they are asked; those about one image stand together, so that it is seen once
    load            an item's image -> what ``Pipeline`` takes for one
    metric          an answer, the right ones -> a score of 0 to 1
    max_new_tokens  of an answer
    version         changes whenever the images do: with it and the items' text, predictions that were kept are known

    Raises:
        FlashVLMError: there is no item, or two have one id.

    Example:
        >>> Task("sofa", (Item("1", ("cat.jpg",), "What is on the sofa?", ("a cat", "cat")),)).groups
        ['1']
    """

    name: str
    items: tuple[Item, ...]
    load: Callable[[Any], ImageSource] = as_it_is
    metric: Metric = exact_match
    max_new_tokens: int = 16
    version: str = ""

    def __post_init__(self) -> None:
        if not self.items:
            raise FlashVLMError(f"task {self.name}: expected questions, found none")
        seen: set[str] = set()
        for item in self.items:
            if item.id in seen:
                raise FlashVLMError(f"task {self.name}: expected an id for each item, found {item.id!r} twice")
            seen.add(item.id)

    @property
    def groups(self) -> list[str]:
        """Of each item, what it is resampled with."""
        return [item.group or item.id for item in self.items]

    @property
    def kinds(self) -> dict[str, np.ndarray]:
        """bool [items] by kind: which items are of it; first, all of them."""
        kinds = dict.fromkeys(item.kind for item in self.items if item.kind)
        chosen = {kind: np.array([item.kind == kind for item in self.items]) for kind in kinds}
        return {ALL_KINDS: np.ones(len(self.items), dtype=bool), **chosen}
