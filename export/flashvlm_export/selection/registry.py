"""Every selection method by name, and the one function that runs any of them on checked inputs.

    selection = select(projected, features, saliency, query, method="flashvlm", budget=64)

To add a method, see "How to add a selection method" in CONTRIBUTING.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashvlm.errors import SelectionError
from flashvlm_export.selection import (
    cdpruner,
    divprune,
    flashvlm,
    flashvlm_contrast,
    flashvlm_published,
    none,
    random,
    trim,
    uniform,
    visionzip,
    vispruner,
)
from flashvlm_export.selection.method import Method, Nodes, Selection, SelectionInputs, SelectionParams
from flashvlm_export.selection.score import text_guided_score

# In the order in which they are listed to users.
_MODULES = (
    flashvlm,
    flashvlm_contrast,
    flashvlm_published,
    vispruner,
    divprune,
    cdpruner,
    visionzip,
    trim,
    uniform,
    random,
    none,
)

METHODS: dict[str, Method] = {module.METHOD.name: module.METHOD for module in _MODULES}

TORCH = Nodes(text_guided_score, flashvlm.masked_lloyd)

AXES: dict[str, tuple[str, ...]] = {
    "projected": ("B", "N", "D"),
    "features": ("B", "N", "Dv"),
    "saliency": ("B", "N"),
    "query": ("B", "L", "D"),
    "query_mask": ("B", "L"),
    "valid": ("B", "N"),
}


def select(
    projected: Tensor,
    features: Tensor,
    saliency: Tensor,
    query: Tensor,
    query_mask: Tensor | None = None,
    valid: Tensor | None = None,
    *,
    method: str = "flashvlm",
    budget: int = 64,
    params: SelectionParams = SelectionParams(),  # noqa: B008 - frozen
    nodes: Nodes = TORCH,
) -> Selection:
    """Keep ``budget`` of the visual tokens of each batch item.

    Scores are float32 whatever the inputs are. Exactly ``budget`` distinct tokens come back for every input,
    and a row gives the same answer alone as in a batch. Only where a row has fewer valid tokens than budget
    are invalid ones among them.

    Args:
        projected: [B, N, D] float, visual tokens in the language model's embedding space.
        features: [B, N, Dv] float, the same tokens in the vision tower.
        saliency: [B, N] float, question-free importance, any scale.
        query: [B, L, D] float, embeddings of the question's tokens (whole prompt for flashvlm-published).
        query_mask: [B, L] bool, False for padding; all true when absent.
        valid: [B, N] bool, False for padding; all true when absent.
        method: a name in METHODS.
        budget: tokens to keep, 1 to N; ``none`` keeps all and ignores it.
        params: the constants of the method; those it does not read stay at their defaults.
        nodes: the torch functions, or stand-ins that emit one graph node each.

    Raises:
        SelectionError: unknown method, a parameter that it does not read, impossible budget, or an input of the wrong
            shape or dtype. Outside an export also an input that holds NaN or infinity in float32.
    """
    if method not in METHODS:
        raise SelectionError(f"method: expected one of {', '.join(METHODS)}; found {method!r}")
    entry = METHODS[method]
    entry.refuse_unread(params)
    given = dict(zip(AXES, (projected, features, saliency, query, query_mask, valid), strict=True))
    _check_shapes({name: tensor for name, tensor in given.items() if tensor is not None})
    if query_mask is None:
        query_mask = torch.ones(query.shape[:2], dtype=torch.bool, device=query.device)
    if valid is None:
        valid = torch.ones(saliency.shape, dtype=torch.bool, device=saliency.device)
    inputs = SelectionInputs(projected, features, saliency, query, query_mask, valid)
    if not entry.keeps_all:
        _check_budget(budget, saliency.shape[1])
    if not torch.compiler.is_exporting():  # a traced graph has no values to look at
        _check_finite(inputs)
    return entry.choose(inputs, budget, params, nodes)


def _check_budget(budget: object, tokens: int) -> None:
    if isinstance(budget, bool) or not isinstance(budget, int) or not 1 <= budget <= tokens:
        raise SelectionError(
            f"budget: expected an integer from 1 to {tokens}, the number of visual tokens, found {budget!r}; "
            "method 'none' keeps all of them"
        )


def _check_shapes(given: dict[str, Tensor]) -> None:
    """One name of an axis stands for one size in all inputs."""
    sizes: dict[str, int] = {}
    for name, tensor in given.items():
        axes = AXES[name]
        named = f"[{', '.join(axes)}]"
        if name in ("query_mask", "valid"):
            if tensor.dtype != torch.bool:
                raise SelectionError(f"{name}: expected torch.bool, found {tensor.dtype}; convert it by .bool()")
        elif not tensor.is_floating_point():
            raise SelectionError(f"{name}: expected a float dtype, found {tensor.dtype}; convert it by .float()")
        if tensor.dim() != len(axes):
            raise SelectionError(
                f"{name}: expected {named}, found {list(tensor.shape)}; add the batch dimension by [None]"
            )
        for axis, size in zip(axes, tensor.shape, strict=True):
            if sizes.setdefault(axis, size) != size:
                raise SelectionError(
                    f"{name}: expected {named} with {axis} = {sizes[axis]} as in the inputs before it, "
                    f"found {list(tensor.shape)}"
                )
    if sizes["N"] == 0:
        raise SelectionError("projected: expected at least one visual token, found none; is the image empty?")


def _check_finite(inputs: SelectionInputs) -> None:
    for name, tensor in inputs._asdict().items():
        if not tensor.float().isfinite().all():
            raise SelectionError(
                f"{name}: expected finite values in float32, found NaN or infinity; "
                "a model that overflows in float16 needs bfloat16 or float32"
            )
