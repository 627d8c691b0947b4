"""What is compared: every row is a method with its parameters, and a name that stands in tables and files."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from quality.experimental import RELEVANCE, REST

REFERENCE = "flashvlm"
RIVALS = (REFERENCE, "flashvlm-published", "vispruner", "cdpruner")  # what a candidate is compared with
OFFERED = "flashvlm-contrast"  # the candidate that became a method
ALL_TOKENS = "none"
DOWNSAMPLED, POOLED = "downsampled", "pooled"
SCOPES = ("query", "positions")  # options of an export that are not in SelectionParams


@dataclass(frozen=True)
class Variant:
    """A method with everything that decides its choice.

    name       as in tables
    method     a key of selection.METHODS, of the experimental ones, ``pooled`` or ``downsampled``
    params     what differs from SelectionParams()
    query      text that guides the selection: question or prompt
    positions  position ids of kept tokens: renumber or keep
    """

    name: str
    method: str
    params: dict[str, Any] = field(default_factory=dict)
    query: str = "question"
    positions: str = "renumber"

    def tokens(self, budget: int) -> int:
        """How many tokens the language model gets: resolutions come in squares only."""
        if self.method not in (DOWNSAMPLED, POOLED):
            return budget
        return min(range(1, budget + 2), key=lambda side: abs(side * side - budget)) ** 2


EVERYTHING = Variant(ALL_TOKENS, ALL_TOKENS)
METHODS = (
    Variant(REFERENCE, "flashvlm"),
    Variant(OFFERED, OFFERED),
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
    "rest": ("lloyd", "bipartite"),
    "start": ("even", "random", "scored", "farthest"),
}
OTHER_DEFAULTS = {"query": "question", "positions": "renumber", "rest": "lloyd", "start": "even"}

# One part of flashvlm replaced at a time; combinations come by name, such as idf+merge:temperature=0.002:eta=0.75
EXPERIMENTS = (
    *(f"{relevance}+lloyd" for relevance in RELEVANCE if relevance not in ("pooled", "peak")),
    *(f"pooled+{rest}" for rest in REST if rest in ("merge", "merge-all", "spread", "coverage", "quota")),
    *(f"peak+{rest}" for rest in REST if rest in ("lloyd-farthest", "spread", "coverage", "dpp")),
)


def defaults() -> dict[str, Any]:
    """The default of every parameter of GRIDS."""
    from dataclasses import asdict

    from flashvlm_export.selection.flashvlm import SelectionParams

    return {**asdict(SelectionParams()), **OTHER_DEFAULTS}


def ablation(parameter: str, value: Any) -> Variant:
    """flashvlm with one thing changed; flashvlm itself where the value is the default."""
    name = f"{parameter}={value}"
    if value == defaults()[parameter]:
        return METHODS[0]
    if parameter in SCOPES:
        return Variant(name, "flashvlm", **{parameter: value})
    if parameter in ("rest", "start"):
        return Variant(name, f"pooled+{value}" if parameter == "rest" else f"pooled+lloyd-{value}")
    return Variant(name, "flashvlm", {parameter: value})


def known_names() -> set[str]:
    """The variants that have a table of their own: methods and ablations."""
    return {variant.name for variant in (EVERYTHING, *METHODS, *_ablations())}


def _ablations() -> list[Variant]:
    return [ablation(parameter, value) for parameter, values in GRIDS.items() for value in values]


def parse(text: str) -> list[Variant]:
    """``methods``, ``ablations``, ``experimental``, ``all``, or names: flashvlm, eta=0.25, idf+merge:eta=0.75.

    Raises:
        ValueError: a name nothing is known by.
    """
    found: list[Variant] = []
    for part in text.split(","):
        found += _group(part.strip())
    return list({variant.name: variant for variant in found}.values())


def _group(name: str) -> list[Variant]:
    grid = [variant for variant in _ablations() if variant not in METHODS]
    experiments = [_named(experiment) for experiment in EXPERIMENTS]
    groups = {"methods": list(METHODS), "ablations": grid, "experimental": experiments}
    groups["all"] = [variant for group in groups.values() for variant in group]
    return groups.get(name) or [
        next((v for v in (EVERYTHING, *METHODS, *grid) if v.name == name), None) or _named(name)
    ]


def _named(text: str) -> Variant:
    """A method and, each after a colon, parameters."""
    from flashvlm_export.selection.flashvlm import METHODS as EXPORTED

    method, *given = text.split(":")
    relevance, _, rest = method.partition("+")
    if method not in EXPORTED and (relevance not in RELEVANCE or rest not in REST):
        raise ValueError(
            f"unknown variant {text!r}; expected methods, ablations, experimental, all, one of "
            f"{', '.join(v.name for v in METHODS)}, or RELEVANCE+REST of {', '.join(RELEVANCE)} and {', '.join(REST)}"
        )
    known, params, scopes = defaults(), {}, {}
    for pair in given:
        name, _, value = pair.partition("=")
        if name not in known or name in ("rest", "start"):
            raise ValueError(f"unknown parameter {name!r} in {text!r}; expected one of {', '.join(known)}")
        try:
            (scopes if name in SCOPES else params)[name] = type(known[name])(value)
        except ValueError:
            raise ValueError(
                f"{name} in {text!r}: expected a value such as {name}={known[name]}, found {pair!r}"
            ) from None
    return Variant(text, method, params, **scopes)
