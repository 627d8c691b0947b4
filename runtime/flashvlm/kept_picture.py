"""The picture of `--show`: the image, which patches of it the model kept, and how it scored all of them."""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from flashvlm.drawing import (
    INK,
    MAT,
    MUTED,
    PAPER,
    RULE,
    Entry,
    Scale,
    draw_legend,
    draw_scale,
    filled,
    hatched,
    in_font,
    plain_font,
    ramp,
    shorten,
    wrap,
)

Box = tuple[float, float, float, float]  # left, top, right, bottom
Score = Literal["log", "cosine"]

PANEL = 560  # width of a panel; all lengths are pixels of the picture
MARGIN = 40
PANELS_Y = MARGIN + 112  # below the heading and the panels' own captions
# Of a longer strip only the part around the model's crop is shown: all of it would be a line.
MAX_ASPECT = 2.0

# Orange and sky blue of Okabe and Ito's palette: apart for every kind of colour vision, and bright on dark.
TOP, REPRESENTATIVE = (240, 150, 0), (86, 180, 233)
DROPPED, UNSEEN, HATCH = (84, 84, 88), (226, 228, 232), (170, 173, 178)
# Gray of dropped patches, from their darkest to their lightest pixels: darker than what is kept of a bright image,
# and lighter than what is kept of a dark one.
DIM = (36, 124)
LEAST_CONTRAST = 24  # gray levels that DIM stretches over: noise in a flat image stays flat

_CAPTIONS = {"log": "Log-score of every token", "cosine": "Relevance of every token", None: "Score of every token"}
_MEANINGS = {"log": "natural logarithms", "cosine": "cosines, less the best one's", None: ""}


def draw_kept(
    image: Image.Image,
    kept: np.ndarray,
    is_top: np.ndarray,
    scores: np.ndarray,
    grid: tuple[int, int],
    box: Box,
    question: str = "",
    answer: str = "",
    method: str = "",
    score: Score | None = None,
) -> Image.Image:
    """Panels of the image, its kept patches and, where the method has one, the score of all; question and answer.

    image   RGB, the original
    kept    int [K], raster indices into the grid
    is_top  bool [K]: kept for its score, or else as a representative of the background
    scores  float [N], N = rows * columns; empty or all zero if there is none; non-finite ones stay gray
    grid    (rows, columns) of visual tokens
    box     what of the image the model saw, in its pixels: `preprocess.seen_box`
    method  name of the selection method
    score   what its scores are

    Raises ValueError if the arrays do not fit the grid.
    """
    rows, columns = grid
    count = rows * columns
    kept, is_top = np.asarray(kept, dtype=np.int64), np.asarray(is_top, dtype=bool)
    scores = np.asarray(scores, dtype=np.float64)
    if kept.shape != is_top.shape or kept.ndim != 1 or ((kept < 0) | (kept >= count)).any():
        raise ValueError(f"expected K indices below {count} and as many flags, found {kept.shape}, {is_top.shape}")
    if scores.shape not in ((count,), (0,)):
        raise ValueError(f"expected {count} scores for a grid of {rows} x {columns}, found {scores.shape}")

    photo, lines = _photo(image.convert("RGB"), grid, box)
    view = _View(photo, lines, _cells(photo.size, *lines))
    shown = kept.size < count
    caption = "Kept patches" if shown else "What the model saw"
    legend = list(_legend(kept.size, int(is_top.sum()), count, bool((view.cells >= 0).all())))
    panels = [_Panel(photo, "Image"), _Panel(_kept_panel(view, kept, is_top), caption, legend)]
    finite = scores[np.isfinite(scores)]
    if finite.any():
        scale = Scale.of(finite)
        panels.append(_Panel(_score_panel(view, scores, scale), _CAPTIONS[score], scale=scale, note=_MEANINGS[score]))
    return _page(panels, _heading(kept.size, count, method), (question, answer))


def _heading(kept: int, count: int, method: str) -> str:
    """Method, budget and saving, such as ``flashvlm keeps 64 of 576 visual tokens, 89 % fewer``."""
    if kept == count:
        return f"All {count:,} visual tokens, nothing selected"
    saved = 100 * (count - kept) / count
    share = "less than 1" if saved < 1 else "more than 99" if saved > 99 else f"{saved:.0f}"
    return f"{method} keeps {kept:,} of {count:,} visual tokens, {share} % fewer".strip()


