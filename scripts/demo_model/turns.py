"""Conversations as token ids, with what is to be learnt at each token."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer

from demo_model.words import ATTRIBUTES
from scenes.questions import NOUNS

IGNORED = -100
SLOT = 64  # tokens at least: three or four questions with their answers; the longest conversation must fit, too
Conversation = list[tuple[str, str]]  # questions with their answers, in the order in which they are asked
Noun = tuple[int, int]  # which thing a noun stands for, and how many things; -1 where it is not that kind of noun
NOTHING: Noun = (-1, -1)


class Token(NamedTuple):
    """One token behind the image; ``conversation`` is the number of the conversation it belongs to."""

    id: int
    target: int
    position: int
    conversation: int
    thing: int
    number_of: int


class Turns:
    """Makes tensors of conversations about images, in the words of the chat template."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        (self.image_id, self.pad_id, self.end_id, self._assistant) = (
            self._tokenizer.token_to_id(token) for token in ("<image>", "<pad>", "</s>", "▁ASSISTANT")
        )
        self._nouns = {self._tokenizer.token_to_id(f"▁{noun}") for noun in NOUNS}

    def encode(
        self,
        chats: list[list[Conversation]],
        image_tokens: list[int],
        nouns: list[list[list[list[Noun]]]] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Each row is one image and conversations about it, every one as if it alone followed the image.

        Args:
            chats: conversations about each image; a question that is asked alone is a conversation of one.
            image_tokens: visual tokens of each image.
            nouns: of each question of each conversation, what each of its nouns stands for.

        Returns:
            prefix_ids [B,P], what stands before the questions with one <image> a visual token, padded behind;
            question_ids [B,S,L], slots with several conversations each, padded behind; number [B,S,L], which
            conversation, -1 for padding; targets [B,S,L], ids of answers and IGNORED elsewhere; thing and number_of
            [B,S,L], which thing or how many a noun stands for, -1 elsewhere;
            position_ids [B,P+S*L], which start anew behind the image for each conversation.
        """
        prefixes, read = [], []
        for row, (chat, count) in enumerate(zip(chats, image_tokens, strict=True)):
            encoded = [encoding.ids for encoding in self._tokenizer.encode_batch([_text(each) for each in chat])]
            at = encoded[0].index(self.image_id)
            prefixes.append([*encoded[0][:at], *[self.image_id] * count])
            named = nouns[row] if nouns else [[[]] * len(conversation) for conversation in chat]
            read.append(
                [self._tokens(ids[at + 1 :], at + count, number, named[number]) for number, ids in enumerate(encoded)]
            )
        size = max(SLOT, *(len(tokens) for each in read for tokens in each))
        rows = [_packed(each, size) for each in read]
        most, padding = max(map(len, rows)), Token(self.pad_id, IGNORED, 0, -1, *NOTHING)
        padded = torch.tensor(
            [
                [slot + [padding] * (size - len(slot)) for slot in slots] + [[padding] * size] * (most - len(slots))
                for slots in rows
            ]
        )
        ids, targets, positions, numbers, things, numbers_of = (v.contiguous() for v in padded.unbind(-1))  # [B,S,L]
        length = max(map(len, prefixes))
        prefix_ids = torch.tensor([prefix + [self.pad_id] * (length - len(prefix)) for prefix in prefixes])
        before = torch.arange(length).expand(len(chats), -1)
        return {
            "prefix_ids": prefix_ids,
            "question_ids": ids,
            "number": numbers,
            "targets": targets,
            "thing": things,
            "number_of": numbers_of,
            "position_ids": torch.cat([before, positions.flatten(1)], 1),
        }

    def word_ids(self) -> torch.Tensor:
        """int64 [9, 31]: the token of each label of each attribute; 0 (<unk>) where there is none."""
        table = torch.zeros(len(ATTRIBUTES), 1 + max(map(len, ATTRIBUTES.values())), dtype=torch.int64)
        for a, words in enumerate(ATTRIBUTES.values()):
            for w, word in enumerate(words):
                (table[a, w + 1],) = self._tokenizer.encode(word, add_special_tokens=False).ids
        return table

    def prompt(self, history: Conversation, question: str, image_tokens: int) -> torch.Tensor:
        """int64 [T]: everything up to an answer that is still to come, with one <image> a visual token."""
        ids = self._tokenizer.encode(_text([*history, (question, "")]).removesuffix(" </s>")).ids
        at = ids.index(self.image_id)
        return torch.tensor([*ids[:at], *[self.image_id] * image_tokens, *ids[at + 1 :]])

    def decode(self, ids: list[int]) -> str:
        """The answer that these tokens spell."""
        return self._tokenizer.decode(ids).strip()

    def _tokens(self, ids: list[int], first: int, conversation: int, nouns: list[list[Noun]]) -> list[Token]:
        """A conversation; ``first`` is the position of its first token, behind the image."""
        tokens: list[Token] = []
        for asked in nouns:
            turn = ids[len(tokens) : ids.index(self.end_id, len(tokens)) + 1]
            tokens += self._turn(turn, first + len(tokens), conversation, asked)
        return tokens

    def _turn(self, ids: list[int], first: int, conversation: int, nouns: list[Noun]) -> list[Token]:
        """A question and its answer."""
        answer = ids.index(self._assistant) + 2  # "ASSISTANT" and ":"
        known = iter(nouns)
        return [
            Token(
                id_,
                id_ if i >= answer else IGNORED,
                first + i,
                conversation,
                *(next(known, NOTHING) if i < answer and id_ in self._nouns else NOTHING),
            )
            for i, id_ in enumerate(ids)
        ]


def _text(conversation: Conversation) -> str:
    """As the chat template writes it: nothing stands between the end of an answer and the next question's USER."""
    return "USER: <image>\n" + "USER: ".join(f"{question} ASSISTANT: {answer}</s>" for question, answer in conversation)


def _packed(conversations: list[list[Token]], size: int) -> list[list[Token]]:
    """Conversations into slots of so many tokens, each into the first that has room."""
    slots: list[list[Token]] = []
    for tokens in conversations:
        for slot in slots:
            if len(slot) + len(tokens) <= size:
                slot += tokens
                break
        else:
            slots.append(list(tokens))
    return slots
