"""Batches by step number alone: the same step gives the same scenes, so a resumed run sees what it would have seen."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.utils.data import Dataset

from demo_model.words import ATTRIBUTES, patch_labels, scene_labels
from scenes.draw import draw
from scenes.questions import ask
from scenes.world import Scene, sample_scene

MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)  # CLIP's
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
IGNORED = -100


@dataclass(frozen=True)
class Plan:
    """What one stage reads: scenes a step, questions a scene, patches a side, and which tensors to make.

    grounds   of the patches that show no thing, how many are kept at most (None: all); only without pixels
    """

    scenes: int
    questions: int
    sides: tuple[int, ...]
    pixels: bool
    labels: bool
    grounds: int | None = None


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
        labels = [patch_labels(scene) for scene in scenes] if plan.labels else []
        if plan.labels:
            if plan.grounds is not None:
                labels = [_some_grounds(each, plan.grounds, rng) for each in labels]
            batch["labels"] = torch.from_numpy(np.concatenate(labels))  # [patches of all, 9]
            batch["scene_labels"] = torch.from_numpy(np.stack([scene_labels(s) for s in scenes]))
        if plan.pixels:
            batch["pixel_values"] = pixel_values(scenes)
        if plan.questions:
            counts = [len(each) for each in labels] if plan.labels else [side * side] * len(scenes)
            chats = [self._chat(scene, f"{self.name}/{step}/{i}") for i, scene in enumerate(scenes)]
            batch |= self._turns.encode(chats, counts)
        return batch

    def _chat(self, scene: Scene, seed: str) -> list[tuple[str, str]]:
        rng = random.Random(f"questions/{seed}")
        asked = [ask(scene, rng) for _ in range(self.plan.questions)]
        return [(question.text, question.answer) for question in asked]


def _some_grounds(labels: np.ndarray, most: int, rng: np.random.Generator) -> np.ndarray:
    is_ground = labels[:, list(ATTRIBUTES).index("ground")] > 0
    keep = ~is_ground
    grounds = np.flatnonzero(is_ground)
    keep[rng.permutation(grounds)[:most]] = True
    return labels[keep]


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

    def encode(self, chats: list[list[tuple[str, str]]], image_tokens: list[int]) -> dict[str, torch.Tensor]:
        """Each row is one image and then its questions, every one as if it alone followed the image.

        Returns:
            input_ids [B,T] with one <image> a visual token; targets [B,T], ids of answers, IGNORED elsewhere;
            position_ids [B,T], which start anew behind the image for each question; block [B,T], 0 for the image and
            what stands before it, then 1, 2, ... a question, -1 for padding.
        """
        rows = []
        for chat, count in zip(chats, image_tokens, strict=True):
            texts = [f"USER: <image>\n{question} ASSISTANT: {answer}</s>" for question, answer in chat]
            row: list[tuple[int, int, int, int]] = []  # id, target, position, block
            for number, encoding in enumerate(self._tokenizer.encode_batch(texts), 1):
                at = encoding.ids.index(self.image_id)
                if not row:
                    prefix = [*encoding.ids[:at], *[self.image_id] * count]
                    row = [(id_, IGNORED, position, 0) for position, id_ in enumerate(prefix)]
                question = encoding.ids[at + 1 :]
                answer = question.index(self._assistant) + 2  # "ASSISTANT" and ":"
                row += [
                    (id_, id_ if i >= answer else IGNORED, len(prefix) + i, number) for i, id_ in enumerate(question)
                ]
            rows.append(row)
        longest = max(map(len, rows))
        padded = torch.tensor([row + [(self.pad_id, IGNORED, 0, -1)] * (longest - len(row)) for row in rows])
        names = ("input_ids", "targets", "position_ids", "block")
        return {name: padded[..., i].contiguous() for i, name in enumerate(names)}

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
