"""Memory of a model at each budget, from its ``config.json`` alone: no download, no weights, no trace.

Parameters are counted on transformers' own model, built on the meta device, and laid out as an export lays them out.
Activations are an estimate (``costs.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from flashvlm.errors import CheckpointError, FlashVLMError
from flashvlm.graph_io import DialectName, FloatType
from flashvlm.profiling.measure import allocated_rows
from flashvlm_export.checkpoint import StoredTensor, describes_a_model, find_config
from flashvlm_export.costs import Costs
from flashvlm_export.dtypes import DTYPES, STORED_FLOATS
from flashvlm_export.families import aliases, configs, family_of
from flashvlm_export.families.contract import Family, LanguageSpec, VisualOptions
from flashvlm_export.graph.dialects import DIALECTS
from flashvlm_export.opening import check_budgets
from flashvlm_export.weights.layout import ALIGNMENT, Layout
from flashvlm_export.weights.recipes import plain

# docs/measurements.md, "Engines": bytes of an engine for each byte of its weights, and of memory while building it.
VISION_ENGINE, DECODER_ENGINE = 1.01, 1.002
SELECT_ENGINE = 4_000_000
BUILD_PEAK, BUILD_ANONYMOUS = 3.1, 2.05
HEADER = ALIGNMENT  # of the embedding table's file


@dataclass(frozen=True)
class PlanOptions:
    """What ``flashvlm-export --plan`` takes.

    text_tokens, new_tokens: of the prompt beside the image, and of the answer. max_seq: None for as many rows as each
    budget needs, rounded up as the runtime does.
    """

    model: str
    budgets: tuple[int, ...] = (64,)
    dtype: Literal["auto"] | FloatType = "auto"
    max_seq: int | None = None
    max_batch: int = 1
    dialect: DialectName = "modern"
    text_tokens: int = 40
    new_tokens: int = 64
    revision: str | None = None
    visual: VisualOptions = field(default_factory=VisualOptions)


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
    dialect: DialectName
    max_batch: int
    text_tokens: int
    new_tokens: int
    candidates: int
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

    Example:
        >>> plan(PlanOptions("llava-1.5-7b", (64, 128), dtype="float16")).budgets[0].device_total
    """
    config_dict, where = _config(options)
    family = family_of(config_dict)
    dtype = _dtype(options, family, config_dict, where)
    with describes_a_model(Path(where)):
        config = family.read_config(config_dict)
        with torch.device("meta"):
            module = family.build(config, DTYPES[dtype].torch).eval()
        language, towers = family.language_spec(config), family.tower_specs(config, options.visual)
    candidates = max(tower.candidates for tower in towers)
    _check(options, language, candidates)
    parts = _parts(family, config, module, dtype, len(towers))
    vision, decoder, embedding = parts["vision"], parts["decoder"], parts["embedding"]
    selects = sum(budget <= tower.candidates for tower in towers for budget in options.budgets)
    engines = (vision.engine_bytes or 0) + (decoder.engine_bytes or 0) + SELECT_ENGINE * selects
    head = 0 if family.tied_head(config) else language.vocab * language.hidden
    body = decoder.parameters - head
    cost = Costs(language, towers, body, DTYPES[dtype].size, DIALECTS[options.dialect])
    kv_token = cost.kv_token
    return Plan(
        model=options.model,
        dtype=dtype,
        dialect=options.dialect,
        max_batch=options.max_batch,
        text_tokens=options.text_tokens,
        new_tokens=options.new_tokens,
        candidates=candidates,
        parameters=sum(part.parameters for part in parts.values()),
        parts=parts,
        bundle_bytes=sum(part.file_bytes or 0 for part in parts.values()),
        engine_bytes=engines,
        build_peak_bytes=int(BUILD_PEAK * decoder.bytes),
        build_anonymous_bytes=int(BUILD_ANONYMOUS * decoder.bytes),
        host_bytes=embedding.bytes,
        kv=KVCache(
            bytes_per_token=kv_token, max_positions=language.max_seq, bytes_at_max_positions=kv_token * language.max_seq
        ),
        budgets=tuple(_budget(options, cost, budget, candidates, engines) for budget in (*options.budgets, None)),
    )


