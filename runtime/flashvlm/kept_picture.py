"""The picture of `--show`: which patches of the image the model kept, and how it scored all of them."""

from bisect import bisect_right
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Box = tuple[float, float, float, float]  # left, top, right, bottom
Rgb = tuple[int, int, int]

PANEL = 640  # width of a panel; all lengths are pixels of the picture
MARGIN = 40
# Of a longer strip only the part around the model's crop is shown: all of it would be a line.
MAX_ASPECT = 2.0

INK, MUTED, RULE, MAT, PAPER = (24, 28, 36), (98, 106, 120), (222, 226, 232), (241, 243, 246), (255, 255, 255)
# Orange and sky blue of Okabe and Ito's palette: apart for every kind of colour vision, and bright on dark.
TOP, REPRESENTATIVE = (240, 150, 0), (86, 180, 233)
DROPPED, UNSEEN = (62, 62, 66), (226, 228, 232)

# Dark blue to yellow in equal steps of OKLab (https://bottosson.github.io/posts/oklab), lightness 0.20 to
# 0.94.
_RAMP = ("080e3e", "0a2d5a", "084c77", "186d89", "2d8e98", "5aac93", "87c883", "c2dd70", "ffef54")
RAMP = np.array([list(bytes.fromhex(colour)) for colour in _RAMP], dtype=np.float32)  # [9,3]


def draw_kept(
    image: Image.Image,
    kept: np.ndarray,
    is_top: np.ndarray,
    scores: np.ndarray,
    grid: tuple[int, int],
    box: Box,
    title: str = "",
    answer: str = "",
) -> Image.Image:
    """Two panels, the kept patches and the score of all, with a legend; question and answer underneath.

    image   RGB, the original
    kept    int [K], raster indices into the grid
    is_top  bool [K]: kept for its score, or else as a representative of the background
    scores  float [N], N = rows * columns; empty or all zero if the method has none; non-finite ones stay gray
    grid    (rows, columns) of visual tokens
    box     what of the image the model saw, in its pixels: `images.crop_box`

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

    photo, (xs, ys) = _photo(image.convert("RGB"), grid, box)
    cells = _cells(photo.size, xs, ys)
    left = _kept_panel(photo, cells, xs, ys, kept, is_top)
    right, limits = _score_panel(photo, cells, scores)
    whole = bool((cells >= 0).all())
    entries = list(_legend(kept.size, int(is_top.sum()), count, whole))
    share = f"{kept.size:,} of {count:,}" if kept.size < count else f"All {count:,}"
    captions = f"{share} visual tokens kept", "Score of every token"
    return _page(left, right, limits, entries, captions, (title, answer))


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
    """int [height,width]: the raster index of the patch at each pixel, -1 outside of the model's view."""
    column = np.searchsorted(xs, np.arange(size[0]), side="right") - 1
    row = np.searchsorted(ys, np.arange(size[1]), side="right") - 1
    columns, rows = len(xs) - 1, len(ys) - 1
    inside = ((row >= 0) & (row < rows))[:, None] & ((column >= 0) & (column < columns))[None]
    return np.where(inside, row[:, None] * columns + column[None], -1)


