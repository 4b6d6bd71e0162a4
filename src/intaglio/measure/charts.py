"""Geometry of the report's charts, as plain numbers and SVG path data for the templates.

Every chart lives in a square of 0..100 by 0..100, y downwards, which the page stretches over its
plotting area; lines keep their width (vector-effect) and labels are HTML beside it, so a chart is
as readable on a phone as on a desk.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from intaglio.measure.render import count

BUCKETS = 160  # points of a drawn curve; a longer one is drawn as bucket means over a hatched range
DOTS_UP_TO = 40  # points that are few enough to be marked one by one
NOT_IN_HEAT = ("norm", "layer_scalar")  # kept as floats: nothing to see


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """step and tokens: how far training was. value: a loss in nats, or another figure of that step."""

    step: int
    tokens: int
    value: float


@dataclass(frozen=True, kw_only=True)
class LayerRow:
    """Distance of a tensor from the original weights.

    relative_rms: for each variant ("stock", "fit", "GPTQ", "QAT"), RMS of the difference / RMS of the original.
    """

    tensor: str
    role: str
    relative_rms: dict[str, float]

    def snr_db(self, variant: str) -> float:
        """Signal-to-noise ratio; infinite for an exact tensor."""
        error = self.relative_rms[variant]
        return -20 * math.log10(error) if error > 0 else math.inf


@dataclass(frozen=True)
class Curve:
    """line, range, dots: SVG path data. ticks and lines: (position in percent, label)."""

    title: str
    unit: str
    line: str
    range: str
    dots: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    lines: list[tuple[float, str]]


def curve_of(rows: Sequence[Mapping[str, float]], key: str) -> list[CurvePoint]:
    """The points of a figure that some rows of a run's log have; see `train.run_folder.read_losses`."""
    return [CurvePoint(step=int(r["step"]), tokens=int(r["tokens"]), value=r[key]) for r in rows if key in r]


def curve(
    title: str,
    unit: str,
    points: Sequence[CurvePoint],
    lines: Sequence[tuple[str, float]] = (),
    *,
    factor: float = 1,
    until: float = 0,
) -> Curve | None:
    """Values over tokens, with named horizontal lines for comparison; None for fewer than two points.

    factor: of the points' values, for the unit. until: tokens that the axis reaches at least.
    """
    finite = [(float(p.tokens), factor * p.value) for p in points if math.isfinite(p.value)]
    if len(finite) < 2:
        return None
    values = [value for _, value in finite] + [value for _, value in lines]
    floor = 0.0 if min(values) < 0.5 * max(values) else min(values)
    y_at = _ticks(floor, max(values))
    x_end = max(until, *(tokens for tokens, _ in finite))
    x_at = _ticks(0.0, x_end)
    x_end = max(x_at[-1], x_end)

    def x(tokens: float) -> float:
        return round(100 * tokens / x_end, 2) if x_end else 0.0

    def y(value: float) -> float:
        return round(100 - 100 * (value - y_at[0]) / (y_at[-1] - y_at[0]), 2)

    buckets = _buckets(finite)
    line = " ".join(f"{x(t)},{y(mean)}" for t, mean, _, _ in buckets)
    span = " ".join(f"M{x(t)},{y(low)}V{y(high)}" for t, _, low, high in buckets if high > low)
    dots = " ".join(f"M{x(t)},{y(value)}h0" for t, value in finite) if len(finite) <= DOTS_UP_TO else ""
    return Curve(
        title=title,
        unit=unit,
        line=f"M{line}",
        range=span,
        dots=dots,
        x_ticks=[(x(t), count(t)) for t in x_at if t <= x_end],
        y_ticks=[(y(value), f"{value:.6g}") for value in y_at],
        lines=[(y(value), name) for name, value in lines],
    )


def _buckets(points: list[tuple[float, float]]) -> list[tuple[float, float, float, float]]:
    """(tokens, mean, lowest, highest) of neighbouring points."""
    width = math.ceil(len(points) / BUCKETS)
    groups = [points[i : i + width] for i in range(0, len(points), width)]
    rows = []
    for group in groups:
        values = [value for _, value in group]
        rows.append((sum(t for t, _ in group) / len(group), sum(values) / len(values), min(values), max(values)))
    return rows


def _ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Round numbers, about `wanted` + 1 of them, from at most `low` to at least `high`."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / wanted))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power * wanted >= span * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


@dataclass(frozen=True)
class Heat:
    """Relative RMS errors, one panel a variant, one row a module, one cell a layer.

    panels: variant to rows of (module, cells); a cell is (layer, strength in 0..1, error).
    """

    layers: int
    low: float
    high: float
    panels: dict[str, list[tuple[str, list[tuple[int, float, float]]]]]


def heat(rows: Sequence[LayerRow]) -> Heat | None:
    """None if no matrix of a numbered layer is among the rows."""
    cells = []
    for row in rows:
        found = re.search(r"layers\.(\d+)\.(.+?)(\.weight)?$", row.tensor)
        if found and row.role not in NOT_IN_HEAT:
            cells += [(v, found[2], int(found[1]), error) for v, error in row.relative_rms.items()]
    errors = [error for *_, error in cells if math.isfinite(error)]
    if not errors:
        return None
    low, high = min(errors), max(errors)
    panels: dict[str, dict[str, list[tuple[int, float, float]]]] = {}
    for variant, module, layer, error in cells:
        strength = round((error - low) / (high - low), 3) if high > low else 0.5
        panels.setdefault(variant, {}).setdefault(module, []).append((layer, strength, error))
    layers = 1 + max(layer for _, _, layer, _ in cells)
    return Heat(layers, low, high, {variant: list(modules.items()) for variant, modules in panels.items()})


@dataclass(frozen=True)
class Ring:
    """A closed SVG path within 0..100, and the angles in degrees at which to draw it."""

    path: str
    turns: list[float]


def rosette(text: str) -> list[Ring]:
    """A guilloche, a banknote's ornament, drawn from a hash of `text`.

    Equal artifacts have equal rosettes, and different ones hardly ever.
    """
    digest = hashlib.sha256(text.encode("utf-8", "replace")).digest()
    petals, more, mix = 4 + digest[0] % 7, 4 + digest[1] % 9, digest[2] / 255
    outer = _ring(petals + more, copies=9, middle=0.80, depth=0.18, overtone=0.10 + 0.25 * mix)
    inner = _ring(petals, copies=12, middle=0.42 + 0.04 * mix, depth=0.18, overtone=0.12)
    return [outer, inner]


def _ring(petals: int, *, copies: int, middle: float, depth: float, overtone: float, points: int = 720) -> Ring:
    """A wave of `petals` periods around a circle, to be woven with copies of itself."""
    coordinates = []
    for angle in (math.tau * i / points for i in range(points)):
        wave = (1 - overtone) * math.cos(petals * angle) + overtone * math.cos(3 * petals * angle + 1)
        x, y = ((middle + depth * wave) * 50 * f(angle) for f in (math.sin, math.cos))
        coordinates.append(f"{50 + x:.1f},{50 - y:.1f}")
    return Ring(f"M{' '.join(coordinates)}Z", [round(360 / petals / copies * i, 3) for i in range(copies)])
