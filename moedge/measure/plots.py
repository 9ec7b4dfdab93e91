"""Plots as SVG text: lines, grouped bars, heat maps. No dependency, no script, readable in light and dark.

Colours come in two sets, by the reader's preference, on a ground of their own; lines differ in dash and marker too.
Knows no models and no files.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 380  # of a plot, in pixels
LEFT, TOP, BOTTOM, RIGHT = 64, 40, 52, 20
LEGEND_ROW, LEGEND_COLUMNS = 18, 3
LIGHT = ("#0b5fa5", "#b3420b", "#1a7a3f", "#8e3b93", "#806000", "#0f7580", "#a3265b", "#545b64")
DARK = ("#6cb4ff", "#ff9e64", "#6fd08c", "#d99be0", "#e0c050", "#63cfd8", "#ff8fb5", "#b4bbc4")
DASHES = ("", "6 3", "2 3", "8 3 2 3")
MARKERS: tuple[Callable[[float, float], str], ...] = (
    lambda x, y: f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"/>',
    lambda x, y: f'<rect x="{x - 3:.1f}" y="{y - 3:.1f}" width="6" height="6"/>',
    lambda x, y: f'<path d="M{x:.1f} {y - 4:.1f}l4 7h-8z"/>',
    lambda x, y: f'<path d="M{x:.1f} {y - 4:.1f}l4 4l-4 4l-4 -4z"/>',
)
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Axis:
    """One axis: what stands at it, whether it is logarithmic, and its ends where the data should not set them."""

    label: str
    log: bool = False
    least: float | None = None
    most: float | None = None


class _Scale:
    """Data to pixels of one axis, and where its ticks are."""

    def __init__(self, axis: Axis, values: Iterable[float], start: float, end: float) -> None:
        self.log, self._start, self._end = axis.log, start, end
        known = [v for v in values if math.isfinite(v) and not (axis.log and v <= 0)]
        if not known:
            raise ValueError(f"no value for the axis {axis.label!r}: nothing to plot")
        low = min(known) if axis.least is None else axis.least
        high = max(known) if axis.most is None else axis.most
        if low == high:
            low, high = (low / 2, high * 2) if axis.log else (low - 0.5, high + 0.5)
        self.ticks = _log_ticks(low, high) if axis.log else _ticks(low, high)
        self._low = self._position(low if axis.least is not None or axis.log else min(low, self.ticks[0]))
        self._high = self._position(high if axis.most is not None or axis.log else max(high, self.ticks[-1]))

    def _position(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def __call__(self, value: float) -> float:
        share = (self._position(value) - self._low) / (self._high - self._low)
        return self._start + share * (self._end - self._start)

    def shows(self, value: float) -> bool:
        return math.isfinite(value) and not (self.log and value <= 0)


def _ticks(low: float, high: float, most: int = 7) -> list[float]:
    """Round numbers in steps of 1, 2 or 5 that reach from `low` or below to `high` or above."""
    rough = (high - low) / (most - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(step for factor in (1, 2, 5, 10) if (step := factor * power) >= rough * 0.999)
    return [number * step for number in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten between the ends, with 2 and 5 between them where there are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if math.log10(high / low) < 3 else (1,)
    found = [f * 10.0**p for p in powers for f in factors if low * 0.999 <= f * 10.0**p <= high * 1.001]
    if len(found) < 2:
        return [low, high]
    step = math.ceil(len(found) / 9)
    return found[::step]


def number_text(value: float) -> str:
    """A tick's number: at most four digits."""
    return f"{value + 0.0:.4g}"


def lines(series: Mapping[str, Points], title: str, x: Axis, y: Axis, steps: bool = False) -> str:
    """One line for each series of (x, y); points that are not finite are left out, `steps` draws a staircase.

    Raises ValueError when there is nothing to plot.
    """
    height = _plot_height(series)
    across = _Scale(x, (a for points in series.values() for a, _ in points), LEFT, WIDTH - RIGHT)
    up = _Scale(y, (b for points in series.values() for _, b in points), height - BOTTOM, TOP)
    parts = [_axes(across, up, x, y, height)]
    for number, (name, points) in enumerate(series.items()):
        places = [(across(a), up(b)) for a, b in points if across.shows(a) and up.shows(b)]
        parts.append(_line(number, name, places, steps))
    parts.append(_legend(list(series), height, dashed=True))
    return _svg("".join(parts), title, WIDTH, height + _legend_height(series))