def _kept_panel(
    photo: Image.Image,
    cells: np.ndarray,
    xs: np.ndarray,
    ys: np.ndarray,
    kept: np.ndarray,
    is_top: np.ndarray,
) -> Image.Image:
    """Kept patches clear and outlined, dropped ones dark and gray, what was not seen pale and hatched."""
    pixels = np.asarray(photo, dtype=np.float32)  # [h,w,3]
    gray = np.asarray(photo.convert("L"), dtype=np.float32)[..., None]
    clear = np.isin(cells, kept)[..., None]
    panel = np.where(clear, pixels, 0.38 * gray + 14)
    panel = _fade_unseen(panel, gray, cells)
    out = Image.fromarray(panel.astype(np.uint8))
    draw = ImageDraw.Draw(out)
    columns = len(xs) - 1
    if len(kept) == columns * (len(ys) - 1):
        return out  # all kept: outlines would only hide the image
    line = int(np.clip(min(np.diff(xs).min(), np.diff(ys).min()) // 10, 1, 4))
    # Representatives first: where cells are small, the top-scored ones win a shared pixel.
    for index, top in sorted(zip(kept.tolist(), is_top.tolist(), strict=True), key=lambda entry: entry[1]):
        row, column = divmod(index, columns)
        x0, y0 = int(xs[column]), int(ys[row])
        x1, y1 = max(x0, int(xs[column + 1]) - 1), max(y0, int(ys[row + 1]) - 1)
        draw.rectangle((x0, y0, x1, y1), outline=TOP if top else REPRESENTATIVE, width=line)
    return out


def _score_panel(
    photo: Image.Image, cells: np.ndarray, scores: np.ndarray
) -> tuple[Image.Image, tuple[float, float] | None]:
    """The scores as colours over the gray image, and the (lowest, highest); None if there is no score."""
    gray = np.asarray(photo.convert("L"), dtype=np.float32)[..., None]
    finite = np.isfinite(scores)
    if not scores[finite].any():
        panel = _fade_unseen(np.broadcast_to(0.45 * gray + 130, (*gray.shape[:2], 3)), gray, cells)
        return Image.fromarray(panel.astype(np.uint8)), None
    low, high = float(scores[finite].min()), float(scores[finite].max())
    # Halves first: the range of two large floats may overflow.
    span = high / 2 - low / 2
    shifted = np.where(finite, scores, low) / 2 - low / 2
    level = shifted / span if span else np.full_like(shifted, 0.5)
    shown = np.append(finite, False)[cells][..., None]  # index -1, outside, is the appended one
    colour = _colour(level)[cells]
    panel = np.where(shown, 0.8 * colour + 0.2 * gray, 0.45 * gray + 130)
    return Image.fromarray(_fade_unseen(panel, gray, cells).astype(np.uint8)), (low, high)


def _colour(level: np.ndarray) -> np.ndarray:
    """[n] in 0..1 -> float32 [n,3], colours of the ramp."""
    stops = np.linspace(0, 1, len(RAMP))
    return np.stack([np.interp(level, stops, RAMP[:, channel]) for channel in range(3)], axis=-1)


def _fade_unseen(panel: np.ndarray, gray: np.ndarray, cells: np.ndarray) -> np.ndarray:
    y, x = np.ogrid[: cells.shape[0], : cells.shape[1]]
    pale = np.where(((x + y) % 14 < 2)[..., None], 0.12 * gray + 168, 0.22 * gray + 190)
    return np.where((cells >= 0)[..., None], panel, pale)


Entry = tuple[str, Rgb, Rgb | None]  # text, fill, outline


def _legend(kept: int, top: int, count: int, whole: bool) -> Iterator[Entry]:
    if kept < count:
        if top:
            yield f"{top:,} top-scored", MAT, TOP
        if kept > top:
            yield f"{kept - top:,} representative", MAT, REPRESENTATIVE
        yield f"{count - kept:,} dropped of {count:,}", DROPPED, None
    if not whole:
        yield "not seen by the model", UNSEEN, None


def _page(
    left: Image.Image,
    right: Image.Image,
    limits: tuple[float, float] | None,
    entries: list[Entry],
    captions: tuple[str, str],
    texts: tuple[str, str],
) -> Image.Image:
    width = 2 * PANEL + 3 * MARGIN
    caption_font, small, body = _font(22), _font(17), _font(24)
    panels_y = MARGIN + 42
    legend_y = panels_y + left.height + 20
    lines = [_wrap(text, body, width - 2 * MARGIN - 56, most) for text, most in zip(texts, (6, 24), strict=True)]
    placed = list(_flow(entries, small))
    text_y = legend_y + max(58 if limits else 26, max((y for _, y, _ in placed), default=0) + 26) + 24
    text_height = sum(34 * len(part) + 12 for part in lines if part)
    height = text_y + (24 + text_height - 12 if text_height else -24) + MARGIN

    page = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(page)
    for number, (panel, caption) in enumerate(zip((left, right), captions, strict=True)):
        x = MARGIN + number * (PANEL + MARGIN)
        draw.text((x, MARGIN + 22), caption, INK, caption_font, anchor="ls")
        draw.rectangle([x, panels_y, x + PANEL - 1, panels_y + panel.height - 1], fill=MAT)
        page.paste(panel, (x + (PANEL - panel.width) // 2, panels_y))
    for x, y, (text, fill, outline) in placed:
        _swatch(draw, MARGIN + x, legend_y + y, fill, outline)
        draw.text((MARGIN + x + 28, legend_y + y + 10), text, INK, small, anchor="lm")
    right_x = 2 * MARGIN + PANEL
    if limits:
        _colour_bar(page, right_x, legend_y, limits, small)
    else:
        _notice(draw, (right_x + PANEL // 2, panels_y + left.height // 2), "this method has no score", body)
    y = text_y
    if text_height:
        draw.line([MARGIN, y, width - MARGIN, y], fill=RULE, width=1)
        y += 24
    for label, part in zip("QA", lines, strict=True):
        if part:
            draw.text((MARGIN, y), label, MUTED, body, anchor="la")
        for line in part:
            draw.text((MARGIN + 56, y), line, INK, body, anchor="la")
            y += 34
        y += 12 if part else 0
    return page


def _flow(entries: list[Entry], font: Any) -> Iterator[tuple[int, int, Entry]]:
    """Legend entries from left to right, on a new line where the panel ends: (x, y, entry)."""
    x = y = 0
    for entry in entries:
        width = 28 + round(font.getlength(entry[0]))
        if x and x + width > PANEL:
            x, y = 0, y + 32
        yield x, y, entry
        x += width + 26


def _swatch(draw: ImageDraw.ImageDraw, x: int, y: int, fill: Rgb, outline: Rgb | None) -> None:
    draw.rectangle([x, y, x + 19, y + 19], fill=fill, outline=outline, width=4 if outline else 0)
    if fill == UNSEEN:
        for step in range(4, 36, 9):
            ends = (x + min(step, 19), y + max(step - 19, 0)), (x + max(step - 19, 0), y + min(step, 19))
            draw.line(ends, fill=(170, 173, 178), width=2)


def _colour_bar(page: Image.Image, x: int, y: int, limits: tuple[float, float], font: Any) -> None:
    low, high = limits
    draw = ImageDraw.Draw(page)
    level = np.linspace(0, 1, PANEL) if low < high else np.full(PANEL, 0.5)
    bar = np.broadcast_to(_colour(level)[None], (20, PANEL, 3)).astype(np.uint8)
    page.paste(Image.fromarray(bar), (x, y))
    if low == high:
        draw.text((x + PANEL // 2, y + 32), f"{low:.4g} everywhere", INK, font, anchor="mt")
        return
    for share, anchor in ((0.0, "lt"), (0.5, "mt"), (1.0, "rt")):
        value = low * (1 - share) + high * share
        draw.text((x + share * (PANEL - 1), y + 32), f"{value:.4g}", INK, font, anchor=anchor)


def _notice(draw: ImageDraw.ImageDraw, centre: tuple[int, int], text: str, font: Any) -> None:
    left, top, right, bottom = draw.textbbox(centre, text, font, anchor="mm")
    draw.rounded_rectangle([left - 20, top - 14, right + 20, bottom + 14], 8, fill=PAPER, outline=RULE)
    draw.text(centre, text, INK, font, anchor="mm")


def _wrap(text: str, font: Any, width: int, most: int) -> list[str]:
    """Lines of at most `width` pixels, at most `most` of them; words that are too long, or Chinese, break."""
    lines = []
    for paragraph in text.strip()[:10_000].splitlines():
        line = ""
        for word in paragraph.split():
            trial = f"{line} {word}" if line else word
            if font.getlength(trial) <= width:
                line = trial
                continue
            if line:
                lines.append(line)
            while font.getlength(word) > width:
                fits = max(1, bisect_right(range(1, len(word)), width, key=lambda n: font.getlength(word[:n])))
                lines.append(word[:fits])
                word = word[fits:]
            line = word
        lines.append(line)
        if len(lines) > most:
            return [*lines[: most - 1], f"{lines[most - 1]} ...".strip()]
    return lines


def _font(size: int) -> Any:
    return ImageFont.load_default(size=size)
