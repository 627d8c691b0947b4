"""The picture of `--show`: the image, which patches of it the model kept, and how it scored all of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal, NamedTuple

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
    shorten,
    wrap,
)
from flashvlm.patches import DROPPED, HATCH, REPRESENTATIVE, TOP, UNSEEN, View, kept_patches, scored_patches
from flashvlm.token_boxes import is_thumbnail, token_boxes

if TYPE_CHECKING:
    from flashvlm.encoder import Selection

Score = Literal["log", "cosine"]

PANEL = 560  # width of a panel; all lengths are pixels of the picture
MARGIN = 40
PANELS_Y = MARGIN + 112  # below the heading and the panels' own captions

_CAPTIONS = {"log": "Log-score of every token", "cosine": "Relevance of every token", None: "Score of every token"}
_MEANINGS = {"log": "natural logarithms", "cosine": "cosines, less the best one's", None: ""}


def draw_kept(
    image: Image.Image,
    selection: Selection,
    question: str = "",
    answer: str = "",
    method: str = "",
    score: Score | None = None,
    name: str = "",
) -> Image.Image:
    """Panels of the image, its kept patches and, where the method has one, the score of all; question and answer.

    The tokens of tiles are drawn on the original image, all tiles together; those of a thumbnail, which see larger
    patches of it, in a panel of their own.

    image      RGB, the original
    selection  of its tokens; scores that are not finite stay gray
    method     name of the selection method
    score      what its scores are
    name       of the image, before the heading

    Raises ValueError if the selection does not fit its image.

    Example:
        >>> answer = pipeline.generate(image, "What is it?")  # doctest: +SKIP
        >>> draw_kept(image, answer.selections[0], "What is it?", answer.text).save("kept.png")  # doctest: +SKIP
    """
    check_selection(selection)
    kept, is_top, scores = selection.kept, selection.is_top, np.asarray(selection.scores, dtype=np.float64)
    boxes, thumbnail = token_boxes(selection.spec, selection.grid), is_thumbnail(selection.spec, selection.grid)
    placed, count = ~np.isnan(boxes[:, 0]), selection.count
    view = View.of(image, boxes, PANEL, round(1.5 * PANEL))
    panels = [_Panel(view.photo, "Image")]
    tiles, small = np.flatnonzero(placed & ~thumbnail), np.flatnonzero(placed & thumbnail)
    layers = [("Kept patches of its tiles", tiles), ("Kept patches of the thumbnail", small)]
    if not small.size:
        layers = [("Kept patches", tiles)]
    if len(kept) == count:
        layers = [("What the model saw", np.flatnonzero(placed))]
    for caption, tokens in layers:
        legend = [*legend_of(tokens, selection), *_unseen(view)]
        if tokens is tiles:
            legend += legend_of_others(placed, selection)
        panels.append(_Panel(kept_patches(view, tokens, kept, is_top), caption, legend))
    finite = scores[tiles][np.isfinite(scores[tiles])] if scores.size else scores
    if finite.any():
        scale = Scale.of(finite)
        notes = [_MEANINGS[score]] + ["where tokens overlap, the finest one's"] * bool(small.size)
        panels.append(_Panel(scored_patches(view, scores, scale), _CAPTIONS[score], scale=scale, notes=notes))
    return _page(panels, heading(selection, method, name), (question, answer))


def check_selection(selection: Selection) -> None:
    kept, count = selection.kept, selection.count
    if kept.shape != selection.is_top.shape or kept.ndim != 1 or ((kept < 0) | (kept >= count)).any():
        found = f"{kept.shape}, {selection.is_top.shape}"
        raise ValueError(f"expected K indices below {count} and as many flags, found {found}")
    if selection.scores.shape not in ((count,), (0,)):
        raise ValueError(f"expected {count} scores, found {selection.scores.shape}")


def heading(selection: Selection, method: str, name: str = "") -> str:
    """Method, budget and saving, such as ``flashvlm keeps 64 of 576 visual tokens, 89 % fewer``."""
    kept, count = len(selection.kept), selection.count
    before = f"{name}: " if name else ""
    if kept == count:
        return f"{before}{'all' if name else 'All'} {count:,} visual tokens, nothing selected"
    saved = 100 * (count - kept) / count
    share = "less than 1" if saved < 1 else "more than 99" if saved > 99 else f"{saved:.0f}"
    return f"{before}{method} keeps {kept:,} of {count:,} visual tokens, {share} % fewer".strip()


class _Panel(NamedTuple):
    """A picture with what stands above and below it."""

    picture: Image.Image
    caption: str
    legend: list[Entry] = []  # noqa: RUF012  # nobody appends
    scale: Scale | None = None
    notes: list[str] = []  # noqa: RUF012


def legend_of(tokens: np.ndarray, selection: Selection) -> Iterator[Entry]:
    """What is kept of the ``tokens``, and what is not."""
    chosen = np.isin(selection.kept, tokens)
    many, top = int(chosen.sum()), int((chosen & selection.is_top).sum())
    if many == len(tokens):
        return
    if top:
        yield Entry(f"{top:,} top-scored", filled(MAT, TOP))
    if many > top:
        yield Entry(f"{many - top:,} representative", filled(MAT, REPRESENTATIVE))
    yield Entry(f"{len(tokens) - many:,} dropped", filled(DROPPED))


def legend_of_others(placed: np.ndarray, selection: Selection) -> Iterator[Entry]:
    """What was dropped of the tokens without a place, newlines and CLS."""
    others = int((~placed).sum()) - int((~placed[selection.kept]).sum())
    if others and len(selection.kept) < selection.count:
        what = "newlines" if selection.spec.skip == "none" else "CLS"
        yield Entry(f"{others:,} {what} dropped", filled(PAPER, RULE))


def _unseen(view: View) -> Iterator[Entry]:
    if not view.seen.all():
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
    return draw_texts(page, below + 28, texts)


def _under(page: Image.Image, panel: _Panel, x: int, y: int) -> int:
    """Legend or colour scale of a panel; returns where it ends."""
    small = plain_font(20)
    if panel.scale is None:
        return y + draw_legend(page, (x, y), panel.legend, small, PANEL) if panel.legend else y - 20
    y += draw_scale(page, (x, y), PANEL, panel.scale, small) + 12
    beyond = panel.scale.below or panel.scale.above
    for note in (*panel.notes, "colours from the 2nd to the 98th percentile" if beyond else ""):
        if note:
            ImageDraw.Draw(page).text((x, y), note, MUTED, plain_font(18), anchor="lt")
            y += 26
    return y - 8


def draw_texts(page: Image.Image, y: int, texts: tuple[str, str]) -> Image.Image:
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
