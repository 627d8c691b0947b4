"""A checkpoint -> its model on the meta device, and what a manifest says of it. Refuses what does not fit together
before any work."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

from flashvlm.budget import ALL
from flashvlm.errors import CheckpointError, FlashVLMError, SelectionError
from flashvlm.graph_io import FloatType
from flashvlm.manifest import Dtypes, ModelSpec, SelectionSpec, fits_fused
from flashvlm.visual import VisualSpec, unshared
from flashvlm_export.checkpoint import Checkpoint, StoredTensor, describes_a_model, open_checkpoint
from flashvlm_export.dtypes import DTYPES
from flashvlm_export.families import family_of
from flashvlm_export.families.contract import Family, LanguageSpec
from flashvlm_export.graph.dialects import DIALECTS
from flashvlm_export.options import ExportOptions
from flashvlm_export.output import check_apart
from flashvlm_export.processor_files import load_processor, read_by_the_runtime, stop_tokens
from flashvlm_export.selection import METHODS


@dataclass(frozen=True)
class OpenModel:
    """config: the family's own. module: transformers' model. processor_files: by name, for the bundle. text_tokens: of
    the shortest question with one image."""

    checkpoint: Checkpoint
    family: Family
    config: Any
    module: nn.Module
    spec: ModelSpec
    visual: tuple[VisualSpec, ...]
    selection: SelectionSpec
    processor_files: dict[str, bytes]
    text_tokens: int


def open_model(options: ExportOptions) -> OpenModel:
    """Raises FlashVLMError for options or a checkpoint that cannot be exported."""
    if options.method not in METHODS:
        raise SelectionError(f"unknown method {options.method!r}; expected one of {', '.join(METHODS)}")
    METHODS[options.method].refuse_unread(options.params, lambda name: f"--{name.replace('_', '-')}")
    dialect = DIALECTS[options.dialect]
    if options.layout == "fused" and not dialect.cache_in_place:
        raise FlashVLMError(f"--layout fused writes its cache in place; --dialect {dialect.name} does not, use split")
    checkpoint = open_checkpoint(options.model, options.revision)
    check_apart(options.out, checkpoint.folder)
    family = family_of(checkpoint.config)
    dtype = _dtype(checkpoint) if options.dtype == "auto" else options.dtype
    dtypes = Dtypes(activations=dtype, weights=dtype, embeddings=options.embeddings_dtype or dtype)
    with describes_a_model(checkpoint.folder / "config.json"):
        config = family.read_config(checkpoint.config)
        config._attn_implementation = dialect.attention
        with torch.device("meta"):
            module = family.build(config, DTYPES[dtype].torch).eval()
        processor = load_processor(checkpoint)
        eos = stop_tokens(checkpoint, processor.tokenizer, family.language_section(checkpoint.config))
        spec = _model_spec(options, family.language_spec(config), dtypes, eos)
    with describes_a_model(checkpoint.folder / "preprocessor_config.json"):
        plain = family.visual_specs(config, processor.image, options.visual)
    visual = _scoped(plain, options.visual.scope)
    selection = _selection(options, spec, visual)
    files, text_tokens = read_by_the_runtime(processor, checkpoint.folder, spec.vocab_size, visual)
    _check_capacity(selection.budgets, spec, visual, text_tokens)
    return OpenModel(checkpoint, family, config, module, spec, visual, selection, files, text_tokens)


def _dtype(checkpoint: Checkpoint) -> FloatType:
    """The dtype most of the checkpoint's bytes are in."""
    sizes: dict[str, int] = {}
    for tensor in checkpoint.tensors.values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
    return cast(FloatType, max(sizes, key=sizes.__getitem__))


def _model_spec(options: ExportOptions, language: LanguageSpec, dtypes: Dtypes, eos: tuple[int, ...]) -> ModelSpec:
    limit = language.max_seq
    if options.max_seq is not None and not 1 < options.max_seq <= limit:
        raise FlashVLMError(f"--max-seq {options.max_seq}: expected 2 to {limit}, the model's max_position_embeddings")
    return ModelSpec(
        name=Path(options.model).name,
        dtypes=dtypes,
        hidden_size=language.hidden,
        num_layers=language.layers,
        num_key_value_heads=language.kv_heads,
        head_dim=language.head_dim,
        vocab_size=language.vocab,
        max_seq=options.max_seq or limit,
        eos_token_ids=eos,
        position_axes=language.position_axes,
        streams=dict(language.streams),
        cache_in_place=DIALECTS[options.dialect].cache_in_place,
    )


