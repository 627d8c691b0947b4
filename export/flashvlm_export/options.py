"""What an export takes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from flashvlm.budget import Budget
from flashvlm.graph_io import DialectName, FloatType
from flashvlm_export.families.contract import VisualOptions
from flashvlm_export.selection import SelectionParams


@dataclass(frozen=True)
class ExportOptions:
    """What ``flashvlm-export`` takes.

    budgets           may be empty: every bundle answers with all tokens too
    default           budget of a question that names none; None: the first, or all where there is none
    positions         of kept tokens; None: as at their places in a model of several position axes, else anew
    dtype             of weights and activations; auto: that of most of the checkpoint
    embeddings_dtype  of the embedding table; None: as ``dtype``
    max_seq           KV slots; None: every position the model was made for
    """

    model: str
    out: Path
    budgets: tuple[int, ...] = (64,)
    default: Budget | None = None
    method: str = "flashvlm"
    params: SelectionParams = field(default_factory=SelectionParams)
    query: Literal["question", "prompt"] = "question"
    positions: Literal["renumber", "keep"] | None = None
    dtype: Literal["auto"] | FloatType = "auto"
    embeddings_dtype: FloatType | None = None
    max_seq: int | None = None
    layout: Literal["split", "fused"] = "split"
    dialect: DialectName = "modern"
    visual: VisualOptions = field(default_factory=VisualOptions)
    revision: str | None = None
    force: bool = False
