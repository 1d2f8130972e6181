"""The quantized softmax of models: corrections, masks, lengths, files."""

from __future__ import annotations

import copy
import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from helpers.driver_models import WordTokenizer, build, numbers, padded_batches, tokens

import ptqkit
from ptqkit.arrays.softmax import SoftmaxGrid, softmax_grid
from ptqkit.errors import CalibrationError, NotFiniteError, UnsupportedModuleError
from ptqkit.hf.data.calibration import prepare_calibration
from ptqkit.hf.evaluation.likelihood import perplexity
from ptqkit.hf.models.attention import attention_hooks, find_attention, installed_attention
from ptqkit.hf.softmax import table as table_module
from ptqkit.hf.softmax.driver import SoftmaxCalibration, load_softmax, quantize_softmax
from ptqkit.hf.softmax.files import save_softmax
from ptqkit.hf.softmax.table import softmax_table
from ptqkit.nn.attention_quantizer import AttentionQuantizer
from ptqkit.nn.softmax.file import SOFTMAX_FILE
from ptqkit.nn.softmax.quantizer import SoftmaxQuantizer
from ptqkit.nn.softmax.statistics import length_edges

VARIANTS = [
    (None, "tensor"),
    ("bias", "tensor"),
    ("bias", "head"),
    ("row_length", "tensor"),
    ("row_length", "head"),
    ("row_sum", "tensor"),
]
CAUSAL = ("llama", "opt", "mistral", "gpt2", "gpt_neox", "qwen2")


def logits(model, batch=None):
    batch = batch or {"input_ids": tokens(2)}
    with torch.no_grad():
        return model(**batch).logits


def study(name="llama", bits=5, batches=None, **options):
    model = build(name)
    data = prepare_calibration(padded_batches(name) if batches is None else batches)
    return model, SoftmaxCalibration(model, data, bits=bits, **options)


def allowed_probabilities(model, batches):
    """By module: pairs of probabilities and allowed entries in the rows of real tokens."""
    from ptqkit.nn.attention import AttentionHook

    class Keep(AttentionHook):
        def __init__(self):
            self.kept = []

        def softmax(self, p, call):
            full = torch.ones_like(p).bool()
            if call.counted is not None:
                full &= call.counted
            self.kept.append((p, full))
            return p

    hooks = {name: Keep() for name in find_attention(model)}
    with attention_hooks(model, hooks) as facts:
        for batch in batches:
            facts.rows = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
            logits(model, batch)
    return {name: hook.kept for name, hook in hooks.items()}


@pytest.mark.parametrize("name", ["llama", "opt", "bert"])
def test_statistics_against_a_count_by_hand(name):
    model, found = study(name)
    scale = 1 / 31
    for module, kept in allowed_probabilities(model, padded_batches(name)).items():
        entries, rows, zeros, total, mass = 0, 0, 0, 0.0, 0.0
        for p, allowed in kept:
            q = torch.round(p / scale) * scale
            entries += int(allowed.sum())
            rows += int(allowed.any(-1).sum())
            zeros += int(((q == 0) & allowed).sum())
            mass += float(q[allowed].double().sum())
            total += float(p[allowed].double().sum())
        bias = found.statistics[module].bias
        assert float(bias.zero_fraction) == zeros / entries
        assert float(bias.mean_row_sum) == pytest.approx(mass / rows, rel=1e-6)
        assert float(bias.bias("tensor")) == pytest.approx((total - mass) / entries, rel=1e-4)
        longest = max(int(a.sum(-1).max()) for _, a in kept)
        assert found.statistics[module].longest == longest


@pytest.mark.parametrize(("correction", "granularity"), VARIANTS[1:])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_corrections_leave_no_mean_error_on_the_calibration_set(name, correction, granularity):
    model, found = study(name)
    quantizers = found.quantizers(correction, granularity)
    plain = found.quantizers(None)
    for module, kept in allowed_probabilities(model, padded_batches(name)).items():
        p, allowed = (torch.cat(x) for x in zip(*kept, strict=True))
        by_head = granularity == "head"

        def mean_error(q, p=p, allowed=allowed, by_head=by_head):
            error = torch.where(allowed, q(p, allowed) - p, 0).double()
            return error.sum((0, 2, 3)) if by_head else error.sum()

        before, after = mean_error(plain[module]), mean_error(quantizers[module])
        assert after.abs().max() < 1e-4 * p.shape[0] * p.shape[2]
        assert before.abs().max() > 100 * after.abs().max()


