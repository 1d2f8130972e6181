"""What importing the package does, and what it must not do."""

from __future__ import annotations

import pytest
from helpers.extras import HF, missing

import ptqkit

STATE = """
import sys, threading, warnings
import numpy as np
warnings.simplefilter("error")
before = np.random.get_state()[1].tobytes(), np.geterr(), threading.active_count()
import ptqkit
after = np.random.get_state()[1].tobytes(), np.geterr(), threading.active_count()
assert before == after
for name in ("torch", "transformers", "pandas", "matplotlib", "rich", "datasets", "greenlet"):
    assert name not in sys.modules, name
ptqkit.gptq(np.ones((4, 8)), np.eye(8), group_size=8)
assert np.random.get_state()[1].tobytes() == before[0]
assert threading.active_count() == before[2] and "torch" not in sys.modules
"""

TORCH = """
import os, torch
torch.manual_seed(3)
torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
seed, dtype = torch.random.get_rng_state(), torch.get_default_dtype()
import numpy as np, ptqkit
X = torch.ones(4, 8, dtype=torch.float32)
H = ptqkit.Hessian(8)
H.update(X.to(torch.bfloat16))
ptqkit.gptq(torch.randn(3, 8, generator=torch.Generator().manual_seed(0)), H, group_size=8)
assert torch.equal(torch.random.get_rng_state(), seed)
assert torch.get_default_dtype() == dtype and torch.get_num_threads() == 1
assert X.dtype == torch.float32 and torch.equal(X, torch.ones(4, 8, dtype=torch.float32))
"""


def test_importing_changes_no_global_state(script):
    script(STATE)


def test_torch_state_is_left_as_found(script):
    import pytest

    pytest.importorskip("torch")
    script(TORCH)


def test_show_config():
    config = ptqkit.show_config()
    assert set(config) == {
        "version",
        "cpu_level",
        "cpu_levels",
        "blas",
        "threads",
        "openmp",
        "machine",
    }
    assert config["version"] == ptqkit.__version__
    assert config["cpu_level"] in config["cpu_levels"] and "base" in config["cpu_levels"]
    assert config["blas"] in ("builtin", "scipy")
    assert isinstance(config["threads"], int) and config["threads"] >= 1


def test_the_public_names_exist():
    absent = missing((*HF, "diffusers"))
    for name in ptqkit.__all__:
        try:
            assert getattr(ptqkit, name) is not None
        except ModuleNotFoundError as error:  # of an extra that is not installed, which it names
            assert error.name in absent and "pip install 'ptqkit[" in str(error)
    assert set(ptqkit.__all__) <= set(dir(ptqkit))
    with pytest.raises(AttributeError, match="attribute nothing"):
        ptqkit.nothing  # noqa: B018


FAILED_IMPORT = """
import importlib.util, sys
import numpy as np
names = ("numpy._core._multiarray_umath", "numpy.core._multiarray_umath")
kept = {name: sys.modules[name] for name in names if name in sys.modules}
sys.modules.update(dict.fromkeys(names))
spec = importlib.util.find_spec("ptqkit")
package = importlib.util.module_from_spec(spec)  # without running it
sys.modules["ptqkit"] = package
try:
    import ptqkit._core
    raise SystemExit("no error")
except ImportError as error:
    assert "once per process" not in str(error), error
for name in names:
    del sys.modules[name]
sys.modules.update(kept)
import ptqkit._core as _core
assert _core.finite_check(np.ones((2, 2), np.float32), 1)
del sys.modules["ptqkit._core"], package._core
try:
    import ptqkit._core as again
except ImportError as error:
    assert "once per process" in str(error), error
"""


def test_an_import_that_failed_can_be_tried_again(script):
    script(FAILED_IMPORT)


OTHER_BLAS = """
import ctypes, sys, types
from ptqkit import _core
capsule = ctypes.pythonapi.PyCapsule_New
capsule.restype = ctypes.py_object
capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
S = "__pyx_t_5scipy_6linalg_11cython_blas_s *"
D = "__pyx_t_5scipy_6linalg_11cython_blas_d *"
blas = {
    "sgemm": f"void (char *, char *, INT, INT, INT, {S}, {S}, INT, {S}, INT, {S}, {S}, INT)",
    "ssyrk": f"void (char *, char *, INT, INT, {S}, {S}, INT, {S}, {S}, INT)",
    "strsm": f"void (char *, char *, char *, char *, INT, INT, {S}, {S}, INT, {S}, INT)",
    "dgemm": f"void (char *, char *, INT, INT, INT, {D}, {D}, INT, {D}, INT, {D}, {D}, INT)",
}
spotrf = "void (char *, INT, __pyx_t_5scipy_6linalg_13cython_lapack_s *, INT, INT)"
names = []
def offer(name, **routines):
    module = sys.modules[f"scipy.linalg.{name}"] = types.ModuleType(name)
    module.__pyx_capi__ = {}
    for routine, signature in routines.items():
        names.append(signature.encode())  # a capsule borrows its name
        module.__pyx_capi__[routine] = capsule(1, names[-1], None)
    return module
_core.use_builtin_blas()
for integer, fits in (("int64_t *", False), ("long *", False), ("int *", True)):
    offer("cython_blas", **{name: s.replace("INT", integer) for name, s in blas.items()})
    offer("cython_lapack", spotrf=spotrf.replace("INT", integer))
    assert _core.use_scipy_blas() is fits, integer
    assert (_core.config()[1] == "scipy") is fits
    _core.use_builtin_blas()
offer("cython_lapack")
assert not _core.use_scipy_blas()
offer("cython_lapack").__pyx_capi__["spotrf"] = 5
assert not _core.use_scipy_blas()
del sys.modules["scipy.linalg.cython_lapack"].__pyx_capi__
assert not _core.use_scipy_blas()
sys.modules["scipy.linalg.cython_lapack"] = None
assert not _core.use_scipy_blas() and _core.config()[1] == "builtin"
"""


def test_routines_of_another_signature_are_not_taken(script):
    script(OTHER_BLAS)
