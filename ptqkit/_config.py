"""What the core runs on: CPU level, BLAS, threads; read once from the environment."""

from __future__ import annotations

import os
import platform

import ptqkit._core as _core

__all__ = ["configure", "show_config"]

CPU_LEVELS = ("base", "avx2", "avx512", "avx512_bf16", "neon")


def configure(environ=os.environ) -> None:
    """Apply ``PTQKIT_CPU`` and ``PTQKIT_BLAS``.

    By default the built-in kernels factorize and multiply on x86 with AVX2 or more (measured
    faster than OpenBLAS there, and bitwise the same for any thread count); elsewhere SciPy's BLAS.

    Raises
    ------
    ImportError
        If a variable asks for what is unknown or cannot run here.
    """
    try:
        level = _core.set_cpu_level(environ.get("PTQKIT_CPU", ""))
    except ValueError as error:
        raise ImportError(f"PTQKIT_CPU: {error}") from None
    blas = environ.get("PTQKIT_BLAS", "") or ("scipy" if level in ("base", "neon") else "builtin")
    if blas not in ("scipy", "builtin"):
        raise ImportError(f"PTQKIT_BLAS must be scipy or builtin, not {blas!r}")
    _core.use_builtin_blas()
    if blas == "scipy" and not _core.use_scipy_blas() and "PTQKIT_BLAS" in environ:
        raise ImportError("PTQKIT_BLAS=scipy, but SciPy offers no 32-bit ssyrk and spotrf")


def show_config() -> dict[str, object]:
    """Return what the core runs on.

    Returns
    -------
    dict
        ``version``, ``cpu_level`` (kernels in use), ``cpu_levels`` (that could run here), ``blas``
        ("builtin" or "scipy"), ``threads``, ``openmp``, ``machine``.
    """
    from ptqkit._version import __version__

    level, blas, threads, openmp = _core.config()
    return {
        "version": __version__,
        "cpu_level": level,
        "cpu_levels": [name for name in CPU_LEVELS if _core.cpu_supports(name)],
        "blas": blas,
        "threads": threads,
        "openmp": openmp,
        "machine": platform.machine(),
    }
