"""Batches by step number alone: the same step gives the same scenes, so a resumed run sees what it would have seen."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from demo_model.turns import Noun, Turns
from demo_model.words import ATTRIBUTES, patch_labels, scene_labels, thing_labels
from scenes.draw import draw
from scenes.questions import NUMBERS, Question, ask
from scenes.world import Scene, sample_scene

MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)  # CLIP's
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
# How often each kind is asked: more of what takes several steps of thought.
SHARES = {"attribute": 2, "where": 1.5, "existence": 3, "counting": 9, "comparison": 7, "character": 1, "ground": 0.3}
NAMING = ("attribute", "where", "comparison", "character")  # kinds whose nouns stand for one thing each
COUNTING = ("existence", "counting")  # kinds whose noun stands for as many things as there are


@dataclass(frozen=True)
class Plan:
    """What one stage reads: scenes a step, questions a scene, patches a side, and which tensors to make.

    turns     how many of the questions are asked one after the other, in each conversation; the others are asked alone
    grounds   of the patches that show no thing, how many the language model reads at most, between these two numbers,
              another in every scene (None: all), so that it learns not to depend on how many there are
    each      of the patches of one thing likewise, beside its centre: they all say the same
    """

    scenes: int
    questions: int
    sides: tuple[int, ...]
    pixels: bool
    labels: bool
    turns: tuple[int, ...] = ()
    grounds: tuple[int, int] | None = None
    each: tuple[int, int] | None = None


class Batches(Dataset):
    """Item ``step`` is a whole batch."""

    def __init__(self, plan: Plan, name: str, steps: range, tokenizer: Path) -> None:
        self.plan, self.name, self.steps, self.tokenizer = plan, name, steps, tokenizer
        self._turns: Turns | None = None

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if self._turns is None:
            self._turns = Turns(self.tokenizer)
        plan, step = self.plan, self.steps[index]
        side = plan.sides[step % len(plan.sides)]
        scenes = [sample_scene(f"train/{self.name}/{step}/{i}", training=True, side=side) for i in range(plan.scenes)]
        rng = np.random.default_rng(step)
        batch: dict[str, Any] = {"origin": torch.tensor([(s.top, s.left) for s in scenes])}
        counts = [side * side] * len(scenes)
        if plan.labels:
            labels = [patch_labels(scene) for scene in scenes]
            kept = [_kept(each, plan, rng) for each in labels]
            if not plan.pixels:  # those that are not kept need not be made
                labels = [each[keep] for each, keep in zip(labels, kept, strict=True)]
            batch["labels"] = torch.from_numpy(np.concatenate(labels))  # [patches of all, 9]
            batch["kept"] = torch.from_numpy(np.concatenate(kept))  # [patches of all] bool
            batch["scene_labels"] = torch.from_numpy(np.stack([scene_labels(s) for s in scenes]))
            counts = [int(keep.sum()) for keep in kept]
        if plan.pixels:
            batch["pixel_values"] = pixel_values(scenes)
        if plan.questions:
            chats = [self._chats(scene, f"{self.name}/{step}/{i}") for i, scene in enumerate(scenes)]
            before = np.cumsum([0, *(len(scene.things) for scene in scenes)])
            batch["things"] = torch.from_numpy(np.concatenate([thing_labels(scene) for scene in scenes]))  # [T,7]
            batch |= self._turns.encode(
                [[[(question.text, question.answer) for question in chat] for chat in about] for about in chats],
                counts,
                [
                    [[_nouns(question, first) for question in chat] for chat in about]
                    for about, first in zip(chats, before, strict=False)
                ],
            )
        return batch

    def _chats(self, scene: Scene, seed: str) -> list[list[Question]]:
        """Conversations about a scene, most of them of one question."""
        rng, plan = random.Random(f"questions/{seed}"), self.plan
        kinds = rng.choices(list(SHARES), list(SHARES.values()), k=plan.questions)
        questions = iter([_ask(scene, rng, kind) for kind in kinds])
        alone = plan.questions - sum(plan.turns)
        return [list(islice(questions, turns)) for turns in (*plan.turns, *[1] * alone)]


def _ask(scene: Scene, rng: random.Random, kind: str) -> Question:
    """A question without a combination that training never shows: its name alone would come to mean "no" or "zero"."""
    while (question := ask(scene, rng, kind)).names_held_out:
        pass
    return question


def _nouns(question: Question, first: int) -> list[Noun]:
    """What the nouns of a question stand for, in its order; things are numbered from ``first``."""
    if question.kind in COUNTING:
        return [(-1, min(len(question.about), len(NUMBERS) - 1))]
    return [(first + i, -1) for i in question.about] if question.kind in NAMING else []


def _kept(labels: np.ndarray, plan: Plan, rng: np.random.Generator) -> np.ndarray:
    """Bool [P]: the patches that the language model of a plan reads."""
    names = list(ATTRIBUTES)
    is_ground = labels[:, names.index("ground")] > 0
    keep = np.ones(len(labels), dtype=bool)
    if plan.grounds is not None:
        keep[rng.permutation(np.flatnonzero(is_ground))[_between(*plan.grounds, rng) :]] = False
    if plan.each is not None:
        center, most = names.index("center"), _between(*plan.each, rng)
        _, group = np.unique(np.delete(labels, center, 1), axis=0, return_inverse=True)
        for number in np.unique(group[~is_ground]):
            others = np.flatnonzero((group == number) & (labels[:, center] == 0))
            keep[rng.permutation(others)[most:]] = False
    return keep


def _between(low: int, high: int, rng: np.random.Generator) -> int:
    """Small numbers as often as large: evenly on a logarithmic scale."""
    return round(math.exp(rng.uniform(math.log(low), math.log(high))))


def pixel_values(scenes: list[Scene]) -> torch.Tensor:
    """float32 [B,3,S,S], normalised as CLIP's processor does."""
    pixels = np.stack([draw(scene) for scene in scenes]).astype(np.float32) / 255  # [B,S,S,3]
    return torch.from_numpy(((pixels - MEAN) / STD).transpose(0, 3, 1, 2).copy())
