"""ptqkit: post-training quantization, compiled and checked against float64 twins.

Functions on NumPy arrays: :class:`Hessian`, :func:`gptq`, :func:`rtn`, :func:`obq`. Whole models:
:func:`quantize`, :func:`load` (these import PyTorch and transformers when first used). The names
and where they come from are listed in ``__init__.pyi``; each is imported when first used.
"""

from __future__ import annotations

from typing import Any

import lazy_loader

from ptqkit._config import configure
from ptqkit._version import __version__ as __version__

_import, _names, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__ += ["__version__"]

configure()
del configure, lazy_loader


def __dir__() -> list[str]:
    return [*_names(), "__version__"]


def __getattr__(name: str) -> Any:
    try:
        value = globals()[name] = _import(name)  # found once, an ordinary attribute from then on
    except ModuleNotFoundError as error:
        needed = (error.name or "").partition(".")[0]
        if needed == "ptqkit" or "ptqkit[" in str(error):
            raise
        extra = "diffusion" if name == "diffusion" else "hf"
        raise ModuleNotFoundError(
            f"ptqkit.{name} needs {needed}; install it with: pip install 'ptqkit[{extra}]'",
            name=error.name,
        ) from error
    return value