def test_row_length_leaves_no_mean_error_at_any_length():
    batches = [{"input_ids": tokens(6)}]
    model, found = study("llama", batches=batches)
    quantizers = found.quantizers("row_length", "head")
    for module, kept in allowed_probabilities(model, batches).items():
        (p, allowed), q = kept[0], quantizers[module]
        error = (q(p, allowed) - p).double().sum(-1).mean(0)  # (heads, q): row i has i + 1 keys
        edges = [0, *q.edges]
        assert q.edges == tuple(length_edges(32))
        for low, high in itertools.pairwise(edges):
            assert error[:, low:high].mean(-1).abs().max() < 1e-5


@pytest.mark.parametrize(("correction", "granularity"), VARIANTS)
@pytest.mark.parametrize("name", CAUSAL)
def test_a_later_token_changes_nothing_before_it(name, correction, granularity):
    model, found = study(name, bits=4)
    quantizers = found.quantizers(correction, granularity)
    ids = tokens(2, 24)
    other = ids.clone()
    other[:, 15] = (other[:, 15] + 7) % 60 + 3
    float_logits = logits(model, {"input_ids": ids})
    hooks = {n: AttentionQuantizer({"softmax": q}) for n, q in quantizers.items()}
    with attention_hooks(model, hooks):
        first, second = (logits(model, {"input_ids": x}) for x in (ids, other))
    assert torch.equal(first[:, :15], second[:, :15])
    assert not torch.equal(first[:, 15:], second[:, 15:])
    assert not torch.equal(first, float_logits)


def test_a_correction_of_forbidden_entries_would_leak():
    """The test above can fail: the same correction, added everywhere, shows later tokens."""
    model = build("llama")
    ids = tokens(2, 24)
    other = ids.clone()
    other[:, 15] += 1
    everywhere = SoftmaxQuantizer(softmax_grid(4), "bias", 0.01)
    hook = AttentionQuantizer({"softmax": lambda p, allowed: everywhere(p, None)})
    with attention_hooks(model, dict.fromkeys(find_attention(model), hook)):
        first, second = (logits(model, {"input_ids": x}) for x in (ids, other))
    assert not torch.equal(first[:, :15], second[:, :15])


@pytest.mark.parametrize(("correction", "granularity"), VARIANTS)
@pytest.mark.parametrize("name", ["llama", "opt", "mistral", "bert"])
def test_what_is_in_the_padding_changes_nothing(name, correction, granularity):
    model, found = study(name, bits=4)
    hooks = {
        n: AttentionQuantizer({"softmax": q})
        for n, q in found.quantizers(correction, granularity).items()
    }
    ids = tokens(2, 24)
    mask = torch.ones_like(ids)
    mask[0, 17:] = 0
    mask[1, :5] = 0
    other = torch.where(mask.bool(), ids, 3 + (ids + 5) % 50)
    with attention_hooks(model, hooks):
        first, second = (
            logits(model, {"input_ids": x, "attention_mask": mask}) for x in (ids, other)
        )
        alone = logits(model, {"input_ids": ids[:1, :17]})
    chosen = mask.bool()
    assert torch.isfinite(first).all()
    assert torch.equal(first[chosen], second[chosen])
    # Without padding the same, but for the order of sums.
    torch.testing.assert_close(alone[0], first[0, :17], rtol=0, atol=2e-3)


@pytest.mark.parametrize(("correction", "granularity"), VARIANTS[1:])
@pytest.mark.parametrize("name", ["llama", "opt", "mistral"])
def test_generation_with_and_without_a_cache(name, correction, granularity):
    model = build(name)
    quantize_softmax(
        model,
        padded_batches(name),
        bits=6,
        correction=correction,
        granularity=granularity,
        diagnostics=False,
    )
    ids = tokens(2, 10)
    made = [
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=14,
            min_new_tokens=14,
            do_sample=False,
            use_cache=use_cache,
        )
        for use_cache in (True, False)
    ]
    assert made[0].shape == (2, 24)
    assert torch.equal(*made)


