"""Accuracy on held-out questions, through torch."""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import groupby
from pathlib import Path

import torch

from demo_model.batches import pixel_values
from demo_model.stages import Demo
from demo_model.turns import IGNORED, Turns
from scenes.exam import Item, exam


@torch.inference_mode()
def accuracy(demo: Demo, processor: Path, count: int, split: str = "check") -> dict[str, float]:
    """Share of questions whose greedy answer is the right one, by kind and in all.

    One forward pass a scene: the greedy answer is right exactly when every token of the right answer, the stop
    token included, is the likeliest after those before it.
    """
    demo.eval()
    turns = Turns(processor)
    right: dict[str, list[bool]] = defaultdict(list)
    for scene, group in groupby(exam(count, split), key=lambda item: item.scene):
        items = list(group)
        batch = {"pixel_values": pixel_values([scene]), "origin": torch.zeros(1, 2, dtype=torch.int64)}
        features, _ = demo.see(batch)
        visual = demo.model.multi_modal_projector(features)[0]
        encoded = turns.encode([[(item.question.text, item.question.answer) for item in items]], [len(visual)])
        states, targets = demo.read(encoded, visual)
        correct = (demo.lm_head(states[-1]).argmax(-1) == targets) | (targets == IGNORED)
        for number, item in enumerate(items):
            is_right = bool(correct[encoded["number"][:, :, 1:] == number].all())
            right[item.question.kind].append(is_right)
            right["held out" if item.held_out else "seen"].append(is_right)
            right["all"].append(is_right)
    return {name: sum(values) / len(values) for name, values in sorted(right.items())}


def best_constant(items: list[Item]) -> tuple[str, float]:
    """The answer that is right most often, and how often."""
    answer, count = Counter(item.question.answer for item in items).most_common(1)[0]
    return answer, count / len(items)
