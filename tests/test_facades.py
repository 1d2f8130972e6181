"""What the lazy packages say if a package that they need is not installed."""

from __future__ import annotations

import subprocess
import sys

import pytest
from helpers.extras import HF, missing


@pytest.mark.parametrize(
    ("absent", "code", "extra"),
    [
        ("diffusers", "import ptqkit; ptqkit.diffusion", "diffusion"),
        ("diffusers", "import ptqkit.diffusion", "diffusion"),
        ("diffusers", "from ptqkit.diffusion import sample", "diffusion"),
        ("transformers", "import ptqkit; ptqkit.hf", "hf"),
        ("transformers", "from ptqkit import quantize", "hf"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(absent, code, extra):
    if missing([p for p in HF if p != absent]):
        pytest.skip("another package is missing too")
    program = f"import sys; sys.modules[{absent!r}] = None; {code}"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    last = run.stderr.strip().splitlines()[-1]
    assert run.returncode == 1
    assert f"needs {absent}; install it with: pip install 'ptqkit[{extra}]'" in last
