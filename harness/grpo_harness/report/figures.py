"""The pictures of the page, as inline SVG that takes its colours from the page.

A picture has a description for those who do not see it, and every mark says what it is when it is
pointed at. Drawn here and not by matplotlib: a page has some forty small pictures, whose colours
follow the reader's light or dark mode.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from grpo_harness.report.hostile import line

WIDTH, HEIGHT = 280, 220
"""The size of a picture, in its own units."""

_LEFT, _RIGHT, _TOP, _BOTTOM = 40, 8, 10, 34


@dataclass(frozen=True)
class Scale:
    """A linear map of numbers from ``low`` to ``high``; what is outside goes to the nearer end."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Return the place of a number."""
        inside = min(max(value, self.low), self.high)
        span = self.high - self.low or 1.0
        return self.start + (inside - self.low) / span * (self.end - self.start)


@dataclass(frozen=True)
class Dot:
    """A problem: its rates then and now, and what is shown when it is pointed at."""

    then: float
    now: float
    flip: str
    said: str


@dataclass(frozen=True)
class Bar:
    """An interval around a change: its bounds, and how far harm may go in which direction."""

    lower: float
    delta: float
    upper: float
    tolerated: tuple[float, ...]
    ignored: tuple[float, ...]
    verdict: str


@dataclass(frozen=True)
class Moment:
    """A measurement over time: its bounds, its verdict, and what is shown when it is pointed at."""

    lower: float
    value: float
    upper: float
    verdict: str
    said: str


def scatter(dots: Sequence[Dot], title: str) -> Markup:
    """Draw each problem by its share of correct completions, then and now."""
    x, y = _scales(0.0, 1.0, 0.0, 1.0)
    marks = [f'<path class="even" d="M{x(0):.1f} {y(0):.1f}L{x(1):.1f} {y(1):.1f}"/>']
    for number, dot in enumerate(dots):
        # Problems with the same counts would hide each other: each is moved by up to 4 units.
        angle, far = number * 2.399963, 4 * math.sqrt((number % 16) / 16)
        cx, cy = x(dot.then) + far * math.cos(angle), y(dot.now) + far * math.sin(angle)
        said = line(dot.said)
        if dot.flip:
            up = -1 if dot.flip == "gained" else 1
            d = f"M{cx - 4:.1f} {cy - 3 * up:.1f}h8l-4 {7 * up}z"
            marks.append(f'<path class="{dot.flip}" d="{d}"><title>{said}</title></path>')
        else:
            at = f'cx="{cx:.1f}" cy="{cy:.1f}"'
            marks.append(f'<circle class="dot" {at} r="2.6"><title>{said}</title></circle>')
    return _picture(
        title, marks, x, y, [(v, f"{v:.0%}") for v in (0.0, 0.5, 1.0)],
        [(v, f"{v:.0%}") for v in (0.0, 0.5, 1.0)], "correct then", "now",
    )  # fmt: skip


def lengths(then: Sequence[float], now: Sequence[float], title: str) -> Markup:
    """Draw how the problems' mean lengths in tokens are distributed, now and then."""
    low, high = min([*then, *now]), max([*then, *now])
    if high <= low:
        low, high = low - 0.5, high + 0.5
    bins = 16
    sides = [_shares(side, low, high, bins) for side in (then, now) if side]
    x, y = _scales(low, high, 0.0, max(max(side) for side in sides))
    width, marks = (high - low) / bins, []
    for number, share in enumerate(sides[-1]):
        left, right = x(low + number * width), x(low + (number + 1) * width)
        if share:
            marks.append(
                f'<rect class="bar" x="{left + 0.5:.1f}" y="{y(share):.1f}" '
                f'width="{right - left - 1:.1f}" height="{y(0) - y(share):.1f}"><title>'
                f"{share:.0%} of the problems now</title></rect>"
            )
    if then:
        steps = "".join(
            f"V{y(share):.1f}H{x(low + (number + 1) * width):.1f}"
            for number, share in enumerate(sides[0])
        )
        marks.append(f'<path class="then" d="M{x(low):.1f} {y(0):.1f}{steps}V{y(0):.1f}"/>')
    ends = [(value, f"{value:.3g}") for value in (low, (low + high) / 2, high)]
    top = max(max(side) for side in sides)
    return _picture(title, marks, x, y, ends, [(top, f"{top:.0%}")], "tokens", "problems")


def lines(curves: Sequence[tuple[str, Sequence[tuple[float, float, float, float]]]],
          title: str, along: str, up: str, *, low: float | None = None,
          high: float | None = None) -> Markup:  # fmt: skip
    """Draw curves: for each its class, and its points as (x, lower, value, upper)."""
    points = [point for _, curve in curves for point in curve]
    values = [v for _, *of in points for v in of if math.isfinite(v)]
    bottom = min(values) if low is None else low
    top = max(values) if high is None else high
    if top <= bottom:
        bottom, top = bottom - 0.5, top + 0.5
    x, y = _scales(min(p[0] for p in points), max(p[0] for p in points), bottom, top)
    marks = []
    for kind, curve in curves:
        if len(curve) > 1:
            there = " ".join(f"{x(at):.1f},{y(upper):.1f}" for at, _, _, upper in curve)
            back = " ".join(f"{x(at):.1f},{y(lower):.1f}" for at, lower, _, _ in curve[::-1])
            marks.append(f'<polygon class="band {kind}" points="{there} {back}"/>')
            way = " ".join(f"{x(at):.1f},{y(value):.1f}" for at, _, value, _ in curve)
            marks.append(f'<polyline class="line {kind}" points="{way}"/>')
        for at, lower, value, upper in curve if len(curve) <= 40 else ():
            said = f"{kind}, {at:g}: {value:.4g} ({lower:.4g} to {upper:.4g})"
            marks.append(
                f'<circle class="point {kind}" cx="{x(at):.1f}" cy="{y(value):.1f}" r="3">'
                f"<title>{said}</title></circle>"
            )
    ends = [(x.low, f"{x.low:g}"), (x.high, f"{x.high:g}")]
    heights = [(v, f"{v:.3g}") for v in (bottom, (bottom + top) / 2, top)]
    return _picture(title, marks, x, y, ends if x.high > x.low else ends[:1], heights, along, up)


