"""Plain text tables."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

__all__ = ["text_table"]


def text_table(
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    left: Collection[int] = (0,),
    widths: Sequence[int] | None = None,
) -> str:
    """Align columns of text under a header and a rule.

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
    lines = [list(header), *map(list, rows)]
    least = widths if widths is not None else [0] * len(header)
    wide = [max(w, *map(len, column)) for w, *column in zip(least, *lines, strict=True)]
    at_left = {k % len(header) for k in left}
    text = [
        "  ".join(
            cell.ljust(width) if k in at_left else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(line, wide, strict=True))
        ).rstrip()
        for line in lines
    ]
    text.insert(1, "-" * max(map(len, text)))
    return "\n".join(text)
