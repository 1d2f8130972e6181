"""Stated tolerances, and the options that every run shares."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# Tests are thousands of tiny problems: threads that spin between them starve each other on a busy
# machine. Read when OpenMP is loaded, so before the package.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from helpers.extras import HF, missing

import ptqkit

# Distance from a rounding tie, in steps of the grid, within which a float32 solver may put a code
# on the other side. Measured on all cases of the tests: see tests/test_gptq.py.
# Features change the Hessian alone, so the level before them decides.
TIE_DISTANCE = {"base": 2e-5, "avx2": 2e-5, "avx512": 2e-5, "neon": 2e-5}


def _tie_distance(cpu_level: str) -> float:
    return TIE_DISTANCE[cpu_level.split("_")[0]]


def pytest_report_header() -> list[str]:
    """Name the folders that are left out for want of a package."""
    folders = {"tests/nn, tests/hf": HF, "tests/diffusion": (*HF, "diffusers")}
    absent = {folder: missing(packages) for folder, packages in folders.items()}
    return [
        f"left out: {folder} (no {', '.join(names)})" for folder, names in absent.items() if names
    ]


@pytest.fixture
def tie() -> float:
    """Stated distance of this CPU level."""
    return _tie_distance(str(ptqkit.show_config()["cpu_level"]))


@pytest.fixture
def tie_distance() -> Callable[[str], float]:
    """Stated distance of a CPU level, by its name."""
    return _tie_distance


@pytest.fixture(params=["builtin", "scipy"])
def blas(request):
    """Run with the built-in kernels and with SciPy's BLAS; put back what was there."""
    import ptqkit._core as _core

    before = str(ptqkit.show_config()["blas"])
    use = {"builtin": _core.use_builtin_blas, "scipy": _core.use_scipy_blas}
    use[request.param]()
    if ptqkit.show_config()["blas"] != request.param:
        use[before]()
        pytest.skip("SciPy offers no usable BLAS here")
    yield request.param
    use[before]()


@pytest.fixture
def script():
    """Run a Python script in a process of its own; returns the completed process."""

    def run(code: str, *arguments: str, timeout: float = 60, check: bool = True, **environment):
        env = {k: v for k, v in os.environ.items() if k not in ("PTQKIT_CPU", "PTQKIT_BLAS")}
        env.update(environment)
        root = Path(ptqkit.__file__).resolve().parents[1]
        env["PYTHONPATH"] = os.pathsep.join([str(root), env.get("PYTHONPATH", "")])
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            env=env,
            timeout=timeout,
            capture_output=True,
            text=True,
        )
        if check and done.returncode:
            pytest.fail(f"the script ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
        return done

    return run
