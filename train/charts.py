"""Charts of the pages: matplotlib's, as inline SVG that takes its colours from the page.

Text stays text and the theme's colours become the page's variables, so that a chart suits light and
dark pages. The same chart gives the same bytes.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import ArrayLike

WIDTH, HEIGHT, SQUARE = 360, 250, 350
"""Pixels: about a column of the pages, so that 12 px text stays 12 px."""

LEFT, BOTTOM, MARGIN = 66, 46, 16
"""Pixels around the axes: left and below for ticks and labels, a margin elsewhere."""

MOST_DOTS = 1500
"""More dots than this in a chart are thinned evenly: the page stays small."""

HUGE = 1e300
"""Numbers beyond this are drawn here: an axis around larger ones would overflow."""

MOS = (0.9, 5.1)
"""Ends of an axis of scores."""

INK, SOFT, RULE, BAR = "#1c2126", "#5c6670", "#d9dee3", "#8fb3d9"
SERIES = ("#1f5fa8", "#c2571a", "#18794e", "#8a3ffc")
THEME = {
    **{INK: "--ink", SOFT: "--soft", RULE: "--rule", BAR: "--bar"},
    **dict(zip(SERIES, ("--one", "--two", "--three", "--four"), strict=True)),
}
"""Colours by the page's variable that replaces them."""

STYLE: Any = {
    "svg.fonttype": "none",
    "font.size": 12,
    "text.color": INK,
    "text.parse_math": False,  # names are text, whatever they hold
    "axes.labelcolor": INK,
    "axes.labelsize": 13,
    "axes.edgecolor": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": RULE,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.major.size": 0,
    "axes.formatter.limits": (-3, 5),  # tick labels have a fixed width
    "legend.frameon": False,
}
themed = matplotlib.rc_context(STYLE)
"""Around everything that draws: texts and ticks take their looks when they are made."""

Points = tuple[ArrayLike, ArrayLike]


@themed
def new(height: float = HEIGHT, rows: int = 1, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """An empty figure and its axes, row by row; ``height`` in pixels of each.

    One axes stands at a fixed place, for to lay it out takes longer than to draw it.
    """
    figure = Figure(figsize=(columns * WIDTH / 72, rows * height / 72), dpi=72)
    if rows == columns == 1:
        wide, high = WIDTH - LEFT - MARGIN, height - BOTTOM - MARGIN
        place = LEFT / WIDTH, BOTTOM / height, wide / WIDTH, high / height
        axes = [figure.add_axes(place)]
    else:
        figure.set_layout_engine("constrained")
        axes = [axes for row in figure.subplots(rows, columns, squeeze=False) for axes in row]
    for one in axes:
        one.xaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 5, 10)))
        one.yaxis.set_major_locator(MaxNLocator(5, steps=(1, 2, 5, 10)))
        one.margins(0.05)
    return figure, axes


def svg(figure: Figure, title: str) -> str:
    """A figure as an SVG file, the same bytes for the same figure and title."""
    text = io.StringIO()
    settings = matplotlib.rc_context(STYLE | {"svg.hashsalt": title})
    # Warnings are of letters that matplotlib's font lacks; the reader's fonts have them.
    with settings, warnings.catch_warnings(action="ignore"):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def inline(figure: Figure, title: str, marks: Sequence[int | str] = ()) -> Markup:
    """A figure as an SVG element with the page's font and colours.

    ``marks`` belong to the dots that were drawn with ``dots``: numbers of clips (as ``data-c``) or
    titles. Titles of charts on one page must differ, for ids of their parts are made of them.
    """
    figure.patch.set_visible(False)
    for axes in figure.axes:
        axes.patch.set_visible(False)
    text = svg(figure, title)
    text = re.sub(r"<(metadata|style|clipPath).*?</\1>", "", text[text.index("<svg") :], flags=re.S)
    text = re.sub(r' clip-path="[^"]*"|font-family: [^;"]*(; )?', "", text)
    text = re.sub("<[^>]*>", lambda tag: re.sub(r"(?<=\.\d\d)\d+", "", tag[0]), text)
    if marks:
        before, after = text.split('<g id="dots">')
        left = iter(marks)
        after = re.sub(
            "<use .*?/>", lambda use: _marked(use[0], next(left)), after, count=len(marks)
        )
        text = f"{before}<g>{after}"
    text = re.sub(r' id="(?!m[0-9a-f]{10}")[^"]*"', "", text)
    for colour, variable in THEME.items():
        text = text.replace(colour, f"var({variable})")
    head = f'<svg viewBox="0 0 {WIDTH} {figure.get_figheight() * 72:g}" role="img" '
    text = f'{head}aria-label="{escape(title)}">' + text[text.index(">") + 1 :]
    return Markup(re.sub(r"\s*\n\s*", " ", text.replace("xlink:href", "href")).strip())


