"""A selection graph without a model around it, as an export of one in float32 has it."""

from __future__ import annotations

from flashvlm.graph_io import VISION, select_graph, select_io
from flashvlm.manifest import Dtypes, ModelSpec
from flashvlm.tilings import Single
from flashvlm.visual import VisualSpec
from flashvlm_export.graph.modules import Graph, Select
from flashvlm_export.selection import METHODS, SelectionParams


def selection_specs(tokens: int, hidden: int, features: int) -> tuple[ModelSpec, VisualSpec]:
    """Of a model of one image size: its N tokens of width D, and Dv in the tower. The rest is as small as can be."""
    dtypes = Dtypes(activations="float32", weights="float32", embeddings="float32")
    model = ModelSpec(
        name="x", dtypes=dtypes, hidden_size=hidden, num_layers=1, num_key_value_heads=1, head_dim=1, vocab_size=1,
        max_seq=2, eos_token_ids=(), cache_in_place=True,
    )  # fmt: skip
    pixels = Single(resize="exact", size=(1, 1), mean=(0, 0, 0), std=(1, 1, 1))
    visual = VisualSpec(
        graph=VISION, placeholder_id=0, tokens_per_unit=tokens, grid=(1, tokens), candidates=tokens,
        feature_size=features, pixels=pixels,
    )  # fmt: skip
    return model, visual


def selection_graph(
    method: str, budget: int, params: SelectionParams, tokens: int, hidden: int, features: int
) -> Graph:
    """The graph of a method, to be traced; one that keeps all does so whatever the budget."""
    kept = tokens if METHODS[method].keeps_all else budget
    io = select_io(*selection_specs(tokens, hidden, features), kept)
    return Graph(select_graph(VISION, kept), Select(method, budget, params), *io)