def test_quantize_and_remove():
    model = build()
    model.train()
    before = model.config._attn_implementation
    state = torch.random.get_rng_state()
    first = logits(model.eval())
    model.train()
    result = quantize_softmax(model, tokens(6), bits=4)
    assert model.training and torch.equal(state, torch.random.get_rng_state())
    assert result.installed and len(installed_attention(model)) == 2
    changed = logits(model.eval())
    assert not torch.equal(changed, first)
    with pytest.raises(ValueError, match="hooks already"):
        quantize_softmax(model, tokens(6))
    with pytest.raises(ValueError, match="hooks already"):
        result.install()
    assert result.remove() == 2 and not result.installed
    assert torch.equal(logits(model), first)
    assert model.config._attn_implementation == before
    result.install()
    assert torch.equal(logits(model), changed)
    assert torch.equal(logits(copy.deepcopy(model)), changed)


def test_report():
    model = build()
    result = quantize_softmax(model, tokens(6), bits=4, correction="row_sum")
    rows = result.report.layers
    assert [r.name for r in rows] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert all(r.heads == 4 and r.bits == 4 and r.longest == 32 for r in rows)
    assert all(0 < r.zero_fraction < 1 and abs(r.mean_row_sum - 1) > 1e-3 for r in rows)
    assert all(r.sqnr_corrected_db >= r.sqnr_db for r in rows)
    assert result.report["model.layers.0.self_attn"] is rows[0]
    parsed = json.loads(result.report.to_json())
    assert parsed["calibration"]["tokens"] == 192
    assert parsed["layers"][0]["bias"] is None
    table = str(result.report).splitlines()
    assert len(table) == 5 and "row_sum" in table[2] and "output of the model" in table[4]


def test_sqnr_of_the_attention_output_by_hand():
    model = build()
    model.set_attn_implementation("eager")
    name = "model.layers.1.self_attn"
    outputs = []
    handle = model.get_submodule(name).o_proj.register_forward_pre_hook(
        lambda m, a: outputs.append(a[0].clone())
    )
    logits(model, {"input_ids": tokens(6)})
    quantizer = SoftmaxQuantizer(softmax_grid(4))
    with attention_hooks(model, {name: AttentionQuantizer({"softmax": quantizer})}):
        logits(model, {"input_ids": tokens(6)})
    handle.remove()
    a, b = (x.double().flatten(1) for x in outputs)
    ratio = (a**2).sum(1) / ((a - b) ** 2).sum(1)
    result = quantize_softmax(model, tokens(6), bits=4, correction=None)
    assert result.report[name].sqnr_db == pytest.approx(10 * ratio.mean().log10().item(), rel=1e-6)


def test_report_leaves_padding_out():
    """A padded sample has the decibels of the same tokens alone."""
    model = build()
    ids = tokens(1, 20)
    padded = torch.cat([ids, 5 * torch.ones(1, 12, dtype=torch.long)], 1)
    mask = (torch.arange(32) < 20).long()[None]
    found = []
    for batch in ({"input_ids": ids}, {"input_ids": padded, "attention_mask": mask}):
        result = quantize_softmax(model, [batch], bits=4, correction="row_sum")
        found.append(result.report)
        result.remove()
    for alone, inside in zip(found[0].layers, found[1].layers, strict=True):
        for name in ("zero_fraction", "mean_row_sum", "sqnr_db", "sqnr_corrected_db", "longest"):
            assert getattr(inside, name) == pytest.approx(getattr(alone, name), rel=1e-4), name
    for name in ("output_db", "output_corrected_db"):
        values = [getattr(report, name) for report in found]
        assert values[1] == pytest.approx(values[0], rel=1e-3), name


