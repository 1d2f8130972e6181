"""Which diagnostic predicts the degradation: rank correlations over all checkpoints."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from benchmarks.pretrain.plan import SCHEMES

LOSS = "validation loss"


def correlations(x: np.ndarray, y: np.ndarray, loss: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Spearman's ρ of all columns of x (n, a) with those of y (n, b); and given the loss (n,)."""

    def standard(values: np.ndarray) -> np.ndarray:
        ranks = rankdata(values, axis=0)
        ranks = ranks - ranks.mean(axis=0)
        return ranks / np.linalg.norm(ranks, axis=0)

    with np.errstate(invalid="ignore", divide="ignore"):
        a, b, c = standard(x), standard(y), standard(loss[:, None])
        whole, of_x, of_y = a.T @ b, a.T @ c, (b.T @ c).T
        rest = np.maximum(1 - of_x**2, 0) * np.maximum(1 - of_y**2, 0)
        given = np.where(rest > 1e-9, (whole - of_x * of_y) / np.sqrt(rest), np.nan)
    return whole, given


def predictors(table: pd.DataFrame, samples: int = 1000) -> pd.DataFrame:
    """Rank correlation of every diagnostic with the degradation on text, and given the loss.

    Intervals are 95 % percentile intervals of a bootstrap over choices: all checkpoints of a
    choice (its seeds, early and late) stay together.
    """
    known = table[table.kind.isin(["diagnostic", "training"])]
    keys = ["choice", "run", "stage"]
    wide = known.pivot_table(index=keys, columns="metric", values="value")
    for scheme in SCHEMES:
        part = table[(table.kind == scheme) & (table.metric == "text loss, percent")]
        wide[scheme] = part.set_index(keys)["value"]
    wide = wide[np.isfinite(wide[[*SCHEMES, LOSS]]).all(axis=1)]
    names = [c for c in wide.columns if c not in SCHEMES and wide[c].nunique() > 1]
    names = [c for c in names if np.isfinite(wide[c]).all()]
    x, y, loss = (wide[c].to_numpy() for c in (names, list(SCHEMES), LOSS))
    groups = list(wide.reset_index().groupby("choice").indices.values())
    rng = np.random.default_rng(0)
    whole = correlations(x, y, loss)
    draws = []
    for _ in range(samples):
        rows = np.concatenate([groups[i] for i in rng.integers(0, len(groups), len(groups))])
        draws.append(correlations(x[rows], y[rows], loss[rows]))
    boot = np.array(draws)
    # a diagnostic that is constant in a draw has no correlation there
    enough = np.isfinite(boot).sum(axis=0) >= samples // 2
    boot = np.where(enough, boot, 0.0)
    low, high = np.nanpercentile(boot, [2.5, 97.5], axis=0)
    low, high = np.where(enough, low, np.nan), np.where(enough, high, np.nan)
    rows = []
    for j, scheme in enumerate(SCHEMES):
        for i, name in enumerate(names):
            row = {"scheme": scheme, "diagnostic": name, "checkpoints": len(x)}
            for k, end in enumerate(("", " given the loss")):
                values = (whole[k][i, j], low[k, i, j], high[k, i, j])
                row |= dict(zip((f"spearman{end}", f"low{end}", f"high{end}"), values, strict=True))
            rows.append(row)
    found = pd.DataFrame(rows)
    order = found.assign(size=found.spearman.abs()).sort_values(
        ["scheme", "size"], ascending=[True, False], kind="stable"
    )
    return found.loc[order.index]


def overall(found: pd.DataFrame, end: str = "") -> pd.Series:
    """Mean over the schemes of |ρ|, the largest first."""
    size = found[f"spearman{end}"].abs()
    return size.groupby(found.diagnostic).mean().sort_values(ascending=False)
