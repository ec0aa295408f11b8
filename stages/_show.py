"""Tables on standard output. What is printed below one stands after an empty line: Markdown reads the line under a table as a row of it."""

from __future__ import annotations


def markdown(table: list[list[str]]) -> str:
    """Header and rows as a Markdown table."""
    header, *body = table
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *body))


def plain(table: list[list[str]]) -> str:
    """Header and rows in columns."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table)