def test_a_correction_that_hurts_its_layer_is_left_out():
    _, found = study(bits=4, batches=[{"input_ids": tokens(6)}])
    name = "model.layers.0.self_attn"
    quantizers = {
        name: SoftmaxQuantizer(softmax_grid(4), "bias", 0.5, longest=32),
        "model.layers.1.self_attn": found.quantizers("row_sum")["model.layers.1.self_attn"],
    }
    given = dict(quantizers)
    report = found.compare(given, guard=False)
    assert report[name].sqnr_corrected_db < report[name].sqnr_db and not report[name].notes
    assert given == quantizers
    report = found.compare(quantizers)
    assert quantizers[name].correction is None
    assert report[name].sqnr_corrected_db == report[name].sqnr_db
    assert "left out" in report[name].notes


def test_the_output_of_the_model_never_gets_worse():
    """Decibels of the logits by hand; corrections that lower them are all left out."""
    model = build()
    ids = {"input_ids": tokens(6)}
    found = SoftmaxCalibration(model, prepare_calibration([ids]), bits=4)
    before = logits(model, ids).double().flatten(1)
    outcomes = set()
    for correction in ("bias", "row_length", "row_sum"):
        for granularity in ("tensor", "head"):
            quantizers = found.quantizers(correction, granularity)
            given = dict(quantizers)
            by_hand = []
            for chosen in (found.quantizers(None), given):
                hooks = {n: AttentionQuantizer({"softmax": q}) for n, q in chosen.items()}
                with attention_hooks(model, hooks):
                    error = logits(model, ids).double().flatten(1) - before
                ratio = (before**2).sum(1) / (error**2).sum(1)
                by_hand.append(10 * ratio.mean().log10().item())
            free = found.compare(dict(given), guard=False)
            assert free.output_db == pytest.approx(by_hand[0], rel=1e-4)
            assert free.output_corrected_db == pytest.approx(by_hand[1], rel=1e-4)
            report = found.compare(quantizers)
            assert report.output_corrected_db >= report.output_db
            if report.notes:
                assert all(q.correction is None for q in quantizers.values())
            outcomes.add(bool(report.notes))
    assert outcomes == {True, False}, "the cases should hold both"


def test_a_classifier_with_padding():
    """Its output is a row per sequence, not per token."""
    config = build("llama").config
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlamaForSequenceClassification(config).eval()
    ids, mask = tokens(4, 4), torch.ones(4, 4, dtype=torch.long)
    mask[0, 2:] = 0
    batches = [{"input_ids": ids, "attention_mask": mask}]
    report = quantize_softmax(model, batches, bits=4, correction="row_sum").report
    assert math.isfinite(report.output_db)


def test_one_exact_sequence_does_not_decide():
    """A row of one key has no error, which makes the mean of ratios infinite."""
    long, short = {"input_ids": tokens(6)}, {"input_ids": tokens(1, 1)}
    _, found = study(bits=4, batches=[long, short])
    quantizers = found.quantizers("row_sum")
    report = found.compare(quantizers)
    assert all(math.isinf(row.sqnr_db) for row in report.layers)
    assert all(q.correction == "row_sum" for q in quantizers.values())


@pytest.mark.parametrize("name", ["llama", "opt"])
@pytest.mark.parametrize("lowest", [None, "min", -math.inf, -1e9, -1e4])
def test_masks_of_the_callers_own_are_masks(name, lowest):
    """Four-dimensional masks, boolean (None) or added to the scores."""
    model, found = study(name, bits=4)
    ids = tokens(2, 24)
    mask = torch.ones(2, 1, 24, 24, dtype=torch.bool).tril()
    if lowest is not None:
        value = torch.finfo(torch.float32).min if lowest == "min" else lowest
        mask = torch.zeros(mask.shape).masked_fill(~mask, value)
    with attention_hooks(
        model,
        {n: AttentionQuantizer({"softmax": q}) for n, q in found.quantizers("row_sum").items()},
    ):
        expected = logits(model, {"input_ids": ids})
        if name == "opt":  # its positions come from a mask of two dimensions
            positions = torch.arange(24).expand(2, 24)
            own = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        else:
            own = {"input_ids": ids, "attention_mask": mask}
        torch.testing.assert_close(logits(model, own), expected, rtol=1e-5, atol=1e-5)


