"""The pre-training ablation: a tiny run from training to the page, and verdicts by hand."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pandas as pd
import pytest
import tokenizers

from benchmarks.pretrain import analyse, evaluate, plan, predictors, tables, train

BASE_LOSS = 4.0


def rows_of(choice, degradation, loss, stages=("late", "early"), error=0.0):
    """CSV rows of a choice: a degradation and a loss per seed and stage."""
    found = []
    for stage in stages:
        for seed, (value, known) in enumerate(zip(degradation[stage], loss[stage], strict=True)):
            one = {"run": f"{choice},seed={seed}", "seed": seed, "stage": stage}
            found.append({**one, "kind": "training", "metric": "validation loss", "value": known})
            for scheme in plan.SCHEMES:
                for metric in tables.MEASURES.values():
                    row = {**one, "kind": scheme, "metric": metric, "value": value}
                    found.append({**row, "error": error})
    return found


def table_of(*parts):
    table = pd.DataFrame([row for part in parts for row in part])
    return table.assign(choice=table["run"].str.replace(r",seed=\d+$", "", regex=True))


def judge(*parts):
    axes = tables.axis_table(tables.degradations(table_of(*parts)))
    return tables.contrast_table(axes)


def verdict(judged, first, second, column="agreement"):
    row = judged[(judged["first"] == first) & (judged["second"] == second)]
    row = row[(row.stage == "late") & (row.scheme == "W4A4") & (row.measure == "text")]
    return row[column].item()


def flat(value, spread=0.02, loss=BASE_LOSS):
    """Two seeds about a value, the early checkpoints half as bad at a higher loss."""
    late, early = [value - spread, value + spread], [value / 2 - spread, value / 2 + spread]
    return {"late": late, "early": early}, {"late": [loss] * 2, "early": [loss + 1] * 2}


def test_verdicts():
    judged = judge(
        rows_of("base", *flat(1.0)),
        rows_of("weight-decay=0.01", *flat(1.03)),
        rows_of("weight-decay=0.001", *flat(2.0)),
        rows_of("dropout=0.8", *flat(0.5)),
        rows_of("positions=alibi", *flat(1.05, spread=0.001)),
        rows_of("positions=sinusoidal", *flat(3.0)),
    )
    assert verdict(judged, "weight decay 0.1", "weight decay 0.01") == "no difference"
    assert verdict(judged, "weight decay 0.1", "weight decay 0.001") == "agrees"
    assert verdict(judged, "dropout 0", "dropout 0.8") == "disagrees"
    assert verdict(judged, "dropout 0", "dropout 0.8", "verdict") == "more with dropout 0"
    assert verdict(judged, "learned", "alibi") == "agrees"  # at most what the paper calls none
    assert verdict(judged, "learned", "sinusoidal") == "disagrees"
    words = tables.axis_verdicts(judged)
    assert words["weight decay"].startswith("agrees (agrees 8, no difference 4")
    assert words["half precision"] == "not run"


def test_noise_of_the_evaluation_is_a_spread():
    parts = [("base", 1.0), ("weight-decay=0.001", 1.2)]
    judged = judge(*(rows_of(c, *flat(v, spread=0.001)) for c, v in parts))
    assert verdict(judged, "weight decay 0.1", "weight decay 0.001") == "agrees"
    judged = judge(*(rows_of(c, *flat(v, spread=0.001), error=0.3) for c, v in parts))
    assert verdict(judged, "weight decay 0.1", "weight decay 0.001") == "no difference"


def test_one_seed_says_nothing():
    one = ({"late": [1.0], "early": [0.5]}, {"late": [4.0], "early": [5.0]})
    judged = judge(rows_of("base", *one), rows_of("dropout=0.1", *flat(9.0)))
    assert verdict(judged, "dropout 0", "dropout 0.1") == "one seed"


def test_equal_loss_removes_what_the_loss_explains():
    """Far above the noise exp(a - 2 loss), a being the choice's: at equal loss exp(a) differs."""

    def choice(name, a, late):
        losses = {"late": [late, late + 0.01], "early": [late + 1, late + 1.1]}
        values = {k: [float(np.exp(a - 2 * x)) for x in v] for k, v in losses.items()}
        return rows_of(name, values, losses)

    parts = (choice("base", 18.0, 4.0), choice("dropout=0.4", 18.0, 5.0))
    found = tables.degradations(table_of(*parts, choice("dropout=0.8", 18.5, 5.5)))
    assert np.allclose(found.slope, -2)
    at = found.groupby("choice").adjusted
    assert at.max().to_numpy() == pytest.approx(at.min().to_numpy())
    expected = np.exp(np.array([18.0, 18.0, 18.5]) - 2 * 4.005)
    assert at.mean()[["base", "dropout=0.4", "dropout=0.8"]].to_numpy() == pytest.approx(expected)
    judged = tables.contrast_table(tables.axis_table(found))
    assert verdict(judged, "dropout 0", "dropout 0.4") == "disagrees"
    rest = verdict(judged, "dropout 0", "dropout 0.4", "difference at equal loss")
    assert abs(rest) < 1e-6 * expected[0]  # what is left is rounding
    assert verdict(judged, "dropout 0", "dropout 0.8", "agreement at equal loss") == "agrees"


