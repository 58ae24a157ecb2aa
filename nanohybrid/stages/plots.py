"""The figures of the reports, in one style for light and dark pages.

Figures are matplotlib objects (no pyplot, no global state). Axes and grid have the colors that report.py
replaces by those of the page.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nanohybrid.extras import require
from nanohybrid.stages.report import GRID, INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = (
    "#2f81d6",
    "#d9730d",
    "#2a9d6f",
    "#b5539c",
    "#8a7a1f",
    "#7d6be0",
)  # each at least 3:1 on white and on #14171b
MUTED = "#8b949e"
MAX_VALUE_LABELS = 14  # numbers that fit side by side in a figure
WIDTH, HEIGHT = 6.8, 3.4  # inches: 490 points, so that 10 point text is 10 to 16 pixels on a phone and a desk

Points = Sequence[tuple[float, float]]
Errors = Mapping[str, Sequence[tuple[float, float]]]
Intervals = Sequence[tuple[float, float, float, float]]

STYLE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["system-ui", "DejaVu Sans", "sans-serif"],
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 4,
}


def layer_styles() -> dict[str, tuple[str, str]]:
    """Color and label of each kind of layer, by its symbol."""
    from nanohybrid.model.mixers import MIXERS  # imports torch, which the other plots do not need

    return {symbol: (mixer.color, mixer.label) for symbol, mixer in MIXERS.items()}


def lines(
    series: Mapping[str, Points],
    x: str,
    y: str,
    title: str = "",
    *,
    log_x: bool = False,
    log_y: bool = False,
    rest: Sequence[Points] = (),
) -> "Figure":
    """Named curves through points (x, y), over unnamed gray curves (`rest`). x and y label the axes."""
    with style():
        figure, axes = canvas(x, y, title)
        for points in rest:
            axes.plot([p[0] for p in points], [p[1] for p in points], color=MUTED, linewidth=0.7, alpha=0.6)
        for color, (name, points) in zip(cycle(len(series)), series.items(), strict=True):
            axes.plot(
                [p[0] for p in points],
                [p[1] for p in points],
                color=color,
                label=name,
                marker="o" if len(points) <= 20 else None,
            )
        scale(axes, log_x=log_x, log_y=log_y)
        legend(figure, len(series))
    return figure


def intervals(
    series: Mapping[str, Intervals], x: str, y: str, title: str = "", *, log_x: bool = False
) -> "Figure":
    """Named curves through points (x, y, low, high), with bands from low to high."""
    with style():
        figure, axes = canvas(x, y, title)
        for color, (name, points) in zip(cycle(len(series)), series.items(), strict=True):
            place = [p[0] for p in points]
            axes.fill_between(
                place, [p[2] for p in points], [p[3] for p in points], color=color, alpha=0.2, linewidth=0
            )
            axes.plot(place, [p[1] for p in points], color=color, label=name, marker="o")
        scale(axes, log_x=log_x)
        legend(figure, len(series))
    return figure


def bars(
    labels: Sequence[str],
    series: Mapping[str, Sequence[float]],
    y: str,
    title: str = "",
    *,
    errors: Errors | None = None,
    log_y: bool = False,
) -> "Figure":
    """Grouped bars: a group for each label, with a bar for each name. `errors` gives the error below and
    above each height.

    Heights are written out for up to MAX_VALUE_LABELS bars. On a logarithmic axis a height of 0 has no bar.
    """
    with style():
        figure, axes = canvas("", y, title)
        scale(axes, log_y=log_y)
        width = 0.8 / max(len(series), 1)
        for index, (color, (name, heights)) in enumerate(
            zip(cycle(len(series)), series.items(), strict=True)
        ):
            places = [group + (index - (len(series) - 1) / 2) * width for group in range(len(labels))]
            shown = [i for i, height in enumerate(heights) if height or not log_y]
            axes.bar(
                [places[i] for i in shown],
                [heights[i] for i in shown],
                width * 0.92,
                color=color,
                label=name,
            )
            reach = errors[name] if errors is not None else [(0.0, 0.0)] * len(labels)
            for i in shown:
                (below, above), place, height = reach[i], places[i], heights[i]
                if errors is not None:
                    axes.errorbar(
                        [place], [height], yerr=[[below], [above]], fmt="none", ecolor=INK, linewidth=1
                    )
                if len(labels) * len(series) <= MAX_VALUE_LABELS:
                    axes.annotate(
                        number(height),
                        (place, height + above),
                        (0, 2),
                        textcoords="offset points",
                        ha="center",
                        fontsize=8.5,
                    )
        axes.set_xticks(range(len(labels)), labels)
        axes.grid(axis="x", visible=False)
        axes.margins(y=0.1)
        legend(figure, len(series))
    return figure


def strip(patterns: Mapping[str, str], title: str = "") -> "Figure":
    """Layer patterns (strings of M, - and *) as strips of colored cells; layer 0 is on the left."""
    with style():
        figure, axes = canvas("layer", "", title, height=0.9 + 0.45 * len(patterns))
        for row, pattern in enumerate(patterns.values()):
            for kind, (color, _) in layer_styles().items():
                spans = [(place - 0.46, 0.92) for place, layer in enumerate(pattern) if layer == kind]
                axes.broken_barh(spans, (row - 0.36, 0.72), facecolors=color)
        axes.set_yticks(range(len(patterns)), list(patterns))
        axes.set_xlim(-0.6, max(map(len, patterns.values())) - 0.4)
        whole_numbers(axes)
        axes.tick_params(length=0)
        axes.invert_yaxis()
        axes.grid(visible=False)
        axes.spines[["left", "bottom"]].set_visible(False)
        kinds(figure, "".join(patterns.values()))
    return figure


def by_layer(pattern: str, heights: Sequence[float], y: str) -> "Figure":
    """A bar for each layer of a pattern, in the color of its kind; heights are written out for up to
    MAX_VALUE_LABELS layers."""
    with style():
        figure, axes = canvas("layer", y, "")
        colors = [layer_styles()[layer][0] for layer in pattern]
        axes.bar(range(len(pattern)), heights, 0.74, color=colors)
        if len(pattern) <= MAX_VALUE_LABELS:
            for place, height in enumerate(heights):
                axes.annotate(
                    number(height),
                    (place, height),
                    (0, 2),
                    textcoords="offset points",
                    ha="center",
                    fontsize=8.5,
                )
        whole_numbers(axes)
        axes.grid(axis="x", visible=False)
        axes.margins(x=0.02, y=0.1)
        kinds(figure, pattern)
    return figure


def kinds(figure: "Figure", layers: str) -> None:
    """A legend of the kinds of layers, above the axes."""
    patches = require("matplotlib.patches", "train")
    handles = [
        patches.Patch(color=color, label=name)
        for kind, (color, name) in layer_styles().items()
        if kind in layers
    ]
    figure.legend(handles=handles, loc="outside upper right", ncols=3, fontsize=9)


def whole_numbers(axes: "Axes") -> None:
    """Integer ticks on the x axis."""
    axes.xaxis.set_major_locator(require("matplotlib.ticker", "train").MaxNLocator("auto", integer=True))


def style() -> Any:
    """The matplotlib settings of all figures, as a context."""
    return require("matplotlib", "train").rc_context(STYLE)


def canvas(x: str, y: str, title: str, height: float = HEIGHT) -> "tuple[Figure, Axes]":
    """An empty figure with labeled axes; the height is in inches."""
    figure = require("matplotlib.figure", "train").Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlabel=x, ylabel=y, title=title)
    return figure, axes


def scale(axes: "Axes", *, log_x: bool = False, log_y: bool = False) -> None:
    """Set logarithmic axes.

    Their ticks, and ticks from 10,000 on, are written out with thousands separators.
    """
    ticker = require("matplotlib.ticker", "train")
    if log_x:
        axes.set_xscale("log")
    if log_y:
        axes.set_yscale("log")
    for axis, log in ((axes.xaxis, log_x), (axes.yaxis, log_y)):
        low, high = axis.get_view_interval()
        if log:
            multiples = (1, 2, 3, 4, 6, 8) if high < 10 * low else (1, 2, 5) if high < 1e3 * low else (1,)
            axis.set_major_locator(ticker.LogLocator(subs=multiples))
            axis.set_minor_formatter(ticker.NullFormatter())
        if log or high >= 1e4:
            axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: number(value, 10)))


def number(value: float, digits: int = 3) -> str:
    """A number with `digits` significant digits and thousands separators, without exponents."""
    return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:,.{digits}g}"


def legend(figure: "Figure", names: int) -> None:
    """A legend above the axes, if there is more than one name."""
    if names > 1:
        figure.legend(loc="outside upper right", ncols=min(names, 4), fontsize=9)


def cycle(count: int) -> list[str]:
    """The first `count` colors; they repeat after the last one."""
    return [COLORS[index % len(COLORS)] for index in range(count)]
