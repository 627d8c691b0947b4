"""What a selection method is: what it chooses from and by, what it returns, and what others may ask of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple, TypeAlias

from torch import Tensor

from flashvlm.errors import SelectionError


@dataclass(frozen=True)
class SelectionParams:
    """The constants of a method; they are baked into the exported graph.

    Args:
        eta: weight of the question against saliency, 0 to 1.
        pool_temperature: softness of the pooling of a token's similarities over the question's tokens; the methods
            of other authors have their own.
        temperature: sharpness of relevance when it is fused with saliency; flashvlm-published has its own.
        eps: floor of normalised saliency and of sharpened relevance.
        top_ratio: share of the budget that goes to the best scores; the rest represents the background.
        iterations: Lloyd iterations of the background partition.
        seed: of the method ``random``.
        partition_space: partition the background over ``features`` or over ``projected`` tokens.

    Raises:
        SelectionError: a value is outside its range.
    """

    eta: float = 0.5
    pool_temperature: float = 1.0
    temperature: float = 0.016
    eps: float = 1e-6
    top_ratio: float = 0.5
    iterations: int = 4
    seed: int = 0
    partition_space: str = "features"

    def __post_init__(self) -> None:
        self._check_number("eta", 0.0, 1.0)
        self._check_number("pool_temperature", 1e-6, 1e6)
        self._check_number("temperature", 1e-6, 1e6)
        self._check_number("eps", 1e-30, 0.5)
        self._check_number("top_ratio", 0.0, 1.0)
        self._check_number("iterations", 0, 100)
        self._check_number("seed", 0, 2**63 - 1)
        if self.partition_space not in ("features", "projected"):
            raise SelectionError(f"partition_space: expected 'features' or 'projected', found {self.partition_space!r}")

    def _check_number(self, name: str, low: float, high: float) -> None:
        """An integer range asks for an integer; a float range takes either. NaN fails every comparison."""
        value = getattr(self, name)
        wanted, kind = (int, "an integer") if isinstance(low, int) else ((int, float), "a number")
        if isinstance(value, bool) or not isinstance(value, wanted) or not low <= value <= high:
            raise SelectionError(f"{name}: expected {kind} from {low:g} to {high:g}, found {value!r}")


class SelectionInputs(NamedTuple):
    """What a method chooses from. Any float dtype; masks are bool."""

    projected: Tensor  # [B, N, D] visual tokens in the language model's embedding space
    features: Tensor  # [B, N, Dv] the same tokens in the vision tower
    saliency: Tensor  # [B, N] question-free importance, any scale
    query: Tensor  # [B, L, D] embeddings of the question's tokens
    query_mask: Tensor  # [B, L] bool, False for padding
    valid: Tensor  # [B, N] bool, False for padding


class Selection(NamedTuple):
    """What a method chose."""

    visual_embeds: Tensor  # [B, K, D] in the dtype of projected
    kept: Tensor  # [B, K] int64, ascending, distinct
    is_top: Tensor  # [B, K] bool: chosen by score, not for diversity
    scores: Tensor  # [B, N] float32, finite; zeros where the method has no score


Scalar: TypeAlias = float | Tensor
# (projected, query, query_mask, saliency, valid, eta, temperature, pool_temperature, eps) -> scores
ScoreFn: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Scalar, Scalar, Scalar, Scalar], Tensor]
# (features, scores, valid, budget, top_count, iterations) -> kept, is_top
LloydFn: TypeAlias = Callable[[Tensor, Tensor, Tensor, int, int, int], tuple[Tensor, Tensor]]


class Nodes(NamedTuple):
    """The two parts that a graph may hold as one node each: the torch functions, or stand-ins that emit the node."""

    score: ScoreFn  # text_guided_score
    lloyd: LloydFn  # masked_lloyd


INPUTS = ("projected", "features", "saliency", "query")  # what a method may decide by
Choose: TypeAlias = Callable[[SelectionInputs, int, SelectionParams, Nodes], Selection]


@dataclass(frozen=True)
class Method:
    """A method's entry in the registry.

    Args:
        name: as in ``--method`` and in manifests.
        choose: (inputs, budget, params, nodes) -> Selection. Traceable, static shapes, float32, batch in dimension 0,
            exactly K distinct ascending indices for every input.
        summary: one line, what it keeps.
        paper: arXiv number, None for a method without one.
        reads: which of INPUTS decide what it keeps or merges. The tokens themselves are of ``projected`` in any case,
            and valid is read by all.
        params: which fields of SelectionParams it reads; any other is refused.
        score: what ``Selection.scores`` is: a logarithm, a difference of cosines from the best, or None (zeros).
        fused: score and choice are the nodes TextGuidedScore and MaskedLloyd in a graph, which the plugins compute.
        stable: rounding does not move its choice; False where what is not chosen by score hangs on the last bit of a
            float32, so that torch, ONNX Runtime and TensorRT may differ in it.
        keeps_all: returns every token, whatever the budget.
    """

    name: str
    choose: Choose
    summary: str
    paper: str | None = None
    reads: frozenset[str] = frozenset()
    params: tuple[str, ...] = ()
    score: Literal["log", "cosine"] | None = None
    fused: bool = False
    stable: bool = True
    keeps_all: bool = False

    def values(self, params: SelectionParams) -> dict[str, float | int | str]:
        """What this method reads of the parameters, by name."""
        return {name: getattr(params, name) for name in self.params}

    def reads_saliency(self, params: SelectionParams) -> bool:
        """Whether saliency decides anything: not where the question alone does."""
        return "saliency" in self.reads and not ("eta" in self.params and params.eta == 1)

    def refuse_unread(self, params: SelectionParams, spell: Callable[[str], str] = str) -> None:
        """Refuses parameters that were changed for nothing.

        Args:
            spell: how the user wrote a parameter's name.

        Raises:
            SelectionError: a parameter that the method does not read is not at its default.
        """
        for field in fields(params):
            if field.name not in self.params and getattr(params, field.name) != field.default:
                reads = ", ".join(map(spell, self.params)) or "none"
                raise SelectionError(
                    f"{spell(field.name)} is not a parameter of {self.name}, which reads {reads}; leave it out"
                )
