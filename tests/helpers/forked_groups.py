"""Forked processes with a gloo group."""

from __future__ import annotations

import datetime
import os
import pickle
import tempfile
import traceback
import warnings
from pathlib import Path

import torch

__all__ = ["in_processes"]


def in_processes(function, size=2, timeout=60):
    """Call ``function(rank)`` in each; returns what each returned or raised, None if it died."""
    with tempfile.TemporaryDirectory() as folder:
        pids = [_fork(function, rank, size, Path(folder), timeout) for rank in range(size)]
        for pid in pids:
            os.waitpid(pid, 0)
        found = []
        for rank in range(size):
            path = Path(folder) / f"result-{rank}"
            found.append(pickle.loads(path.read_bytes()) if path.exists() else None)
        return found


def _fork(function, rank, size, folder, timeout):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python warns of threads, which the child does not use
        pid = os.fork()
    if pid:
        return pid
    try:
        import torch.distributed as dist

        torch.set_num_threads(1)
        seconds = datetime.timedelta(seconds=timeout)
        where = f"file://{folder / 'meeting'}"
        dist.init_process_group(
            "gloo", init_method=where, rank=rank, world_size=size, timeout=seconds
        )
        try:
            result = function(rank)
        except Exception as error:
            result = error
        temporary = folder / f"writing-{rank}"
        temporary.write_bytes(pickle.dumps(result))
        temporary.rename(folder / f"result-{rank}")
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)
