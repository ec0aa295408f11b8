"""The picture of what a threshold does: recall against over-escalation, as plain SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 440, 64, 20, 44, 56
COLOURS = {"student": "#0b5cad", "base": "#8a8a8a", "bag_of_words": "#c26a00", "embedding": "#3d8b37"}
LABELS = {"student": "student", "base": "base model", "bag_of_words": "bag of words", "embedding": "sentence embedding"}


@dataclass(frozen=True)
class Mark:
    """A point on the picture: shares from 0 to 1, recall with its interval."""

    label: str
    over_escalation: float
    recall: float
    low: float
    high: float
    filled: bool


def _x(share: float, most: float) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * share / most


def _y(share: float) -> float:
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share


def draw(curves: Mapping[str, Sequence[tuple[float, float]]], marks: Sequence[Mark], title: str, most: float = 0.3) -> str:
    """An SVG document.

    Args:
        curves: model -> (over-escalation, recall), from (0, 0) upwards; drawn as far as an over-escalation of `most`.
        marks: points of the student.
        title: above the picture.
        most: the right end of the axis; extended where a mark lies beyond it.
    """
    most = min(1.0, max([most, *(mark.over_escalation + 0.05 for mark in marks)]))
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img" '
             f'font-family="sans-serif" font-size="13">', f"<title>{title}</title>", f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
             f'<text x="{LEFT}" y="22" font-size="15" fill="#222222">{title}</text>']
    for step in range(6):
        share, level = most * step / 5, step / 5
        parts += [f'<line x1="{LEFT}" y1="{_y(level):.1f}" x2="{WIDTH - RIGHT}" y2="{_y(level):.1f}" stroke="#e4e4e4"/>',
                  f'<text x="{LEFT - 8}" y="{_y(level) + 4:.1f}" text-anchor="end" fill="#555555">{100 * level:.0f} %</text>',
                  f'<text x="{_x(share, most):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle" fill="#555555">{100 * share:.0f} %</text>']
    parts += [f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 14}" text-anchor="middle" fill="#222222">'
              "handed off although nobody was needed (over-escalation)</text>",
              f'<text x="16" y="{(TOP + HEIGHT - BOTTOM) / 2}" text-anchor="middle" fill="#222222" '
              f'transform="rotate(-90 16 {(TOP + HEIGHT - BOTTOM) / 2})">hand-offs found (recall)</text>',
              f'<clipPath id="frame"><rect x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT - RIGHT}" height="{HEIGHT - TOP - BOTTOM}"/></clipPath>',
              f'<line x1="{_x(0, most):.1f}" y1="{_y(0):.1f}" x2="{_x(most, most):.1f}" y2="{_y(most):.1f}" '
              'stroke="#999999" stroke-dasharray="2 4"/>']
    for name, points in curves.items():
        path = " ".join(f"{_x(over, most):.1f},{_y(recall):.1f}" for over, recall in points)
        wide = 2.5 if name == "student" else 1.5
        parts.append(f'<polyline points="{path}" fill="none" stroke="{COLOURS[name]}" stroke-width="{wide}" clip-path="url(#frame)"/>')
    for row, name in enumerate(curves):
        legend = HEIGHT - BOTTOM - 12 - 18 * (len(curves) - 1 - row)
        parts += [f'<line x1="{WIDTH - 190}" y1="{legend - 4}" x2="{WIDTH - 166}" y2="{legend - 4}" stroke="{COLOURS[name]}" stroke-width="2.5"/>',
                  f'<text x="{WIDTH - 160}" y="{legend}" fill="#222222">{LABELS[name]}</text>']
    for mark in marks:
        x, y, colour = _x(mark.over_escalation, most), _y(mark.recall), COLOURS["student"]
        parts += [f'<line x1="{x:.1f}" y1="{_y(mark.low):.1f}" x2="{x:.1f}" y2="{_y(mark.high):.1f}" stroke="{colour}"/>',
                  f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{colour if mark.filled else "#ffffff"}" stroke="{colour}" stroke-width="2"/>',
                  f'<text x="{x + 9:.1f}" y="{y + 4:.1f}" fill="#222222">{mark.label}</text>']
    return "\n".join([*parts, "</svg>", ""])