def test_failed_runs_are_left_out(tmp_path):
    bad = flat(1.0, loss=8.0)
    table = table_of(rows_of("base", *flat(1.0)), rows_of("dropout=0.1", *bad))
    table.drop(columns="choice").to_csv(tmp_path / "x.csv", index=False)
    read, failed = tables.read(tmp_path / "x.csv")
    assert failed == ["dropout=0.1,seed=0", "dropout=0.1,seed=1"]
    assert set(read.choice) == {"base"}


def test_predictors_by_hand():
    rng = np.random.default_rng(0)
    names = ["base", "dropout=0.1", "dropout=0.4", "dropout=0.8", "gain=single"]
    parts = []
    for name in names:
        y, loss = rng.random(4) + 1, rng.random(4) + 4
        values = {"late": y[:2], "early": y[2:]}
        part = rows_of(name, values, {"late": loss[:2], "early": loss[2:]})
        for row in [r for r in part if r["kind"] == "training"]:
            value = values[row["stage"]][row["seed"]]
            noise = float(rng.random())
            for metric, x in (("same", value), ("opposite", -(value**3)), ("noise", noise)):
                part.append({**row, "kind": "diagnostic", "metric": metric, "value": x})
        parts.append(part)
    table = table_of(*parts)
    found = predictors.predictors(table, samples=200)
    found = found[found.scheme == "W4A4"].set_index("diagnostic")
    assert found.spearman["same"] == pytest.approx(1)
    assert found.spearman["opposite"] == pytest.approx(-1)
    assert found.low["noise"] < 0 < found.high["noise"]
    wide = table[table.kind != "W4A4"].pivot_table(
        index=["run", "stage"], columns="metric", values="value"
    )
    x, loss = wide["noise"].rank(), wide["validation loss"].rank()
    y = wide["same"].rank()
    assert found.spearman["noise"] == pytest.approx(x.corr(y))
    rest = [v - np.polyval(np.polyfit(loss, v, 1), loss) for v in (x, y)]
    assert found["spearman given the loss"]["noise"] == pytest.approx(np.corrcoef(rest)[0, 1])


