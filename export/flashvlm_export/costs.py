"""What one prompt costs: operations, and bytes held at once.

Activations are an estimate. Its formula, per graph, is the largest set of tensors alive at once when no operators are
fused, for T tokens of width D, feed-forward width F, H heads (Hkv of them with keys) of size d, and C cache rows:

    residual   2 T D
    attention  2 T (H + 2 Hkv) d + T H d            query, key and value before and after rotation, and the output
               legacy: + 2 H T (C + T), 4 bytes each, + 2 Hkv (C + T) d     scores and softmax; cache beside new rows
    MLP        3 T F                                gate, up and their product
    mask       T C; legacy: T (C + T)
    logits     V, in the model's dtype and in float32
    a graph    residual + max(attention, MLP) + mask + logits

A TensorRT engine reserves that for the longest prompt it was built for: engines count it at T = C = max_seq, prompts
at their own length. Selection counts its float32 copies of the tokens and three [N, N] matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flashvlm_export.families.contract import LanguageSpec, TowerSpec
from flashvlm_export.graph.dialects import Dialect


@dataclass(frozen=True)
class Costs:
    """body: parameters of the decoder without its head. item: bytes of a number."""

    language: LanguageSpec
    towers: Sequence[TowerSpec]
    body: int
    item: int
    dialect: Dialect

    @property
    def kv_token(self) -> int:
        language = self.language
        return 2 * language.layers * language.kv_heads * language.head_dim * self.item

    def flops(self, tokens: int) -> float:
        """Of a prefill: two for a parameter and token, and causal attention; the head runs on one token."""
        language = self.language
        head = language.vocab * language.hidden
        attention = 2 * language.layers * tokens * tokens * language.heads * language.head_dim
        return 2.0 * self.body * tokens + attention + 2 * head

    def decoder(self, tokens: int, rows: int) -> int:
        """Bytes at once for ``tokens`` new ones and ``rows`` of the cache."""
        language, item, size = self.language, self.item, self.language.head_dim
        seen = rows if self.dialect.cache_in_place else rows + tokens
        attention = item * (2 * tokens * (language.heads + 2 * language.kv_heads) + tokens * language.heads) * size
        if not self.dialect.fused_attention:
            attention += 2 * language.heads * tokens * seen * 4
        if not self.dialect.cache_in_place:
            attention += item * 2 * language.kv_heads * seen * size
        mlp = item * 3 * tokens * language.intermediate
        fixed = item * (2 * tokens * language.hidden + tokens * seen) + (item + 4) * language.vocab
        return fixed + max(attention, mlp)

    def vision(self) -> int:
        """Of the largest tower."""
        return max(tower.units * self._unit(tower) for tower in self.towers)

    def _unit(self, tower: TowerSpec) -> int:
        attention = self.item * 4 * tower.tokens * tower.width
        if not self.dialect.fused_attention:
            attention += 2 * tower.heads * tower.tokens * tower.tokens * 4
        mlp = self.item * 2 * tower.tokens * tower.intermediate
        return 4 * tower.pixels + self.item * 2 * tower.tokens * tower.width + max(attention, mlp)

    def select(self, query: int) -> int:
        """For a question of ``query`` tokens."""
        hidden = self.language.hidden
        return max(
            4 * (n * hidden + n * tower.features + query * hidden + 3 * n * n)
            for tower in self.towers
            for n in (tower.candidates,)
        )
