"""Tables in Markdown, as documents and reports have them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown_table(
    heads: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Iterable[int] = ()
) -> str:
    r"""A table; of each cell the line breaks become spaces and the bars are escaped.

    Args:
        heads: The headings.
        rows: The cells, as many a row as there are headings.
        numbers: Positions of the columns that are set to the right.

    Raises:
        ValueError: A row has more or fewer cells than there are headings.

    Example:
        >>> print(markdown_table(("name", "W"), [("a|b", "3")], numbers=[1]))
        | name | W |
        | --- | ---: |
        | a\|b | 3 |
    """
    right = set(numbers)
    marks = ["---:" if i in right else "---" for i in range(len(heads))]
    lines = []
    for row in (heads, marks, *rows):
        if len(row) != len(heads):
            raise ValueError(f"a row must have {len(heads)} cells, got {list(row)}")
        cells = (" ".join(cell.split()).replace("|", "\\|") for cell in row)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