def _budget(options: PlanOptions, cost: Costs, budget: int | None, candidates: int, engines: int) -> BudgetPlan:
    batch, language = options.max_batch, cost.language
    prompt = (budget or candidates) + options.text_tokens
    rows = prompt + options.new_tokens - 1  # the last new token needs none
    capacity = options.max_seq or min(allocated_rows(prompt, options.new_tokens), language.max_seq)
    if rows > capacity:
        asked = f"--max-seq {options.max_seq}" if options.max_seq else f"the model's {capacity} positions"
        raise FlashVLMError(
            f"{asked}: budget {budget or 'all'} needs {rows} rows for {options.text_tokens} tokens of text and "
            f"{options.new_tokens} of answer; plan for fewer, or raise --max-seq"
        )
    kv = batch * cost.kv_token * capacity
    held = batch * (cost.decoder(capacity, capacity) + cost.vision())
    held += batch * cost.select(options.text_tokens) if budget else 0
    return BudgetPlan(
        budget=budget or "all",
        prompt_tokens=prompt,
        rows=rows,
        kv_used=batch * cost.kv_token * rows,
        capacity=capacity,
        kv_capacity=kv,
        activations=batch * cost.decoder(prompt, capacity),
        engine_activations=held,
        device_total=engines + kv + held,
        prefill_flops=cost.flops(prompt),
        prefill_share=cost.flops(prompt) / cost.flops(candidates + options.text_tokens),
    )


# --- the model -----------------------------------------------------------------------------------------------------


def _config(options: PlanOptions) -> tuple[dict[str, Any], str]:
    """config.json as a dict, and where it is from; a short name's own unless a folder has that name."""
    model, known = options.model, configs()
    if model in known and options.revision is None and not Path(model).is_dir():
        return known[model], f"the configuration of {aliases().get(model, model)}"
    path, config = find_config(model, options.revision)
    return config, str(path)


def _dtype(options: PlanOptions, family: Family, config: dict[str, Any], where: str) -> FloatType:
    if options.dtype != "auto":
        return options.dtype
    for section in (config, family.language_section(config)):
        for key in ("dtype", "torch_dtype"):
            if (dtype := section.get(key)) in STORED_FLOATS.values():
                return cast(FloatType, dtype)
    raise CheckpointError(f"{where} names no dtype; plan with --dtype float16, bfloat16 or float32")


def _parts(family: Family, config: Any, model: nn.Module, dtype: FloatType, towers: int) -> dict[str, Part]:
    """Where each parameter goes, as the exporter places them. A tied table is in its file, which the decoder reads."""
    names = dict(model.named_parameters())
    table = names[family.embedding_name(config)]
    layers, head = family.language(model)
    decoder = {id(parameter) for module in (layers, head) for parameter in module.parameters()}
    groups: dict[str, dict[str, torch.Tensor]] = {"vision": {}, "decoder": {}, "embedding": {}, "unused": {}}
    for name, parameter in names.items():
        group = "embedding" if parameter is table else "decoder" if id(parameter) in decoder else "vision"
        groups["unused" if family.is_unused(config, name) else group][name] = parameter
    if (tied := family.tied_head(config)) is not None:
        groups["decoder"].pop(tied, None)
    parts = {name: _part(group, dtype) for name, group in groups.items()}
    # Vision graphs share a file of weights, their engines do not.
    for name, ratio in (("vision", towers * VISION_ENGINE), ("decoder", DECODER_ENGINE)):
        # An engine has a copy of its own of a table that it shares with the embeddings.
        size = parts[name].bytes + (parts["embedding"].bytes if tied and name == "decoder" else 0)
        parts[name] = parts[name].model_copy(
            update={"bytes": size, "file_bytes": _laid_out(groups[name], dtype), "engine_bytes": int(ratio * size)}
        )
    parts["embedding"] = parts["embedding"].model_copy(
        update={"file_bytes": HEADER + parts["embedding"].bytes, "engine_bytes": 0}
    )
    return parts


def _part(group: Mapping[str, torch.Tensor], dtype: FloatType) -> Part:
    count = sum(parameter.numel() for parameter in group.values())
    return Part(parameters=count, bytes=count * DTYPES[dtype].size)


def _laid_out(group: Mapping[str, torch.Tensor], dtype: FloatType) -> int:
    """Bytes of a data file with these tensors; which of them is last, and so unpadded, is not known before a trace."""
    layout = Layout()
    layout.add(
        "", {name: plain(StoredTensor(name, Path(), 0, dtype, tuple(t.shape)), dtype) for name, t in group.items()}
    )
    return layout.nbytes


def _check(options: PlanOptions, language: LanguageSpec, candidates: int) -> None:
    check_budgets(options.budgets, candidates)
    if options.max_seq is not None and not 1 < options.max_seq <= language.max_seq:
        raise FlashVLMError(
            f"--max-seq {options.max_seq}: expected 2 to {language.max_seq}, the model's max_position_embeddings"
        )
    if options.max_batch < 1:
        raise FlashVLMError(f"--max-batch {options.max_batch}: expected at least 1")
