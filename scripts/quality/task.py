"""The held-out questions about scenes as a task, and how much of what they ask for was kept."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import scenes
from demo_model.words import COVERED
from flashvlm.evaluation import Item, Prediction, Task
from scenes import exam
from scenes.draw import draw, owners
from scenes.world import Scene

MAX_NEW_TOKENS = 8  # the longest answers have 4


def exam_task(asked: Sequence[exam.Item], split: str) -> Task:
    """Questions of a split, those of a scene in a row. An image is a scene, which is drawn when it is seen."""
    numbers = {scene: n for n, scene in enumerate(dict.fromkeys(item.scene for item in asked))}
    items = tuple(
        Item(
            id=f"{split}/{n}",
            images=(item.scene,),
            question=item.question.text,
            answers=(item.question.answer,),
            kind=item.question.kind,
            group=str(numbers[item.scene]),
        )
        for n, item in enumerate(asked)
    )
    sources = b"".join(path.read_bytes() for path in sorted(Path(scenes.__path__[0]).glob("*.py")))
    version = hashlib.sha256(sources).hexdigest()
    return Task(f"scenes-{split}", items, load=draw, max_new_tokens=MAX_NEW_TOKENS, version=version)


class Asked:
    """The patches that questions are about, of images of ``side`` x ``side``."""

    def __init__(self, asked: Sequence[exam.Item], side: int) -> None:
        self._patches = [asked_patches(item.scene, item.question.about, side) for item in asked]

    def kept_shares(self, predictions: Sequence[Prediction]) -> list[float | None]:
        """Share of them that each prediction kept; None where no patch is asked for."""
        shares: list[float | None] = []
        for prediction, patches in zip(predictions, self._patches, strict=True):
            assert prediction.kept is not None
            (kept,) = prediction.kept
            shares.append(float(patches[list(kept)].sum() / patches.sum()) if patches.any() else None)
        return shares


def asked_patches(scene: Scene, about: Sequence[int], side: int) -> np.ndarray:
    """Bool [side * side]: patches of which one of the things covers at least a fifth."""
    owned = owners(scene)
    cell = np.arange(len(owned)) * side // len(owned)
    patch = cell[:, None] * side + cell[None, :]  # [S,S]
    pixels = np.bincount(patch.ravel(), minlength=side * side)
    shown = np.zeros(side * side, dtype=bool)
    for thing in about:
        shown |= np.bincount(patch[owned == thing + 1], minlength=side * side) >= COVERED * pixels
    return shown
