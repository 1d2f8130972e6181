"""Studies: products of options, errors computed by hand, resume, and pictures."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
from helpers.sweep_cases import tiny_model, words

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import ptqkit  # noqa: E402
from ptqkit import PreflightError, Study  # noqa: E402
from ptqkit.errors import CalibrationError, UsageError  # noqa: E402
from ptqkit.hf import Workbench, load_model, perplexity, prepare_calibration  # noqa: E402
from ptqkit.study import driver  # noqa: E402
from ptqkit.study.cells import CellsFailed  # noqa: E402
from ptqkit.study.result import StudyResult  # noqa: E402

TRAIN, TEST = [words(400)], [words(240, 1)]
CALIBRATION = {"samples": 3, "sequence_length": 24}
GRID = {"bits": [2, 3], "group_size": [16, None]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("study") / "model"
    tiny_model(path)
    return path


@pytest.fixture(scope="module")
def study(folder):
    return Study(folder, TRAIN, TEST, window=32, device="cpu", name="tiny", **CALIBRATION)


@pytest.fixture(scope="module")
def result(study):
    return study.run(["rtn", "reference"], **GRID, draws=2, progress=False)


@pytest.fixture
def counted(monkeypatch):
    """Names of the cells that models are made for."""
    names = []

    def count(bench, recipe, *rest):
        names.append(recipe)
        return plain(bench, recipe, *rest)

    plain = driver.quantized_copy
    monkeypatch.setattr(driver, "quantized_copy", count)
    return names


def test_a_product_has_every_case_once(result):
    assert len(result.cases) == 8 and len(result.cells) == 1 + 8 * 2
    assert result.parameters == {
        "recipe": ["rtn", "reference"],
        "bits": [2, 3],
        "group_size": [16, "channel"],
    }
    assert result.cases[1] == "rtn, bits=2, group_size=channel"
    one = next(c for c in result.cells if c.recipe == "reference, bits=3, group_size=16")
    assert one.inputs["recipe"]["bits"] == 3 and one.inputs["recipe"]["order"] == "natural"
    assert one.parameters == {"recipe": "reference", "bits": 3, "group_size": 16}


@pytest.mark.parametrize("draw", [0, 1])
def test_a_case_is_a_plain_run(folder, study, result, draw):
    model, tokenizer, _ = load_model(folder, device="cpu")
    data = prepare_calibration(TRAIN, tokenizer, seed=draw, **CALIBRATION)
    plain = ptqkit.quantize(
        model, "reference", data, bits=3, group_size=16, stored_dtype="float16", progress=False
    )
    ours = study.quantize("reference", bits=3, group_size=16, draw=draw)
    states = [plain.model.state_dict(), ours.model.state_dict()]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    found = perplexity(plain.model, tokenizer, TEST, window=32)
    name = "reference, bits=3, group_size=16"
    cell = next(c for c in result.cells if (c.recipe, c.draw) == (name, draw))
    assert cell.value == found.perplexity and cell.losses == list(found.losses)
    assert sum(found.losses) / found.tokens == pytest.approx(found.nll_per_token, rel=1e-12)


def test_the_float_model_stays(folder, study, result):
    model, tokenizer, _ = load_model(folder, device="cpu")
    fresh = study.float_model()
    for name, value in model.state_dict().items():
        assert torch.equal(value, fresh.state_dict()[name])
    assert result.cells[0].value == perplexity(model, tokenizer, TEST, window=32).perplexity


def by_hand(first, second):
    """Difference of two recipes and its errors, spelled out; each is a list of cells."""
    draws = max(len(first), len(second))
    first, second = ([c[min(r, len(c) - 1)] for r in range(draws)] for c in (first, second))
    n = np.array(first[0].scored, dtype=np.float64)
    total, m = n.sum(), len(n)
    differences, pulls = [], np.zeros(m, dtype=np.float64)
    for a, b in zip(first, second, strict=True):
        la, lb = np.array(a.losses, np.float64), np.array(b.losses, np.float64)
        pa, pb = math.exp(la.sum() / total), math.exp(lb.sum() / total)
        differences.append(pa - pb)
        for i in range(m):
            own = pa * (la[i] - n[i] * la.sum() / total) - pb * (lb[i] - n[i] * lb.sum() / total)
            pulls[i] += own / total / draws
    over_windows = math.sqrt(m / (m - 1) * sum(p * p for p in pulls))
    mean = sum(differences) / draws
    spread = math.sqrt(sum((d - mean) ** 2 for d in differences) / (draws - 1))
    return mean, over_windows, spread / math.sqrt(draws)


def test_errors_are_those_computed_by_hand(result):
    cells = {}
    for cell in result.cells:
        cells.setdefault(cell.recipe, []).append(cell)
    pairs = [
        ("reference, bits=3, group_size=16", "float"),
        ("reference, bits=3, group_size=16", "rtn, bits=3, group_size=16"),
        ("reference, bits=2, group_size=16", "reference, bits=2, group_size=channel"),
    ]
    for first, second in pairs:
        found = result.compare(first, second)
        expected = by_hand(cells[first], cells[second])
        shown = (found.difference, found.se_windows, found.se_draws)
        assert shown == pytest.approx(expected, rel=1e-9)
        assert found.standard_error == pytest.approx(math.hypot(*expected[1:]), rel=1e-9)
        assert (found.windows, found.draws) == (len(cells[first][0].losses), 2)
        assert found.se_draws > 0 and found.se_windows > 0
    row = next(r for r in result.rows() if r["case"] == first)
    assert row["excess"] == result.excess(first).difference


def test_a_linear_error_is_that_of_the_mean():
    """Of equal windows and a plain mean: the textbook's formula."""
    from ptqkit._paired import Sample, standard_errors

    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 9))
    first = Sample.of([a.mean()], [a], [1] * 9, False)
    found = standard_errors(first - Sample.of([b.mean()], [b], [1] * 9, False))
    assert found[0] == pytest.approx(np.std(a - b, ddof=1) / 3, rel=1e-12)
    assert math.isnan(found[1])


