"""Charts of report.html, in SVG by hand: colors are classes of the page's style sheet.

Systems differ in shape as well as in color.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

WIDTH, HEIGHT = 520, 300
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 26, 46  # room for ticks, labels and the legend
MOST_POINTS = 400  # of a curve; more cannot be told apart at this width
DOTS_TO = 150.0  # per cent WER; clips beyond are drawn at the edge

SVG = Markup('<svg viewBox="0 0 {width} {height}" role="img" aria-label="{title}">{content}</svg>')
LINE = Markup('<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>')
TEXT = Markup('<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{text}</text>')
POLYLINE = Markup('<polyline class="curve series{number}" points="{points}"/>')
# One element for all dots: markers at the points of a line that is not drawn. Of the last point
# none is drawn: it is there twice. report.js shows the link on the dot below the pointer.
DOTS = Markup(
    '<marker id="dot" markerUnits="userSpaceOnUse" overflow="visible">'
    '<circle class="dot" r="4"/></marker>'
    '<path id="dots" marker-start="url(#dot)" marker-mid="url(#dot)" d="M{points}"/>'
    '<a id="pointed" tabindex="-1"><circle class="dot" r="4"><title></title></circle></a>'
)
MARKERS = (  # one shape for each system, around (0, 0)
    "M-5,0a5,5 0 1,0 10,0a5,5 0 1,0 -10,0z",
    "M-5,-5h10v10h-10z",
    "M0,-6l6,11h-12z",
    "M0,-7l6,7l-6,7l-6,-7z",
)
MARKER = Markup(
    '<path class="marker series{number}" transform="translate({x:.1f},{y:.1f})" d="{d}"/>'
)


@dataclass(frozen=True)
class Axes:
    """The frame of a chart, and where values lie in it."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]

    def x(self, value: float) -> float:
        low, high = self.x_range
        return LEFT + (WIDTH - LEFT - RIGHT) * (value - low) / ((high - low) or 1.0)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / ((high - low) or 1.0)

    def frame(self, x_label: str, y_label: str, x_ticks: dict[float, str] | None = None) -> Markup:
        """Grid, ticks and labels; `x_ticks` names positions in place of numbers."""
        parts = []
        left, right, bottom = LEFT, WIDTH - RIGHT, HEIGHT - BOTTOM
        for value in ticks(*self.y_range):
            y = self.y(value)
            parts.append(LINE.format(kind="grid", x1=left, y1=y, x2=right, y2=y))
            parts.append(TEXT.format(kind="y tick", x=left - 6, y=y + 4, text=number(value)))
        named = x_ticks or {value: number(value) for value in ticks(*self.x_range)}
        for value, name in named.items():
            parts.append(TEXT.format(kind="x tick", x=self.x(value), y=bottom + 17, text=name))
        parts.append(LINE.format(kind="axis", x1=left, y1=bottom, x2=right, y2=bottom))
        middle = (left + right) / 2
        parts.append(TEXT.format(kind="x label", x=middle, y=HEIGHT - 6, text=x_label))
        parts.append(TEXT.format(kind="label", x=4, y=14, text=y_label))
        return Markup().join(parts)


def ticks(low: float, high: float) -> list[float]:
    """Round numbers that divide a range into about five parts.

    >>> ticks(0, 117.3), ticks(0.8, 1.3)
    ([0.0, 20.0, 40.0, 60.0, 80.0, 100.0], [0.8, 0.9, 1.0, 1.1, 1.2, 1.3])
    """
    rough = ((high - low) or 1.0) / 6
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, 10) for index in range(first, last + 1)]


def rounded(low: float, high: float) -> tuple[float, float]:
    """A range widened to the ticks around it.

    >>> rounded(0.0, 153.2), rounded(0.98, 1.22)
    ((0.0, 200.0), (0.95, 1.25))
    """
    marks = ticks(low, high)
    step = marks[1] - marks[0]
    return (
        marks[0] - step * (marks[0] > low),
        marks[-1] + step * (marks[-1] < high),
    )


def number(value: float) -> str:
    """A tick's number, with a true minus."""
    return f"{value:g}".replace("-", "−")


def marker(series: int, x: float, y: float) -> Markup:
    shape = MARKERS[series % len(MARKERS)]
    return MARKER.format(number=series % len(MARKERS), x=x, y=y, d=shape)


