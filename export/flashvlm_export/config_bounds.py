"""The numbers of a ``config.json``, checked before any library allocates by them.

Every range holds all models there are with room to spare. What has no range here is for the family to judge.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from flashvlm.errors import CheckpointError

Ranges = Mapping[str, tuple[float, float]]
INTEGERS: Ranges = {
    "hidden_size": (1, 1 << 16),
    "intermediate_size": (1, 1 << 18),
    "num_hidden_layers": (1, 512),
    "num_attention_heads": (1, 1 << 10),
    "num_key_value_heads": (1, 1 << 10),
    "head_dim": (1, 1 << 12),
    "vocab_size": (1, 1 << 22),
    "max_position_embeddings": (1, 1 << 24),
    "original_max_position_embeddings": (1, 1 << 24),
    "num_channels": (1, 64),
    "image_size": (1, 4096),
    "patch_size": (1, 1024),
    "projection_dim": (0, 1 << 16),
    "pretraining_tp": (1, 1024),
    "chunk_size_feed_forward": (0, 1 << 24),
    "image_seq_length": (1, 1 << 16),
    "image_token_index": (0, (1 << 22) - 1),
    "image_token_id": (0, (1 << 22) - 1),
    "video_token_id": (0, (1 << 22) - 1),
    "video_token_index": (0, (1 << 22) - 1),
    "depth": (1, 512),
    "num_heads": (1, 1 << 10),
    "num_position_embeddings": (1, 1 << 20),
    "out_hidden_size": (1, 1 << 16),
    "in_channels": (1, 64),
    "in_chans": (1, 64),
    "spatial_merge_size": (1, 16),
    "temporal_patch_size": (1, 64),
    "tokens_per_second": (1, 1 << 16),
    "window_size": (1, 4096),
}
REALS: Ranges = {
    "rms_norm_eps": (0.0, 1.0),
    "layer_norm_eps": (0.0, 1.0),
    "initializer_range": (0.0, 100.0),
    "initializer_factor": (0.0, 100.0),
    "attention_dropout": (0.0, 1.0),
    "rope_theta": (1.0, 1e15),
    "factor": (1e-3, 1e6),
    "low_freq_factor": (1e-3, 1e6),
    "high_freq_factor": (1e-3, 1e6),
    "partial_rotary_factor": (1e-3, 1.0),
}
# How a call of the model answers, or what a classifier would add: neither is part of what is exported.
NOT_THE_MODEL = frozenset(
    {
        *("return_dict", "use_return_dict", "output_attentions", "output_hidden_states", "torchscript", "use_cache"),
        *("attn_implementation", "_attn_implementation", "_attn_implementation_internal"),
        *("num_labels", "id2label", "label2id", "pruned_heads"),
    }
)
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def checked_config(
    config: dict[str, Any], where: str = "config.json", integers: Ranges = INTEGERS, reals: Ranges = REALS
) -> dict[str, Any]:
    """A configuration whose numbers are in range, without what is not the model. A family may check keys of its own.

    Raises:
        CheckpointError: a number is of another kind or out of range; the key, what was found and the range.
    """
    kept: dict[str, Any] = {}
    for key, value in config.items():
        if key in NOT_THE_MODEL:
            continue
        if isinstance(value, dict):
            inner = f"{where}: {key}" if ":" not in where else f"{where}.{key}"
            kept[key] = checked_config(value, inner, integers, reals)
            continue
        low, high = integers.get(key) or reals.get(key) or (-math.inf, math.inf)
        if isinstance(value, (int, float)) and not low <= value <= high:
            raise CheckpointError(f"{_at(where, key)} is {_short(value)}; expected {low:,} to {high:,}")
        if key in integers and isinstance(value, (bool, float, str)):
            raise CheckpointError(f"{_at(where, key)} is {value!r}; expected a whole number")
        if key in reals and isinstance(value, (bool, str)):
            raise CheckpointError(f"{_at(where, key)} is {value!r}; expected a number")
        kept[key] = value
    return kept


def refuse_unlike_attention(text: dict[str, Any], where: str) -> None:
    """Refuses what the decoder graph would leave out in silence: windows, and rotary embeddings that depend on length.

    Raises:
        CheckpointError: an active sliding window, a layer that is not full attention, or another kind of rotary
            embedding than ``ROPE_TYPES``.
    """
    window, positions = text.get("sliding_window"), text.get("max_position_embeddings")
    reaches_all = isinstance(window, int) and isinstance(positions, int) and window >= positions
    if window is not None and text.get("use_sliding_window") is not False and not reaches_all:
        raise CheckpointError(
            f"config.json: {where}.sliding_window is {window!r}, which limits attention; expected none, as the "
            f"decoder attends to every token"
        )
    kinds = text.get("layer_types") or ()
    if odd := [kind for kind in kinds if kind != "full_attention"]:
        raise CheckpointError(f"config.json: {where}.layer_types has {odd[0]!r}; expected full_attention alone")
    for key in ("rope_parameters", "rope_scaling"):
        rope = text.get(key) or {}
        kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
        if kind not in ROPE_TYPES:
            raise CheckpointError(
                f"config.json: {where}.{key} is of type {kind!r}, which depends on the prompt's length or is unknown; "
                f"expected {', '.join(ROPE_TYPES)}"
            )


def _at(where: str, key: str) -> str:
    return f"{where}.{key}" if ":" in where else f"{where}: {key}"


def _short(value: float) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
