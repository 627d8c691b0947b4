"""An image with visual tokens painted on it: kept ones as they are, dropped ones gray, or all in the colour of a score.

A token is a box of the image; boxes may overlap, and where they do, the finest one is seen.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from flashvlm.drawing import Scale, ramp

# Of a longer strip only the part around what the model saw is shown: all of it would be a line.
MAX_ASPECT = 2.0

# Orange and sky blue of Okabe and Ito's palette: apart for every kind of colour vision, and bright on dark.
TOP, REPRESENTATIVE = (240, 150, 0), (86, 180, 233)
DROPPED, UNSEEN, HATCH = (84, 84, 88), (226, 228, 232), (170, 173, 178)
# Gray of dropped patches, from their darkest to their lightest pixels: darker than what is kept of a bright image,
# and lighter than what is kept of a dark one.
DIM = (36, 124)
LEAST_CONTRAST = 24  # gray levels that DIM stretches over: noise in a flat image stays flat


class View(NamedTuple):
    """An image at the size it is drawn.

    boxes  int64 [N,4]: left, top, right, bottom of each token in pixels of ``photo``; empty for one without a place
    seen   bool [height,width]: what any token sees
    """

    photo: Image.Image
    boxes: np.ndarray
    seen: np.ndarray

    @classmethod
    def of(cls, image: Image.Image, boxes: np.ndarray, width: int, height: int) -> View:
        """``boxes`` [N,4] in pixels of the image, NaN for tokens without a place; at most ``width`` by ``height``."""
        placed = ~np.isnan(boxes[:, 0])
        crop = _crop(image.size, boxes[placed])
        (left, top, right, bottom), scale = crop, min(width / (crop[2] - crop[0]), height / (crop[3] - crop[1]))
        size = max(1, round((right - left) * scale)), max(1, round((bottom - top) * scale))
        # Not every crop is whole pixels: `box` takes fractions.
        photo = image.convert("RGB").resize(size, Image.Resampling.LANCZOS, box=crop)
        corner, factor = np.array([left, top] * 2), np.array([size[0] / (right - left), size[1] / (bottom - top)] * 2)
        drawn = np.zeros(boxes.shape, dtype=np.int64)
        drawn[placed] = np.clip(np.rint((boxes[placed] - corner) * factor), 0, [*size, *size])
        return cls(photo, drawn, _cover(size, drawn, np.arange(len(boxes))) >= 0)

    def cells(self, tokens: np.ndarray) -> np.ndarray:
        """int64 [height,width]: which of these tokens is at each pixel, -1 where none is."""
        return _cover(self.photo.size, self.boxes, tokens)


def _crop(size: tuple[int, int], boxes: np.ndarray) -> tuple[float, float, float, float]:
    """The part of an image of ``size`` (width, height) that is shown: left, top, right, bottom."""
    start, end = [0.0, 0.0], [float(size[0]), float(size[1])]
    for axis in (0, 1):
        low, high = boxes[:, axis].min(initial=size[axis]), boxes[:, axis + 2].max(initial=0)
        low, high = max(0.0, float(low)), min(float(size[axis]), float(high))
        shown = max(MAX_ASPECT * size[1 - axis], high - low)
        if size[axis] > shown:
            start[axis] = min(max((low + high) / 2 - shown / 2, 0), size[axis] - shown)
            end[axis] = start[axis] + shown
    return start[0], start[1], end[0], end[1]


def _cover(size: tuple[int, int], boxes: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """See ``View.cells``."""
    cells = np.full(size[::-1], -1, dtype=np.int64)
    area = np.prod(boxes[tokens, 2:] - boxes[tokens, :2], axis=1)
    coarse_first = np.argsort(-area, kind="stable")
    for token in tokens[coarse_first[area[coarse_first] > 0]]:
        left, top, right, bottom = boxes[token]
        cells[top:bottom, left:right] = token
    return cells


def kept_patches(view: View, tokens: np.ndarray, kept: np.ndarray, is_top: np.ndarray) -> Image.Image:
    """Those kept of the ``tokens`` as they are and outlined, the others gray, what was not seen pale and hatched."""
    pixels = np.asarray(view.photo, dtype=np.float32)  # [h,w,3]
    chosen = np.isin(kept, tokens)
    kept, is_top = kept[chosen], is_top[chosen]
    clear = np.isin(view.cells(tokens), kept)[..., None]
    dim = DIM[0] + (DIM[1] - DIM[0]) * _structure(view)
    out = Image.fromarray(_fade_unseen(np.where(clear, pixels, dim), view).astype(np.uint8))
    if len(kept) == len(tokens):
        return out  # outlines would only hide the image
    draw = ImageDraw.Draw(out)
    sides = view.boxes[tokens, 2:] - view.boxes[tokens, :2]
    line = int(np.clip(sides.min() // 8, 1, 4))
    outside = 1 if line == 1 else 0  # a line of one pixel would be lost
    # Representatives first: where cells are small, the top-scored ones win a shared pixel.
    for token, top in sorted(zip(kept.tolist(), is_top.tolist(), strict=True), key=lambda entry: entry[1]):
        left, upper, right, lower = view.boxes[token].tolist()
        box = (left - outside, upper - outside, max(left, right - 1) + outside, max(upper, lower - 1) + outside)
        draw.rectangle(box, outline=TOP if top else REPRESENTATIVE, width=line + outside)
    return out


def scored_patches(view: View, scores: np.ndarray, scale: Scale) -> Image.Image:
    """The scores [N] as colours over the gray image; gray alone where they are not finite."""
    gray = 255 * _structure(view)
    finite = np.isfinite(scores)
    cells = view.cells(np.arange(len(scores)))
    colour = ramp(scale.level(np.where(finite, scores, scale.low)))[cells]  # [h,w,3]
    shown = np.append(finite, False)[cells][..., None]  # index -1, outside, is the appended one
    panel = np.where(shown, 0.82 * colour + 0.18 * gray, 0.45 * gray + 130)
    return Image.fromarray(_fade_unseen(panel, view).astype(np.uint8))


def _structure(view: View) -> np.ndarray:
    """The gray image, float32 [h,w,1], with what the model saw of it stretched to 0..1: the same on any exposure."""
    gray = np.asarray(view.photo.convert("L"), dtype=np.float32)
    seen = gray[view.seen]
    low, high = np.percentile(seen if seen.size else gray, (1, 99))
    spare = max(0.0, LEAST_CONTRAST - (high - low)) / 2
    return np.clip((gray - (low - spare)) / (high - low + 2 * spare), 0, 1)[..., None]


def _fade_unseen(panel: np.ndarray, view: View) -> np.ndarray:
    gray = np.asarray(view.photo.convert("L"), dtype=np.float32)[..., None]
    y, x = np.ogrid[: gray.shape[0], : gray.shape[1]]
    pale = np.where(((x + y) % 14 < 2)[..., None], 0.12 * gray + 168, 0.22 * gray + 190)
    return np.where(view.seen[..., None], panel, pale)
