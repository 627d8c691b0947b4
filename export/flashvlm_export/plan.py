"""Memory of a model at each budget, from its ``config.json`` alone: no download, no weights, no trace.

Parameters are counted on transformers' own model, built on the meta device, and laid out as an export lays them out.
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

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from flashvlm.errors import CheckpointError, FlashVLMError, SelectionError
from flashvlm.graph_io import FloatType
from flashvlm.manifest import ModelSpec
from flashvlm.profiling.measure import allocated_rows
from flashvlm_export.checkpoint import ALIASES, ITEMSIZE, StoredTensor, describes_a_model, find_config
from flashvlm_export.families import CONFIGS, family_of
from flashvlm_export.graph import modules as graphs
from flashvlm_export.weights import stream as weights

# docs/measurements.md, "Engines": bytes of an engine for each byte of its weights, and of memory while building it.
VISION_ENGINE, DECODER_ENGINE = 1.01, 1.002
SELECT_ENGINE = 4_000_000
BUILD_PEAK, BUILD_ANONYMOUS = 3.1, 2.05
HEADER = weights.ALIGNMENT  # of the embedding table's file


@dataclass(frozen=True)
class PlanOptions:
    """What ``flashvlm-export --plan`` takes.

    text_tokens, new_tokens: of the prompt beside the image, and of the answer. max_seq: None for as many rows as each
    budget needs, rounded up as the runtime does.
    """

    model: str
    budgets: tuple[int, ...] = (64,)
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    max_seq: int | None = None
    max_batch: int = 1
    dialect: Literal["modern", "legacy"] = "modern"
    text_tokens: int = 40
    new_tokens: int = 64
    revision: str | None = None


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Part(_Record):
    """Some of the model's parameters: how many, their bytes, and the bytes of their file where they have one."""

    parameters: int
    bytes: int
    file_bytes: int | None = None
    engine_bytes: int | None = None


class KVCache(_Record):
    bytes_per_token: int
    max_positions: int
    bytes_at_max_positions: int


class BudgetPlan(_Record):
    """One budget at the planned batch. All sizes in bytes.

    rows: cache rows of prompt and answer. capacity: those the engines have. activations: of the whole prompt.
    engine_activations: what engines of that capacity reserve. device_total: engines, cache and engine_activations.
    prefill_flops: of one prompt, and as a share of all tokens.
    """

    budget: int | Literal["all"]
    prompt_tokens: int
    rows: int
    kv_used: int
    capacity: int
    kv_capacity: int
    activations: int
    engine_activations: int
    device_total: int
    prefill_flops: float
    prefill_share: float


class Plan(_Record):
    """Measured: the ratios of engines and builds. Computed: parameters, files, caches. Estimated: activations."""

    model: str
    dtype: FloatType
    dialect: Literal["modern", "legacy"]
    max_batch: int
    text_tokens: int
    new_tokens: int
    num_image_tokens: int
    parameters: int
    parts: dict[str, Part]
    bundle_bytes: int
    engine_bytes: int
    build_peak_bytes: int
    build_anonymous_bytes: int
    host_bytes: int
    kv: KVCache
    budgets: tuple[BudgetPlan, ...]