def _scoped(visual: Sequence[VisualSpec], scope: Collection[Literal["tile", "frame"]]) -> tuple[VisualSpec, ...]:
    """The specs with the scope of a budget that was asked for; one of each word has to be there."""
    units: dict[str, Literal["tile", "frame"]] = {"image": "tile", "video": "frame"}
    for word in scope:
        fits = [spec for spec in visual if units[spec.modality] == word and spec.tiled]
        if not fits or any(spec.order == "anyres" for spec in fits):
            found = "rows over all tiles" if fits else "none"
            raise FlashVLMError(f"--budget-scope {word}: expected {word}s in turn, found {found}; leave it out")
    return tuple(
        VisualSpec.model_validate({**spec.model_dump(), "scope": "unit"}) if units[spec.modality] in scope else spec
        for spec in visual
    )


def _selection(options: ExportOptions, model: ModelSpec, visual: Sequence[VisualSpec]) -> SelectionSpec:
    counts = {spec.candidates for spec in visual}
    check_budgets(options.budgets, max(counts))
    for spec in visual:
        if (problem := unshared(spec, options.budgets)) is not None:
            raise SelectionError(f"--budget: {problem}; ask for more, or use --budget-scope {spec.modality}")
    if METHODS[options.method].keeps_all and options.budgets and {*options.budgets} != counts:
        raise SelectionError(f"--method {options.method} keeps every token; use --budget all, not {options.budgets[0]}")
    positions: Literal["renumber", "keep"] = options.positions or ("renumber" if model.position_axes == 1 else "keep")
    if positions == "renumber" and model.position_axes > 1:
        raise FlashVLMError(
            f"--positions renumber: this model's positions have {model.position_axes} axes, on which tokens keep "
            f"their places; use --positions keep"
        )
    if options.layout == "fused" and not fits_fused(model, visual):
        raise FlashVLMError("--layout fused takes one image in one piece, and this model's are not; use --layout split")
    return SelectionSpec(
        method=options.method,
        query=options.query,
        positions=positions,
        score=METHODS[options.method].score,
        budgets=options.budgets,
        default=options.default if options.default is not None else options.budgets[0] if options.budgets else ALL,
        params=METHODS[options.method].values(options.params),
    )


def check_budgets(budgets: Sequence[int], candidates: int) -> None:
    """Raises SelectionError for one that is not 1 to ``candidates``."""
    for budget in budgets:
        if not 0 < budget <= candidates:
            raise SelectionError(f"--budget {budget}: expected 1 to {candidates} (this model's image tokens), or all")


def _check_capacity(budgets: Sequence[int], model: ModelSpec, visual: Sequence[VisualSpec], text_tokens: int) -> None:
    image_tokens = max(budgets, default=max(spec.candidates for spec in visual))
    if model.max_seq < image_tokens + text_tokens:
        raise FlashVLMError(
            f"--max-seq {model.max_seq} is too small: {image_tokens} image tokens and the shortest question need "
            f"{image_tokens + text_tokens}; raise it, or lower --budget"
        )


# --- the checkpoint's tensors ----------------------------------------------------------------------------------------


def match_tensors(family: Family, module: nn.Module, checkpoint: Checkpoint, config: Any) -> dict[str, StoredTensor]:
    """Pairs every parameter of the model with the checkpoint tensor that holds it, by transformers' module path.

    Raises:
        CheckpointError: a tensor is missing, extra, doubled or of another shape.
    """
    expected = {name: tuple(parameter.shape) for name, parameter in module.named_parameters(remove_duplicate=False)}
    found: dict[str, StoredTensor] = {}
    for tensor in checkpoint.tensors.values():
        name = family.canonical_name(tensor.name)
        if name is None:
            continue
        if name not in expected:
            raise CheckpointError(
                f"{checkpoint.name}: tensor {tensor.name} is not part of this model; expected no extra tensors"
            )
        if name in found:
            raise CheckpointError(
                f"{checkpoint.name}: {tensor.name} and {found[name].name} are the same parameter {name}"
            )
        if tensor.shape != expected[name]:
            raise CheckpointError(
                f"{checkpoint.name}: {tensor.name} is {list(tensor.shape)}; config.json says {list(expected[name])}"
            )
        found[name] = tensor
    head, table = family.tied_head(config), family.embedding_name(config)
    if head is not None and table in found:
        found.setdefault(head, found[table])
    for name in expected:
        if name not in found:
            raise CheckpointError(f"{checkpoint.name}: tensor {name} is missing from the checkpoint; download it again")
    return found


def check_unused(model: OpenModel, source: dict[str, StoredTensor], used: set[str]) -> tuple[str, ...]:
    """Names of the checkpoint's tensors that no graph reads; each is one that the family says feeds none."""
    unused = [(name, tensor.name) for name, tensor in source.items() if tensor.name not in used]
    for name, _ in unused:
        if not model.family.is_unused(model.config, name):
            raise AssertionError(f"{name} is in no graph and family {model.family.NAME} does not list it as unused")
    return tuple(sorted(stored for _, stored in unused))