def _line(number: int, name: str, places: Points, steps: bool) -> str:
    if not places:
        return ""
    path = f"M{places[0][0]:.1f} {places[0][1]:.1f}"
    path += "".join(f"H{px:.1f}V{py:.1f}" if steps else f"L{px:.1f} {py:.1f}" for px, py in places[1:])
    marks = "" if steps or len(places) > 40 else "".join(_marker(number, px, py) for px, py in places)
    kind = number % len(LIGHT)
    return (
        f'<g><title>{_text(name)}</title><path class="line c{kind}" d="{path}"{_dash(number)}/>'
        f'<g class="fill f{kind}">{marks}</g></g>'
    )


def bars(
    groups: Sequence[str], series: Mapping[str, Sequence[float]], title: str, y: Axis, stacked: bool = False
) -> str:
    """For every group a bar of each series, side by side or stacked. `y` is linear and begins at 0.

    Raises ValueError when there is nothing to plot, a length differs, or a logarithm is asked for.
    """
    if y.log:
        raise ValueError(f"bars of {y.label!r} cannot stand on a logarithmic axis: plot lines")
    wrong = next((name for name, values in series.items() if len(values) != len(groups)), None)
    if wrong is not None or not groups:
        raise ValueError(f"{len(groups)} groups, but {wrong!r} has another number of values: give one for each group")
    height = _plot_height(series)
    tops = [sum(v for v in column if math.isfinite(v)) for column in zip(*series.values(), strict=True)]
    values = tops if stacked else [v for some in series.values() for v in some]
    up = _Scale(y, [0.0, *values], height - BOTTOM, TOP)
    wide = (WIDTH - LEFT - RIGHT) / len(groups)
    each = 0.8 * wide / (1 if stacked else len(series))
    parts = [_frame(up, None, y, height)]
    for place, group in enumerate(groups):
        base, left = 0.0, LEFT + (place + 0.1) * wide
        for number, (name, some) in enumerate(series.items()):
            value = some[place]
            if not math.isfinite(value):
                continue
            at = left if stacked else left + number * each
            ends = sorted((up(base), up(base + value)))
            parts.append(
                f'<rect class="fill f{number % len(LIGHT)}" x="{at:.1f}" y="{ends[0]:.1f}" width="{each * 0.94:.1f}" '
                f'height="{ends[1] - ends[0]:.1f}">'
                f"<title>{_text(f'{group}, {name}: {number_text(value)}')}</title></rect>"
            )
            base += value if stacked else 0.0
        if place % math.ceil(len(groups) / 16) == 0:
            parts.append(_label(LEFT + (place + 0.5) * wide, height - BOTTOM + 16, group, "middle"))
    parts.append(_legend(list(series), height))
    return _svg("".join(parts), title, WIDTH, height + _legend_height(series))


def heat(
    values: Sequence[Sequence[float]],
    title: str,
    x_label: str,
    y_label: str,
    marked: Sequence[Iterable[int]] | None = None,
) -> str:
    """A cell for each value, row by row from the top, full at the largest of its row; `marked` cells get a frame.

    Rows may differ in length; a value that is not finite stays empty. Raises ValueError when there is nothing to plot.
    """
    columns = max((len(row) for row in values), default=0)
    if not columns:
        raise ValueError(f"no values for {title!r}: nothing to plot")
    size = (WIDTH - LEFT - RIGHT) / columns
    tall = min(28.0, max(10.0, size))
    height = TOP + tall * len(values) + BOTTOM
    parts = []
    for row, cells in enumerate(values):
        frames = set(marked[row]) if marked is not None else set()
        known = [value for value in cells if math.isfinite(value)]
        low, high = min([0.0, *known]), max([0.0, *known])
        for column, value in enumerate(cells):
            share = (value - low) / (high - low) if math.isfinite(value) and high > low else 0.0
            text = f"{y_label} {row}, {x_label} {column}: {number_text(value)}"
            kept = ", kept" if column in frames else ""
            parts.append(
                f'<rect class="cell{" kept" if kept else ""}" x="{LEFT + column * size + 0.5:.1f}" '
                f'y="{TOP + row * tall + 0.5:.1f}" width="{max(0.5, size - 1):.1f}" height="{tall - 1:.1f}" '
                f'fill-opacity="{share:.3f}"><title>{_text(text + kept)}</title></rect>'
            )
        if row % math.ceil(len(values) / 32) == 0:
            parts.append(_label(LEFT - 8, TOP + (row + 0.5) * tall + 4, str(row), "end"))
    for column in range(0, columns, max(1, math.ceil(columns / 16))):
        parts.append(_label(LEFT + (column + 0.5) * size, TOP + tall * len(values) + 16, str(column), "middle"))
    parts += _names(x_label, y_label, height, TOP + tall * len(values) / 2)
    return _svg("".join(parts), title, WIDTH, height)


def _plot_height(series: Mapping[str, object]) -> int:
    if not series:
        raise ValueError("no series: nothing to plot")
    return HEIGHT


