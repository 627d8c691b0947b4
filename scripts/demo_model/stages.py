"""The stages of training, each a loss over a batch.

words   language model alone, on scenes told in words: each patch is the sum of its words' embeddings
tower   vision tower alone: patches name what they show, CLS names what the scene holds
align   projector: image tokens become the sums of words that the language model knows
answer  everything, on questions about pixels, while patches go on naming what they show
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from demo_model.attention import SEPARATE
from demo_model.batches import Plan
from demo_model.turns import IGNORED
from demo_model.words import ATTRIBUTES, OF_THINGS
from scenes.questions import NUMBERS
from scenes.world import CHARACTERS, COLORS, GRID, GROUNDS, SHAPES

FOUND_AT = 4  # blocks after which a noun should know its thing, so that two are left to compare and to answer
FOUND_WEIGHT = 0.2
NAMING_WEIGHT = 0.2  # in `answer`
THING, CENTER = 4.0, 15.0  # weight of a patch of a thing, and of the one at its centre, where the ground's is 1
Range = tuple[int, int]


@dataclass(frozen=True)
class Stage:
    plans: tuple[tuple[float, Plan], ...]  # from which share of the steps on, which plan
    trained: tuple[str, ...]  # prefixes of parameter names
    learning_rate: float


def _told(scenes: int, questions: int, sides: tuple[int, ...], grounds: Range | None, each: Range | None) -> Plan:
    return Plan(scenes, questions, sides, pixels=False, labels=True, grounds=grounds, each=each)


def _shown(scenes: int, questions: int, sides: tuple[int, ...], **more: Any) -> Plan:
    return Plan(scenes, questions, sides, pixels=True, labels=True, **more)


STAGES = {
    "words": Stage(
        (
            (0.0, _told(24, 12, (8,), (4, 4), None)),
            (0.15, _told(16, 14, (8, 12), (2, 50), (1, 6))),
            (0.25, _told(16, 14, (12, 16), (4, 100), (1, 6))),
            (0.35, _told(12, 16, (24, 16, 24, 24), (4, 430), (1, 14))),
            (0.85, _told(8, 16, (24,), None, None)),
        ),
        ("model.language_model.", "lm_head.", "nouns."),
        1.5e-3,
    ),
    "tower": Stage(
        (
            (0.0, _shown(32, 0, (8,))),
            (0.15, _shown(16, 0, (12,))),
            (0.4, _shown(5, 0, (24,))),
        ),
        ("model.vision_tower.", "heads."),
        8e-4,
    ),
    "align": Stage(
        ((0.0, _shown(12, 0, (12,))), (0.3, _shown(4, 0, (24,)))),
        ("model.multi_modal_projector.",),
        1e-3,
    ),
    "answer": Stage(
        (
            (0.0, _shown(6, 16, (24,), turns=(6, 5), grounds=(4, 430), each=(1, 14))),
            (0.6, _shown(6, 16, (24,), turns=(6, 5))),
        ),
        ("model.", "lm_head.", "nouns.", "heads."),
        2e-4,
    ),
}


class Demo(nn.Module):
    """The model that is shipped, and heads that only training uses."""

    def __init__(self, model: Any, word_ids: Tensor) -> None:
        super().__init__()
        self.model, self.lm_head = model.model, model.lm_head
        self.config = model.config
        width = model.config.vision_config.hidden_size
        self.heads = nn.ModuleDict({name: nn.Linear(width, len(words) + 1) for name, words in ATTRIBUTES.items()})
        self.heads["scene"] = nn.Linear(width, len(COLORS) * len(SHAPES) + len(CHARACTERS) + len(GROUNDS))
        width = model.config.text_config.hidden_size
        self.nouns = nn.ModuleDict({name: nn.Linear(width, len(ATTRIBUTES[name]) + 1) for name in OF_THINGS})
        self.nouns["number"] = nn.Linear(width, len(NUMBERS))
        self.register_buffer("word_ids", word_ids, persistent=False)

    def forward(self, stage: str, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return getattr(self, f"_{stage}")(batch)

    # --- stages ---

    def _words(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        visual = self.told(batch["labels"], noisy=True)
        return self._answering(batch, visual)

    def _tower(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return self._naming(*self.see(batch), batch)

    def _align(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        features, _ = self.see(batch)
        tokens = self.model.multi_modal_projector(features).flatten(0, 1).float()
        told = self.told(batch["labels"], noisy=False).detach().float()
        weight = _weight(batch["labels"])[:, None]
        return {"align": (weight * (tokens - told).square()).sum() / (weight * told.square()).sum()}

    def _answer(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        features, cls = self.see(batch)
        losses = self._answering(batch, self.model.multi_modal_projector(features.flatten(0, 1)[batch["kept"]]))
        naming = self._naming(features, cls, batch)
        return losses | {"naming": NAMING_WEIGHT * torch.stack(list(naming.values())).sum()}

    # --- parts ---

    def told(self, labels: Tensor, noisy: bool) -> Tensor:
        """labels [P,9] -> the sum of the embeddings of a patch's words [P,D]."""
        ids = self.word_ids[torch.arange(len(ATTRIBUTES), device=labels.device), labels]  # [P,9]
        shown = (labels > 0).float()
        if noisy:
            shown = shown * (torch.rand_like(shown) > 0.04)
        embedded = self.model.language_model.embed_tokens(ids)  # [P,9,D]
        told = (embedded * shown[..., None]).sum(1)
        if noisy:
            told = told + torch.randn_like(told) * told.detach().std() * 0.4 * torch.rand_like(told[:, :1])
        return told

    def see(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Features [B,P,Dv] of the block that LLaVA takes, and CLS [B,Dv] after the last; windows keep their place."""
        tower = self.model.vision_tower
        pixels = batch["pixel_values"]
        side = pixels.shape[-1] // self.config.vision_config.patch_size
        # torch 2.13 on CPUs: the fused attention's backward is 4 times slower than plain products below 150 tokens.
        tower.config._attn_implementation = "eager" if side <= 12 and not pixels.is_cuda else "sdpa"
        patches = tower.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)  # [B,P,Dv]
        cells = torch.arange(side, device=pixels.device)
        rows, columns = (batch["origin"][:, i, None] + cells for i in (0, 1))  # [B,side] each
        places = (rows[:, :, None] * GRID + columns[:, None, :]).flatten(1) + 1  # [B,P]; 0 is CLS
        table = tower.embeddings.position_embedding.weight
        cls = (tower.embeddings.class_embedding + table[0]).expand(len(pixels), 1, -1)
        hidden = tower.pre_layrnorm(torch.cat([cls, patches + table[places]], 1))
        features = hidden
        for i, layer in enumerate(tower.encoder.layers):
            if i == len(tower.encoder.layers) - 1:
                features = hidden
            hidden = layer(hidden, attention_mask=None)
            if isinstance(hidden, tuple):
                hidden = hidden[0]
        return features[:, 1:], hidden[:, 0]

    def _naming(self, features: Tensor, cls: Tensor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Cross-entropy of every attribute of every patch, those of things where there are things; and CLS's own."""
        labels = batch["labels"]
        normal = F.layer_norm(features.flatten(0, 1), features.shape[-1:])  # [P,Dv]
        is_thing, weight = labels[:, 0] > 0, _weight(labels)
        losses = {}
        for a, name in enumerate(ATTRIBUTES):
            chosen = is_thing if name in ("shape", "pattern", "size", "character", "center") else slice(None)
            each = F.cross_entropy(self.heads[name](normal[chosen]).float(), labels[chosen, a], reduction="none")
            losses[name] = (each * weight[chosen]).sum() / weight[chosen].sum()
        scene = self.heads["scene"](self.model.vision_tower.post_layernorm(cls)).float()
        losses["scene"] = F.binary_cross_entropy_with_logits(scene, batch["scene_labels"]) * 10
        return losses

    def _answering(self, batch: dict[str, Tensor], visual: Tensor) -> dict[str, Tensor]:
        states, targets = self.read(batch, visual)
        hidden = states[-1]
        logits = self.lm_head(hidden[targets != IGNORED]).float()
        wanted = targets[targets != IGNORED]
        right = (logits.argmax(-1) == wanted).float().mean()
        nouns = FOUND_WEIGHT * self._knowing(states[FOUND_AT], batch)
        return {"answer": F.cross_entropy(logits, wanted), "nouns": nouns, "token accuracy": right.detach()}

    def _knowing(self, hidden: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Cross-entropy of what nouns should know: all attributes of their thing, or how many things they stand for."""
        normal = F.layer_norm(hidden, hidden.shape[-1:])  # [B,S,L-1,D]
        thing, number = (batch[name][:, :, :-1] for name in ("thing", "number_of"))
        labels = batch["things"][thing[thing >= 0]]  # [M,7]
        known = [(name, normal[thing >= 0], labels[:, a]) for a, name in enumerate(OF_THINGS)]
        known.append(("number", normal[number >= 0], number[number >= 0]))
        losses = [
            F.cross_entropy(self.nouns[name](states).float(), wanted, reduction="sum") / max(1, len(wanted))
            for name, states, wanted in known
        ]
        return torch.stack(losses).sum()

    def read(self, batch: dict[str, Tensor], visual: Tensor) -> tuple[list[Tensor], Tensor]:
        """Hidden states [B,S,L-1,D] before, between and after the blocks, and the tokens to predict [B,S,L-1].

        ``visual`` are the visual tokens of all images, one behind the other. A question sees its image, those before it
        in its conversation, and itself.
        """
        self.model.language_model.config._attn_implementation = SEPARATE
        prefix, questions = batch["prefix_ids"], batch["question_ids"]
        embed = self.model.language_model.embed_tokens
        is_image = prefix == self.config.image_token_id
        embedded = embed(prefix)
        embedded = embedded.masked_scatter(is_image[..., None], visual.to(embedded.dtype))
        out = self.model.language_model(
            inputs_embeds=torch.cat([embedded, embed(questions.flatten(1))], 1),
            position_ids=batch["position_ids"],
            use_cache=False,
            seen=prefix != self.config.text_config.pad_token_id,
            number=batch["number"],
            output_hidden_states=True,
        )
        states = [state[:, prefix.shape[1] :].unflatten(1, questions.shape[1:]) for state in out.hidden_states]
        return [state[:, :, :-1] for state in states], batch["targets"][:, :, 1:]


def _weight(labels: Tensor) -> Tensor:
    """float32 [P]: how much a patch counts; nine in ten show the ground."""
    is_thing, is_center = labels[:, 0] > 0, labels[:, list(ATTRIBUTES).index("center")] > 0
    return 1 + (THING - 1) * is_thing.float() + (CENTER - THING) * is_center.float()
