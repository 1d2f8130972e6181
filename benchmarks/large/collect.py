"""Put runs of the pipeline together that were made on one kind of machine, for the page.

    python -m benchmarks.large.collect a.json b.json --commit COMMIT \\
        --out benchmarks/results/large/pipeline_7b.json

Each run has the command of its file; the machine is that of the first one. Runs of equal names are
kept once, the last one. `--older` gives the runs that were not made again, from a file of before.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.large.models import Size

__all__ = ["collected", "name_of", "one_process_of"]


def name_of(run: Mapping[str, Any]) -> str:
    """Return what a run is called on the page."""
    job, size = run["job"], Size(**run["job"]["size"])
    layers = "all layers" if size.layers == Size().layers else f"{size.layers} layers"
    options, parts = job["options"], [run["recipe"], layers]
    known = {"bits", "group_size", "symmetric", "schedule", "diagnostics", "memory_budget"}
    parts += [f"{k}={v}" for k, v in options.items() if k not in known]
    if options.get("memory_budget"):
        parts.append(f"budget of {options['memory_budget']}")
    if job["stream"]:
        parts.append("streamed")
    if job["profile"]:
        parts.append("profiled")
    if run["processes"]:
        parts.append(f"torchrun, {run['processes']} process{'es'[: 2 * (run['processes'] > 1)]}")
    return ", ".join(parts)


def one_process_of(run: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> Any:
    """Return the run of one process of torchrun that a run is compared with; None if it is none.

    They are of the same model and options.
    """
    keys = ("size", "options", "samples", "length", "batch_size", "stream", "recipe")

    def what(of: Mapping[str, Any]) -> list[Any]:
        return [of["job"][key] for key in keys]

    found = (r for r in runs if r["processes"] == 1 and what(r) == what(run))
    return next(found, None) if run["processes"] else None


def collected(
    files: Sequence[Mapping[str, Any]],
    commit: str,
    note: str,
    older: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return one file's content of several files' contents.

    Checksums of codes become the number of layers in which they are others than those of one
    process. Runs of ``older``, and those stopped then, keep their commit.
    """
    runs: dict[str, Any] = {}
    for found in files:
        for run in found["runs"]:
            name = name_of(run)
            runs.pop(name, None)
            runs[name] = {"name": name, "command": found["command"], **run}
    codes = {name: run["ranks"][0].get("codes", {}) for name, run in runs.items()}
    for name, run in runs.items():
        base = one_process_of(run, list(runs.values()))
        if base is not None and base is not run and codes[name]:
            others = codes[base["name"]]
            count = sum(digest != others.get(n) for n, digest in codes[name].items())
            run["layers_with_other_codes"], run["layers"] = count, len(codes[name])
    for run in [] if older is None else older["runs"]:
        if run["name"] not in runs:
            runs[run["name"]] = {"commit": older["commit"], **run}
    for run in runs.values():
        run["ranks"] = [{k: v for k, v in r.items() if k != "codes"} for r in run["ranks"]]
    return {
        "benchmark": "pipeline",
        "commit": commit,
        "note": note,
        "machine": files[0]["machine"],
        "runs": list(runs.values()),
        "not_finished": [] if older is None else older.get("not_finished", []),
    }


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("files", nargs="+", type=Path)
    p.add_argument("--commit", required=True, help="of the package that was measured")
    p.add_argument("--note", default="", help="what was special about the machine or the runs")
    p.add_argument("--older", type=Path, help="file of before, for the runs not made again")
    p.add_argument("--out", type=Path, required=True)
    args = p.parse_args()
    files = [json.loads(path.read_text(encoding="utf-8")) for path in args.files]
    older = None if args.older is None else json.loads(args.older.read_text(encoding="utf-8"))
    found = collected(files, args.commit, args.note, older)
    args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