def plan(options: PlanOptions) -> Plan:
    """Plans a model's memory. Reads ``config.json`` and nothing else; never a download for a short name.

    Raises:
        FlashVLMError: no such model, no config.json, a model of no supported family, or options that do not fit it.
    """
    config_dict, where = _config(options)
    family = family_of(config_dict)
    dtype = _dtype(options, config_dict, where)
    config, model = _model(family, config_dict, dtype, where)
    with describes_a_model(Path(where)):
        spec: ModelSpec = family.model_spec(config, Path(options.model).name, dtype, None, ())
    _check(options, spec)
    parts = _parts(family, config, model, dtype)
    tower, text = config.vision_config, config.text_config
    kv_token = 2 * spec.num_layers * spec.num_key_value_heads * spec.head_dim * ITEMSIZE[dtype]
    vision, decoder, embedding = parts["vision"], parts["decoder"], parts["embedding"]
    engines = (vision.engine_bytes or 0) + (decoder.engine_bytes or 0) + SELECT_ENGINE * len(options.budgets)
    batch, item = options.max_batch, ITEMSIZE[dtype]
    seen = batch * _vision_activations(tower, item, options.dialect)
    chosen = batch * _select_activations(spec, tower.hidden_size, options.text_tokens)
    body = decoder.parameters - spec.vocab_size * spec.hidden_size  # the head runs on one token

    def flops(tokens: int) -> float:
        """Of a prefill: two for a parameter and token, and causal attention; the head runs on one token."""
        attention = 2 * text.num_hidden_layers * tokens * tokens * text.num_attention_heads * spec.head_dim
        return 2.0 * body * tokens + attention + 2 * spec.vocab_size * spec.hidden_size

    every = flops(spec.num_image_tokens + options.text_tokens)
    budgets = []
    for budget in (*options.budgets, None):
        prompt = (budget or spec.num_image_tokens) + options.text_tokens
        rows = prompt + options.new_tokens - 1  # the last new token needs none
        capacity = options.max_seq or min(allocated_rows(prompt, options.new_tokens), spec.max_seq)
        if rows > capacity:
            asked = f"--max-seq {options.max_seq}" if options.max_seq else f"the model's {capacity} positions"
            raise FlashVLMError(
                f"{asked}: budget {budget or 'all'} needs {rows} rows for {options.text_tokens} tokens of text and "
                f"{options.new_tokens} of answer; plan for fewer, or raise --max-seq"
            )
        reserved = batch * _decoder_activations(text, spec, item, capacity, capacity, options.dialect)
        kv = batch * kv_token * capacity
        held = reserved + seen + (chosen if budget else 0)
        budgets.append(
            BudgetPlan(
                budget=budget or "all",
                prompt_tokens=prompt,
                rows=rows,
                kv_used=batch * kv_token * rows,
                capacity=capacity,
                kv_capacity=kv,
                activations=batch * _decoder_activations(text, spec, item, prompt, capacity, options.dialect),
                engine_activations=held,
                device_total=engines + kv + held,
                prefill_flops=flops(prompt),
                prefill_share=flops(prompt) / every,
            )
        )
    return Plan(
        model=options.model,
        dtype=dtype,
        dialect=options.dialect,
        max_batch=batch,
        text_tokens=options.text_tokens,
        new_tokens=options.new_tokens,
        num_image_tokens=spec.num_image_tokens,
        parameters=sum(part.parameters for part in parts.values()),
        parts=parts,
        bundle_bytes=sum(part.file_bytes or 0 for part in parts.values()),
        engine_bytes=engines,
        build_peak_bytes=int(BUILD_PEAK * decoder.bytes),
        build_anonymous_bytes=int(BUILD_ANONYMOUS * decoder.bytes),
        host_bytes=embedding.bytes,
        kv=KVCache(
            bytes_per_token=kv_token, max_positions=spec.max_seq, bytes_at_max_positions=kv_token * spec.max_seq
        ),
        budgets=tuple(budgets),
    )


# --- the model -----------------------------------------------------------------------------------------------------


def _config(options: PlanOptions) -> tuple[dict[str, Any], str]:
    """config.json as a dict, and where it is from; a short name's own unless a folder has that name."""
    model = options.model
    if model in CONFIGS and options.revision is None and not Path(model).is_dir():
        return CONFIGS[model], f"the configuration of {ALIASES[model]}"
    path, config = find_config(model, options.revision)
    return config, str(path)


def _dtype(options: PlanOptions, config: dict[str, Any], where: str) -> FloatType:
    if options.dtype != "auto":
        return options.dtype
    text = config.get("text_config")
    named = [c.get(key) for c in (config, text) if isinstance(c, dict) for key in ("dtype", "torch_dtype")]
    for dtype in named:
        if dtype in ITEMSIZE:
            return dtype
    raise CheckpointError(f"{where} names no dtype; plan with --dtype float16, bfloat16 or float32")


def _model(family: ModuleType, config_dict: dict[str, Any], dtype: FloatType, where: str) -> tuple[Any, Any]:
    with describes_a_model(Path(where)):
        config = family.read_config(config_dict)
        with torch.device("meta"):
            return config, family.build(config, graphs.TORCH_DTYPES[dtype]).eval()


