"""The cost model of large runs: counts by hand, the fit, and a page that is up to date."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.data import ROOT

from benchmarks.large import collect, cost, equality, models, page
from benchmarks.large.models import Size

DENSE = Size(8, 12, 2, 2, 1, 32)  # heads of 4 channels, one of keys and values


def test_counts_by_hand():
    # Groups of inputs and outputs: (8, 16), (8, 8), (8, 24), (12, 8); 10 tokens in windows of 5.
    found = cost.count(DENSE, 10, 5)
    layer = 2 * 10 * (8 * 16 + 8 * 8 + 8 * 24 + 12 * 8) + 4 * 10 * 5 * 8
    assert found["products"] == 2 * layer - 2 * 10 * 12 * 8  # the last one does not run
    assert found["sums"] == 2 * 10 * (3 * 8**2 + 12**2)
    assert found["factors"] == pytest.approx(2 * (3 * 8**3 + 12**3) / 3)
    assert found["rows"] == 2 * (8**2 * (16 + 8 + 24) + 12**2 * 8)
    assert found["weights"] == 2 * (8 * 48 + 96)
    model = models.build(DENSE, 16, "float32")
    kept = 2 * 32 * 8 + (2 * 2 + 1) * 8  # embeddings, head and norms
    assert sum(p.numel() for p in model.parameters()) == found["weights"] + kept


def test_counts_of_experts_and_of_replay():
    size = Size(8, 12, 2, 2, 2, 32, experts=4, chosen=2)
    one, other = cost.count(size, 10, 5), cost.count(size, 10, 5, "replay")
    assert one["weights"] == 2 * (8 * 24 + 8 * 8 + 4 * (8 * 24 + 12 * 8))
    assert one["sums"] == 2 * 10 * (8**2 + 8**2 + 2 * 8**2 + 2 * 12**2)
    assert other["products"] > 2 * one["products"] and other["sums"] == one["sums"]
    module = models.build(size, 16, "float32").model.layers[0].mlp.experts
    assert module.gate_up_proj.shape == (4, 24, 8)


def test_the_fit_finds_what_made_the_seconds():
    draw = np.random.default_rng(0)
    true = {p: {n: 10 ** draw.uniform(-12, -9) for n in ns} for p, ns in cost.FEATURES.items()}
    runs = []
    for width in (8, 16, 24, 40, 64):
        size = Size(width, 2 * width, 2, 2, 2, 32)
        run = {"size": vars(size), "samples": width, "length": 5, "schedule": "one-pass"}
        runs.append({**run, "seconds": cost.seconds_of(cost.counts_of(run), true)})
    found = cost.fit(runs[:-1])
    told = cost.seconds_of(cost.counts_of(runs[-1]), found)
    assert told == pytest.approx(runs[-1]["seconds"], rel=1e-6)


def test_processes_share_all_but_the_factors():
    counts = cost.count(DENSE, 10, 5)
    unit = {part: dict.fromkeys(names, 1.0) for part, names in cost.FEATURES.items()}
    one, two = (cost.seconds_of(counts, unit, n) for n in (1, 2))
    assert two["forward"] == one["forward"] / 2
    assert two["solve"] == pytest.approx((one["solve"] + counts["factors"]) / 2)
    shared = cost.seconds_of(counts, unit, 2, share_factors=True)
    assert shared["solve"] == pytest.approx(one["solve"] / 2)


def test_the_page_is_what_the_results_give():
    text = page.page(ROOT / "benchmarks" / "results" / "large")
    assert (ROOT / "docs" / "cost.md").read_text(encoding="utf-8") == text


def test_every_way_is_compared_with_one_that_comes_before_it():
    seen = set()
    for name, way in equality.WAYS.items():
        assert not way.reference or way.reference in seen
        seen.add(name)


def run(processes, seconds, **ranks):
    job = {"size": vars(Size(layers=4)), "samples": 128, "length": 2048, "batch_size": 4}
    job |= {"recipe": "reference", "stream": False, "profile": "", "options": {"bits": 4}}
    found = [{"seconds": {"total": seconds - i}, **ranks} for i in range(max(1, processes))]
    return {"recipe": "reference", "processes": processes, "job": job, "ranks": found}


def test_runs_are_put_together_by_name_and_compared_with_one_process():
    a, b = ({"command": c, "machine": c, "runs": []} for c in "ab")
    a["runs"] = [run(1, 9.0, codes={"x": "1", "y": "2"}), run(2, 8.0, codes={"x": "0"})]
    b["runs"] = [run(2, 4.0, codes={"x": "1", "y": "3"}), run(0, 7.0, codes={"x": "5"})]
    found = collect.collected([a, b], "c0ffee", "")
    named = {r["name"]: r for r in found["runs"]}
    assert list(named) == [
        "reference, 4 layers, torchrun, 1 process",
        "reference, 4 layers, torchrun, 2 processes",
        "reference, 4 layers",
    ]
    two = named["reference, 4 layers, torchrun, 2 processes"]
    assert (two["command"], two["layers_with_other_codes"], two["layers"]) == ("b", 1, 2)
    assert all("codes" not in rank for r in found["runs"] for rank in r["ranks"])
    assert "layers_with_other_codes" not in named["reference, 4 layers"]
    again = collect.collected([a], "decaf", "", found | {"not_finished": ["one"]})
    commits = [r.get("commit") for r in again["runs"]]
    assert commits == [None, None, "c0ffee"] and again["not_finished"] == ["one"]
    assert page._named(again["runs"][2]) == "reference, 4 layers (commit c0ffee)"
    goals = page._goals(found["runs"])
    assert "| times as fast with 2 GPUs | 1.8 | 2.25 |" in goals and goals.count("**no**") == 1
    assert "| times as fast with 4 GPUs | 3.2 | - | not run | **no** |" in goals