def test_calibrated_range():
    model, found = study("bert", grid_range="calibrated", batches=[{"input_ids": tokens(6)}])
    kept = allowed_probabilities(model, [{"input_ids": tokens(6)}])
    for name, statistics in found.statistics.items():
        top = max(float(p.max()) for p, _ in kept[name])
        assert top < 1
        assert statistics.grid.scale == pytest.approx(top / 31, rel=1e-6)
        assert statistics.grid.zero_point == 0


@pytest.mark.parametrize("correction", ["bias", "row_sum"])
def test_range_search_takes_the_best_of_its_ranges(correction):
    model = build("llama")
    data = prepare_calibration(padded_batches())
    fixed, found = (
        SoftmaxCalibration(model, data, bits=3, grid_range=span) for span in ("fixed", "search")
    )
    reports = [s.compare(s.quantizers(correction), guard=False) for s in (fixed, found)]
    pairs = list(zip(reports[0].layers, reports[1].layers, strict=True))
    assert all(b.sqnr_corrected_db >= a.sqnr_corrected_db for a, b in pairs)
    # Random attention has no probability near one.
    assert any(b.scale < a.scale and b.sqnr_corrected_db > a.sqnr_corrected_db for a, b in pairs)
    tops = [7 * b.scale for _, b in pairs]
    assert all(min(abs(top - t) for t in (1, 0.8, 0.6)) < 1e-6 for top in tops)


def test_no_calibration_where_none_is_needed():
    model = build()
    result = quantize_softmax(model, bits=4, correction="row_sum")
    assert result.report is None and result.installed
    result.remove()
    with pytest.raises(CalibrationError, match="calibration is missing"):
        quantize_softmax(model, correction="bias")
    with pytest.raises(CalibrationError, match="calibration is missing"):
        quantize_softmax(model, correction="row_sum", grid_range="calibrated")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 1}, "bits"),
        ({"bits": 17}, "bits"),
        ({"bits": True}, "bits"),
        ({"correction": "beta"}, "correction must be one of"),
        ({"granularity": "step"}, "granularity must be one of"),
        ({"grid_range": "auto"}, "grid_range must be one of"),
        ({"layers": ["*.mlp"]}, "matches no attention module"),
        ({"layers": []}, "layers is empty"),
        ({"samples": 0}, "samples"),
    ],
)
def test_mistakes(options, message):
    model = build()
    with pytest.raises((ValueError, TypeError), match=message):
        quantize_softmax(model, tokens(4), **options)
    assert not installed_attention(model)


def test_models_that_cannot_be():
    with pytest.raises(UnsupportedModuleError, match="BloomForCausalLM"):
        quantize_softmax(build("bloom"), tokens(4))


def test_values_that_are_not_finite():
    model = build()
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN|finite"):
        quantize_softmax(model, tokens(4))
    assert not installed_attention(model)
    assert model.config._attn_implementation == "sdpa"


def test_layers_alone():
    model = build()
    result = quantize_softmax(model, tokens(4), bits=4, layers="*.1.self_attn")
    assert list(result.quantizers) == ["model.layers.1.self_attn"]
    assert list(installed_attention(model)) == ["model.layers.1.self_attn"]


def test_text_and_tokenizer():
    model = build()
    result = quantize_softmax(
        model, [numbers(600)], bits=5, tokenizer=WordTokenizer(), samples=4, sequence_length=64
    )
    # Cut to what the model takes.
    assert result.report.calibration["sequence_length"] == 32


