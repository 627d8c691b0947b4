"""What LLaVA-NeXT and its descendants share: canvases that an image is put on, and rows over their tiles."""

from __future__ import annotations

from typing import Any

from flashvlm.errors import CheckpointError, FlashVLMError, brief

Canvases = tuple[tuple[int, int], ...]  # rows and columns of tiles


def check_pinpoints(config: Any) -> None:
    """Raises CheckpointError for canvases that are no tiles of the tower, or too many."""
    side, pinpoints = config.vision_config.image_size, config.image_grid_pinpoints
    if not 1 <= len(pinpoints) <= 64:
        raise CheckpointError(f"config.json: image_grid_pinpoints has {len(pinpoints):,} sizes; expected 1 to 64")
    for pair in pinpoints:
        if not (isinstance(pair, list) and len(pair) == 2 and all(_is_edge(edge, side) for edge in pair)):
            raise CheckpointError(
                f"config.json: image_grid_pinpoints has {brief(pair)}; expected [height, width] in multiples of "
                f"the tower's {side} pixels"
            )


def _is_edge(edge: Any, side: int) -> bool:
    return isinstance(edge, int) and 0 < edge <= 4096 and edge % side == 0


def canvases(config: Any, most: int | None) -> Canvases:
    """Those of at most ``most`` tiles. Raises FlashVLMError if there is none."""
    side = config.vision_config.image_size
    every = [(height // side, width // side) for height, width in config.image_grid_pinpoints]
    allowed = tuple((rows, columns) for rows, columns in every if most is None or rows * columns <= most)
    if not allowed:
        fewest = min(rows * columns for rows, columns in every)
        raise FlashVLMError(f"--max-tiles {most}: expected {fewest} or more, the tiles of this model's smallest canvas")
    return allowed


def units(canvases: Canvases) -> int:
    """Tiles of the largest image, and its thumbnail."""
    return 1 + max(rows * columns for rows, columns in canvases)


def candidates(canvases: Canvases, side: int) -> int:
    """Visual tokens of the largest image: its thumbnail's, and those of its canvas with a newline for each row.
    ``side``: of a tile, in tokens."""
    return side * side + max(rows * side * (columns * side + 1) for rows, columns in canvases)


def pinpoints(config: Any, canvases: Canvases) -> Canvases:
    """The same in pixels: height and width."""
    side = config.vision_config.image_size
    return tuple((rows * side, columns * side) for rows, columns in canvases)


def check_processor(processor: Any, config: Any, *names: str) -> None:
    """Raises CheckpointError unless it cuts images as the model reads them; ``names``: settings that are a size."""
    side = config.vision_config.image_size
    for name in names:
        found = dict(getattr(processor, name) or {})
        if {found[key] for key in ("shortest_edge", "height", "width") if found.get(key) is not None} != {side}:
            raise CheckpointError(
                f"preprocessor_config.json: {name} is {found}; the vision tower takes {side} x {side}"
            )
    theirs = [list(pair) for pair in processor.image_grid_pinpoints]
    if theirs != config.image_grid_pinpoints:
        raise CheckpointError(
            f"preprocessor_config.json: image_grid_pinpoints is {theirs}; config.json has {config.image_grid_pinpoints}"
        )
