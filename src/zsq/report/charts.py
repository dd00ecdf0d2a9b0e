"""Charts as inline SVG: colours and fonts come from the page, so that they follow its light and dark dress."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from zsq.layers import Histogram

__all__ = ["Axis", "Point", "bars", "histogram", "interval", "key", "lines", "nice_ticks", "scatter"]

_LEFT, _RIGHT, _TOP, _BOTTOM = 52.0, 12.0, 12.0, 40.0
_SERIES = 8
"""Colours that the page knows, as classes s0, s1 ..."""


class Point(NamedTuple):
    """One mark of a scatter plot."""

    x: float
    y: float
    series: str
    says: str
    """What is shown where a pointer rests on it."""
    hollow: bool = False
    """Only its edge is drawn, for a control of the series."""


@dataclass(frozen=True)
class Axis:
    """How numbers from ``low`` to ``high`` become places from ``start`` to ``end`` in a picture."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    @classmethod
    def over(
        cls, values: Iterable[float], start: float, end: float, *, log: bool = False, zero: bool = False
    ) -> "Axis":
        """An axis that holds ``values`` (and 0, if ``zero``) with a little room; of a logarithm, the positive ones."""
        kept = [value for value in values if math.isfinite(value) and (value > 0 or not log)] or [1.0]
        low, high = min(kept), max(kept)
        if log:
            return cls(low / 1.3, high * 1.3, start, end, log=True)
        if zero:
            low, high = min(low, 0.0), max(high, 0.0)
        room = 0.06 * (high - low) or 0.5
        return cls(low if zero and low == 0 else low - room, high if zero and high == 0 else high + room, start, end)

    def at(self, value: float) -> float:
        """The place of ``value``, not beyond either end."""
        low, high, value = (self._scaled(each) for each in (self.low, self.high, value))
        share = min(max((value - low) / (high - low), 0.0), 1.0)
        return self.start + (self.end - self.start) * share

    def ticks(self) -> list[float]:
        """Round numbers along the axis."""
        if not self.log:
            return nice_ticks(self.low, self.high)
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for steps in ((1,), (1, 3), (1, 2, 5)):
            found = [step * 10.0**power for power in powers for step in steps]
            found = [value for value in found if self.low <= value <= self.high]
            if len(found) >= 3:
                break
        return found[:: math.ceil(len(found) / 7)] if found else [self.low, self.high]

    def _scaled(self, value: float) -> float:
        return math.log10(max(value, 1e-300)) if self.log else value


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` multiples of 1, 2 or 5 times a power of ten, from ``low`` to ``high``.

    >>> nice_ticks(0.0, 9.0)
    [0.0, 2.0, 4.0, 6.0, 8.0]
    """
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) + 0.0 for index in range(first, math.floor(high / step + 1e-9) + 1)]


def bars(
    values: Sequence[tuple[str, float]],
    label: str,
    *,
    unit: str = "",
    log: bool = False,
    marked: Iterable[str] = (),
    axis: str = "layer, in the order in which they run",
    width: float = 980.0,
) -> str:
    """A bar for each name; those that are ``marked`` in another colour. Many bars widen the picture."""
    width, height = max(width, 64.0 + 14.0 * len(values)), 230.0
    y = Axis.over([value for _, value in values], height - _BOTTOM, _TOP, log=log, zero=not log)
    room = (width - _LEFT - _RIGHT) / max(len(values), 1)
    ground = height - _BOTTOM if log else y.at(0.0)
    marked = set(marked)
    shapes = []
    for index, (name, value) in enumerate(values):
        top = y.at(value) if value > 0 or not log else ground
        shapes.append(
            f'<rect class="{"hot" if name in marked else "bar"}" x="{_LEFT + index * room + 0.12 * room:.1f}" '
            f'y="{min(top, ground):.1f}" width="{0.76 * room:.1f}" height="{max(abs(ground - top), 0.8):.1f}">'
            f"<title>{_text(name)}: {_number(value)}{unit}</title></rect>"
        )
    middle = (_LEFT + width - _RIGHT) / 2
    names = f'<text class="axis" x="{middle:.0f}" y="{height - 8:.0f}" text-anchor="middle">{_text(axis)}</text>'
    return _svg(width, height, label, [*_rules(y, width, unit), *shapes, names])


def lines(
    series: Mapping[str, Sequence[Sequence[tuple[float, float]]]], label: str, *, x_name: str, y_name: str
) -> str:
    """Lines by name, each of one or more stretches; the vertical axis is logarithmic if all is positive and wide."""
    width, height = 640.0, 260.0
    points = [point for stretches in series.values() for stretch in stretches for point in stretch]
    values = [value for _, value in points]
    log = min(values) > 0 and max(values) > 20 * min(values)
    x = Axis.over([place for place, _ in points], _LEFT, width - _RIGHT, zero=True)
    y = Axis.over(values, height - _BOTTOM, _TOP, log=log)
    shapes = []
    for index, (name, stretches) in enumerate(series.items()):
        for stretch in stretches:
            places = " ".join(f"{x.at(place):.1f},{y.at(value):.1f}" for place, value in stretch)
            shapes.append(
                f'<polyline class="line s{index % _SERIES}" points="{places}"><title>{_text(name)}</title></polyline>'
            )
            shapes += [
                f'<circle class="dot s{index % _SERIES}" cx="{x.at(place):.1f}" cy="{y.at(value):.1f}" r="2.4">'
                f"<title>{_text(name)}, {_number(place)}: {_number(value)}</title></circle>"
                for place, value in stretch
                if len(stretch) <= 60
            ]
    return _svg(
        width, height, label, [*_rules(y, width), *_feet(x, height), *_names(width, height, x_name, y_name), *shapes]
    )


def scatter(
    points: Sequence[Point],
    label: str,
    *,
    x_name: str,
    y_name: str,
    order: Sequence[str],
    rule: tuple[str, float] | None = None,
) -> str:
    """A mark for each point; colour and form say to which of the series in ``order`` it belongs.

    ``rule`` is a name and where its dashed line lies. A wide horizontal axis is logarithmic.
    """
    width, height = 560.0, 340.0
    places = [point.x for point in points]
    x = Axis.over(places, _LEFT, width - _RIGHT, log=min(places) > 0 and max(places) > 8 * min(places))
    y = Axis.over([point.y for point in points] + ([rule[1]] if rule else []), height - _BOTTOM, _TOP)
    shapes = []
    if rule is not None:
        name, level = rule[0], y.at(rule[1])
        shapes.append(
            f'<line class="rule" x1="{_LEFT:g}" x2="{width - _RIGHT:g}" y1="{level:.1f}" y2="{level:.1f}"/>'
            f'<text class="axis" x="{width - _RIGHT:g}" y="{level + 14:.1f}" text-anchor="end">{_text(name)}</text>'
        )
    for point in points:
        shapes.append(_mark(order.index(point.series), x.at(point.x), y.at(point.y), point.hollow, point.says))
    return _svg(
        width, height, label, [*_rules(y, width), *_feet(x, height), *_names(width, height, x_name, y_name), *shapes]
    )


def key(order: Sequence[str], shown: Collection[str], hollow: str = "") -> list[tuple[str, str]]:
    """The mark of each series that is ``shown`` as a small picture, and its name; last what a ``hollow`` mark says."""
    marks = [(_mark(place, 7, 7), name) for place, name in enumerate(order) if name in shown]
    marks += [(_mark(_SERIES - 1, 7, 7, hollow=True), hollow)] if hollow else []
    return [(f'<svg class="key" viewBox="0 0 14 14" aria-hidden="true">{mark}</svg>', name) for mark, name in marks]


def histogram(counts: Histogram, label: str, within: tuple[float, float] | None = None) -> str:
    """A small picture of ``counts``; what a quantizer represents is shaded."""
    width, height = 132.0, 34.0
    low, high = counts.low, counts.high if counts.high > counts.low else counts.low + 1.0
    x = Axis(low, high, 0.0, width)
    most = max(math.sqrt(count) for count in counts.counts) or 1.0
    room = width / len(counts.counts)
    path = f"M0,{height:g}"
    for index, count in enumerate(counts.counts):
        top = height - 30.0 * math.sqrt(count) / most  # square roots, so that tails are seen
        path += f"V{top:.1f}H{(index + 1) * room:.1f}"
    shapes = [f'<path class="bar" d="{path}V{height:g}Z"/>']
    if within is not None:
        start, end = x.at(within[0]), x.at(within[1])
        shapes.insert(
            0, f'<rect class="band" x="{start:.1f}" y="0" width="{max(end - start, 1):.1f}" height="{height:g}"/>'
        )
    return (
        f'<svg class="spark" viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{_text(label)}">'
        f"<title>{_text(label)}</title>{''.join(shapes)}</svg>"
    )


def interval(drop: float, low: float, high: float, end: float) -> str:
    """A rule from 0 to ``end`` points with an interval and a mark."""
    width, height = 360.0, 52.0
    x = Axis(min(0.0, low), end, 10.0, width - 10)
    ticks = "".join(
        f'<line class="grid" x1="{x.at(t):.1f}" x2="{x.at(t):.1f}" y1="8" y2="30"/>'
        f'<text class="axis" x="{x.at(t):.1f}" y="46" text-anchor="middle">{_number(t)}</text>'
        for t in nice_ticks(x.low, end)
    )
    return _svg(
        width,
        height,
        f"estimated drop {drop:.1f} points, between {low:.1f} and {high:.1f}",
        [
            ticks,
            f'<rect class="band" x="{x.at(low):.1f}" y="12" width="{max(x.at(high) - x.at(low), 2):.1f}" '
            'height="14" rx="4"/>',
            f'<line class="hotline" x1="{x.at(drop):.1f}" x2="{x.at(drop):.1f}" y1="8" y2="30"/>',
        ],
    )


def _mark(place: int, x: float, y: float, hollow: bool = False, says: str = "") -> str:
    """The mark of the series at ``place``: colours repeat in another form."""
    match place // _SERIES % 4:
        case 0:
            form = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.6"/>'
        case 1:
            form = f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8"/>'
        case 2:
            form = f'<path d="M{x:.1f},{y - 5.5:.1f}l5.5,5.5l-5.5,5.5l-5.5,-5.5Z"/>'
        case _:
            form = f'<path d="M{x:.1f},{y - 5:.1f}l5.2,9h-10.4Z"/>'
    title = f"<title>{_text(says)}</title>" if says else ""
    return f'<g class="{"mark hollow" if hollow else "mark"} s{place % _SERIES}">{form}{title}</g>'


def _rules(y: Axis, width: float, unit: str = "") -> list[str]:
    return [
        f'<line class="grid" x1="{_LEFT:g}" x2="{width - _RIGHT:g}" y1="{y.at(tick):.1f}" y2="{y.at(tick):.1f}"/>'
        f'<text class="axis" x="{_LEFT - 6:g}" y="{y.at(tick) + 4:.1f}" text-anchor="end">{_number(tick)}{unit}</text>'
        for tick in y.ticks()
    ]


def _feet(x: Axis, height: float) -> list[str]:
    return [
        f'<text class="axis" x="{x.at(tick):.1f}" y="{height - _BOTTOM + 16:.1f}" text-anchor="middle">'
        f"{_number(tick)}</text>"
        for tick in x.ticks()
    ]


def _names(width: float, height: float, x_name: str, y_name: str) -> list[str]:
    middle, side = (_LEFT + width - _RIGHT) / 2, (_TOP + height - _BOTTOM) / 2
    return [
        f'<text class="axis" x="{middle:.0f}" y="{height - 6:.0f}" text-anchor="middle">{_text(x_name)}</text>',
        f'<text class="axis" transform="translate(12,{side:.0f}) rotate(-90)" text-anchor="middle">'
        f"{_text(y_name)}</text>",
    ]


def _svg(width: float, height: float, label: str, parts: Sequence[str]) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {width:g} {height:g}" style="--width:{width:g}px" role="img" '
        f'aria-label="{_text(label)}">{"".join(parts)}</svg>'
    )


def _text(text: str) -> str:
    for sign, name in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ('"', "&quot;")):
        text = text.replace(sign, name)
    return text


def _number(value: float) -> str:
    """A number as short as it can be read.

    >>> [_number(value) for value in (0.0, 12.0, 0.25, 1500.0, 2_000_000.0, 0.00042)]
    ['0', '12', '0.25', '1,500', '2M', '0.00042']
    """
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.3g}M"
    if size >= 1000:
        return f"{value:,.0f}"
    if size == 0 or size >= 0.001:
        return f"{value:.3g}"
    return f"{value:.2g}"
