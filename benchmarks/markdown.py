"""Writes tables in Markdown: for the README and other pages, for the proof, and for comparisons."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def markdown_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], left: Collection[int] = (0,)
) -> list[str]:
    """Returns the lines of a Markdown table, padded so that it can also be read as plain text.

    The columns whose indices are in `left` are aligned left, all others right. A `|` in a cell is escaped.
    Raises ValueError if a row does not have as many cells as the header.
    """
    cells = [[cell.replace("|", r"\|") for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]

    def line(row: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * (width + 2) if i in left else "-" * (width + 1) + ":" for i, width in enumerate(widths)]
    return [line(cells[0]), f"|{'|'.join(rule)}|", *map(line, cells[1:])]