def _parts(family: ModuleType, config: Any, model: nn.Module, dtype: FloatType) -> dict[str, Part]:
    """Where each parameter goes, as the exporter places them. A tied table is in its file and in the decoder's."""
    names = dict(model.named_parameters())
    table = names[family.embedding_name()]
    tower = family.vision(model)
    layers, head = family.language(model)
    groups: dict[str, list[torch.Tensor]] = {"vision": [], "decoder": [], "embedding": [table], "unused": []}
    owners = [("vision", tower.parameters()), ("decoder", layers.parameters()), ("decoder", head.parameters())]
    owner = {id(p): name for name, parameters in owners for p in parameters}
    for name, parameter in names.items():
        if family.is_unused(config, name):
            groups["unused"].append(parameter)
        elif parameter is not table:
            groups[owner[id(parameter)]].append(parameter)
    tied = any(parameter is table for parameter in head.parameters())
    parts = {name: _part(group, dtype) for name, group in groups.items()}
    for name, ratio in (("vision", VISION_ENGINE), ("decoder", DECODER_ENGINE)):
        group = [*groups[name], table] if tied and name == "decoder" else groups[name]
        size = _part(group, dtype).bytes
        parts[name] = parts[name].model_copy(
            update={"bytes": size, "file_bytes": _laid_out(group, dtype), "engine_bytes": int(ratio * size)}
        )
    parts["embedding"] = parts["embedding"].model_copy(
        update={"file_bytes": HEADER + parts["embedding"].bytes, "engine_bytes": 0}
    )
    return parts


def _part(group: list[torch.Tensor], dtype: FloatType) -> Part:
    count = sum(parameter.numel() for parameter in group)
    return Part(parameters=count, bytes=count * ITEMSIZE[dtype])


def _laid_out(group: list[torch.Tensor], dtype: FloatType) -> int:
    """Bytes of a data file with these tensors; which of them is last, and so unpadded, is not known before a trace."""
    sources = (StoredTensor("", Path(), 0, dtype, tuple(parameter.shape)) for parameter in group)
    placed = weights.place((("", source, False) for source in sources), dtype)
    return placed[-1].offset + placed[-1].nbytes if placed else 0


def _check(options: PlanOptions, spec: ModelSpec) -> None:
    for budget in options.budgets:
        if not 0 < budget <= spec.num_image_tokens:
            raise SelectionError(
                f"--budget {budget}: expected 1 to {spec.num_image_tokens} (this model's image tokens), or all"
            )
    if options.max_seq is not None and not 1 < options.max_seq <= spec.max_seq:
        raise FlashVLMError(
            f"--max-seq {options.max_seq}: expected 2 to {spec.max_seq}, the model's max_position_embeddings"
        )
    if options.max_batch < 1:
        raise FlashVLMError(f"--max-batch {options.max_batch}: expected at least 1")


# --- activations: the formulas above -------------------------------------------------------------------------------


def _decoder_activations(text: Any, spec: ModelSpec, item: int, tokens: int, rows: int, dialect: str) -> int:
    heads, groups, size = text.num_attention_heads, spec.num_key_value_heads, spec.head_dim
    seen = rows + tokens if dialect == "legacy" else rows
    attention = item * (2 * tokens * (heads + 2 * groups) * size + tokens * heads * size)
    if dialect == "legacy":
        attention += 2 * heads * tokens * seen * 4 + item * 2 * groups * seen * size
    mlp = item * 3 * tokens * text.intermediate_size
    fixed = item * (2 * tokens * spec.hidden_size + tokens * seen) + (item + 4) * spec.vocab_size
    return fixed + max(attention, mlp)


def _vision_activations(tower: Any, item: int, dialect: str) -> int:
    tokens = (tower.image_size // tower.patch_size) ** 2 + 1  # and CLS
    width = tower.hidden_size
    attention = item * 4 * tokens * width
    if dialect == "legacy":
        attention += 2 * tower.num_attention_heads * tokens * tokens * 4
    pixels = 4 * 3 * tower.image_size**2
    return pixels + item * 2 * tokens * width + max(attention, item * 2 * tokens * tower.intermediate_size)


def _select_activations(spec: ModelSpec, width: int, query: int) -> int:
    n = spec.num_image_tokens
    return 4 * (n * spec.hidden_size + n * width + query * spec.hidden_size + 3 * n * n)