def test_comparing_labels_pairs_the_other_labels(result):
    found = result.compare({"recipe": "reference"}, {"recipe": "rtn"})
    each = [
        result.compare(f"reference, {rest}", f"rtn, {rest}").difference
        for rest in (f"bits={b}, group_size={g}" for b in (2, 3) for g in (16, "channel"))
    ]
    assert found.cases == 4 and found.difference == pytest.approx(np.mean(each), rel=1e-9)
    assert found.difference == result.compare("reference", "rtn").difference
    back = result.compare("rtn", "reference")
    assert back.difference == -found.difference and back.standard_error == found.standard_error
    both = {"recipe": "rtn", "bits": 2}, {"recipe": "reference", "bits": 3}
    assert result.compare(*both).cases == 2
    assert "standard errors), mean of 4 pairs" in str(found)
    assert result.compare({"bits": 2}, "float").cases == 4
    for wrong in ("quality", {"bits": 5}, {"bit": 2}):
        with pytest.raises(UsageError, match="neither a case|no case has bits=5|no parameter"):
            result.compare(wrong, "float")


def test_what_is_measured_is_never_measured_again(study, result, counted, tmp_path, folder):
    again = study.run("reference", **GRID, draws=2, progress=False)
    assert counted == []
    assert again.compare("reference, bits=3, group_size=16", "float").difference == (
        result.excess("reference, bits=3, group_size=16").difference
    )
    first = study.run("reference", bits=3, group_size=16, path=tmp_path, progress=False)
    other = Study(folder, TRAIN, TEST, window=32, device="cpu", **CALIBRATION)
    found = other.run("reference", bits=3, group_size=16, path=tmp_path, progress=False)
    assert (
        counted == [] and found.losses("reference").tolist() == first.losses("reference").tolist()
    )
    other.run("reference", bits=3, group_size=16, path=tmp_path, rerun=True, progress=False)
    assert len(counted) == 1
    less = Study(folder, TRAIN, TEST, window=30, device="cpu", **CALIBRATION)
    less.run("reference", bits=3, group_size=16, path=tmp_path, progress=False)
    assert len(counted) == 2


def test_a_recipe_without_calibration_runs_once_for_all_draws(study, counted):
    bare = Study(study.float_model(), metric=lambda model: 0.0)
    assert bare.quantize("rtn", bits=4, group_size=16).recipe.bits == 4
    found = study.run("rtn", bits=4, group_size=16, draws=3, progress=False)
    assert len(counted) == 1 and found.excess("rtn").draws == 3
    assert found.excess("rtn").se_draws == 0


def test_an_interrupted_study_goes_on(folder, tmp_path, monkeypatch, counted):
    made = Study(folder, TRAIN, TEST, window=32, device="cpu", **CALIBRATION)
    plain, seen = made.measure, []

    def stop(model, task):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(task)
        return plain(model, task)

    monkeypatch.setattr(made, "measure", stop)
    with pytest.raises(driver.StudyInterrupted, match="2 of 3 cells are finished") as stopped:
        made.run("rtn", bits=[2, 3], group_size=16, path=tmp_path, progress=False)
    assert "missing" in stopped.value.result.table()
    counted.clear()
    other = Study(folder, TRAIN, TEST, window=32, device="cpu", **CALIBRATION)
    events = []
    other.run("rtn", bits=[2, 3], group_size=16, path=tmp_path, progress=events.append)
    assert len(counted) == 1
    assert [(e.index, e.total, e.seconds_left) for e in events] == [(1, 1, 0.0)]


