"""The ladder as a picture: a bar a rung, and a mark where the lesson stands."""

from html import escape
from typing import Any

ROW, LEFT, WIDTH = 34, 250, 720  # pixels


def plot_ladder(rows: list[dict[str, Any]]) -> str:
    """SVG of `rung`, `val_loss` (bar) and `lesson_val_loss` (black mark, where there is one)."""
    widest = max(max(row["val_loss"], row["lesson_val_loss"] or 0) for row in rows)
    scale = (WIDTH - LEFT - 60) / widest
    parts = []
    for place, row in enumerate(rows):
        top, bar = 40 + place * ROW, row["val_loss"] * scale
        parts.append(
            f'<text x="{LEFT - 8}" y="{top + 16}" text-anchor="end">{escape(row["rung"])}</text>'
            f'<rect x="{LEFT}" y="{top}" width="{bar:.1f}" height="22" fill="#7aa6c2"/>'
            f'<text x="{LEFT + bar + 10:.1f}" y="{top + 16}">{row["val_loss"]:.3f}</text>'
        )
        if row["lesson_val_loss"]:
            x = LEFT + row["lesson_val_loss"] * scale
            parts.append(f'<rect x="{x - 1:.1f}" y="{top - 3}" width="2" height="28"/>')
    height = 50 + len(rows) * ROW
    title = "validation loss, nats a character (black: the lesson's figure)"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'font-family="sans-serif" font-size="13"><rect width="100%" height="100%" fill="white"/>'
        f'<text x="{LEFT}" y="24">{title}</text>\n' + "\n".join(parts) + "\n</svg>\n"
    )
