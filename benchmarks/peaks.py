"""Peak rates of this CPU's multiplying instructions, by loops on registers alone (peaks.c)."""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import ptqkit

__all__ = ["peak_loops"]

# Rate: the function of peaks.c, and what the names of the CPU's levels must contain.
KINDS = {
    "fma avx2": ("fma_avx2", "avx2"),
    "int16 madd avx2": ("madd_avx2", "avx2"),
    "fma avx512": ("fma_avx512", "avx512"),
    "int16 madd avx512": ("madd_avx512", "avx512"),
    "vnni": ("dot_vnni", "vnni"),
    "bf16 dot": ("dot_bf16", "bf16"),
    "amx int8": ("dot_amx_int8", "amx"),
    "amx bf16": ("dot_amx_bf16", "amx"),
}


def _library(folder: str) -> ctypes.CDLL:
    source, built = Path(__file__).with_name("peaks.c"), Path(folder, "peaks.so")
    compiler = os.environ.get("CC", "cc").split()
    subprocess.run(
        [*compiler, "-O2", "-shared", "-fPIC", str(source), "-o", str(built)], check=True
    )
    return ctypes.CDLL(str(built))


class _Loop:
    """Some rounds of one instruction on some threads at once."""

    def __init__(self, function: ctypes._CFuncPtr, rounds: int, threads: int) -> None:
        self.function, self.rounds, self.threads = function, rounds, threads
        self.operations = rounds * threads * function(1)

    def __call__(self) -> None:
        workers = [
            threading.Thread(target=self.function, args=(self.rounds,))
            for _ in range(self.threads - 1)
        ]
        for worker in workers:
            worker.start()
        self.function(self.rounds)
        for worker in workers:
            worker.join()


def peak_loops(threads: int = 0, seconds: float = 0.15) -> dict[str, _Loop]:
    """Loops of about that long, one for each instruction that ptqkit's levels on this CPU use.

    To be timed among other candidates where the clock depends on what runs: each has
    ``operations``, a product and a sum being two. Empty, with a line that says so, if there is no
    C compiler.
    """
    config = ptqkit.show_config()
    threads = threads or int(config["threads"])
    levels = " ".join(config["cpu_levels"])
    with tempfile.TemporaryDirectory() as folder:
        try:
            library = _library(folder)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"no peaks: {error}")
            return {}
    found = {}
    for name, (symbol, needed) in KINDS.items():
        if needed not in levels or not hasattr(library, symbol):
            continue
        function = getattr(library, symbol)
        function.argtypes, function.restype = [ctypes.c_int64], ctypes.c_int64
        rounds = 1 << 14
        while True:  # long enough for the clock and for the frequency to settle
            start = time.perf_counter()
            function(rounds)
            took = time.perf_counter() - start
            if took > seconds / 4:
                break
            rounds *= 4
        found[name] = _Loop(function, max(1, int(rounds * seconds / took)), threads)
    return found
