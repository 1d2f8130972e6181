"""Threads: same bits, GIL released, fork, Ctrl-C, concurrent calls."""

from __future__ import annotations

import os
import threading

import numpy as np
import pytest
from helpers.core_cases import layer, same_result

import ptqkit


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_results_are_bitwise_the_same(threads):
    W, H = layer(200, 96, "outlier")
    for options in (
        {"group_size": 12},
        {"group_size": None, "order": "act", "refine_passes": 2},
        {
            "group_size": 48,
            "order": "act",
            "static_groups": True,
            "grid": "hessian",
            "refine_passes": 1,
        },
        {"group_size": 16, "order": "group-act", "grid": "mse"},
    ):
        one = ptqkit.gptq(W, H, threads=1, bits=3, **options)
        many = ptqkit.gptq(W, H, threads=threads, bits=3, **options)
        assert same_result(one, many)
        np.testing.assert_array_equal(one.row_objectives, many.row_objectives)
    X = np.random.default_rng(0).normal(size=(2100, 203))
    for dtype in (np.float32, np.float16):
        one, many = (ptqkit.Hessian(203, threads=t) for t in (1, threads))
        for hessian in (one, many):
            hessian.update(X.astype(dtype), np.arange(2100) % 7 > 0)
        np.testing.assert_array_equal(one.matrix, many.matrix)
    codes = np.random.default_rng(1).integers(0, 8, (500, 33), dtype=np.uint8)
    np.testing.assert_array_equal(
        ptqkit.pack_rows(codes, 3, threads=threads),
        ptqkit.pack_rows(codes, 3, threads=1),
    )


def test_concurrent_calls_give_their_own_results():
    layers = [layer(40 + i, 64, "correlated", i) for i in range(6)]
    want = [ptqkit.gptq(W, H, group_size=16, refine_passes=1) for W, H in layers]
    failures = []

    def work(i):
        W, H = layers[i]
        for threads in (1, 2, 0) * 3:
            q = ptqkit.gptq(W, H, group_size=16, refine_passes=1, threads=threads)
            if not (same_result(q, want[i]) and q.objective == want[i].objective):
                failures.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(layers))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
        assert not worker.is_alive()
    assert not failures


AFFINITY = """
import os, threading
import numpy as np, ptqkit
rng = np.random.default_rng(0)
n = 256
X = rng.standard_normal((2048, n)).astype(np.float32)
W = rng.standard_normal((1024, n)).astype(np.float32)
ranges = ptqkit.ChannelRanges(n)
ranges.update(X)
thread = threading.get_native_id()
every = os.sched_getaffinity(0)
os.sched_setaffinity(thread, {min(every)})
widened = threading.Event()
def widen():
    os.sched_setaffinity(thread, every)
    widened.set()
timer = threading.Timer(0.2, widen)
timer.start()
calls = 0
while not widened.is_set() or calls < 3:  # some call is running when the mask widens
    ptqkit.search_equalization([W], X, ranges, bits=8, per_tensor=True, symmetric=True,
                               activation_bits=8, activation_granularity="tensor",
                               alphas=[0.2, 0.5, 0.8])
    calls += 1
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no CPU affinity here")
def test_processors_that_appear_during_a_call_do_not_overrun_its_scratch(script):
    script(AFFINITY, timeout=120)


MANY = """
import os
import numpy as np, ptqkit
def threads():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Threads:"))
W = np.random.default_rng(0).normal(size=(9000, 128)).astype(np.float32)
want, before = ptqkit.rtn(W, threads=1).codes, threads()
assert (ptqkit.rtn(W, threads=1024).codes == want).all()
assert threads() < before + len(os.sched_getaffinity(0)), (before, threads())
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="threads are counted in /proc")
def test_no_more_threads_are_started_than_there_are_processors(script):
    script(MANY)