class _View(NamedTuple):
    """The image at panel size, and where its patches are."""

    photo: Image.Image
    lines: tuple[np.ndarray, np.ndarray]  # borders of patches: x [columns + 1] and y [rows + 1]
    cells: np.ndarray  # int [height,width]: raster index of the patch at each pixel, -1 outside of the model's view


class _Panel(NamedTuple):
    """A picture with what stands above and below it."""

    picture: Image.Image
    caption: str
    legend: list[Entry] = []  # noqa: RUF012  # nobody appends
    scale: Scale | None = None
    note: str = ""


def _photo(image: Image.Image, grid: tuple[int, int], box: Box) -> tuple[Image.Image, tuple[np.ndarray, np.ndarray]]:
    """The image at panel size, and the cell borders in its pixels: x [columns + 1] and y [rows + 1]."""
    left, top, right, bottom = box
    view = [0.0, 0.0, float(image.width), float(image.height)]
    for axis, across in ((0, image.height), (1, image.width)):
        excess = view[axis + 2] - MAX_ASPECT * across
        if excess > 0:
            centre = (box[axis] + box[axis + 2]) / 2
            start = min(max(centre - MAX_ASPECT * across / 2, 0), excess)
            view[axis], view[axis + 2] = start, start + MAX_ASPECT * across
    width, height = view[2] - view[0], view[3] - view[1]
    scale = min(PANEL / width, 1.5 * PANEL / height)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    # Not every view is whole pixels: `box` takes fractions.
    photo = image.resize(size, Image.Resampling.LANCZOS, box=(view[0], view[1], view[2], view[3]))
    xs = np.rint((np.linspace(left, right, grid[1] + 1) - view[0]) * (size[0] / width)).astype(np.int64)
    ys = np.rint((np.linspace(top, bottom, grid[0] + 1) - view[1]) * (size[1] / height)).astype(np.int64)
    return photo, (xs, ys)


def _cells(size: tuple[int, int], xs: np.ndarray, ys: np.ndarray) -> np.ndarray:
    """See ``_View``."""
    column = np.searchsorted(xs, np.arange(size[0]), side="right") - 1
    row = np.searchsorted(ys, np.arange(size[1]), side="right") - 1
    columns, rows = len(xs) - 1, len(ys) - 1
    inside = ((row >= 0) & (row < rows))[:, None] & ((column >= 0) & (column < columns))[None]
    return np.where(inside, row[:, None] * columns + column[None], -1)


