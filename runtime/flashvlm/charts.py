"""One look for all charts, by matplotlib; imported only where a chart is drawn.

Figures are objects of their own: no pyplot, no window, no state that another user of matplotlib would see.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from flashvlm.errors import FlashVLMError
from flashvlm.extras import install

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, RULE, PAPER = "#181c24", "#626a78", "#dee2e8", "#ffffff"
# Of Okabe and Ito's palette: apart for every kind of colour vision.
BLUE, SKY, ORANGE, GREEN, RED, GRAY = "#0072b2", "#56b4e9", "#e69f00", "#008264", "#cc4400", "#b0b6c0"


class MissingMatplotlibError(FlashVLMError):
    """There is no matplotlib to draw with."""


def new_figure(width: float, height: float) -> Figure:
    """An empty page in inches; 100 pixels of a saved picture each.

    Raises:
        MissingMatplotlibError: with the line that installs it.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingMatplotlibError(
            f"matplotlib is not installed or does not import ({error}); install it with: {install('plot')}"
        ) from None
    figure = Figure(figsize=(width, height), dpi=100, facecolor=PAPER)
    FigureCanvasAgg(figure)
    return figure


def add_heading(figure: Figure, title: str, details: str) -> None:
    """Title and a muted line of details, at the top left."""
    width, height = figure.get_size_inches()
    figure.text(0.4 / width, 1 - 0.62 / height, title, fontsize=19, color=INK)
    figure.text(0.4 / width, 1 - 0.98 / height, details, fontsize=10.5, color=MUTED)


def add_axes(figure: Figure, left: float, bottom: float, width: float, height: float, title: str) -> Axes:
    """Axes at a place in inches, with a title, and without what says nothing."""
    page_width, page_height = figure.get_size_inches()
    place = left / page_width, bottom / page_height, width / page_width, height / page_height
    axes = figure.add_axes(place)
    axes.set_title(title, loc="left", fontsize=13, color=INK, pad=14)
    axes.tick_params(length=0, labelsize=11, labelcolor=INK)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    return axes


def save(figure: Figure, where: Path | BinaryIO) -> None:
    """Writes a PNG that is the same for the same numbers: without time or version of its maker."""
    figure.savefig(where, format="png", metadata={"Software": None})