def test_a_case_that_fails_says_why_and_the_others_go_on(study):
    with pytest.warns(RuntimeWarning, match="1 of 3 cells failed; .*group_size 7 does not"):
        found = study.run("rtn", bits=3, group_size=[7, 16], progress=False)
    assert [r["status"] for r in found.rows()] == ["ok", "failed", "ok"]
    assert "failed: rtn, group_size=7: " in found.table() and found.best() == found.cases[1]
    with pytest.raises(UsageError, match="group_size=7.* is failed: .*does not"):
        found.excess("rtn, group_size=7")
    with pytest.raises(CellsFailed, match="does not divide"):
        study.run("rtn", bits=3, group_size=7, fail_fast=True, progress=False)


def test_a_study_without_one_good_case_says_the_reason(study):
    with pytest.raises(CellsFailed, match="every case failed; .*size=5.*; use .*or 'channel'"):
        study.run("rtn", bits=3, group_size=[5, 7], progress=False)
    assert study.group_size(64) == 16 and study.group_size(15) == 8


def test_all_problems_of_a_product_are_told_before_anything_runs(study):
    with pytest.raises(PreflightError) as error:
        study.run("rtn", bits=[3, 9], groupsize=[16], grid=[], progress=False)
    assert [p.partition(":")[0] for p in error.value.problems[:2]] == [
        "'groupsize' is no option of recipes (did you mean 'group_size'?)",
        "grid is an empty list",
    ]
    with pytest.raises(PreflightError, match="rtn, bits=9: bits must be"):
        study.run("rtn", bits=[3, 9], progress=False)
    with pytest.raises(PreflightError, match="no case is left"):
        study.run("rtn", bits=[3, 4], where=lambda labels: labels["bits"] > 4)
    with pytest.raises(UsageError, match="draws must be at least 1"):
        study.run("rtn", draws=0)


def test_options_that_change_together_are_one_axis(study):
    orders = {"natural": {"order": "natural"}, "static": {"order": "act", "static_groups": True}}
    found = study.run("reference", bits=3, group_size=16, ordering=orders, progress=False)
    assert found.cases == ["reference, ordering=natural", "reference, ordering=static"]
    assert found.cells[2].inputs["recipe"]["static_groups"] is True
    names = {"mine": ["AWE", {"part": "RTN", "bits": 4, "group_size": 16}], "theirs": "rtn"}
    both = study.run(names, group_size=16, where=lambda x: x["recipe"] == "mine", progress=False)
    assert both.cases == ["mine"] and both.cells[1].inputs["recipe"]["equalization"]


def test_a_softmax_is_an_axis_too(folder, study):
    choices = [None, {"bits": 4, "correction": "row_sum"}, {"bits": 4}]
    found = study.run("rtn", bits=4, group_size=16, softmax=choices, progress=False)
    assert found.cases[1:] == ["rtn, softmax=SM4 row_sum", "rtn, softmax=SM4 bias"]
    alone = study.run(None, softmax=choices[:2], progress=False)
    assert alone.cases == ["softmax=SM4 row_sum"]
    options = {"bits": [4, 8], "correction": [None, "row_sum"]}
    both = study.run("float", softmax=options, progress=False)
    assert both.parameters == {"softmax bits": [4, 8], "softmax correction": ["none", "row_sum"]}
    assert both.cells[2].value == alone.cells[1].value and len(both.cases) == 4
    model, tokenizer, _ = load_model(folder, device="cpu")
    made = ptqkit.quantize(
        model, "rtn", bits=4, group_size=16, stored_dtype="float16", progress=False
    ).model
    ptqkit.quantize_softmax(made, bits=4, correction="row_sum")
    expected = perplexity(made, tokenizer, TEST, window=32)
    assert found.cells[2].value == expected.perplexity


def test_a_metric_has_errors_over_its_items(folder):
    model, tokenizer, _ = load_model(folder, device="cpu")
    ids = torch.arange(60, dtype=torch.long).view(6, 10)

    def last(made):
        return made(ids).logits[:, -1, 7]

    made = Study(model, ids, metric=last, tokenizer=tokenizer)
    assert list(made.tasks) == ["last"]
    found = made.run("reference", bits=3, group_size=16, progress=False)
    quantized = made.quantize("reference", bits=3, group_size=16).model
    with torch.no_grad():
        each = (last(quantized.eval()).double() - last(model.eval()).double()).numpy()
    assert found.excess("reference").difference == pytest.approx(each.mean(), rel=1e-9)
    expected = np.std(each, ddof=1) / math.sqrt(6)
    assert found.excess("reference").se_windows == pytest.approx(expected, rel=1e-9)
    with pytest.raises(UsageError, match="draws need calibration text"):
        made.run("reference", bits=3, group_size=16, draws=2)
    several = Study(model, ids, {"a": ids, "b": TEST}, tokenizer=tokenizer, window=16)
    assert several.run("rtn", bits=3, group_size=16, progress=False).tasks == ["a", "b"]


