"""Tables for people: plain columns on a terminal, and the same cells in Markdown.

Called by every command that shows several numbers.
"""

from collections.abc import Sequence


def table(rows: Sequence[Sequence[object]], header: Sequence[str]) -> str:
    """Plain columns under a ruled header: the first column to the left, the others to the right.

    Floats show one decimal, integers thousands; anything else its str().
    Raises: ValueError for a row whose length is not the header's.
    """
    cells = [list(header), *([_cell(value) for value in row] for row in rows)]
    if any(len(row) != len(header) for row in cells):
        raise ValueError(f"every row needs {len(header)} cells, like the header {list(header)}")
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    lines = []
    for first, *others in cells:
        right = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        lines.append("  ".join([first.ljust(widths[0]), *right]).rstrip())
    return "\n".join(lines)


def markdown_table(rows: Sequence[Sequence[object]], header: Sequence[str]) -> str:
    """The same cells as a table of Markdown."""
    cells = [
        list(header),
        ["---"] * len(header),
        *([_cell(value) for value in row] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _cell(value: object) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.1f}" if isinstance(value, float) else str(value)
