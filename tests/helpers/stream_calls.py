"""Runs that stream a tiny model, in forked processes that are killed."""

from __future__ import annotations

import os
import signal
import time
import traceback
import warnings

import torch

from ptqkit.hf.quantization.driver import quantize

__all__ = ["killed_after", "killed_at", "quantize_stored"]


def quantize_stored(folder, out, ids, options):
    """Quantize the model of a folder block by block."""
    quantize(folder, "reference", ids, out_dir=out, stream=True, progress=False, **options)


def _fork(work):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python warns of threads, which the child does not use
        pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        torch.set_num_threads(1)
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _code(pid):
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code


def killed_at(count, function, *args):
    """Kill a process before its file operation of this number; return its exit code."""
    left = [count]

    def counted(original):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return call

    def work():
        for name in ("replace", "rename", "fsync", "unlink", "mkdir"):
            setattr(os, name, counted(getattr(os, name)))
        function(*args)

    return _code(_fork(work))


def killed_after(seconds, function, *args):
    """Kill a process after some seconds, unless it has ended; return its exit code."""
    pid = _fork(lambda: function(*args))
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    return _code(pid)
