"""Batches by step number alone: the same step gives the same scenes, so a resumed run sees what it would have seen."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.utils.data import Dataset

from demo_model.words import ATTRIBUTES, patch_labels, scene_labels, thing_labels
from scenes.draw import draw
from scenes.questions import NOUNS, NUMBERS, Question, ask
from scenes.world import Scene, sample_scene

MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)  # CLIP's
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
IGNORED = -100
SLOT = 64  # tokens: three or four questions with their answers; the longest has 33
# How often each kind is asked: more of what takes several steps of thought.
SHARES = {"attribute": 2, "where": 1.5, "existence": 3, "counting": 9, "comparison": 7, "character": 1, "ground": 0.3}
NAMING = ("attribute", "where", "comparison", "character")  # kinds whose nouns stand for one thing each
COUNTING = ("existence", "counting")  # kinds whose noun stands for as many things as there are

Noun = tuple[int, int]  # which thing a noun stands for, and how many things; -1 where it is not that kind of noun
NOTHING: Noun = (-1, -1)


@dataclass(frozen=True)
class Plan:
    """What one stage reads: scenes a step, questions a scene, patches a side, and which tensors to make.

    grounds   of the patches that show no thing, how many the language model reads at most, between these two numbers,
              another in every scene (None: all), so that it learns not to depend on how many there are
    each      of the patches of one thing likewise, beside its centre: they all say the same
    """

    scenes: int
    questions: int
    sides: tuple[int, ...]
    pixels: bool
    labels: bool
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
            chats = [self._chat(scene, f"{self.name}/{step}/{i}") for i, scene in enumerate(scenes)]
            before = np.cumsum([0, *(len(scene.things) for scene in scenes)])
            batch["things"] = torch.from_numpy(np.concatenate([thing_labels(scene) for scene in scenes]))  # [T,7]
            batch |= self._turns.encode(
                [[(question.text, question.answer) for question in chat] for chat in chats],
                counts,
                [[_nouns(question, first) for question in chat] for chat, first in zip(chats, before, strict=False)],
            )
        return batch

    def _chat(self, scene: Scene, seed: str) -> list[Question]:
        rng = random.Random(f"questions/{seed}")
        kinds = rng.choices(list(SHARES), list(SHARES.values()), k=self.plan.questions)
        return [_ask(scene, rng, kind) for kind in kinds]


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


class Turns:
    """Conversations as token ids, with the answers as labels."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        (self.image_id, self.pad_id, self.end_id) = (
            self._tokenizer.token_to_id(token) for token in ("<image>", "<pad>", "</s>")
        )
        self._nouns = {self._tokenizer.token_to_id(f"▁{noun}") for noun in NOUNS}

    def encode(
        self, chats: list[list[tuple[str, str]]], image_tokens: list[int], nouns: list[list[list[Noun]]] | None = None
    ) -> dict[str, torch.Tensor]:
        """Each row is one image and its questions, every one as if it alone followed the image.

        Args:
            chats: question and answer, as many for each image.
            image_tokens: visual tokens of each image.
            nouns: of each question, what each of its nouns stands for.

        Returns:
            prefix_ids [B,P], what stands before the questions with one <image> a visual token, padded behind;
            question_ids [B,S,L], slots with several questions each, padded behind; number [B,S,L], which question,
            -1 for padding; targets [B,S,L], ids of answers and IGNORED elsewhere; thing and number_of [B,S,L], which
            thing or how many a noun stands for, -1 elsewhere;
            position_ids [B,P+S*L], which start anew behind the image for each question.
        """
        prefixes, rows = [], []
        for row, (chat, count) in enumerate(zip(chats, image_tokens, strict=True)):
            texts = [f"USER: <image>\n{question} ASSISTANT: {answer}</s>" for question, answer in chat]
            encoded = [encoding.ids for encoding in self._tokenizer.encode_batch(texts)]
            at = encoded[0].index(self.image_id)
            prefixes.append([*encoded[0][:at], *[self.image_id] * count])
            slots: list[list[tuple[int, ...]]] = []  # id, target, position, number, thing, number of
            for number, ids in enumerate(encoded):
                behind = ids[at + 1 :]
                answer = behind.index(self._assistant) + 2  # "ASSISTANT" and ":"
                known = iter(nouns[row][number] if nouns else [])
                read = [
                    (
                        id_,
                        id_ if i >= answer else IGNORED,
                        at + count + i,
                        number,
                        *(next(known, NOTHING) if i < answer and id_ in self._nouns else NOTHING),
                    )
                    for i, id_ in enumerate(behind)
                ]
                for slot in slots:
                    if len(slot) + len(read) <= SLOT:
                        slot += read
                        break
                else:
                    slots.append(read)
            rows.append(slots)
        most, padding = max(map(len, rows)), (self.pad_id, IGNORED, 0, -1, *NOTHING)
        padded = torch.tensor(
            [
                [slot + [padding] * (SLOT - len(slot)) for slot in slots] + [[padding] * SLOT] * (most - len(slots))
                for slots in rows
            ]
        )
        ids, targets, positions, numbers, things, numbers_of = padded.unbind(-1)  # [B,S,L]
        length = max(map(len, prefixes))
        prefix_ids = torch.tensor([prefix + [self.pad_id] * (length - len(prefix)) for prefix in prefixes])
        before = torch.arange(length).expand(len(chats), -1)
        return {
            "prefix_ids": prefix_ids,
            "question_ids": ids.contiguous(),
            "number": numbers.contiguous(),
            "targets": targets.contiguous(),
            "thing": things.contiguous(),
            "number_of": numbers_of.contiguous(),
            "position_ids": torch.cat([before, positions.flatten(1)], 1),
        }

    @property
    def _assistant(self) -> int:
        return self._tokenizer.token_to_id("▁ASSISTANT")

    def word_ids(self) -> torch.Tensor:
        """int64 [9, 31]: the token of each label of each attribute; 0 (<unk>) where there is none."""
        table = torch.zeros(len(ATTRIBUTES), 1 + max(map(len, ATTRIBUTES.values())), dtype=torch.int64)
        for a, words in enumerate(ATTRIBUTES.values()):
            for w, word in enumerate(words):
                (table[a, w + 1],) = self._tokenizer.encode(word, add_special_tokens=False).ids
        return table
