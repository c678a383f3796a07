"""Inline SVG charts. Horizontal places are percentages: a chart fits any width and its text never scales."""

import math
from collections.abc import Sequence

from markupsafe import Markup, escape

from components.pages.text import THIN, count, percent, visible

Series = tuple[str, Sequence[tuple[float, float]]]
"""A style (`deconfounded`, `confounder`, `undefended`, `poison`, `clean`) and its points."""
HEIGHT = 168
"""Of a plot, in pixels."""


def interval(low: float, value: float, high: float, *, top: float, style: str, marks: Sequence[tuple[str, float]] = ()) -> Markup:
    """A dot with its interval on an axis from 0 to `top`; `marks` are (style, value) ticks, such as a limit."""
    grid = [_tag("line", x1=_at(tick / top), x2=_at(tick / top), y1=0, y2=28, class_="grid") for tick in ticks(top)]
    ticked = [_tag("line", x1=_at(mark / top), x2=_at(mark / top), y1=3, y2=25, class_=f"mark {kind}") for kind, mark in marks]
    bar = _tag("line", x1=_at(low / top), x2=_at(high / top), y1=14, y2=14, class_=f"interval {style}")
    dot = _tag("circle", cx=_at(value / top), cy=14, r=5, class_=f"dot {style}")
    label = f"{percent(value)}, between {percent(low)} and {percent(high)}"
    return _svg(28, "track", label, *grid, *ticked, bar, dot)


def axis(top: float) -> Markup:
    """The labelled axis from 0 to `top` (a fraction) that stands under a column of intervals."""
    return _svg(18, "track", f"axis from 0 to {percent(top)}", *(_label(_whole(tick), tick / top, 13) for tick in ticks(top)))


def bar(parts: Sequence[tuple[str, float]], *, total: float) -> Markup:
    """A horizontal bar of (style, length) parts, side by side, as long as their share of `total`."""
    done, drawn = 0.0, []
    for style, length in parts:
        drawn.append(_tag("rect", x=_at(done / total), y=4, width=_at(length / total), height=12, class_=f"fill {style}"))
        done += length
    return _svg(20, "track", "bar", *drawn)


def lines(series: Sequence[Series], *, top: float, label: str, rate: bool = False) -> Markup:
    """Curves over a common horizontal axis from 0; the vertical axis goes from 0 to `top`."""
    last = max(x for _, points in series for x, _ in points) or 1.0
    drawn = [_level(tick / top, _whole(tick) if rate else f"{tick:g}") for tick in ticks(top)]
    drawn += [_label(count(tick), tick / last, HEIGHT + 18) for tick in ticks(last)]
    curves = [_curve(style, [(x / last, y / top) for x, y in points]) for style, points in series]
    ends = [_tag("circle", cx=_at(p[-1][0] / last), cy=_down(p[-1][1] / top), r=3.5, class_=f"dot {style}") for style, p in series]
    inner = _tag("svg", _join(curves), viewBox="0 0 100 100", preserveAspectRatio="none", width="100%", height="100%")
    return _svg(HEIGHT, "plot", label, *drawn, inner, *ends)


def histogram(
    edges: Sequence[float],
    groups: Sequence[tuple[str, Sequence[int]]],
    *,
    label: str,
    names: Sequence[tuple[float, str]],
) -> Markup:
    """Bars per bin with the groups stacked; `names` label places of the horizontal axis."""
    first, span = edges[0], edges[-1] - edges[0]
    top = nice(max(max(map(sum, zip(*(counts for _, counts in groups), strict=True))), 1))
    drawn = [_level(tick / top, count(tick)) for tick in ticks(top) if tick == int(tick)]
    floor = [0] * (len(edges) - 1)
    for style, counts in groups:
        for i, bin_count in enumerate(counts):
            if bin_count:
                drawn.append(_column((edges[i] - first) / span, (edges[i + 1] - edges[i]) / span, floor[i] / top, bin_count / top, style))
            floor[i] += bin_count
    drawn += [_label(name, (place - first) / span, HEIGHT + 18) for place, name in names if edges[0] <= place <= edges[-1]]
    return _svg(HEIGHT, "plot", label, *drawn)


def scatter(series: Sequence[tuple[str, Sequence[float]]], *, levels: Sequence[tuple[float, str]], label: str) -> Markup:
    """Dots side by side at heights in [0, 1], the lowest of each series larger; `levels` are labelled lines across."""
    drawn = [_level(place, text) for place, text in levels]
    for style, heights in series:
        lowest = min(heights)
        for i, height in enumerate(heights):
            radius = 6 if height == lowest else 3.5
            drawn.append(_tag("circle", cx=_at((i + 0.5) / len(heights)), cy=_down(height), r=radius, class_=f"dot {style}"))
    return _svg(HEIGHT, "plot", label, *drawn)


def nice(top: float) -> float:
    """The smallest of 1, 2, 2.5, 5, 10 times a power of ten that is not below `top`."""
    if not (math.isfinite(top) and top > 0):
        return 1.0
    power = 10.0 ** math.floor(math.log10(top))
    return next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= top * (1 - 1e-9))


def ticks(top: float) -> list[float]:
    """About five round places from 0 to `top`."""
    step = nice(top / 5)
    return [round(i * step, 12) for i in range(int(top / step + 1e-9) + 1)]


def _column(left: float, width: float, floor: float, height: float, style: str) -> Markup:
    pixels = max(height * HEIGHT, 1.5)
    y = HEIGHT * (1 - floor) - pixels
    return _tag("rect", x=_at(left + width * 0.06), width=_at(width * 0.88), y=f"{y:.1f}", height=f"{pixels:.1f}", class_=f"fill {style}")


def _curve(style: str, points: Sequence[tuple[float, float]]) -> Markup:
    stride = -(-len(points) // 400)
    kept = [*points[:-1:stride], points[-1]]
    places = " ".join(f"{100 * x:.2f},{100 * (1 - min(max(y, 0.0), 1.0)):.2f}" for x, y in kept)
    return _tag("polyline", points=places, class_=f"curve {style}")


def _level(place: float, text: str) -> Markup:
    line = _tag("line", x1="0", x2="100%", y1=_down(place), y2=_down(place), class_="grid")
    return line + _tag("text", text, x=-8, y=f"{HEIGHT * (1 - place) + 4:.1f}", class_="left")


def _label(text: str, place: float, y: float) -> Markup:
    anchor = "first" if place < 0.02 else "last" if place > 0.98 else "middle"
    return _tag("text", text, x=_at(place), y=y, class_=anchor)


def _svg(height: int, style: str, label: str, *content: Markup) -> Markup:
    return _tag("svg", _join(content), class_=style, height=height, width="100%", role="img", aria_label=label)


def _tag(name: str, content: str = "", **attributes: object) -> Markup:
    written = (Markup('{}="{}"').format(key.rstrip("_").replace("_", "-"), visible(value)) for key, value in attributes.items())
    return Markup("<{0} {1}>{2}</{0}>").format(name, Markup(" ").join(written), escape(visible(content)))


def _join(content: Sequence[Markup]) -> Markup:
    return Markup("").join(content)


def _whole(rate: float) -> str:
    return f"{100 * rate:g}{THIN}%"


def _at(place: float) -> str:
    return f"{100 * min(max(place, 0.0), 1.0):.2f}%"


def _down(place: float) -> str:
    return f"{HEIGHT * (1 - min(max(place, 0.0), 1.0)):.1f}"
