"""What importing the package does, and what it must not do."""

from __future__ import annotations

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
    for name in ptqkit.__all__:
        if name not in ("Recipe", "load", "quantize"):  # these import PyTorch
            assert getattr(ptqkit, name) is not None
    assert set(ptqkit.__all__) <= set(dir(ptqkit))
    import pytest

    with pytest.raises(AttributeError, match="attribute nothing"):
        ptqkit.nothing  # noqa: B018
