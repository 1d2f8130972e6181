"""The printer of plain text tables."""

from __future__ import annotations

import pytest

from ptqkit._tables import text_table


def test_columns_align_under_a_rule_as_long_as_the_longest_line():
    found = text_table(("layer", "bits", "notes"), [("a", "10", ""), ("head.2", "4", "kept as is")])
    assert found.splitlines() == [
        "layer   bits       notes",
        "------------------------",
        "a         10",
        "head.2     4  kept as is",
    ]


def test_left_columns_count_from_both_ends_and_widths_are_minima():
    found = text_table(("a", "b", "c"), [("x", "1", "yes")], left=(0, -1), widths=(3, 4, 0))
    assert found.splitlines() == ["a       b  c", "--------------", "x       1  yes"]


def test_a_header_alone_is_a_table():
    assert text_table(("a", "bb"), []) == "a  bb\n-----"


def test_rows_of_another_length_are_refused():
    with pytest.raises(ValueError):
        text_table(("a", "b"), [("x",)])