def legend(names: Sequence[str]) -> Markup:
    """The series' markers and names, at the top right, the last one at the edge."""
    parts, right = [], float(WIDTH - RIGHT)
    for series, name in reversed(list(enumerate(names))):
        right -= 8 * len(name) + 26
        parts.append(marker(series, right, 10))
        parts.append(TEXT.format(kind="label", x=right + 10, y=14, text=name))
    return Markup().join(parts)


def svg(title: str, content: Markup) -> Markup:
    return SVG.format(width=WIDTH, height=HEIGHT, title=title, content=content)


# ------ charts


def dots(rates: Sequence[tuple[float, float]], x_name: str, y_name: str) -> tuple[Markup, int]:
    """WER of two systems, a dot for each clip.

    Args:
        rates: WER of the first and of the second system for each clip, in the order of the rows.

    Returns:
        The chart, and the number of clips drawn at its edge.
    """
    highest = max(map(max, rates), default=DOTS_TO)
    limit = min(DOTS_TO, rounded(0.0, highest or 1.0)[1])
    axes = Axes((0.0, limit), (0.0, limit))
    parts = [axes.frame(f"WER of {x_name}, %", f"WER of {y_name}, %")]
    end = {"x2": axes.x(limit), "y2": axes.y(limit)}
    parts.append(LINE.format(kind="equal", x1=axes.x(0), y1=axes.y(0), **end))
    places = [
        f"{axes.x(min(first, limit)):.1f},{axes.y(min(second, limit)):.1f}"
        for first, second in rates
    ]
    parts.append(DOTS.format(points=" ".join(places + places[-1:])))
    beyond = sum(max(pair) > limit for pair in rates)
    return svg(f"{x_name} against {y_name}, a dot a clip", Markup().join(parts)), beyond


def groups(
    names: Sequence[str], rates: dict[str, list[tuple[float, tuple[float, float] | None] | None]]
) -> Markup:
    """WER of each system in each group, with intervals where they are known.

    Args:
        names: of the groups.
        rates: for each system a rate and its interval for each group; `None` for a group without.
    """
    known = [rate for own in rates.values() for rate in own if rate]
    highest = max((max(wer, *(interval or (0.0,))) for wer, interval in known), default=100.0)
    axes = Axes((-0.5, len(names) - 0.5), rounded(0.0, highest or 1.0))
    parts = [axes.frame("", "WER, %", dict(enumerate(names))), legend(list(rates))]
    for series, own in enumerate(rates.values()):
        offset = 14 * (series - (len(rates) - 1) / 2)  # side by side
        for group, rate in enumerate(own):
            if rate is None:
                continue
            wer, interval = rate
            x = axes.x(group) + offset
            if interval:
                low, high = (axes.y(value) for value in interval)
                kind = f"interval series{series % len(MARKERS)}"
                parts.append(LINE.format(kind=kind, x1=x, y1=low, x2=x, y2=high))
            parts.append(marker(series, x, axes.y(wer)))
    return svg("WER by group, each system", Markup().join(parts))


def curves(records: Sequence[dict[str, Any]], keys: dict[str, str], y_label: str) -> Markup | None:
    """Curves over the steps of a run; `None` if no series has two points.

    Args:
        records: lines of metrics.jsonl.
        keys: name in the legend by key of the records.
    """
    series = {name: points(records, key) for key, name in keys.items()}
    series = {name: own for name, own in series.items() if own}
    if max(map(len, series.values()), default=0) < 2:
        return None
    steps, values = (
        sorted(point[axis] for own in series.values() for point in own) for axis in (0, 1)
    )
    axes = Axes((steps[0], steps[-1]), rounded(values[0], values[-1]))
    parts = [axes.frame("step", y_label), legend(list(series))]
    for index, own in enumerate(series.values()):
        places = [(axes.x(step), axes.y(value)) for step, value in own]
        joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(POLYLINE.format(number=index, points=joined))
        if len(places) <= 50:  # beyond, markers hide the curve
            parts += [marker(index, x, y) for x, y in places]
    return svg(f"{y_label} by step", Markup().join(parts))


def points(records: Sequence[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """Steps and finite values of one key, thinned to what can be seen."""
    pairs = [(record.get("step"), record.get(key)) for record in records]
    numbers = [
        (float(step), float(value))
        for step, value in pairs
        if isinstance(step, int) and isinstance(value, (int, float)) and math.isfinite(value)
    ]
    return numbers[:: math.ceil(len(numbers) / MOST_POINTS) or 1]
