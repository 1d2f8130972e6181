"""Choose what the core runs on (CPU level, BLAS) from the environment, and show it."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping

import ptqkit._core as _core

__all__ = ["configure", "show_config"]

# Levels, and those features of theirs that are found together.
CPU_LEVELS = (
    "base",
    "avx2",
    "avx512",
    "avx512_bf16",
    "avx512_vnni",
    "avx512_vnni_bf16",
    "avx512_vnni_bf16_amx",
    "neon",
    "neon_dotprod",
)


def configure(environ: Mapping[str, str] = os.environ) -> None:
    """Apply ``PTQKIT_CPU`` and ``PTQKIT_BLAS``.

    By default the built-in kernels factorize and multiply on x86 with AVX2 or more (measured
    faster than OpenBLAS there, and bitwise the same for any number of threads); SciPy's BLAS does
    elsewhere.

    Raises
    ------
    ImportError
        If a variable names something unknown, or something that cannot run on this machine.
    """
    try:
        level = _core.set_cpu_level(environ.get("PTQKIT_CPU", ""))
    except ValueError as error:
        raise ImportError(f"PTQKIT_CPU: {error}") from None
    blas = environ.get("PTQKIT_BLAS", "") or ("scipy" if level == "base" or level.startswith("neon") else "builtin")
    if blas not in ("scipy", "builtin"):
        raise ImportError(f"PTQKIT_BLAS must be scipy or builtin, not {blas!r}")
    _core.use_builtin_blas()
    if blas == "scipy" and not _core.use_scipy_blas() and "PTQKIT_BLAS" in environ:
        raise ImportError("PTQKIT_BLAS=scipy, but SciPy offers no 32-bit BLAS and LAPACK")


def show_config() -> dict[str, object]:
    """Return the settings in effect.

    Returns
    -------
    dict
        ``version``, ``cpu_level`` (kernels in use), ``cpu_levels`` (that this CPU runs), ``blas``
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
