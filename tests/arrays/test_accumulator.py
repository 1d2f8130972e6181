"""Accumulators: any exception, several threads, copies."""

from __future__ import annotations

import copy
import pickle
import sys
import threading

import numpy as np
import pytest

import ptqkit
import ptqkit._core as _core

RNG = np.random.default_rng(0)
X = RNG.normal(size=(96, 24)).astype(np.float32)
P = RNG.random((1, 2, 12, 24)).astype(np.float32)
P /= P.sum(axis=-1, keepdims=True)


class Timeout(Exception):
    """What a signal handler of the user raises."""


# name: how it is made, one update, all that it says, and the function of the core that it calls
KINDS = {
    "hessian": (
        lambda: ptqkit.Hessian(24, threads=1),
        lambda a: a.update(X),
        lambda a: [a.tokens, a.matrix],
        "hessian_update",
    ),
    "drift": (
        lambda: ptqkit.Drift(24, 24, threads=1),
        lambda a: a.update(X + np.float32(0.5), X),
        lambda a: [a.tokens, a.matrix],
        "cross_update",
    ),
    "ranges": (
        lambda: ptqkit.ChannelRanges(24, threads=1),
        lambda a: a.update(X),
        lambda a: [a.tokens, a.minimum, a.maximum, a.mean],
        "channel_ranges",
    ),
    "statistics": (
        lambda: ptqkit.ActivationStatistics(24, threads=1),
        lambda a: a.update(X),
        lambda a: [a.tokens, a.rms, a.kurtosis, a.channel_absmax, a.channel_counts],
        "activation_statistics",
    ),
    "softmax": (
        lambda: ptqkit.SoftmaxBias(2, grid=ptqkit.softmax_grid(8), threads=1),
        lambda a: a.update(P),
        lambda a: [a.rows, a.entries, a.empty_rows, a.bias("head"), a.shares_zero("head")],
        "softmax_statistics",
    ),
    "sqnr per sample": (
        lambda: ptqkit.SQNR(threads=1),
        lambda a: a.update(X, X + np.float32(0.1)),
        lambda a: [a.count, a.infinite, a.decibel],
        "energy",
    ),
    "sqnr per channel": (
        lambda: ptqkit.SQNR("channel", threads=1),
        lambda a: a.update(X, X + np.float32(0.1)),
        lambda a: [a.count, a.infinite, a.decibel],
        "energy_columns",
    ),
}


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


@pytest.mark.parametrize("error", [Timeout, KeyboardInterrupt, SystemExit, MemoryError])
def test_an_exception_in_an_update_adds_all_or_nothing_or_is_said(kind, error, monkeypatch):
    make, update, values, function = kind
    seen, once = make(), make()
    update(seen)
    update(once)
    real = getattr(_core, function)

    def interrupted(*arguments):
        real(*arguments)
        raise error

    monkeypatch.setattr(_core, function, interrupted)
    with pytest.raises(error):
        update(seen)
    monkeypatch.undo()
    if function not in ("hessian_update", "cross_update"):
        for found, want in zip(values(seen), values(once), strict=True):
            np.testing.assert_array_equal(found, want)
        return
    uses = [update, values, once.merge, lambda a: a.merge(once), lambda a: a.copy().matrix]
    reader = {
        "hessian_update": lambda a: ptqkit.gptq(X[:4], a, group_size=8),
        "cross_update": lambda a: ptqkit.target_weights(X[:4], np.eye(24), a),
    }[function]
    for use in [
        *uses,
        reader,
        lambda a: pickle.loads(pickle.dumps(a)).matrix,
    ]:
        with pytest.raises(ptqkit.CalibrationError, match=r"interrupted.*a new one"):
            use(seen)


SIGNAL = """
import signal, time
import numpy as np, ptqkit
class Timeout(Exception):
    pass
def handler(*_):
    for use in (lambda: H.matrix, lambda: H.update(X[:1]), lambda: H.copy().matrix):
        try:
            use()
        except ptqkit.CalibrationError:
            said.append(True)
    raise Timeout
said = []
signal.signal(signal.SIGALRM, handler)
X = np.random.default_rng(0).standard_normal((2048, 768)).astype(np.float16)
H = ptqkit.Hessian(768, threads=1)
signal.setitimer(signal.ITIMER_REAL, 0.2)
try:
    while True:
        H.update(X)
except Timeout:
    pass
if not H._torn:
    raise SystemExit(0 if not said else 1)  # the signal came between two updates
assert len(said) == 3  # within the update, and without waiting for it for ever
try:
    H.update(X)
except ptqkit.CalibrationError as error:
    assert "interrupted" in str(error)
else:
    raise SystemExit("part of a batch went unnoticed")
"""


def test_a_signal_handler_that_raises_within_an_update(script):
    script(SIGNAL)


def test_threads_may_share_an_accumulator(kind):
    make, update, values, _ = kind
    one, shared = make(), make()
    workers, rounds = 4, 60
    for _ in range(workers * rounds):
        update(one)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    start = threading.Barrier(workers)

    def work():
        start.wait()
        for _ in range(rounds):
            update(shared)

    threads = [threading.Thread(target=work) for _ in range(workers)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    for found, want in zip(values(shared), values(one), strict=True):
        # equal batches: no order of theirs shows
        np.testing.assert_allclose(found, want, rtol=1e-12)


def test_an_update_waits_while_another_thread_changes_the_object(kind):
    make, update, values, _ = kind
    seen = make()
    update(seen)
    before = [np.copy(value) for value in values(seen)]
    thread = threading.Thread(target=update, args=(seen,))
    with seen._lock:  # as a thread inside an update does
        thread.start()
        thread.join(timeout=0.2)
        assert thread.is_alive()
        for found, want in zip(values(seen), before, strict=True):
            np.testing.assert_array_equal(found, want)
    thread.join(timeout=30)
    assert values(seen)[0] == 2 * before[0]


def test_objects_that_are_merged_into_each_other_do_not_wait_for_each_other():
    left, right = ptqkit.Hessian(24), ptqkit.Hessian(24)
    left.update(X)
    right.update(X)

    def work(one, other):
        for _ in range(20):
            one.merge(other)
            one._sum *= np.float32(0.25)

    pairs = [(left, right), (right, left)]
    threads = [threading.Thread(target=work, args=p, daemon=True) for p in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
        assert not thread.is_alive()
    left.merge(left)


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a))])
def test_copies_are_independent(kind, how):
    make, update, values, _ = kind
    first = make()
    update(first)
    values(first)
    twin = how(first)
    update(twin)
    again = make()
    update(again)
    for found, want in zip(values(first), values(again), strict=True):
        np.testing.assert_array_equal(found, want)
    update(again)
    for found, want in zip(values(twin), values(again), strict=True):
        np.testing.assert_array_equal(found, want)
