# SPDX-License-Identifier: LGPL-2.1-or-later
"""Groups of horizontal bars as SVG, for the documentation. No dependency, and the same input gives the same bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

# Distinguishable without colour vision (Okabe and Ito), the first for what is ours.
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#999999", "#cc79a7")

_WIDTH = 860
_NAMES_WIDTH = 280
_VALUES_WIDTH = 90
_BAR = 13
_GAP = 10
_TOP = 62
_FONT = "font-family='sans-serif'"


@dataclass(frozen=True)
class Group:
    """Bars that are compared with each other: a title, and a value by each series' name; None where there is none."""

    title: str
    values: Mapping[str, float | None]


def bars(title: str, unit: str, groups: Sequence[Group], *, one_scale: bool = False) -> str:
    """The picture. Each group has its own scale, its longest bar being the full width, unless `one_scale` is set."""
    names = list(dict.fromkeys(name for group in groups for name in group.values))
    colours = {name: _COLOURS[number % len(_COLOURS)] for number, name in enumerate(names)}
    largest = max((_largest(group) for group in groups), default=1.0)
    parts = [_text(10, 22, title, size=16, weight="bold"), *_legend(names, colours, unit)]
    y = _TOP
    for group in groups:
        parts += _group(group, y, colours, largest if one_scale else _largest(group))
        y += len(group.values) * _BAR + _GAP
    head = f"<svg xmlns='http://www.w3.org/2000/svg' width='{_WIDTH}' height='{y}' viewBox='0 0 {_WIDTH} {y}'>"
    background = f"<rect width='{_WIDTH}' height='{y}' fill='#ffffff'/>"
    return "\n".join([head, background, *parts, "</svg>", ""])


def _group(group: Group, y: int, colours: Mapping[str, str], full: float) -> list[str]:
    middle = y + len(group.values) * _BAR / 2
    parts = [_text(_NAMES_WIDTH - 8, middle + 4, group.title, anchor="end")]
    for number, (name, value) in enumerate(group.values.items()):
        top = y + number * _BAR
        width = (value or 0.0) / full * (_WIDTH - _NAMES_WIDTH - _VALUES_WIDTH)
        parts.append(
            f"<rect x='{_NAMES_WIDTH}' y='{top}' width='{width:.1f}' height='{_BAR - 2}' fill='{colours[name]}'/>"
        )
        parts.append(_text(_NAMES_WIDTH + width + 5, top + _BAR - 4, _number(value), size=10))
    return parts


def _legend(names: Sequence[str], colours: Mapping[str, str], unit: str) -> list[str]:
    parts = [_text(_NAMES_WIDTH - 8, 46, unit, anchor="end", size=11)]
    x = float(_NAMES_WIDTH)
    for name in names:
        parts.append(f"<rect x='{x:.0f}' y='37' width='10' height='10' fill='{colours[name]}'/>")
        parts.append(_text(x + 14, 46, name, size=11))
        x += 30 + 6.6 * len(name)
    return parts


def _largest(group: Group) -> float:
    return max((value for value in group.values.values() if value), default=1.0)


def _number(value: float | None) -> str:
    if value is None:
        return "none"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 12, weight: str = "normal") -> str:
    return (
        f"<text x='{x:.1f}' y='{y:.1f}' {_FONT} font-size='{size}' font-weight='{weight}' text-anchor='{anchor}'"
        f" fill='#222222'>{escape(text)}</text>"
    )
