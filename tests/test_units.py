"""Sizes as texts."""

import pytest

from ptqkit._units import show_bytes

MIB = 2**20


@pytest.mark.parametrize(
    ("size", "beside", "text"),
    [
        (1024, None, "1 KiB"),
        (10 * MIB, None, "10 MiB"),
        (3 * 2**30, 4 * MIB, "3,072 MiB"),
        (40 * MIB + 300_000, 40 * MIB, "40.29 MiB"),
        (40 * MIB, 40 * MIB + 300_000, "40.00 MiB"),
        (40 * MIB, 40 * MIB, "40 MiB"),
    ],
)
def test_two_sizes_do_not_look_the_same(size, beside, text):
    assert show_bytes(size, beside) == text
