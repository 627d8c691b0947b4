"""What is compared: every row is a method with its parameters, and a name that stands in tables and files."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

REFERENCE = "flashvlm"
ALL_TOKENS = "none"
DOWNSAMPLED, POOLED = "downsampled", "pooled"
SCOPES = ("query", "positions")  # options of an export that are not in SelectionParams


@dataclass(frozen=True)
class Variant:
    """A method with everything that decides its choice.

    name       as in tables
    method     a key of selection.METHODS, ``pooled`` or ``downsampled``
    params     what differs from SelectionParams()
    query      text that guides the selection: question or prompt
    positions  position ids of kept tokens: renumber or keep
    """

    name: str
    method: str
    params: dict[str, Any] = field(default_factory=dict)
    query: Literal["question", "prompt"] = "question"
    positions: Literal["renumber", "keep"] = "renumber"

    def tokens(self, budget: int) -> int:
        """How many tokens the language model gets: resolutions come in squares only."""
        if self.method not in (DOWNSAMPLED, POOLED):
            return budget
        return min(range(1, budget + 2), key=lambda side: abs(side * side - budget)) ** 2


EVERYTHING = Variant(ALL_TOKENS, ALL_TOKENS)
METHODS = (
    Variant(REFERENCE, "flashvlm"),
    Variant("flashvlm-contrast", "flashvlm-contrast"),
    Variant("flashvlm-published", "flashvlm-published", query="prompt"),
    Variant("vispruner", "vispruner"),
    Variant("cdpruner", "cdpruner"),
    Variant("trim", "trim"),
    Variant("divprune", "divprune"),
    Variant("visionzip", "visionzip"),
    Variant("uniform", "uniform"),
    Variant("random", "random"),
    Variant(POOLED, POOLED),
    Variant(DOWNSAMPLED, DOWNSAMPLED),
)

# Each varies one thing about the defaults; the default itself is the variant `flashvlm`.
GRIDS: dict[str, tuple[Any, ...]] = {
    "eta": (0.0, 0.25, 0.5, 0.75, 1.0),
    "temperature": (0.001, 0.004, 0.016, 0.064),
    "pool_temperature": (0.05, 0.2, 1.0, 1e6),  # 1e6 is the plain mean over the question's tokens
    "top_ratio": (0.0, 0.25, 0.5, 0.75, 1.0),
    "iterations": (0, 1, 2, 4, 8),
    "partition_space": ("features", "projected"),
    "query": ("question", "prompt"),
    "positions": ("renumber", "keep"),
}


def defaults() -> dict[str, Any]:
    """The default of every parameter of GRIDS."""
    from flashvlm_export.selection import SelectionParams

    return {**asdict(SelectionParams()), **{scope: getattr(EVERYTHING, scope) for scope in SCOPES}}


def ablation(parameter: str, value: Any) -> Variant:
    """flashvlm with one thing changed; flashvlm itself where the value is the default."""
    name = f"{parameter}={value}"
    if value == defaults()[parameter]:
        return METHODS[0]
    if parameter in SCOPES:
        return Variant(name, "flashvlm", **{parameter: value})
    return Variant(name, "flashvlm", {parameter: value})


def known_names() -> set[str]:
    """The variants that have a table of their own: methods and ablations."""
    return {variant.name for variant in (EVERYTHING, *METHODS, *_ablations())}


def _ablations() -> list[Variant]:
    return [ablation(parameter, value) for parameter, values in GRIDS.items() for value in values]


def parse(text: str) -> list[Variant]:
    """Groups and names between commas, each once: methods, ablations, all, or names such as flashvlm, eta=0.25,
    flashvlm:eta=0.75:query=prompt.

    Raises:
        ValueError: a name nothing is known by.
    """
    found: list[Variant] = []
    for part in text.split(","):
        found += _group(part.strip())
    return list({variant.name: variant for variant in found}.values())


def _group(name: str) -> list[Variant]:
    grid = [variant for variant in _ablations() if variant not in METHODS]
    groups = {"methods": list(METHODS), "ablations": grid, "all": [*METHODS, *grid]}
    return groups.get(name) or [
        next((v for v in (EVERYTHING, *METHODS, *grid) if v.name == name), None) or _named(name)
    ]


def _named(text: str) -> Variant:
    """A method and, each after a colon, parameters."""
    from flashvlm_export.selection import METHODS as EXPORTED

    method, *given = text.split(":")
    if method not in EXPORTED:
        names = ", ".join(v.name for v in METHODS)
        raise ValueError(f"unknown variant {text!r}; expected methods, ablations, all, or one of {names}")
    known = defaults()
    params: dict[str, Any] = {}
    scopes: dict[str, Any] = {}
    for pair in given:
        name, _, value = pair.partition("=")
        if name not in known:
            raise ValueError(f"unknown parameter {name!r} in {text!r}; expected one of {', '.join(known)}")
        try:
            (scopes if name in SCOPES else params)[name] = type(known[name])(value)
        except ValueError:
            raise ValueError(
                f"{name} in {text!r}: expected a value such as {name}={known[name]}, found {pair!r}"
            ) from None
    return Variant(text, method, params, **scopes)