def _marked(use: str, mark: int | str) -> str:
    if isinstance(mark, int):
        return use.replace("<use ", f'<use data-c="{mark}" ')
    return f"{use[:-2]}><title>{escape(mark)}</title></use>"


def dots(axes: Axes, x: ArrayLike, y: ArrayLike, size: float = 5.2, opacity: float = 1) -> None:
    """The dots of a chart that ``inline`` gives its marks to."""
    axes.plot(x, y, "o", color=SERIES[0], ms=size, mew=0, alpha=opacity, gid="dots")


def millions(axes: Axes, sizes: Sequence[float], margin: float) -> None:
    """A logarithmic axis of parameters in millions around ``sizes``."""
    low, high = min(sizes) / margin, max(sizes) * margin
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    log_ticks(axes, low, high)
    axes.set_xlabel("parameters (millions)")


def log_ticks(axes: Axes, low: float, high: float) -> None:
    """Few round ticks from ``low`` to ``high``."""
    wide = high / low
    subs = (1,) if wide > 1000 else (1, 3) if wide > 30 else (1, 2, 5)
    axes.xaxis.set_major_locator(LogLocator(subs=subs))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


@themed
def lines(title: str, x_label: str, y_label: str, series: Mapping[str, Points]) -> Markup:
    """Lines over a common x; a legend where there are several."""
    figure, (axes,) = new()
    for (name, (x, y)), colour in zip(series.items(), SERIES, strict=False):
        marker = "o" if np.size(x) < 40 else ""
        ends = [np.clip(np.asarray(side, np.float64), -HUGE, HUGE) for side in (x, y)]
        axes.plot(*ends, color=colour, marker=marker, ms=5, lw=1.6, label=name)
    if len(series) > 1:
        axes.legend()
    axes.set(xlabel=x_label, ylabel=y_label)
    return inline(figure, title)


@themed
def scatter(
    title: str,
    labels: tuple[str, str],
    points: Points,
    *,
    curve: Points | None = None,
    mos_scale: bool = True,
    first: int | None = None,
) -> Markup:
    """Scores over ratings, with the line where both are equal, and ``curve`` if given.

    ``first`` is the first clip's number, where the dots are to name their clips. Without
    ``mos_scale`` the scores have another unit than the ratings.
    """
    figure, (axes,) = new(SQUARE)
    axes.set(xlabel=labels[0], ylabel=labels[1], xlim=MOS, xticks=range(1, 6))
    x, y = (np.asarray(side, np.float64) for side in points)
    if mos_scale:
        axes.set_ylim(MOS)
        axes.plot((1, 5), (1, 5), "--", color=SOFT, lw=1)
        y = np.clip(y, *MOS)
    if curve:
        axes.plot(np.clip(curve[0], *MOS), curve[1], color=SERIES[1], lw=1.6)
    shown = thinned(len(x))
    dots(axes, x[shown], y[shown], opacity=min(0.8, max(0.3, 60 / max(len(shown), 1))))
    return inline(figure, title, [first + n for n in shown] if first is not None else ())


def thinned(count: int, most: int = MOST_DOTS) -> list[int]:
    """Which of so many points are drawn: all, or every n-th, ``most`` at most."""
    return list(range(0, count, max(1, -(-count // most))))


@themed
def histogram(
    title: str,
    label: str,
    values: Sequence[float],
    edges: Sequence[float],
    expected: Sequence[float] = (),
    log: bool = False,
) -> Markup:
    """Share of ``values`` in each bin; ``expected`` outlines the shares asked for."""
    figure, (axes,) = new()
    weights = np.full(len(values), 100 / max(len(values), 1))
    axes.hist(values, edges, weights=weights, color=BAR, rwidth=0.95)
    if len(expected):
        axes.stairs([100 * share for share in expected], edges, color=SERIES[1], lw=1.6)
    if log:
        axes.set_xscale("log")
        log_ticks(axes, edges[0], edges[-1])
    axes.set(xlabel=label, ylabel="share of samples (%)", xlim=(edges[0], edges[-1]))
    return inline(figure, title)


@themed
def columns(
    title: str, label: str, names: Sequence[str], shares: ArrayLike, expected: ArrayLike
) -> Markup:
    """A column for each named value, with the share that is asked for marked across it."""
    figure, (axes,) = new()
    axes.bar(names, 100 * np.asarray(shares), 0.6, color=BAR)
    places = np.arange(len(names))
    axes.hlines(100 * np.asarray(expected), places - 0.38, places + 0.38, SERIES[1], lw=1.6)
    axes.set(xlabel=label, ylabel="share of samples (%)")
    return inline(figure, title)
