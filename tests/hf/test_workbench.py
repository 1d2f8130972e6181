"""The workbench: any model is quantized in copies and measured."""

from __future__ import annotations

import copy
import math

import pytest
from helpers.sweep_cases import tiny_model, words

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import ptqkit  # noqa: E402
from ptqkit.errors import NotFiniteError, UsageError  # noqa: E402
from ptqkit.hf import Workbench, load_model, perplexity, prepare_calibration, workbench  # noqa: E402

WINDOWS = {"samples": 3, "sequence_length": 24}
SMALL = {"bits": 3, "group_size": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a tiny model, stored as float16, and its tokenizer."""
    path = tmp_path_factory.mktemp("bench") / "model"
    tiny_model(path)
    return path


@pytest.fixture
def bench(folder):
    return Workbench.load(
        folder,
        device="cpu",
        calibration=[words(400)],
        calibration_options=WINDOWS,
        test=[words(80, 1)],
        test_options={"window": 32},
    )


def test_loading_tells_what_it_chose(folder):
    model, tokenizer, facts = load_model(folder, device="cpu")
    assert facts == {
        "folder": str(folder),
        "stored_dtype": "float16",
        "dtype": "float32",
        "device": "cpu",
        "class": "LlamaForCausalLM",
    }
    assert model.dtype == torch.float32 and tokenizer is not None and not model.training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "no/such/model"}, "no/such/model: there is no such folder"),
        ({"device": "nowhere"}, "device nowhere cannot be used here"),
        ({"dtype": "float33"}, "unknown dtype 'float33'"),
    ],
)
def test_what_cannot_be_loaded(folder, options, message):
    with pytest.raises(UsageError, match=message):
        load_model(**{"name": folder, "device": "cpu", **options})


def test_rows_equal_the_library_called_by_hand(folder, bench):
    before = {name: t.clone() for name, t in bench.model.state_dict().items()}
    row = bench.measure("reference", **SMALL)
    assert all(torch.equal(t, before[name]) for name, t in bench.model.state_dict().items())

    model, tokenizer, _ = load_model(folder, device="cpu")
    base = perplexity(model, tokenizer, [words(80, 1)], window=32).perplexity
    batches = prepare_calibration([words(400)], tokenizer, max_length=64, **WINDOWS).batches
    result = ptqkit.quantize(
        model, "reference", batches, scale_dtype="float16", progress=False, **SMALL
    )
    value = perplexity(model, tokenizer, [words(80, 1)], window=32).perplexity
    assert (bench.float_row.perplexity, row.perplexity, row.excess) == (base, value, value - base)
    assert row.bits_per_weight == result.report.totals()["bits_per_weight"]
    assert (row.recipe, row.bits, row.symmetric) == ("reference", 3, False)
    assert 0 < row.megabytes < bench.float_row.megabytes


def test_a_perplexity_that_is_not_finite_is_a_warning(bench, monkeypatch):
    assert math.isfinite(bench.float_row.perplexity)
    real = workbench.perplexity

    def damaged(model, *args, **options):
        with torch.no_grad():
            model.lm_head.weight[3] = math.nan
        return real(model, *args, **options)

    monkeypatch.setattr(workbench, "perplexity", damaged)
    with pytest.warns(RuntimeWarning, match="the perplexity of the model quantized by rtn is nan"):
        assert math.isnan(bench.measure("rtn", **SMALL).perplexity)
    with pytest.raises(NotFiniteError, match="the perplexity of the model is nan"):
        bench.perplexity_of(copy.deepcopy(bench.model))


def test_other_windows_give_another_row(bench):
    first = bench.measure("reference", **SMALL)
    bench.calibrate(seed=1)
    other = bench.measure("reference", **SMALL)
    bench.calibrate(seed=0)
    assert bench.measure("reference", **SMALL).perplexity == first.perplexity != other.perplexity


def test_text_is_read_only_if_a_recipe_needs_it(folder):
    asked = []

    def source():
        asked.append(1)
        return [words(400)]

    bench = Workbench.load(folder, device="cpu", calibration=source, calibration_options=WINDOWS)
    bench.quantize("rtn", **SMALL)
    assert not asked
    for _ in range(2):
        bench.quantize("reference", **SMALL)
    assert len(asked) == 1


def test_scales_follow_the_stored_dtype(bench):
    assert bench.quantize("rtn", **SMALL).recipe.scale_dtype == "float16"
    assert bench.quantize("rtn", scale_dtype="float32", **SMALL).recipe.scale_dtype == "float32"
    bench.stored_dtype = "float32"
    assert bench.quantize("rtn", **SMALL).recipe.scale_dtype is None


def test_settings_name_the_conventions(bench):
    found = bench.settings
    assert (found["window"], found["start_token"]) == (32, "<s>")
    assert found["calibration_tokens"] == 3 * 24 and found["test_tokens"] > 0


def test_an_encoder_is_measured_by_its_task():
    from helpers.driver_models import build, padded_batches, tokens

    model, batches, seen = build("bert").train(), padded_batches("bert"), []
    with torch.no_grad():
        want = model.eval()(tokens()).logits.argmax(-1)
    model.train()

    def agreement(other):
        seen.append(other.training)
        with torch.no_grad():
            return (other(tokens()).logits.argmax(-1) == want).double().mean()

    bench = Workbench(model, calibration=batches, metric=agreement)
    row, other = (bench.measure(name, bits=2, group_size=16) for name in ("quality", "rtn"))
    assert bench.float_row.metric == 1.0 and bench.float_row.metric_change == 0.0
    assert 0 < row.metric < 1 and row.metric_change == row.metric - 1
    assert row.metric != other.metric
    assert math.isnan(row.perplexity) and math.isnan(row.excess)
    assert model.training and not any(seen)
    assert bench.settings["calibration_tokens"] == sum(
        int(b["attention_mask"].sum()) for b in batches
    )


def test_a_metric_next_to_perplexity(folder):
    bench = Workbench.load(
        folder,
        device="cpu",
        calibration=[words(400)],
        calibration_options=WINDOWS,
        test=[words(80, 1)],
        test_options={"window": 32},
        metric=lambda model: 7,
    )
    row = bench.measure("rtn", **SMALL)
    assert (row.metric, row.metric_change) == (7, 0) and row.excess > 0
    assert math.isnan(Workbench(bench.model, bench.tokenizer).float_metric)
