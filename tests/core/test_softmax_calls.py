"""The softmax functions of the core with garbage, with the GIL, and interrupted."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.softmax_core_calls import softmax_calls

import ptqkit._core as _core

BAD_GRIDS = [
    (),
    (1 / 255, 0),
    (1 / 255, 0, 255, 1),
    [1 / 255, 0, 255],
    (0.0, 0, 255),
    (-1.0, 0, 255),
    (np.nan, 0, 255),
    (np.inf, 0, 255),
    (1e-60, 0, 255),
    (1e35, 0, 255),
    (0.1, -1, 255),
    (0.1, 256, 255),
    (0.1, 0, 0),
    (0.1, 0, 65536),
    (0.1, 2**40, 255),
    (0.1, 0, "8"),
    ("s", 0, 255),
]


@pytest.mark.parametrize("grid", BAD_GRIDS, ids=range(len(BAD_GRIDS)))
def test_bad_grids(grid):
    for name, at in (("softmax_quantize", 3), ("softmax_statistics", 4)):
        arguments = softmax_calls()[name]
        arguments[at] = grid
        with pytest.raises((TypeError, ValueError, OverflowError)):
            getattr(_core, name)(*arguments)


def test_numbers_and_sizes_out_of_range():
    changes = [
        ("softmax_quantize", 2, [-1, 2]),
        ("softmax_quantize", 4, [-1, 3, 4]),
        ("softmax_quantize", 8, [np.zeros(23, np.float32), np.zeros(24)]),
        ("softmax_quantize", 9, [-1, 3]),
        ("softmax_statistics", 3, [-1, 2]),
        (
            "softmax_quantize",
            1,
            [
                np.ones((2, 2, 4, 5), bool),
                np.ones((2, 1, 4, 1), bool),
                np.ones((3, 1, 4, 5), bool),
                np.ones((2, 1, 3, 5), bool),
            ],
        ),
        (
            "softmax_quantize",
            5,
            [
                np.zeros((3, 5)),
                np.zeros((2, 6)),
                np.zeros((3, 0)),
                np.zeros((0, 6)),
                np.zeros((3, 7)),
            ],
        ),
        (
            "softmax_quantize",
            6,
            [np.zeros((2, 3, 4, 5), np.uint16), np.zeros((2, 3, 4, 6), np.uint8)],
        ),
        (
            "softmax_quantize",
            0,
            [np.zeros((2, 3, 4, 0), np.float32), np.zeros((2, 0, 4, 5), np.float32)],
        ),
        ("softmax_statistics", 6, [np.zeros((3, 239, 4), int), np.zeros((2, 240, 4), int)]),
        ("softmax_statistics", 5, ["x", None]),
        ("energy", 0, [np.ones((3, 8))]),
        ("energy", 1, [np.ones((3, 8))]),
        ("energy_columns", 2, [np.zeros((8, 2))]),
    ]
    for name, at, values in changes:
        for value in values:
            arguments = softmax_calls()[name]
            arguments[at] = value
            with pytest.raises((TypeError, ValueError)):
                getattr(_core, name)(*arguments)


def test_hopeless_values_do_not_crash():
    for name, arguments in softmax_calls().items():
        for at, valid in enumerate(arguments):
            if isinstance(valid, np.ndarray) and valid.dtype.kind == "f":
                for value in (np.nan, np.inf, -np.inf, 3e38, -3e38, 1e-45):
                    again = softmax_calls()[name]
                    again[at] = np.full_like(valid, value)
                    getattr(_core, name)(*again)
    for tolerance in (np.nan, -1.0, np.inf):
        arguments = softmax_calls()["softmax_statistics"]
        arguments[5] = tolerance
        bad, _ = _core.softmax_statistics(*arguments)
        assert bad == (-1 if tolerance == np.inf else 0)


def test_masks_of_one_sample_or_row_serve_all():
    for size in ((1, 1, 1, 5), (2, 3, 1, 5), (1, 3, 4, 5)):
        arguments = softmax_calls()["softmax_quantize"]
        arguments[1] = np.arange(np.prod(size)).reshape(size) % 5 < 3
        assert _core.softmax_quantize(*arguments) == (-1, 0)
        seen = np.broadcast_to(arguments[1], arguments[6].shape)
        np.testing.assert_array_equal(arguments[6] != 0, seen)


GIL = """
import threading, time
import numpy as np, ptqkit
rng = np.random.default_rng(0)
x = rng.normal(size=(8, 1024, 1024)).astype(np.float32)
grid = ptqkit.softmax_grid()
P, out = np.full((48, 1024, 1024), 1 / 1024, np.float32), np.empty_like(x)
meter = ptqkit.SoftmaxBias(48, grid=grid, threads=1)
calls = {
    "softmax": lambda: ptqkit.softmax_on_grid(x, grid, out=out, threads=1),
    "bias": lambda: meter.update(P),
    "sqnr": lambda: ptqkit.sqnr(x, P[:8], threads=1),
    "channels": lambda: ptqkit.sqnr(x, P[:8], "channel", threads=1),
}
for name, call in calls.items():
    stamps, stop = [], threading.Event()
    def tick():
        while not stop.is_set():
            stamps.append(time.perf_counter())
            time.sleep(0.0005)
    ticker = threading.Thread(target=tick)
    ticker.start()
    begin, spent = time.perf_counter(), 0
    while time.perf_counter() - begin < 0.25:
        call()
        spent += 1
    end = time.perf_counter()
    stop.set()
    ticker.join()
    # with the GIL held, the ticker would wake once a call at most
    assert sum(begin < t < end for t in stamps) > 1.5 * spent, (name, len(stamps), spent)
"""


def test_the_gil_is_released(script):
    script(GIL, timeout=120)


INTERRUPT = """
import signal, sys, threading, time
import numpy as np, ptqkit
signal.signal(signal.SIGINT, signal.default_int_handler)
x = np.zeros((1, 1, 1, 64), np.float32)
scores = np.broadcast_to(x, (4, 64, 4096, 64))
scores = np.ascontiguousarray(scores)
grid = ptqkit.softmax_grid()
out = np.empty_like(scores)
meter = ptqkit.SoftmaxBias(64, grid=grid, threads=1)
P = np.full_like(scores, 1 / 64)
calls = {
    "softmax": lambda: ptqkit.softmax_on_grid(scores, grid, out=out, threads=1),
    "bias": lambda: meter.update(P),
}
def forever():
    while True:
        calls[sys.argv[1]]()
timer = threading.Timer(0.3, signal.raise_signal, [signal.SIGINT])
timer.start()
try:
    forever()
except KeyboardInterrupt:
    pass
small = np.zeros((1, 4, 4), np.float32)
assert ptqkit.softmax_on_grid(small, grid)[0, 0, 0] > 0
assert meter.rows % (4 * 64 * 4096) == 0
"""


@pytest.mark.parametrize("what", ["softmax", "bias"])
def test_ctrl_c_leaves_everything_usable(script, what):
    script(INTERRUPT, what, timeout=60)
