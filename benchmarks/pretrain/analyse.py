"""From the ablation's CSV to its tables, figures and page: one command.

    python -m benchmarks.pretrain.analyse runs

Reads ``ablation.csv`` (or ``.csv.gz``) and ``training.json`` of a folder and writes
``ablation.csv.gz``, ``training.json``, ``axes.csv``, ``contrasts.csv``, ``predictors.csv``, the
figures and ``README.md`` into benchmarks/results/pretrain. Run on that folder it writes the same.
"""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.pretrain import figures, page, predictors, tables

RESULTS = Path(__file__).resolve().parents[1] / "results" / "pretrain"


def read_facts(path: Path, table: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Return what runs noted by "run/stage", of checkpoints that the CSV holds."""
    if not path.exists():
        return {}
    losses = table[table.metric == "validation loss"].set_index(["run", "stage"])["value"]
    found = {}
    for name, facts in json.loads(path.read_text()).items():
        parts = [part for part in name.split("/") if part != "training.json"]
        known = losses.get((parts[-2], parts[-1]))
        # folders of other experiments may have the same names
        if known is not None and abs(known - facts["validation_loss"]) < 1e-4 * known:
            found["/".join(parts[-2:])] = facts
    return dict(sorted(found.items()))


def write_csv(table: pd.DataFrame, path: Path) -> None:
    """Six digits a number; the same bytes for the same table."""
    text = table.to_csv(index=False, float_format="%.6g", lineterminator="\n").encode()
    path.write_bytes(gzip.compress(text, mtime=0) if path.suffix == ".gz" else text)


def analyse(source: Path, out: Path, samples: int = 1000) -> str:
    """Write everything; return the page."""
    out.mkdir(parents=True, exist_ok=True)
    plain = source / "ablation.csv"
    whole = pd.read_csv(plain if plain.exists() else source / "ablation.csv.gz")
    facts = read_facts(source / "training.json", whole)
    # rows of a checkpoint stay in their order, checkpoints in that of their names
    whole = whole.sort_values(["run", "stage"], ascending=[True, False], kind="stable")
    write_csv(whole, out / "ablation.csv.gz")
    (out / "training.json").write_text(json.dumps(facts) + "\n")
    table, failed = tables.read(out / "ablation.csv.gz")
    found = tables.degradations(table)
    axes = tables.axis_table(found)
    judged = tables.contrast_table(axes)
    ranked = predictors.predictors(table, samples)
    for name, part in (("axes", axes), ("contrasts", judged), ("predictors", ranked)):
        write_csv(part, out / f"{name}.csv")
    drawn = figures.draw_all(table, found, ranked, out)
    stages = tables.early_and_late(found)
    text = page.page(facts, failed, axes, judged, ranked, stages, drawn)
    (out / "README.md").write_text(text, encoding="utf-8")
    return text


def main() -> None:
    """Analyse a folder and print the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", type=Path, help="folder with ablation.csv and training.json")
    parser.add_argument("--out", type=Path, default=RESULTS, help="benchmarks/results/pretrain")
    parser.add_argument("--samples", type=int, default=1000, help="of the bootstrap")
    args = parser.parse_args()
    print(analyse(args.source, args.out, args.samples))


if __name__ == "__main__":
    main()