GIL = """
import threading, time
import numpy as np, ptqkit
n = 1024
rng = np.random.default_rng(0)
X = rng.normal(size=(4 * n, n)).astype(np.float32)
W = rng.normal(size=(2 * n, n)).astype(np.float32)
H = ptqkit.Hessian(n)
H.update(X)
calls = {
    "hessian": lambda: ptqkit.Hessian(n).update(X),
    "factor": lambda: ptqkit.factorize(H),
    "gptq": lambda: ptqkit.gptq(W, H, order="act", static_groups=True, refine_passes=2),
    "refit": lambda: ptqkit.gptq(W, H, refit_rounds=1),
    "beam": lambda: ptqkit.gptq(W[:64], H, beam_width=4),
    "coupled": lambda: ptqkit.couple_rows(W[:256], coarse, H, X[:256, :256] + X[:256, :256].T),
    "drift": lambda: ptqkit.Drift(n, n).update(X, X[::-1]),
    "target": lambda: ptqkit.target_weights(W[:n], H, G),
    "rtn": lambda: ptqkit.rtn(W, grid="mse"),
    "objective": lambda: ptqkit.objective(W, 0, H),
    "obq": lambda: ptqkit.obq(W[:4, :160], H.matrix[:160, :160]),
    "int8": lambda: ptqkit.int8_matmul(qx, qw),
}
qx, qw = ptqkit.quantize_activations(X), ptqkit.quantize_activations(W)
coarse = ptqkit.rtn(W[:256], H=H)
G = H.matrix + np.eye(n)
for name, call in calls.items():
    stamps, stop = [], threading.Event()
    def tick():
        while not stop.is_set():
            stamps.append(time.perf_counter())
            time.sleep(0.0005)
    ticker = threading.Thread(target=tick)
    ticker.start()
    begin = time.perf_counter()
    while time.perf_counter() - begin < 0.25:
        first = time.perf_counter()
        call()
    end = time.perf_counter()
    stop.set()
    ticker.join()
    inside = [t for t in stamps if begin < t < end]
    # with the GIL held, the ticker would wake once a call at most
    assert len(inside) > 20, (name, len(inside), end - begin)
"""


def test_the_gil_is_released(script):
    script(GIL, timeout=120)


FORK = """
import os, sys, time
import numpy as np, ptqkit
rng = np.random.default_rng(0)
n = 96
X, W = rng.normal(size=(500, n)).astype(np.float32), rng.normal(size=(300, n)).astype(np.float32)
def work(threads):
    H = ptqkit.Hessian(n, threads=threads)
    H.update(X)
    q = ptqkit.gptq(W, H, group_size=16, order="act", refine_passes=1, threads=threads)
    return q.codes.tobytes() + q.scales.tobytes() + ptqkit.pack_rows(q.codes, 4).tobytes()
want = work(2)  # a parallel region, whose threads do not survive the fork
for depth in range(2):
    child = os.fork()
    if child == 0:
        grand = os.fork()
        if grand == 0:
            os._exit(0 if work(2) == want else 3)
        same = work(2) == want and work(0) == want
        os._exit(0 if same and os.waitpid(grand, 0)[1] == 0 else 4)
    limit = time.monotonic() + 30
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() > limit:
            os.kill(child, 9)
            sys.exit("the child hangs")
        time.sleep(0.01)
    assert status == 0, status
    assert work(2) == want  # and the parent still has its threads
import multiprocessing
with multiprocessing.get_context("fork").Pool(2) as pool:
    assert all(r == want for r in pool.map_async(work, [2, 0, 3]).get(timeout=60))
"""


@pytest.mark.parametrize("blas", ["builtin", "scipy"])
def test_fork_after_a_parallel_region(script, blas):
    script(FORK, timeout=120, PTQKIT_BLAS=blas)


INTERRUPT = """
import signal, sys, threading, time
import numpy as np, ptqkit
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits it ignored
what = sys.argv[1]
rng = np.random.default_rng(0)
def correlated(n, tokens):
    return rng.normal(size=(tokens, n)).astype(np.float32)
if what == "gptq":
    n = 2048
    H = np.eye(n, dtype=np.float32)
    F = ptqkit.factorize(H)
    W = rng.normal(size=(4 * n, n)).astype(np.float32)
    call = lambda: ptqkit.gptq(W, F, refine_passes=500)
elif what == "obq":
    n = 160
    W = rng.normal(size=(20000, n)).astype(np.float32)
    call = lambda: ptqkit.obq(W, np.eye(n, dtype=np.float32))
elif what == "rtn":
    n = 256
    W = np.tile(rng.normal(size=(256, n)).astype(np.float32), (256, 1))
    call = lambda: ptqkit.rtn(W, grid="mse", grid_steps=256)
elif what == "int8":
    codes = np.zeros((3000, 131071), np.int8)  # never written, so never in memory
    grid = np.ones((3000, 1), np.float32), np.zeros((3000, 1), np.int8)
    q = ptqkit.QuantizedActivations(codes, *grid, 8, "token", True)
    call = lambda: ptqkit.int8_matmul(q, q)
elif what == "factor":
    n = 4096
    H = np.eye(n, dtype=np.float32)
    call = lambda: [ptqkit.factorize(H) for _ in range(1000)]
elif what == "refit":
    W = rng.normal(size=(8192, 2048)).astype(np.float32)
    F = ptqkit.factorize(np.eye(2048, dtype=np.float32))
    call = lambda: ptqkit.gptq(W, F, refit_rounds=500)
elif what == "beam":
    W = rng.normal(size=(8192, 2048)).astype(np.float32)
    F = ptqkit.factorize(np.eye(2048, dtype=np.float32))
    call = lambda: ptqkit.gptq(W, F, beam_width=16)
elif what == "drift":
    X, drift = np.zeros((60000, 2048), np.float16), ptqkit.Drift(2048, 2048)
    call = lambda: drift.update(X, X)
elif what == "target":
    n = 4096
    W, H = np.ones((n, n), np.float32), np.eye(n, dtype=np.float32)
    call = lambda: ptqkit.target_weights(W, H, H + np.float32(0.5))
elif what == "block":  # thousands of heads, each of which takes a millisecond
    from ptqkit.arrays import decoder
    def layer(out, inputs):
        ones = np.ones((out, 1), np.float32)
        codes, zeros = np.ones((out, inputs), np.uint8), np.zeros((out, 1), np.uint8)
        return ptqkit.PackedMatrix.pack(codes, ones, zeros, bits=8).layer("float")
    sizes = decoder.BlockSizes("float32", 8, 8, 4096, 1, 2, 1e-5)
    keys, x = np.ones((1, 400_000, 2), np.float32), np.ones(8, np.float32)
    query, layers = np.ones((4096, 2), np.float32), [layer(8, n) for n in (8192, 8, 8, 8)]
    call = lambda: decoder.end(sizes, query, keys, keys, None, 1.0, x, x, layers, x.copy())
sent = []
def fire():
    sent.append(time.perf_counter())
    signal.raise_signal(signal.SIGINT)
small = np.ones((3, 8), np.float32)
before = ptqkit.rtn(small, group_size=8).codes
timer = threading.Timer(0.4, fire)
timer.start()
try:
    call()
except KeyboardInterrupt:
    late = time.perf_counter() - sent[0]
else:
    sys.exit("not interrupted")
assert late < 1.0 + float(sys.argv[2]), late
# and the process goes on
assert (ptqkit.rtn(small, group_size=8).codes == before).all()
assert ptqkit.gptq(small, np.eye(8), group_size=8).objective >= 0
print(late)
"""