def timeline(
    moments: Sequence[Moment],
    steps: Sequence[tuple[int, int, float]],
    marks: Sequence[tuple[float, str, str]],
    title: str,
    ends: tuple[str, str],
    up: Callable[[float], str],
) -> Markup:
    """Draw measurements in their order, with their intervals.

    ``steps`` are levels, as (first, last, value), ``marks`` upright lines as (place, class, what it
    says), ``ends`` the names of the first and the last, and ``up`` the text of a value.
    """
    bottom, top = min(m.lower for m in moments), max(m.upper for m in moments)
    if top <= bottom:
        bottom, top = bottom - 0.5, top + 0.5
    x, y = _scales(-0.5, len(moments) - 0.5, bottom, top)
    drawn = [
        f'<path class="{kind}" d="M{x(at):.1f} {y.start}V{y.end}">'
        f"<title>{line(said)}</title></path>"
        for at, kind, said in marks
    ]
    drawn += [
        f'<path class="then" d="M{x(first - 0.4):.1f} {y(value):.1f}H{x(last + 0.4):.1f}"/>'
        for first, last, value in steps
    ]
    for at, moment in enumerate(moments):
        kind = moment.verdict.lower() or "now"
        drawn.append(
            f'<path class="axis" d="M{x(at):.1f} {y(moment.lower):.1f}V{y(moment.upper):.1f}"/>'
            f'<circle class="point {kind}" cx="{x(at):.1f}" cy="{y(moment.value):.1f}" r="3">'
            f"<title>{line(moment.said)}</title></circle>"
        )
    along = [(x.low, ends[0]), (x.high, ends[1])]
    heights = [(value, up(value)) for value in (bottom, (bottom + top) / 2, top)]
    return _picture(title, drawn, x, y, along[: len(moments)], heights, "commits", "")


def interval(bar: Bar, reach: float, title: str) -> Markup:
    """Draw one interval of a row; rows with the same ``reach`` share a scale."""
    x = Scale(-reach, reach, 4, 296)
    marks = [f'<path class="zero" d="M{x(0):.1f} 0V20"/>']
    marks += [f'<path class="margin" d="M{x(v):.1f} 0V20"/>' for v in bar.tolerated]
    marks += [f'<path class="minimum" d="M{x(v):.1f} 5V15"/>' for v in bar.ignored]
    kind = bar.verdict.lower()
    marks.append(f'<path class="whisker {kind}" d="M{x(bar.lower):.1f} 10H{x(bar.upper):.1f}"/>')
    marks.append(f'<circle class="point {kind}" cx="{x(bar.delta):.1f}" cy="10" r="4"/>')
    said = line(title)
    return Markup(  # noqa: S704 - numbers, and a text that is escaped
        '<svg class="interval" viewBox="0 0 300 20" preserveAspectRatio="none" role="img" '
        f'aria-label="{said}"><title>{said}</title>{"".join(marks)}</svg>'
    )


def _shares(values: Sequence[float], low: float, high: float, bins: int) -> list[float]:
    found = [0] * bins
    for value in values:
        found[min(int((value - low) / (high - low) * bins), bins - 1)] += 1
    return [number / len(values) for number in found]


def _scales(left: float, right: float, bottom: float, top: float) -> tuple[Scale, Scale]:
    return (Scale(left, right, _LEFT, WIDTH - _RIGHT), Scale(bottom, top, HEIGHT - _BOTTOM, _TOP))


def _picture(
    title: str,
    marks: Sequence[str],
    x: Scale,
    y: Scale,
    along: Sequence[tuple[float, str]],
    up: Sequence[tuple[float, str]],
    below: str,
    beside: str,
) -> Markup:
    """Put marks between their axes."""
    said = line(title)
    return Markup(  # noqa: S704 - numbers, and texts that are escaped
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{said}">'
        + "".join(_axes(x, y, along, up, below, beside))
        + "".join(marks)
        + "</svg>"
    )


def _axes(
    x: Scale,
    y: Scale,
    along: Sequence[tuple[float, str]],
    up: Sequence[tuple[float, str]],
    below: str,
    beside: str,
) -> Iterator[str]:
    yield f'<path class="axis" d="M{x.start} {y.end}V{y.start}H{x.end}"/>'
    for value, name in along:
        end = "start" if value == x.low else "end" if value == x.high else "middle"
        yield _text(x(value), y.start + 14, name, end)
    for value, name in up:
        yield _text(x.start - 4, y(value) + 4, name, "end")
    yield _text((x.start + x.end) / 2, HEIGHT - 5, below, "middle", "name")
    yield _text(x.start + 4, y.end + 8, beside, "start", "name")


def _text(x: float, y: float, text: str, anchor: str, kind: str = "tick") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text class="{kind}" {place}>{line(text)}</text>'
