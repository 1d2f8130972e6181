"""What the result files of this folder hold in addition: the machine, its GPUs, the command."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

from benchmarks.common import header

__all__ = ["write"]


def write(path: Path | None, name: str, results: dict[str, Any]) -> None:
    """Write results as JSON, if a file was asked for."""
    import torch

    machine = header()
    machine["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    given = [Path(a).name if Path(a).is_absolute() else a for a in sys.argv[1:]]
    command = f"python -m benchmarks.large.{name} {shlex.join(given)}"
    entry = {"benchmark": name, "command": command, "machine": machine, **results}
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(entry, indent=1) + "\n", encoding="utf-8")