def test_stated_directions():
    names = {axis: [text for text, _ in plan.choices_of(axis)] for axis in plan.AXES}
    harder = {
        (names[axis][i], names[axis][j]): None if h is None else names[axis][(i, j)[h]]
        for axis in plan.AXES
        for i, j, h in plan.contrasts(axis)
    }
    assert harder["weight decay 0.1", "weight decay 0.001"] == "weight decay 0.001"
    pair = ("weight decay 0.001, clipping 1", "weight decay 0.001, clipping none")
    assert harder[pair] == pair[1]
    assert harder["dropout 0", "dropout 0.8"] == "dropout 0.8"
    pair = ("weight decay 0.1, bf16", "weight decay 0.1, fp16")
    assert harder[pair] == pair[1]
    assert harder["learned", "alibi"] is None
    assert harder["adam, channel gain", "muon, channel gain"] == "adam, channel gain"
    assert harder["adam, channel gain", "adam, single gain"] == "adam, channel gain"
    assert len(plan.runs(2)) == 2 * 16


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two tiny runs and their tasks."""
    folder = tmp_path_factory.mktemp("runs")
    text = "Once upon a time there was a little girl who liked to play in the garden. " * 200
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([text], vocab_size=280, special_tokens=["<s>"])
    ids = np.array(tokenizer.encode(text).ids, np.uint16)
    np.savez(folder / "tokens.npz", train=ids, valid=ids, test=ids)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tasks").mkdir()
    choice = {"context": "Once upon", "choices": ["a time", "the girl"], "gold": 0}
    for name in plan.TASKS:
        item = {"context": "There was a", "continuation": "girl"} if "lambada" in name else choice
        lines = f"{json.dumps(item)}\n".encode() * 3
        (folder / "tasks" / f"{name}.jsonl.gz").write_bytes(gzip.compress(lines))
    small = [
        "--steps",
        "4",
        "--batch",
        "2",
        "--length",
        "16",
        "--hidden-size",
        "64",
        "--layers",
        "2",
    ]
    small += ["--vocab-size", "280", "--warmup", "2", "--early", "0.5", "--device", "cpu"]
    for name, options in (
        ("base", []),
        ("gain=single+optimizer=muon", ["--gain", "single", "--optimizer", "muon"]),
        ("precision=fp16", ["--precision", "fp16"]),
    ):
        out = str(folder / f"{name},seed=0")
        train.train(
            train.parse(["--data", str(folder / "tokens.npz"), "--out", out, *small, *options])
        )
    return folder


def test_from_training_to_the_page(runs, tmp_path, monkeypatch):
    known = {f"{p.parent.name}/{p.name}": p for p in sorted(runs.glob("*/*")) if p.is_dir()}
    assert len(known) == 6
    muon = "gain=single+optimizer=muon,seed=0/late"
    known = {k: v for k, v in known.items() if k.startswith("base") or k == muon}
    for path in known.values():
        rows = evaluate.evaluate(str(path), str(runs / "tokens.npz"), str(runs / "tasks"), "cpu")
        evaluate.write(tmp_path / "ablation.csv", rows)
    facts = {name: json.loads((path / "training.json").read_text()) for name, path in known.items()}
    (tmp_path / "training.json").write_text(json.dumps(facts))
    assert evaluate.done_already(tmp_path / "ablation.csv") == {
        tuple(name.split("/")) for name in known
    }
    table = pd.read_csv(tmp_path / "ablation.csv")
    for (run, _), part in table.groupby(["run", "stage"]):
        metrics = part.groupby("kind")["metric"].agg(set).to_dict()
        for scheme in plan.SCHEMES:
            assert {"text loss, percent", "mean of tasks, percent"} < metrics[scheme]
            assert {f"{t} accuracy change" for t in plan.TASKS} < metrics[scheme]
        for place in evaluate.PARTS:
            assert {f"{k}, {place}" for k in evaluate.INPUTS} < metrics["diagnostic"]
            assert {f"weight {k}, {place}" for k in evaluate.WEIGHTS} < metrics["diagnostic"]
            assert f"spectral_norm, {place}, 1" in metrics["depth"]
        assert {"attention sinks", "softmax mass lost", "key-value error"} < metrics["diagnostic"]
        assert "sensitivity of all blocks, dB" in metrics["diagnostic"]
        assert len([m for m in metrics["diagnostic"] if m.startswith("outlier dim")]) == 4
        assert len(metrics["distribution"]) == 2 * 2 * 9
        text = part[part.metric == "text"]["value"].item()
        perplexity = part[part.metric == "text perplexity"]["value"].item()
        assert perplexity == pytest.approx(np.exp(text), rel=1e-4)
        gains = part[part.metric == "norm gain std"]["value"].item()
        assert (gains == 0) == ("single" in run)
    page = analyse.analyse(tmp_path, tmp_path / "out", samples=20)
    names = {"README.md", "ablation.csv.gz", "axes.csv", "contrasts.csv", "predictors.csv"}
    names |= {"training.json", "losses.png", "predictors.png"}
    names |= {f"figure{i}.png" for i in (2, 3, 4, 5)}
    assert {p.name for p in (tmp_path / "out").iterdir()} == names
    assert "not run" in page and "--steps 4 --batch 2" in page
    monkeypatch.setattr(
        analyse.figures, "draw_all", lambda *args: sorted(f for f in names if "png" in f)
    )
    assert analyse.analyse(tmp_path / "out", tmp_path / "again", samples=20) == page
    for path in (tmp_path / "again").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
