"""Language models that several families have, and the checks of a ``config.json`` that go with them."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, MistralConfig

from flashvlm.errors import CheckpointError
from flashvlm_export.config_bounds import refuse_unlike_attention
from flashvlm_export.families.contract import LanguageSpec

# Attend to every token before them, rotate by one position, and have a cache of keys and values alone.
TEXT_TYPES = ("llama", "mistral", "qwen2", "qwen3")


def check_sections(config: dict[str, Any], family: str) -> dict[str, Any]:
    """The configuration, checked for what every one of a vision and a language section has to be, its rope settled.

    Raises:
        CheckpointError: a section is missing, the weights are quantized, or the attention is not the decoder's.
    """
    for part in ("vision_config", "text_config"):
        if not isinstance(config.get(part), dict):
            found = repr(config[part]) if part in config else "missing"
            raise CheckpointError(f"config.json: {part} is {found}; family {family} has an object there")
    refuse_quantized(config)
    text = settle_rope(config["text_config"])
    refuse_unlike_attention(_with_window(text), "text_config")
    return {**config, "text_config": text}


def _with_window(text: dict[str, Any]) -> dict[str, Any]:
    """A Mistral whose ``config.json`` names no window has one in transformers."""
    defaults = MistralConfig().to_dict() if text.get("model_type") == "mistral" else {}
    return {**{key: defaults[key] for key in ("sliding_window", "max_position_embeddings") if key in defaults}, **text}


def refuse_quantized(config: dict[str, Any]) -> None:
    if "quantization_config" in config:
        raise CheckpointError("config.json: the checkpoint is quantized; expected float16, bfloat16 or float32 weights")


def expect(family: str, *settings: tuple[str, Any, tuple[Any, ...]]) -> None:
    """Each a name in ``config.json``, what is there, and what the family covers. Raises CheckpointError."""
    for name, found, expected in settings:
        if found not in expected:
            raise CheckpointError(
                f"config.json: {name} is {found!r}; family {family} supports {' or '.join(map(str, expected))}"
            )


def check_token(name: str, token: Any, rows: int) -> None:
    """Raises CheckpointError unless ``token`` is one of the table's."""
    if not isinstance(token, int) or not 0 <= token < rows:
        raise CheckpointError(f"config.json: {name} is {token!r}; expected one of the {rows:,} tokens")


def settle_rope(text: dict[str, Any]) -> dict[str, Any]:
    """A language section whose rotary embedding is of a type that does not depend on length.

    ``dynamic`` changes its frequencies beyond max_position_embeddings alone, where a bundle does not go: within them
    it is the default.
    """
    settled = dict(text)
    for key in ("rope_parameters", "rope_scaling"):
        rope = text.get(key)
        if isinstance(rope, dict) and rope.get("rope_type", rope.get("type")) == "dynamic":
            kept = {k: v for k, v in rope.items() if k not in ("type", "rope_type", "factor")}
            settled[key] = {**kept, "rope_type": "default"}
    return settled


# --- what a family takes as it is where its model is LlavaForConditionalGeneration's likeness -------------------------


def language_section(config: dict[str, Any]) -> dict[str, Any]:
    return config["text_config"] if isinstance(config.get("text_config"), dict) else {}


def language_spec(config: Any, **more: Any) -> LanguageSpec:
    """Of the configuration's language section; ``more``: positions and streams that differ."""
    text = config.text_config
    return LanguageSpec(
        hidden=text.hidden_size,
        layers=text.num_hidden_layers,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        # Some configurations leave it out, some write null.
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        intermediate=text.intermediate_size,
        vocab=text.vocab_size,
        max_seq=text.max_position_embeddings,
        **more,
    )


def refuse_float16(family: str, config: Any, dtype: torch.dtype) -> None:
    """For families whose activations are reported to overflow: float16 ends at 65,504, bfloat16 where float32 does.

    A checkpoint that says it is float16 was made so on purpose.

    Raises:
        CheckpointError: float16, of a checkpoint that was trained in bfloat16.
    """
    stored = config.dtype or config.text_config.dtype
    if dtype is torch.float16 and stored is torch.bfloat16:
        raise CheckpointError(
            f"--dtype float16: activations of family {family} may overflow, as its weights were trained in bfloat16; "
            f"use --dtype bfloat16, or float32 where a device has none"
        )


def build(config: Any, dtype: torch.dtype) -> nn.Module:
    """transformers' own model, weights in ``dtype``; called under ``torch.device("meta")``."""
    # Not model.to(dtype): that would also round the rotary frequencies, which transformers keeps in float32.
    return cast(nn.Module, AutoModelForImageTextToText.from_config(config, dtype=dtype))


def language(model: Any) -> tuple[nn.Module, nn.Module]:
    return model.model.language_model, model.lm_head


def embedding_name(config: Any) -> str:
    return "model.language_model.embed_tokens.weight"


def tied_head(config: Any) -> str | None:
    return "lm_head.weight" if config.tie_word_embeddings or config.text_config.tie_word_embeddings else None