@pytest.mark.parametrize(
    "what", ["gptq", "obq", "rtn", "factor", "int8", "refit", "beam", "drift", "target", "block"]
)
def test_ctrl_c_stops_a_long_call_and_leaves_the_process_usable(script, what):
    slack = "1.0"  # for a loaded machine; without polling each of these calls goes on for longer
    script(INTERRUPT, what, slack, timeout=120)


BLAS = """
import signal, sys, threading, time
import numpy as np, ptqkit
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits it ignored
what = sys.argv[1]
rng = np.random.default_rng(0)
n = 4096
if what == "hessian":
    X = np.ones((8192, n), np.float32)
    H = ptqkit.Hessian(n)
    call = lambda: [H.update(X) for _ in range(100)]
elif what == "factor":
    H = np.eye(n, dtype=np.float32)
    call = lambda: [ptqkit.factorize(H) for _ in range(100)]
elif what == "drift":
    X, H = np.ones((8192, n), np.float32), ptqkit.Drift(n, n)
    call = lambda: [H.update(X, X) for _ in range(100)]
else:
    n = 2048
    W, H = np.ones((n, n), np.float32), np.eye(n, dtype=np.float32)
    G = H + np.float32(0.5)
    call = lambda: [ptqkit.propagate_error(W, H, G, 0.5) for _ in range(100)]
assert ptqkit.show_config()["blas"] == "scipy"
spent = []
def fire():
    spent.append(time.process_time())
    signal.raise_signal(signal.SIGINT)
timer = threading.Timer(1.5, fire)  # somewhere within a call
timer.start()
try:
    call()
except KeyboardInterrupt:
    late = time.process_time() - spent[0]
else:
    sys.exit("not interrupted")
assert late < 0.8, late  # seconds of all processors: whole calls take several times as much
if what in ("hessian", "drift"):
    try:
        H.matrix
    except ptqkit.CalibrationError:
        pass
"""


@pytest.mark.parametrize("what", ["hessian", "drift", "factor", "propagate"])
def test_ctrl_c_does_not_wait_for_a_whole_product_of_blas(script, what):
    script(BLAS, what, timeout=120, PTQKIT_BLAS="scipy")


HANDLER = """
import signal, threading
import numpy as np, ptqkit
class Stop(Exception):
    pass
def handler(*_):
    raise Stop("mine")
W = np.random.default_rng(0).normal(size=(6000, 160)).astype(np.float32)
signal.signal(signal.SIGALRM, handler)
signal.setitimer(signal.ITIMER_REAL, 0.3)
try:
    ptqkit.obq(W, np.eye(160, dtype=np.float32))
except Stop as error:
    assert str(error) == "mine"
else:
    raise SystemExit("the handler's exception was lost")
"""


def test_an_exception_of_a_signal_handler_arrives_as_it_is(script):
    script(HANDLER, timeout=60)
