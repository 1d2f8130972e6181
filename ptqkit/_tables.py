"""Plain text tables, at most 100 columns wide."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Iterable, Sequence

__all__ = ["WIDTH", "join_names", "table_width", "text_table", "wrap_line"]

WIDTH = 100
"""Characters of the longest line."""

# Names are not cut to less than this.
_LEAST = 12


def text_table(
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    left: Collection[int] = (0,),
    widths: Sequence[int] | None = None,
) -> str:
    """Align columns of text under a header and a rule.

    If the lines would be longer than ``WIDTH``, columns aligned to the left are shortened: names
    lose the beginning that all of the column have, then their middles.

    Parameters
    ----------
    header : sequence of str
    rows : iterable of sequences of str
        As many entries as the header has.
    left : collection of int
        Columns aligned to the left, counted from the end if negative; all others, to the right.
    widths : sequence of int, optional
        Least width of each column in characters, so that rows printed one by one align.

    Returns
    -------
    str
        Lines without trailing spaces or a final line break.
    """
    least = widths if widths is not None else [0] * len(header)
    columns = [list(cells) for cells in zip(header, *rows, strict=True)]
    at_left = {k % len(header) for k in left}
    _shorten([columns[k] for k in sorted(at_left)], table_width(columns) - WIDTH)
    wide = [max(w, *map(len, column)) for w, column in zip(least, columns, strict=True)]
    text = [
        "  ".join(
            cell.ljust(width) if k in at_left else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(line, wide, strict=True))
        ).rstrip()
        for line in zip(*columns, strict=True)
    ]
    text.insert(1, "-" * max(map(len, text)))
    return "\n".join(text)


def table_width(columns: Sequence[Sequence[str]]) -> int:
    """Return the characters that a line of these columns, header included, takes."""
    return sum(max(map(len, column)) for column in columns) + 2 * (len(columns) - 1)


def wrap_line(line: str) -> str:
    """Break a long line between words; what follows is indented."""
    return textwrap.fill(line, WIDTH, subsequent_indent="  ", break_on_hyphens=False)


def join_names(names: Sequence[str], near: str) -> str:
    """Join dotted names without the parts that they share with a name next to them, and again."""
    end = min((_shared([name, near]) for name in names), default=0)
    short = [name[end:] for name in names]
    return ", ".join([*short[:1], *(name[_shared(short) :] for name in short[1:])])


def _shorten(columns: list[list[str]], excess: int) -> None:
    """Take characters out of columns, in place, but for their headers: the widest ones first."""
    for column in sorted(columns, key=lambda cells: -max(map(len, cells))):
        if excess > 0:
            before = max(map(len, column))
            column[1:] = _without_prefix(column[1:])
            excess -= before - max(map(len, column))
    wide = [max(map(len, column)) for column in columns]
    while excess > 0 and max(wide) > _LEAST:
        wide[wide.index(max(wide))] -= 1
        excess -= 1
    for column, width in zip(columns, wide, strict=True):
        column[1:] = [_cut_middle(cell, width) for cell in column[1:]]


def _without_prefix(cells: list[str]) -> list[str]:
    """Replace the leading parts of dotted names that all cells share by two points."""
    end = _shared(cells)
    return [f"..{cell[end:]}" for cell in cells] if end > 2 else cells


def _shared(names: Sequence[str]) -> int:
    """Return how many characters of dotted names are parts that all of them begin with."""
    length = 0
    if len(names) > 1:
        for level in zip(*(name.split(".")[:-1] for name in names), strict=False):
            if len(set(level)) > 1:
                break
            length += len(level[0]) + 1
    return length


def _cut_middle(text: str, width: int) -> str:
    """Replace the middle of a text that is too long by two points; most of the end stays."""
    tail = 2 * width // 3
    return text if len(text) <= width else f"{text[: width - tail - 2]}..{text[-tail:]}"