def _legend_height(names: Iterable[object]) -> int:
    return LEGEND_ROW * math.ceil(len(list(names)) / LEGEND_COLUMNS) + 8


def _axes(across: _Scale, up: _Scale, x: Axis, y: Axis, height: float) -> str:
    parts = [_frame(up, x.label, y, height)]
    for tick in across.ticks:
        place = across(tick)
        if LEFT - 1 <= place <= WIDTH - RIGHT + 1:
            parts.append(f'<path class="grid" d="M{place:.1f} {TOP}V{height - BOTTOM}"/>')
            parts.append(_label(place, height - BOTTOM + 16, number_text(tick), "middle"))
    return "".join(parts)


def _frame(up: _Scale, x_label: str | None, y: Axis, height: float) -> str:
    """The vertical axis with its ticks, the base line and both labels."""
    parts = []
    for tick in up.ticks:
        place = up(tick)
        if TOP - 1 <= place <= height - BOTTOM + 1:
            parts.append(f'<path class="grid" d="M{LEFT} {place:.1f}H{WIDTH - RIGHT}"/>')
            parts.append(_label(LEFT - 8, place + 4, number_text(tick), "end"))
    parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{height - BOTTOM}H{WIDTH - RIGHT}"/>')
    return "".join(parts + _names(x_label, y.label, height, (TOP + height - BOTTOM) / 2))


def _names(x_label: str | None, y_label: str, height: float, middle: float) -> list[str]:
    found = [f'<text transform="translate(16 {middle:.1f}) rotate(-90)" text-anchor="middle">{_text(y_label)}</text>']
    if x_label is not None:
        found.append(_label((LEFT + WIDTH - RIGHT) / 2, height - BOTTOM + 36, x_label, "middle"))
    return found


def _legend(names: Sequence[str], top: float, dashed: bool = False) -> str:
    parts, wide = [], (WIDTH - LEFT) / LEGEND_COLUMNS
    for number, name in enumerate(names):
        x, y = LEFT + number % LEGEND_COLUMNS * wide, top + 4 + number // LEGEND_COLUMNS * LEGEND_ROW
        kind = number % len(LIGHT)
        if dashed:
            marker = _marker(number, x + 11, y)
            parts.append(f'<path class="line c{kind}" d="M{x:.1f} {y:.1f}h22"{_dash(number)}/>')
            parts.append(f'<g class="fill f{kind}">{marker}</g>')
        else:
            parts.append(f'<rect class="fill f{kind}" x="{x:.1f}" y="{y - 6:.1f}" width="22" height="12"/>')
        parts.append(_label(x + 28, y + 4, name if len(name) <= 28 else name[:27] + "…", "start"))
    return "".join(parts)


def _marker(number: int, x: float, y: float) -> str:
    return MARKERS[(number + number // len(DASHES)) % len(MARKERS)](x, y)  # 16 pairs of dash and marker


def _dash(number: int) -> str:
    dash = DASHES[number % len(DASHES)]
    return f' stroke-dasharray="{dash}"' if dash else ""


def _label(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{_text(text)}</text>'


def _text(value: str) -> str:
    """Escaped, without the control characters that XML does not know."""
    return escape("".join(c for c in value if c.isprintable() or c == " "), quote=True)


def _colours(colours: Sequence[str]) -> str:
    return "".join(f".mp .c{n}{{stroke:{c}}}.mp .f{n}{{fill:{c}}}" for n, c in enumerate(colours))


def _svg(body: str, title: str, width: float, height: float) -> str:
    style = (
        ".mp{font:12px system-ui,sans-serif}.mp .ground{fill:#fff}.mp text{fill:#1f2328}"
        ".mp .axis{stroke:#57606a;fill:none}.mp .grid{stroke:#e3e6ea;fill:none}.mp .line{fill:none;stroke-width:2}"
        ".mp .cell{fill:#0b5fa5;stroke:#e3e6ea}"
        f".mp .cell.kept{{stroke:#b3420b;stroke-width:1.5}}{_colours(LIGHT)}"
        "@media(prefers-color-scheme:dark){.mp .ground{fill:#16191d}.mp text{fill:#e6e9ec}.mp .axis{stroke:#9aa3ad}"
        ".mp .grid{stroke:#30363d}.mp .cell{fill:#6cb4ff;stroke:#30363d}.mp .cell.kept{stroke:#ff9e64}"
        f"{_colours(DARK)}}}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="mp" role="img" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" height="{height:.0f}"><title>{_text(title)}</title><style>{style}</style>'
        f'<rect class="ground" width="100%" height="100%"/>'
        f'<text x="{width / 2:.0f}" y="24" text-anchor="middle" font-size="14" font-weight="600">{_text(title)}</text>'
        f"{body}</svg>"
    )
