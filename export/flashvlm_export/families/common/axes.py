"""Language models whose tokens have a position on three axes: time, height and width (M-RoPE, arXiv 2409.12191)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from flashvlm.errors import CheckpointError

AXES = 3


def settle_mrope(text: dict[str, Any]) -> dict[str, Any]:
    """A language section with the rope of type ``mrope`` called ``default``, as it is along each axis."""
    settled = dict(text)
    for key in ("rope_parameters", "rope_scaling"):
        rope = text.get(key)
        if isinstance(rope, dict) and rope.get("rope_type", rope.get("type")) == "mrope":
            settled[key] = {**{k: v for k, v in rope.items() if k != "type"}, "rope_type": "default"}
    return settled


def check_sections_of_head(sections: Any, head_dim: int) -> None:
    """Raises CheckpointError unless ``mrope_section`` deals the rotated pairs of a head to the three axes."""
    whole = isinstance(sections, (list, tuple)) and all(isinstance(n, int) and n > 0 for n in sections)
    if not whole or len(sections) != AXES or 2 * sum(sections) != head_dim:
        raise CheckpointError(
            f"config.json: mrope_section is {sections!r}; expected three numbers with a sum of {head_dim // 2}, half "
            f"of a head's {head_dim} channels"
        )


def chunked(sections: Sequence[int]) -> list[int]:
    """The axis of each pair of channels, axis after axis: Qwen2.5-VL."""
    return [axis for axis, pairs in enumerate(sections) for _ in range(pairs)]


def interleaved(sections: Sequence[int]) -> list[int]:
    """The axis of each pair of channels, axes by turns as long as each has pairs left: Qwen3-VL."""
    axes = [0] * sum(sections)
    for axis in (1, 2):
        for pair in range(axis, min(AXES * sections[axis], len(axes)), AXES):
            axes[pair] = axis
    return axes


class Language(nn.Module):
    """The layers of a stock model, rotated by positions [B,3,S].

    One Gather of the positions by the axis of each pair of channels, where transformers rotates by all three and
    mixes: ScatterND, for interleaved ones. ``deepstack`` [B,S,L*D], zero at text, is added to what leaves each of the
    first L layers; transformers indexes the visual tokens instead.

    axes: the axis of each pair of channels of a head.
    """

    def __init__(self, stock: Any, axes: Sequence[int]) -> None:
        super().__init__()
        self.layers, self.norm, self.rotary_emb = stock.layers, stock.norm, stock.rotary_emb
        self.axes = torch.tensor(axes, device="cpu")

    def forward(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor,
        past_key_values: Any = None,
        use_cache: bool = False,
        deepstack: Tensor | None = None,
    ) -> BaseModelOutputWithPast:
        rotary = self._rotary(position_ids, inputs_embeds.dtype)
        streams = () if deepstack is None else deepstack.split(inputs_embeds.shape[-1], dim=-1)
        hidden = inputs_embeds
        for i, layer in enumerate(self.layers):
            hidden = layer(
                hidden,
                attention_mask=attention_mask,
                position_embeddings=rotary,
                past_key_values=past_key_values,
                use_cache=use_cache,
            )
            if i < len(streams):
                hidden = hidden + streams[i]
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden))

    def _rotary(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine [B,S,d], computed in float32 as in transformers."""
        embedding: Any = self.rotary_emb
        places = torch.index_select(position_ids, 1, self.axes).transpose(1, 2)  # [B,S,d/2]
        half = places.float() * embedding.inv_freq
        angles, scale = torch.cat([half, half], dim=-1), embedding.attention_scaling
        return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)
