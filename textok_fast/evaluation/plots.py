"""Line plots as SVG text, by hand: no plotting dependency, and they can be put straight into a page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

# Readable on white and on near-black; told apart without colour too (each line has its own dash and marker).
COLOURS = ("#2f7ed8", "#d9622b", "#2a9d6f", "#9b59b6", "#b8860b", "#c0397b")
DASHES = ("", "7 4", "2 3", "9 3 2 3", "12 4", "4 4")

WIDTH, HEIGHT = 500, 360
LEFT, RIGHT, BOTTOM = 66, 16, 52


@dataclass(frozen=True)
class Series:
    """One line: ``points`` are (x, y), ``labels`` (one a point, or none) are written above the markers, ``errors`` (the same)
    are half the lengths of the bars on them."""

    name: str
    points: Sequence[tuple[float, float]]
    labels: Sequence[str] = ()
    markers: bool = False
    errors: Sequence[float] = ()


@dataclass(frozen=True)
class Level:
    """A dashed horizontal line with its name written on it."""

    y: float
    name: str


def line_plot(
    title: str,
    x_label: str,
    y_label: str,
    series: Sequence[Series],
    levels: Sequence[Level] = (),
    log: bool = False,
    x_ticks: Sequence[float] = (),
    standalone: bool = False,
    log_x: bool = False,
) -> str:
    """An SVG element with axes, grid and legend. ``log``: both axes logarithmic, ``log_x``: x alone; what is not finite, or not
    above 0 there, is left out.

    Text and axes take the page's text colour; ``standalone`` adds a white ground and a dark one for the file's own sake.
    """
    series = [_drawable(line, log or log_x, log) for line in series]
    xs = [x for line in series for x, _ in line.points] or [1.0, 10.0]
    bars = [(x, y - error, y + error) for line in series for (x, y), error in zip(line.points, line.errors, strict=False)]
    ends = [y for _, *both in bars for y in both if y > 0 or not log]
    ys = [y for line in series for _, y in line.points] + ends + [level.y for level in levels] or [1.0, 10.0]
    x_axis = _Axis(min(xs), max(xs), LEFT, WIDTH - RIGHT, log or log_x, x_ticks, room=0.06 if log or log_x else 0.0)
    legend = len(series) > 1
    top = 36 + (20 * math.ceil(len(series) / 2) if legend else 0)
    y_axis = _Axis(min(ys), max(ys), HEIGHT - BOTTOM, top, log, (), room=0.09)

    ground = ' style="background:#fff;color:#1f2328"' if standalone else ""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"{ground}'
        f' aria-label="{escape(title)}" font-family="system-ui, sans-serif" font-size="14" fill="currentColor">',
        f"<title>{escape(title)}</title>",
    ]
    if standalone:
        parts.append(f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>')
    parts.append(f'<text x="{LEFT}" y="20" font-size="15" font-weight="600">{escape(title)}</text>')
    if legend:
        for index, line in enumerate(series):
            left, base = LEFT + (WIDTH - LEFT - RIGHT) / 2 * (index % 2), 42 + 20 * (index // 2)
            parts.append(_stroke(f"M{left:.1f} {base - 4}h26", index))
            parts.append(f'<text x="{left + 32:.1f}" y="{base}">{escape(line.name)}</text>')
    frame = 'fill="none" stroke="currentColor" stroke-opacity="0.6"'
    published = 'fill="none" stroke="#d83a3a" stroke-width="1.6" stroke-dasharray="6 4"'
    faint = 'stroke="currentColor" stroke-opacity="0.12"'
    for value in x_axis.ticks:
        x = x_axis.place(value)
        parts.append(f'<path d="M{x:.1f} {top}V{HEIGHT - BOTTOM}" {faint}/>')
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{number(value)}</text>')
    for value in y_axis.ticks:
        y = y_axis.place(value)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" {faint}/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4.5:.1f}" text-anchor="end">{number(value)}</text>')
    parts.append(f'<path d="M{LEFT} {top}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}" {frame}/>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle:.1f}" y="{HEIGHT - 12}" text-anchor="middle">{escape(x_label)}</text>')
    turned = f"translate(16 {(top + HEIGHT - BOTTOM) / 2:.1f}) rotate(-90)"
    parts.append(f'<text transform="{turned}" text-anchor="middle">{escape(y_label)}</text>')
    for level in levels:
        y = y_axis.place(level.y)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" {published}/>')
        parts.append(f'<text x="{LEFT + 8}" y="{y - 6:.1f}" fill="#d83a3a">{escape(level.name)}</text>')
    for index, line in enumerate(series):
        places = [(x_axis.place(x), y_axis.place(y)) for x, y in line.points]
        if places:
            parts.append(_stroke("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places), index))
        for (x, _y), (_, value), error in zip(places, line.points, line.errors, strict=False):
            if error > 0 and (value > error or not log):
                low, high = y_axis.place(value - error), y_axis.place(value + error)
                bar = f"M{x:.1f} {low:.1f}V{high:.1f}M{x - 4:.1f} {low:.1f}h8M{x - 4:.1f} {high:.1f}h8"
                parts.append(f'<path d="{bar}" fill="none" stroke="{_colour(index)}" stroke-width="1.4"/>')
        if line.markers:
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{_colour(index)}"/>' for x, y in places]
        for (x, y), label in zip(places, line.labels, strict=False):
            # above the first line's points and below the others', so that two lines close to each other stay readable
            below, anchor = index % 2 == 1, "end" if x > WIDTH - RIGHT - 60 else "start" if x < LEFT + 40 else "middle"
            place = f'x="{x:.1f}" y="{y + (19 if below else -9):.1f}" text-anchor="{anchor}"'
            parts.append(f'<text {place} fill="{_colour(index)}">{escape(label)}</text>')
    return "\n".join([*parts, "</svg>"])


def bar_plot(
    title: str, x_label: str, names: Sequence[str], parts: Sequence[tuple[str, Sequence[float]]], standalone: bool = False
) -> str:
    """An SVG element with a horizontal bar for each of ``names``, put together of ``parts``: (part, its length in each bar).

    Each bar fills the width, whatever its sum: shares are compared, not lengths.
    """
    row, top = 30, 36 + 20 * math.ceil(len(parts) / 2)
    height = top + row * max(1, len(names)) + 34
    left, right = 210, WIDTH + 120 - RIGHT
    ground = ' style="background:#fff;color:#1f2328"' if standalone else ""
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH + 120} {height}" role="img"{ground}'
        f' aria-label="{escape(title)}" font-family="system-ui, sans-serif" font-size="13" fill="currentColor">',
        f"<title>{escape(title)}</title>",
    ]
    if standalone:
        out.append(f'<rect width="{WIDTH + 120}" height="{height}" fill="#fff"/>')
    out.append(f'<text x="12" y="20" font-size="15" font-weight="600">{escape(title)}</text>')
    for index, (part, _) in enumerate(parts):
        start, base = 12 + 240 * (index % 2), 42 + 20 * (index // 2)
        out.append(f'<rect x="{start}" y="{base - 11}" width="14" height="12" fill="{_colour(index)}"/>')
        out.append(f'<text x="{start + 20}" y="{base}">{escape(part)}</text>')
    for line, name in enumerate(names):
        x: float = left
        y = top + row * line + 6
        out.append(f'<text x="{left - 8}" y="{y + 15}" text-anchor="end">{escape(name)}</text>')
        lengths = [values[line] if math.isfinite(values[line]) else 0.0 for _, values in parts]
        total = sum(lengths)
        for index, length in enumerate(lengths):
            width = (right - left) * length / total if total > 0 else 0.0
            if width > 0:
                out.append(f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{row - 9}" fill="{_colour(index)}"/>')
            if width > 34:
                share = f"{100 * length / total:.0f} %"
                out.append(f'<text x="{x + width / 2:.1f}" y="{y + 15}" text-anchor="middle" fill="#fff">{share}</text>')
            x += width
    out.append(f'<text x="{(left + right) / 2:.1f}" y="{height - 10}" text-anchor="middle">{escape(x_label)}</text>')
    return "\n".join([*out, "</svg>"])


def number(value: float) -> str:
    """A tick label: 4,096; 0.25; 2e-05."""
    if value and (abs(value) < 1e-3 or abs(value) >= 1e7):
        return f"{value:.0e}"
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


class _Axis:
    """Maps values of [low, high], widened by ``room`` of the length at both ends, to pixels."""

    def __init__(
        self, low: float, high: float, start: float, end: float, log: bool, ticks: Sequence[float], room: float
    ) -> None:
        self.log, self.start, self.end = log, start, end
        low, high = self._scale(low), self._scale(high)
        if high - low < 1e-9:
            low, high = low - 0.5, high + 0.5
        self.low, self.high = low - room * (high - low), high + room * (high - low)
        self.ticks = sorted(set(ticks)) or (self._log_ticks() if log else self._even_ticks())

    def _scale(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def place(self, value: float) -> float:
        return self.start + (self.end - self.start) * (self._scale(value) - self.low) / (self.high - self.low)

    def _log_ticks(self) -> list[float]:
        decades = range(math.floor(self.low), math.ceil(self.high) + 1)
        for steps in ((1,), (1, 3), (1, 2, 5)):
            ticks = [step * 10.0**decade for decade in decades for step in steps]
            ticks = [tick for tick in ticks if self.low <= math.log10(tick) <= self.high]
            if len(ticks) >= 4:
                break
        return ticks

    def _even_ticks(self) -> list[float]:
        raw = (self.high - self.low) / 5
        size = 10.0 ** math.floor(math.log10(raw))
        step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= raw * 0.999)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [round(index * step, 12) for index in range(first, last + 1)]


def _drawable(line: Series, log_x: bool, log_y: bool) -> Series:
    keep = [
        index
        for index, (x, y) in enumerate(line.points)
        if math.isfinite(x) and math.isfinite(y) and (x > 0 or not log_x) and (y > 0 or not log_y)
    ]
    labels = [line.labels[index] for index in keep if index < len(line.labels)]
    errors = [line.errors[index] for index in keep if index < len(line.errors)]
    return Series(line.name, [line.points[index] for index in keep], labels, line.markers, errors)


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _stroke(path: str, index: int) -> str:
    dash = DASHES[index % len(DASHES)]
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<path d="{path}" fill="none" stroke="{_colour(index)}" stroke-width="2"{dashed}/>'