@pytest.mark.parametrize(("correction", "granularity"), VARIANTS)
def test_saved_and_loaded(tmp_path, correction, granularity):
    model = build("opt")
    result = quantize_softmax(
        model, padded_batches(), bits=5, correction=correction, granularity=granularity
    )
    expected = logits(model)
    path = result.save(tmp_path / "m")
    assert path == tmp_path / "m" / SOFTMAX_FILE
    loaded = ptqkit.load(tmp_path / "m")
    assert torch.equal(logits(loaded), expected)
    for name, hook in installed_attention(loaded).items():
        found, given = hook.quantizers["softmax"], result.quantizers[name]
        assert (found.grid, found.correction) == (given.grid, given.correction)
        assert (found.longest, found.edges) == (given.longest, given.edges)
        assert np.array_equal(found.bias, given.bias)
    assert ptqkit.hf.remove_attention(loaded) == 2
    result.remove()
    assert torch.equal(logits(loaded), logits(model))
    # Beside a model that is there: the one file anew.
    other = quantize_softmax(model, padded_batches(), bits=3, correction="row_sum")
    files = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "m").iterdir()}
    other.save(tmp_path / "m")
    changed = {p.name for p in (tmp_path / "m").iterdir() if files[p.name] != p.stat().st_mtime_ns}
    assert changed == {SOFTMAX_FILE}
    assert torch.equal(logits(ptqkit.load(tmp_path / "m")), logits(model))


def test_with_quantized_weights(tmp_path):
    model = build()
    result = ptqkit.quantize(model, "rtn", bits=4, group_size=16, progress=False)
    softmax = quantize_softmax(model, tokens(6), bits=5)
    result.save(tmp_path / "q")
    expected = logits(model)
    assert (tmp_path / "q" / SOFTMAX_FILE).is_file()
    loaded = ptqkit.load(tmp_path / "q")
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=0)
    softmax.remove()
    result.save(tmp_path / "plain")
    assert not (tmp_path / "plain" / SOFTMAX_FILE).exists()


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_weights_are_quantized_under_a_quantized_softmax(name):
    """One forward pass with coroutines, hooks inside attention: the same as replay."""
    found = []
    for schedule in ("one-pass", "replay"):
        model = build(name)
        quantize_softmax(model, bits=4, correction="row_sum")
        result = ptqkit.quantize(
            model,
            "reference",
            padded_batches(name),
            bits=4,
            group_size=16,
            schedule=schedule,
            progress=False,
        )
        assert result.report.schedule == schedule
        found.append(logits(model))
    assert torch.equal(*found)


def test_other_hooks_are_not_saved_in_silence(tmp_path):
    model = build()
    result = ptqkit.quantize(model, "rtn", bits=4, group_size=16, progress=False)
    hook = AttentionQuantizer({"key": lambda x: x})
    with attention_hooks(model, dict.fromkeys(find_attention(model), hook)):
        with pytest.raises(ValueError, match="no file can hold"):
            result.save(tmp_path / "q")
    assert list(tmp_path.iterdir()) == []


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    model = build()
    quantize_softmax(model, bits=4, correction="row_sum").save(tmp_path / "m")
    before = (tmp_path / "m" / SOFTMAX_FILE).read_text(encoding="utf-8")
    ptqkit.hf.remove_attention(model)
    result = quantize_softmax(model, bits=3, correction="row_sum")

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="no space left"):
        result.save(tmp_path / "m")
    monkeypatch.undo()
    assert (tmp_path / "m" / SOFTMAX_FILE).read_text(encoding="utf-8") == before
    assert not [p for p in (tmp_path / "m").iterdir() if p.name.startswith(".")]


def test_a_folder_of_another_model_is_refused(tmp_path):
    build("opt").save_pretrained(tmp_path / "opt")
    (tmp_path / "empty").mkdir()
    model = build()
    quantizers = quantize_softmax(model, bits=4, correction="row_sum").quantizers
    with pytest.raises(ValueError, match="another model: its model_type is 'opt'"):
        save_softmax(model, quantizers, tmp_path / "opt")
    with pytest.raises(ValueError, match="holds no model"):
        save_softmax(model, quantizers, tmp_path / "empty")


