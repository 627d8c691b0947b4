"""The stages of training, each a loss over a batch.

words   language model alone, on scenes told in words: each patch is the sum of its words' embeddings
tower   vision tower alone: patches name what they show, CLS names what the scene holds
align   projector: image tokens become the sums of words that the language model knows
answer  everything, on questions about pixels; the tower goes on naming what it sees
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from demo_model.batches import IGNORED, Plan
from demo_model.words import ATTRIBUTES
from scenes.world import CHARACTERS, COLORS, GRID, GROUNDS, SHAPES


@dataclass(frozen=True)
class Stage:
    plans: tuple[tuple[float, Plan], ...]  # from which share of the steps on, which plan
    trained: tuple[str, ...]  # prefixes of parameter names
    learning_rate: float


STAGES = {
    "words": Stage(
        (
            (0.0, Plan(scenes=64, questions=4, sides=(8,), pixels=False, labels=True, grounds=4)),
            (0.35, Plan(scenes=48, questions=4, sides=(12,), pixels=False, labels=True, grounds=8)),
            (0.6, Plan(scenes=24, questions=8, sides=(18,), pixels=False, labels=True, grounds=24)),
            (0.8, Plan(scenes=16, questions=10, sides=(24,), pixels=False, labels=True, grounds=64)),
        ),
        ("model.language_model.", "lm_head."),
        1.5e-3,
    ),
    "tower": Stage(
        (
            (0.0, Plan(scenes=32, questions=0, sides=(8,), pixels=True, labels=True)),
            (0.3, Plan(scenes=16, questions=0, sides=(12,), pixels=True, labels=True)),
            (0.9, Plan(scenes=4, questions=0, sides=(24,), pixels=True, labels=True)),
        ),
        ("model.vision_tower.", "heads."),
        1e-3,
    ),
    "align": Stage(
        (
            (0.0, Plan(scenes=12, questions=0, sides=(12,), pixels=True, labels=True)),
            (0.4, Plan(scenes=4, questions=0, sides=(24,), pixels=True, labels=True)),
        ),
        ("model.vision_tower.", "model.multi_modal_projector.", "heads."),
        6e-4,
    ),
    "answer": Stage(
        (
            (0.0, Plan(scenes=12, questions=6, sides=(12,), pixels=True, labels=True)),
            (0.25, Plan(scenes=6, questions=12, sides=(24,), pixels=True, labels=True)),
        ),
        ("model.", "lm_head.", "heads."),
        5e-4,
    ),
}
NAMING = 0.1  # weight of the tower's own losses beside the answers


class Demo(nn.Module):
    """The model that is shipped, and heads that only training uses."""

    def __init__(self, model: Any, word_ids: Tensor) -> None:
        super().__init__()
        self.model, self.lm_head = model.model, model.lm_head
        self.config = model.config
        width = model.config.vision_config.hidden_size
        self.heads = nn.ModuleDict({name: nn.Linear(width, len(words) + 1) for name, words in ATTRIBUTES.items()})
        self.heads["scene"] = nn.Linear(width, len(COLORS) * len(SHAPES) + len(CHARACTERS) + len(GROUNDS))
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
        features, cls = self.see(batch)
        tokens = self.model.multi_modal_projector(features).flatten(0, 1).float()
        told = self.told(batch["labels"], noisy=False).detach().float()
        scale = told.pow(2).mean()
        return {"align": F.mse_loss(tokens, told) / scale, **self._naming(features, cls, batch)}

    def _answer(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        features, cls = self.see(batch)
        naming = {name: NAMING * loss for name, loss in self._naming(features, cls, batch).items()}
        return naming | self._answering(batch, self.model.multi_modal_projector(features).flatten(0, 1))

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
        is_thing = labels[:, 0] > 0
        losses = {}
        for a, name in enumerate(ATTRIBUTES):
            chosen = is_thing if name in ("shape", "pattern", "size", "character", "center") else slice(None)
            losses[name] = F.cross_entropy(self.heads[name](normal[chosen]).float(), labels[chosen, a])
        scene = self.heads["scene"](self.model.vision_tower.post_layernorm(cls)).float()
        losses["scene"] = F.binary_cross_entropy_with_logits(scene, batch["scene_labels"]) * 10
        return losses

    def _answering(self, batch: dict[str, Tensor], visual: Tensor) -> dict[str, Tensor]:
        hidden, targets = self.read(batch, visual)
        logits = self.lm_head(hidden[targets != IGNORED]).float()
        wanted = targets[targets != IGNORED]
        right = (logits.argmax(-1) == wanted).float().mean()
        return {"answer": F.cross_entropy(logits, wanted), "token accuracy": right.detach()}

    def read(self, batch: dict[str, Tensor], visual: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states [B,T-1,D] and the tokens they should predict [B,T-1]. A question sees the image and itself."""
        ids, block = batch["input_ids"], batch["block"]
        embeds = self.model.language_model.embed_tokens(ids)
        is_image = ids == self.config.image_token_id
        embeds = embeds.masked_scatter(is_image[..., None], visual.to(embeds.dtype))
        same = (block[:, :, None] == block[:, None, :]) | (block[:, None, :] == 0)
        seen = same & torch.ones_like(same[0]).tril()  # [B,T,T]
        out = self.model.language_model(
            inputs_embeds=embeds, attention_mask=seen[:, None], position_ids=batch["position_ids"], use_cache=False
        )
        return out.last_hidden_state[:, :-1], batch["targets"][:, 1:]
