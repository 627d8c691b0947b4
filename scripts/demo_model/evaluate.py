"""Accuracy on held-out questions, through torch."""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from demo_model.batches import pixel_values
from demo_model.stages import Demo
from demo_model.turns import IGNORED, Conversation, Turns
from scenes.exam import Item, conversations, exam
from scenes.world import Scene

MAX_NEW_TOKENS = 8  # the longest answers have 4


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
        visual = _visual(demo, scene)
        encoded = turns.encode([[[(item.question.text, item.question.answer)] for item in items]], [len(visual)])
        states, targets = demo.read(encoded, visual)
        correct = (demo.lm_head(states[-1]).argmax(-1) == targets) | (targets == IGNORED)
        for number, item in enumerate(items):
            is_right = bool(correct[encoded["number"][:, :, 1:] == number].all())
            right[item.question.kind].append(is_right)
            right["held out" if item.held_out else "seen"].append(is_right)
            right["all"].append(is_right)
    return {name: sum(values) / len(values) for name, values in sorted(right.items())}


@torch.inference_mode()
def accuracy_by_turn(demo: Demo, processor: Path, count: int, turns: int, split: str = "check") -> list[float]:
    """Share of right answers at each turn of conversations about the scenes of ``count`` questions.

    As in use: the model has its own answers before it, and reads them with transformers' own attention.
    """
    demo.eval()
    encoder = Turns(processor)
    right: list[list[bool]] = [[] for _ in range(turns)]
    for items in conversations(count, turns, split):
        visual = _visual(demo, items[0].scene)
        history: Conversation = []
        for item, column in zip(items, right, strict=True):
            answer = _answer(demo, encoder, visual, history, item.question.text)
            history.append((item.question.text, answer))
            column.append(answer == item.question.answer)
    return [sum(column) / len(column) for column in right]


def _visual(demo: Demo, scene: Scene) -> Tensor:
    """Image tokens [P,D] of a whole scene."""
    features, _ = demo.see({"pixel_values": pixel_values([scene]), "origin": torch.zeros(1, 2, dtype=torch.int64)})
    return demo.model.multi_modal_projector(features)[0]


def _answer(demo: Demo, turns: Turns, visual: Tensor, history: Conversation, question: str) -> str:
    """The greedy answer to a question behind earlier ones."""
    language = demo.model.language_model
    language.config._attn_implementation = "sdpa"
    ids = turns.prompt(history, question, len(visual))
    embedded = language.embed_tokens(ids)
    embedded[ids == turns.image_id] = visual
    said: list[int] = []
    cache = None
    while len(said) < MAX_NEW_TOKENS:
        out = language(inputs_embeds=embedded[None], past_key_values=cache, use_cache=True)
        token = int(demo.lm_head(out.last_hidden_state[0, -1]).argmax())
        if token == turns.end_id:
            break
        said.append(token)
        cache, embedded = out.past_key_values, language.embed_tokens(torch.tensor([token]))
    return turns.decode(said)


def best_constant(items: list[Item]) -> tuple[str, float]:
    """The answer that is right most often, and how often."""
    answer, count = Counter(item.question.answer for item in items).most_common(1)[0]
    return answer, count / len(items)