def edited(change):
    """The file of a tiny model after a change."""
    layer = {
        "heads": 4,
        "bits": 8,
        "scale": 1 / 256,
        "zero_point": 0,
        "correction": "bias",
        "bias": [0.1] * 4,
        "longest": 32,
    }
    values = {
        "format": "ptqkit-softmax",
        "version": 1,
        "layers": {"model.layers.0.self_attn": layer},
    }
    change(values, layer)
    return values


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v, x: v.update(format="x"), "is not a ptqkit-softmax file"),
        (lambda v, x: v.update(version=2), "version 2; this ptqkit reads 1"),
        (lambda v, x: v.update(layers={}), "names no layers"),
        (lambda v, x: v["layers"].update(a=3), "layer a: it must be an object"),
        (lambda v, x: v["layers"].update(other=dict(x)), "for other, but the model has no such"),
        (lambda v, x: x.update(heads=8, bias=0.1), "has 4 heads, the file says 8"),
        (lambda v, x: x.update(heads=0), "heads must be an integer from 1"),
        (lambda v, x: x.update(bias=[0.1] * 3), "bias is for 3 heads, not 4"),
        (lambda v, x: x.update(bias=[]), "at least one value"),
        (lambda v, x: x.update(bias="x"), "layer model.layers.0.self_attn"),
        (lambda v, x: x.update(bits=1), "bits must be an integer from 2 to 16"),
        (lambda v, x: x.update(scale=0), "scale must be a positive number"),
        (lambda v, x: x.update(zero_point=256), "zero_point must be an integer from 0 to 255"),
        (lambda v, x: x.update(correction="beta"), "correction must be one of"),
        (lambda v, x: x.update(colour=1), "unknown field 'colour'"),
        (lambda v, x: x.pop("scale"), "field 'scale' is missing"),
        (lambda v, x: x.update(longest=0), "longest must be an integer from 1"),
    ],
)
def test_damaged_files(tmp_path, change, message):
    (tmp_path / SOFTMAX_FILE).write_text(json.dumps(edited(change)), encoding="utf-8")
    model = build()
    with pytest.raises(ValueError, match=message):
        load_softmax(model, tmp_path)
    assert not installed_attention(model)


def test_file_that_is_no_json(tmp_path):
    model = build()
    assert load_softmax(model, tmp_path) is None
    (tmp_path / SOFTMAX_FILE).write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="not valid JSON"):
        load_softmax(model, tmp_path)
    (tmp_path / SOFTMAX_FILE).write_text(json.dumps(edited(lambda v, x: None)), encoding="utf-8")
    found = load_softmax(model, tmp_path)
    assert found.quantizers["model.layers.0.self_attn"].grid == SoftmaxGrid(8, 1 / 256, 0)


def test_table():
    model = build()
    data = prepare_calibration(tokens(6))
    seen = []
    table = softmax_table(
        model,
        None,
        tokens(3, 32, seed=5),
        data,
        bits=(8, 4),
        corrections=("bias/head", "row_sum"),
        start_token=None,
        progress=seen.append,
    )
    names = [row.name for row in table.rows]
    assert names == [
        "float softmax",
        "SM8",
        "SM8 + bias/head",
        "SM8 + row_sum",
        "SM4",
        "SM4 + bias/head",
        "SM4 + row_sum",
    ]
    assert table.rows[4].excess == table.rows[4].perplexity - table.rows[0].perplexity
    assert set(table.layers) == {8, 4} and len(table.layers[8]) == 2
    assert table.layers[4][0]["zero_fraction"] > table.layers[8][0]["zero_fraction"]
    assert len(seen) == 9 and not installed_attention(model)
    assert "round to zero" in table.table()
    with pytest.raises(ValueError, match="each of corrections must be one of"):
        softmax_table(model, None, tokens(2), data, corrections=("beta",))


def test_a_table_goes_on_without_a_finite_perplexity(monkeypatch):
    model, data = build(), prepare_calibration(tokens(4))

    def measured(*args, check=True, **options):
        found = perplexity(*args, check=check, **options)
        return found if check else replace(found, perplexity=math.nan)

    monkeypatch.setattr(table_module, "perplexity", measured)
    with pytest.warns(RuntimeWarning) as told:
        table = softmax_table(
            model, None, tokens(2), data, bits=(4,), corrections=("row_sum",), start_token=None
        )
    assert [row.name for row in table.rows] == ["float softmax", "SM4", "SM4 + row_sum"]
    words = [str(w.message) for w in told]
    assert len(words) == 2 and "the model with SM4 + row_sum is nan" in words[1]
    with torch.no_grad():
        model.lm_head.weight[3] = math.nan
    with pytest.raises(NotFiniteError):
        softmax_table(model, None, tokens(2), data, start_token=None)