def test_what_cannot_be_measured_is_refused(folder, tmp_path):
    with pytest.raises(CalibrationError, match="there is no such file; give text itself as a list"):
        Study(folder, TRAIN, "nowhere.txt")
    (tmp_path / "own.txt").write_text(TEST[0], encoding="utf-8")
    assert list(Study(folder, TRAIN, tmp_path / "own.txt").tasks) == ["own"]


def test_a_result_is_a_table_in_every_form(result):
    frame = pytest.importorskip("pandas") and result.to_dataframe()
    assert len(frame) == 9 and list(frame["bits"][1:]) == [2, 2, 3, 3, 2, 2, 3, 3]
    assert len(frame.query("recipe == 'rtn' and bits == 3")) == 2
    lines = result.table().splitlines()
    assert lines[0].split() == "tiny bits/weight perplexity excess ± windows ± draws s".split()
    assert len(lines) == 2 + 9 and max(map(len, lines)) <= 100
    assert "\n" not in repr(result) and len(repr(result)) <= 200
    page = result._repr_html_()
    assert page.count("<tr>") == 10 and "reference, bits=3, group_size=16" in page
    assert result.select(bits=2, recipe=["rtn"]).cases == result.cases[:2]
    assert "NaN" not in str(result.to_dict()) and result.to_dict()["rows"][1]["draws"] == 2
    one = result.compare("rtn", "reference")
    assert one._repr_html_().count("<tr>") == 2 and len(one.to_dataframe()) == 1


def test_long_names_keep_in_tables_what_tells_them_apart(result):
    long = ", order=group-act, grid=hessian, refine_passes=1"
    cells = [
        replace(c, recipe=f"reference, {c.recipe.partition(', ')[2]}{long}")
        for c in result.cells
        if c.recipe.startswith("reference")
    ]
    lines = StudyResult("tiny", [*(c for c in result.cells if c.recipe == "float"), *cells]).table()
    assert max(map(len, lines.splitlines())) <= 100
    assert lines.startswith("tiny: reference ") and lines.count("\nbits=") == 4


def test_pictures_name_their_axes_and_bars_begin_at_zero(result):
    labels = {
        "bars": ("xlabel", "perplexity above the float model's"),
        "lines": ("ylabel", "perplexity above the float model's"),
        "heatmap": ("xlabel", "bits per code"),
        "size": ("xlabel", "bits per weight, with scales"),
        "windows": ("xlabel", "nats per token above the float model's"),
    }
    for kind, (which, text) in labels.items():
        picture = result.plot(kind)
        axes = picture.axes[0]
        assert text in getattr(axes, f"get_{which}")(), kind
        assert axes.get_title(loc="left").startswith("tiny: 2, 3 bits"), kind
        assert picture._repr_png_().startswith(b"\x89PNG")
    assert "mean over group_size" in result.plot("lines", x="bits").axes[0].get_title(loc="left")
    for wrong in ({"kind": "pie"}, {"x": "beds"}, {"x": "bits", "by": "bits"}, {"task": "b"}):
        with pytest.raises(UsageError):
            result.plot(**wrong)
    axes = result.select(bits=2, recipe="reference").plot("bars").axes[0]
    assert axes.get_xscale() == "linear" and all(bar.get_x() == 0 for bar in axes.patches)
    assert len(axes.patches) == 2


def test_values_far_apart_are_points_not_bars(study, result):
    changed = copy.deepcopy(result)
    base = changed.cells[0]
    for k, cell in enumerate(changed.cells[1:]):
        more = 10.0 ** (k / 4 - 4)
        cell.losses = [x + more * n for x, n in zip(base.losses, base.scored, strict=True)]
        cell.value = math.exp(sum(cell.losses) / sum(cell.scored))
    axes = changed.plot("bars").axes[0]
    assert axes.get_xscale() == "log" and not axes.patches
    low, high = axes.get_xlim()
    found = [changed.excess(c).difference for c in changed.cases]
    assert all(low < value < high for value in found)


def test_a_workbench_can_be_copied(folder):
    bench = Workbench.load(folder, device="cpu", test=TEST, test_options={"window": 32})
    copied = copy.deepcopy(bench)
    assert copied.float_result == bench.float_result
    assert copied.cached_tokenizer.bos_token_id == bench.cached_tokenizer.bos_token_id
