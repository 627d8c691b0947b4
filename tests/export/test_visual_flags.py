"""What flashvlm-export refuses of sizes, tiles, frames and scopes, before any work."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashvlm_export.cli.export import main
from refusals import assert_refused, run

FLAGS: list[tuple[list[str], tuple[str, ...]]] = [
    (["--image-size", "448"], ("--image-size 448: expected HEIGHTxWIDTH", "448x672")),
    (["--image-size", "28x28"], ("--image-size 28x28", "family llava has images of one size")),
    (["--max-tiles", "0"], ("--max-tiles 0: expected at least 1",)),
    (["--max-tiles", "2"], ("--max-tiles 2: family llava has no tiles",)),
    (["--frames", "8"], ("--frames 8: family llava has no videos",)),
    (["--budget-scope", "patch"], ("--budget-scope patch: expected image, tile, frame or video",)),
    (["--budget-scope", "image,tile"], ("expected image or tile, found both",)),
    (["--budget-scope", "tile"], ("--budget-scope tile: expected tiles in turn, found none",)),
]


@pytest.mark.parametrize(("flags", "expected"), FLAGS, ids=lambda value: " ".join(value))
def test_flags(flags: list[str], expected: tuple[str, ...], tiny_checkpoint: Path, tmp_path: Path) -> None:
    ran = run(main, "--model", tiny_checkpoint, "--out", tmp_path / "out", *["--budget", "4", *flags])
    assert_refused(ran, *expected)
    assert not [*tmp_path.iterdir()]