def _kept_panel(view: _View, kept: np.ndarray, is_top: np.ndarray) -> Image.Image:
    """Kept patches as they are and outlined, dropped ones gray, what was not seen pale and hatched."""
    pixels = np.asarray(view.photo, dtype=np.float32)  # [h,w,3]
    clear = np.isin(view.cells, kept)[..., None]
    dim = DIM[0] + (DIM[1] - DIM[0]) * _structure(view)
    out = Image.fromarray(_fade_unseen(np.where(clear, pixels, dim), view).astype(np.uint8))
    draw = ImageDraw.Draw(out)
    xs, ys = view.lines
    columns = len(xs) - 1
    if len(kept) == columns * (len(ys) - 1):
        return out  # outlines would only hide the image
    line = int(np.clip(min(np.diff(xs).min(), np.diff(ys).min()) // 8, 1, 4))
    # Representatives first: where cells are small, the top-scored ones win a shared pixel.
    for index, top in sorted(zip(kept.tolist(), is_top.tolist(), strict=True), key=lambda entry: entry[1]):
        row, column = divmod(index, columns)
        x0, y0 = int(xs[column]), int(ys[row])
        x1, y1 = max(x0, int(xs[column + 1]) - 1), max(y0, int(ys[row + 1]) - 1)
        draw.rectangle((x0, y0, x1, y1), outline=TOP if top else REPRESENTATIVE, width=line)
    return out


def _score_panel(view: _View, scores: np.ndarray, scale: Scale) -> Image.Image:
    """The scores [N] as colours over the gray image; gray alone where they are not finite."""
    gray = 255 * _structure(view)
    finite = np.isfinite(scores)
    colour = ramp(scale.level(np.where(finite, scores, scale.low)))[view.cells]  # [h,w,3]
    shown = np.append(finite, False)[view.cells][..., None]  # index -1, outside, is the appended one
    panel = np.where(shown, 0.82 * colour + 0.18 * gray, 0.45 * gray + 130)
    return Image.fromarray(_fade_unseen(panel, view).astype(np.uint8))


def _structure(view: _View) -> np.ndarray:
    """The gray image, float32 [h,w,1], with what the model saw of it stretched to 0..1: the same on any exposure."""
    gray = np.asarray(view.photo.convert("L"), dtype=np.float32)
    seen = gray[view.cells >= 0]
    low, high = np.percentile(seen if seen.size else gray, (1, 99))
    spare = max(0.0, LEAST_CONTRAST - (high - low)) / 2
    return np.clip((gray - (low - spare)) / (high - low + 2 * spare), 0, 1)[..., None]


def _fade_unseen(panel: np.ndarray, view: _View) -> np.ndarray:
    gray = np.asarray(view.photo.convert("L"), dtype=np.float32)[..., None]
    y, x = np.ogrid[: gray.shape[0], : gray.shape[1]]
    pale = np.where(((x + y) % 14 < 2)[..., None], 0.12 * gray + 168, 0.22 * gray + 190)
    return np.where((view.cells >= 0)[..., None], panel, pale)


def _legend(kept: int, top: int, count: int, whole: bool) -> Iterator[Entry]:
    if kept < count:
        if top:
            yield Entry(f"{top:,} top-scored", filled(MAT, TOP))
        if kept > top:
            yield Entry(f"{kept - top:,} representative", filled(MAT, REPRESENTATIVE))
        yield Entry(f"{count - kept:,} dropped", filled(DROPPED))
    if not whole:
        yield Entry("not seen by the model", hatched(UNSEEN, HATCH))


def _page(panels: list[_Panel], heading: str, texts: tuple[str, str]) -> Image.Image:
    """Panels side by side under a heading, each with its legend; the texts as Q and A below."""
    width = len(panels) * (PANEL + MARGIN) + MARGIN
    height = max(panel.picture.height for panel in panels)
    page = Image.new("RGB", (width, PANELS_Y + height + 400), PAPER)
    draw = ImageDraw.Draw(page)
    title = in_font(heading, 31)
    draw.text((MARGIN, MARGIN + 28), shorten(title, width - 2 * MARGIN), INK, title.font, anchor="ls")
    below = PANELS_Y + height
    for number, panel in enumerate(panels):
        x = MARGIN + number * (PANEL + MARGIN)
        draw.text((x, PANELS_Y - 16), panel.caption, INK, plain_font(24), anchor="ls")
        draw.rectangle((x, PANELS_Y, x + PANEL - 1, PANELS_Y + height - 1), fill=MAT)
        page.paste(panel.picture, (x + (PANEL - panel.picture.width) // 2, PANELS_Y))
        below = max(below, _under(page, panel, x, PANELS_Y + height + 20))
    return _texts(page, below + 28, texts)


def _under(page: Image.Image, panel: _Panel, x: int, y: int) -> int:
    """Legend or colour scale of a panel; returns where it ends."""
    small = plain_font(20)
    if panel.scale is None:
        return y + draw_legend(page, (x, y), panel.legend, small, PANEL) if panel.legend else y - 20
    y += draw_scale(page, (x, y), PANEL, panel.scale, small) + 12
    beyond = panel.scale.below or panel.scale.above
    for note in (panel.note, "colours from the 2nd to the 98th percentile" if beyond else ""):
        if note:
            ImageDraw.Draw(page).text((x, y), note, MUTED, plain_font(18), anchor="lt")
            y += 26
    return y - 8


def _texts(page: Image.Image, y: int, texts: tuple[str, str]) -> Image.Image:
    """Question and answer under a rule, and the page cut to what it holds."""
    drawn = [in_font(text, 28) for text in texts]
    lines = [wrap(text, page.width - 2 * MARGIN - 56, most) for text, most in zip(drawn, (6, 24), strict=True)]
    taken = sum(40 * len(part) + 14 for part in lines if part)
    out = Image.new("RGB", (page.width, y - 28 + MARGIN + (taken + 38 if taken else 0)), PAPER)
    out.paste(page)
    draw = ImageDraw.Draw(out)
    if taken:
        draw.line((MARGIN, y, page.width - MARGIN, y), fill=RULE, width=2)
        y += 26
    for label, text, part in zip("QA", drawn, lines, strict=True):
        if part:
            draw.text((MARGIN, y + 28), label, MUTED, plain_font(28), anchor="ls")
        for line in part:
            draw.text((MARGIN + 56, y + 28), line, INK, text.font, anchor="ls")
            y += 40
        y += 14 if part else 0
    return out
