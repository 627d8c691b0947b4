"""Small videos for tests, made with PyAV from seeded noise."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np


def scene(frames: int, size: tuple[int, int] = (32, 48), seed: int = 0) -> np.ndarray:
    """uint8 [T,H,W,3]: coarse noise, another in each frame."""
    coarse = np.random.default_rng(seed).integers(0, 256, (frames, size[0] // 8, size[1] // 8, 3), dtype=np.uint8)
    return coarse.repeat(8, axis=1).repeat(8, axis=2)


def write_clip(path: Path, frames: np.ndarray, fps: Fraction | int = 10, codec: str = "mpeg4", **more: Any) -> Path:
    """Encodes uint8 [T,H,W,3]; the container is that of the suffix."""
    import av

    with av.open(str(path), "w", **more) as container:
        stream = container.add_stream(codec, rate=fps)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def decoded(path: Path) -> list[np.ndarray]:
    """Every frame of a file, uint8 [H,W,3]."""
    import av

    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
