"""Sensitivity: one kind of tensor or layer quantized at a time, everything put back."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from helpers.driver_models import build, padded_batches, tokens

import ptqkit
from ptqkit.errors import CalibrationError, UnsupportedModuleError
from ptqkit.hf.diagnostics import sensitivity as sensitivity_module
from ptqkit.hf.diagnostics.sensitivity import KINDS, sensitivity
from ptqkit.hf.evaluation.likelihood import perplexity
from ptqkit.hf.models.attention import installed_attention
from ptqkit.hf.softmax.driver import quantize_softmax
from ptqkit.nn.activations import ActivationQuantizer, install_quantizer, installed_quantizer
from ptqkit.recipe.options import ActivationQuantization


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def sqnr(pairs):
    """Mean over samples of the ratio of signal to error, in decibels (SBC eq. 1), by hand."""
    ratios = []
    for a, b in pairs:
        for x, y in zip(a.double(), b.double(), strict=True):
            ratios.append(float((x**2).sum() / ((x - y) ** 2).sum()))
    return 10 * math.log10(sum(ratios) / len(ratios))


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bert"])
def test_every_kind_and_nothing_left_behind(name):
    model = build(name)
    batches = padded_batches(name)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    before = [logits(model, b) for b in batches]
    rng = torch.random.get_rng_state()
    report = sensitivity(model, batches, bits=6)
    assert {r.name for r in report.rows} == set(KINDS)
    values = [r.sqnr_db for r in report.rows]
    assert values == sorted(values) and all(0 < v < 120 for v in values)
    assert torch.equal(rng, torch.random.get_rng_state())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(a, logits(model, b)) for a, b in zip(before, batches, strict=True))
    assert not installed_attention(model)
    assert all(installed_quantizer(m) is None for m in model.modules())


def test_weights_by_hand():
    model, other = build(), build()
    batches = [{"input_ids": tokens(3)}]
    for module_name, module in other.named_modules():
        if isinstance(module, torch.nn.Linear) and "layers" in module_name:
            q = ptqkit.rtn(module.weight.detach().numpy(), bits=4, group_size=None)
            module.weight.data = torch.from_numpy(q.dequantize())
    expected = sqnr([(logits(model, batches[0]), logits(other, batches[0]))])
    found = sensitivity(model, batches, kinds=["weights"], bits=4)
    assert found["weights"].tensors == 14
    assert found["weights"].sqnr_db == pytest.approx(expected, rel=1e-6)


def test_softmax_by_hand_with_padding_left_out():
    model = build("opt")
    batches = padded_batches("opt")
    before = [logits(model, b) for b in batches]
    softmax = quantize_softmax(model, bits=4, correction="row_sum")
    for quantizer in softmax.quantizers.values():
        quantizer.correction = None
    pairs = []
    for a, b in zip(before, batches, strict=True):
        mask = b["attention_mask"][..., None]
        pairs.append((a * mask, logits(model, b) * mask))
    softmax.remove()
    found = sensitivity(model, batches, kinds="softmax", bits=4)
    # Float logits of the eager function differ from those of sdpa in their last digits.
    assert found["softmax"].sqnr_db == pytest.approx(sqnr(pairs), rel=1e-4)


def test_inputs_by_hand():
    model, other = build("gpt2"), build("gpt2")
    ids = {"input_ids": tokens(3)}
    inputs = {}
    linears = [(n, m) for n, m in other.named_modules() if type(m).__name__ == "Conv1D"]
    for name, module in linears:
        module.register_forward_pre_hook(lambda m, a, n=name: inputs.update({n: a[0]}))
    logits(other, ids)
    inputs = dict(inputs)
    for name, module in linears:
        ranges = ptqkit.ChannelRanges(inputs[name].shape[-1])
        ranges.update(inputs[name])
        quantizer = ActivationQuantizer.calibrate(ActivationQuantization(6, "tensor"), ranges)
        install_quantizer(module, quantizer)
    expected = sqnr([(logits(model, ids), logits(other, ids))])
    found = sensitivity(model, [ids], kinds=["inputs"], bits=6)
    assert found["inputs"].sqnr_db == pytest.approx(expected, rel=1e-6)


def test_by_layer_and_each():
    model = build()
    report = sensitivity(model, tokens(3), by="layer", bits=6)
    assert {r.name for r in report.rows} == {"model.layers.0", "model.layers.1"}
    assert all(r.tensors == 5 + 7 + 7 for r in report.rows)
    report = sensitivity(model, tokens(3), by="module", bits=6, kinds=["softmax", "weights"])
    assert len(report.rows) == 2 + 14
    assert report["model.layers.0.self_attn softmax"].tensors == 1
    # One alone harms less than all of its kind.
    together = sensitivity(model, tokens(3), bits=6, kinds=["weights"])["weights"].sqnr_db
    assert all(r.sqnr_db > together for r in report.rows if r.kind == "weights")


def test_more_bits_harm_less():
    model = build()
    four, eight = (sensitivity(model, tokens(3), bits=bits) for bits in (4, 8))
    for row in four.rows:
        assert eight[row.name].sqnr_db > row.sqnr_db + 10


def test_perplexity_too():
    model = build()
    text = tokens(2, 32, seed=3)
    report = sensitivity(
        model, tokens(3), bits=4, kinds=["value"], text=text, start_token=None, window=16
    )
    assert (
        report.float_perplexity
        == perplexity(model, None, text, start_token=None, window=16).perplexity
    )
    assert report["value"].perplexity != report.float_perplexity
    assert "perplexity" in report.table()


def test_a_perplexity_that_is_not_finite_is_told(monkeypatch):
    model, text = build(), tokens(2, 32, seed=3)
    calls = []

    def measured(*args, check, **options):
        calls.append(check)
        found = perplexity(*args, check=check, **options)
        return found if check else replace(found, perplexity=math.inf)

    monkeypatch.setattr(sensitivity_module, "perplexity", measured)
    with pytest.warns(RuntimeWarning, match="the perplexity of the model with quantized value is"):
        report = sensitivity(model, tokens(3), kinds=["value"], text=text, start_token=None)
    assert calls == [True, False] and report["value"].perplexity == math.inf


def test_report_as_table_json_and_picture(tmp_path):
    report = sensitivity(build(), tokens(2), bits=8)
    report.rows[-1].sqnr_db = math.inf
    assert len(report.table().splitlines()) == 2 + len(KINDS)
    parsed = json.loads(report.to_json(tmp_path / "r.json"))
    assert parsed == json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert parsed["rows"][-1]["sqnr_db"] is None and parsed["calibration"]["tokens"] == 64
    pytest.importorskip("matplotlib")
    report.draw(tmp_path / "r.png")
    assert (tmp_path / "r.png").stat().st_size > 5000
    with pytest.raises(KeyError):
        report["nothing"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kinds": []}, "kinds is empty; give some of"),
        ({"kinds": ["keys"]}, "not 'keys'"),
        ({"by": "head"}, "by must be one of"),
        ({"bits": 1}, "from 2 to 16"),
        ({"bits": 12}, "weights take at most 8 bits"),
        ({"samples": 0}, "samples"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(ValueError, match=message):
        sensitivity(build(), tokens(2), **options)


def test_models_that_cannot_be():
    bloom = build("bloom")
    with pytest.raises(UnsupportedModuleError, match="inside its own forward"):
        sensitivity(bloom, tokens(2))
    report = sensitivity(bloom, tokens(2), kinds=["weights", "inputs"])
    assert len(report.rows) == 2
    model = build()
    with pytest.raises(UnsupportedModuleError, match="returns no logits"):
        sensitivity(model.model, tokens(2), kinds=["key"])
    softmax = quantize_softmax(model, bits=8, correction="row_sum")
    with pytest.raises(ValueError, match="hooks already"):
        sensitivity(model, tokens(2))
    softmax.remove()
    linear = model.model.layers[0].mlp.up_proj
    install_quantizer(linear, ActivationQuantizer(ActivationQuantization()))
    with pytest.raises(ValueError, match=r"layers.0.mlp.up_proj are quantized already"):
        sensitivity(model, tokens(2))


def test_values_that_are_not_finite():
    model = build()
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[0, 0] = torch.nan
    with pytest.raises(CalibrationError, match="not finite"):
        sensitivity(model, tokens(2))
