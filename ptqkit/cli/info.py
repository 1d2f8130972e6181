"""``ptqkit info``: what runs here."""

from __future__ import annotations

import argparse
import os
import platform
from importlib import metadata
from typing import Any

from ptqkit._config import show_config
from ptqkit.cli.options import add_common
from ptqkit.cli.output import check_json, say, write_json

__all__ = ["ENVIRONMENT", "add_parser", "collect"]

ENVIRONMENT = {
    "PTQKIT_CPU": "kernels to use: base, avx2, avx512, avx512_vnni_bf16_amx ... (default: the CPU's best)",
    "PTQKIT_BLAS": "code that factorizes: builtin or scipy (default: the faster one)",
    "PTQKIT_OPENMP": "when building: 0 leaves OpenMP out, 1 requires it",
    "PTQKIT_CFLAGS": "when building: further flags of the C compiler",
    "PTQKIT_DEBUG": "1 makes the command line show tracebacks",
    "OMP_NUM_THREADS": "threads of the core if threads=0, and of PyTorch",
}
"""Variables that ptqkit reads, and what they do."""

_PACKAGES = {
    "numpy": "",
    "scipy": "",
    "torch": "hf",
    "transformers": "hf",
    "safetensors": "hf",
    "compressed-tensors": "hf",
    "greenlet": "hf",
    "accelerate": "hf",
    "rich": "hf",
    "matplotlib": "hf",
    "datasets": "datasets",
    "pandas": "notebook",
}

_DESCRIPTION = """\
Show what the compiled core runs on, the versions of the packages around it and the environment
variables that ptqkit reads.
"""

_EPILOG = """\
examples:
  ptqkit info
  PTQKIT_CPU=avx2 ptqkit info        check that a forced level is taken
  ptqkit info --json -               for a bug report
"""


def add_parser(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "info",
        help="what runs here: CPU level, BLAS, threads, versions, variables",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_common(parser)
    parser.set_defaults(run=run)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def collect() -> dict[str, Any]:
    """Return ``config``, ``python``, ``system``, ``packages`` and ``environment`` as a dict."""
    return {
        "config": show_config(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "environment": {name: os.environ.get(name) for name in ENVIRONMENT},
    }


def run(args: argparse.Namespace) -> None:
    """Print the facts."""
    check_json(args)
    facts = collect()
    config = facts["config"]
    if args.quiet and args.json != "-":
        print(f"ptqkit {config['version']} {config['cpu_level']} {config['blas']}")
    say(args, f"ptqkit {config['version']}, Python {facts['python']}, {facts['system']}")
    for name, value in config.items():
        if name != "version":
            shown = ", ".join(value) if isinstance(value, (list, tuple)) else value
            say(args, f"  {name:<12} {shown}")
    say(args, "packages")
    for name, version in facts["packages"].items():
        extra = f" (comes with ptqkit[{_PACKAGES[name]}])" if _PACKAGES[name] else ""
        say(args, f"  {name:<20} {version or 'not installed' + extra}")
    say(args, "environment variables")
    for name, meaning in ENVIRONMENT.items():
        value = facts["environment"][name]
        say(args, f"  {name:<16} {'-' if value is None else value:<10} {meaning}")
    write_json(args, facts)
