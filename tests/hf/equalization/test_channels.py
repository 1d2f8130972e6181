"""Channels before and after equalization: nothing is changed, and figures are the model's."""

from __future__ import annotations

import copy
import inspect

import numpy as np
import pytest
import torch
from helpers.driver_models import tokens
from helpers.fold_models import make

from ptqkit.errors import UnsupportedModuleError
from ptqkit.hf import equalization_channels, equalize, quantize
from ptqkit.hf.data.calibration import prepare_calibration
from ptqkit.hf.equalization.inputs import measure_inputs


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_spans_and_scales_are_what_equalize_does(name):
    model = make(name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    channels = equalization_channels(model, tokens())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    equalized = copy.deepcopy(model)
    report = equalize(equalized, tokens(), progress=False)
    assert [g.consumers for g in channels] == [tuple(g.consumers) for g in report.groups]
    calibration = prepare_calibration(tokens(), None)
    modules = {g.consumers[0]: equalized.get_submodule(g.consumers[0]) for g in channels}
    found = measure_inputs(equalized, modules, calibration, 0)
    for group in channels:
        first = group.consumers[0]
        expected = group.activation_span / group.scales
        np.testing.assert_allclose(found[first].ranges.span, expected, rtol=2e-3, atol=1e-5)
        columns = torch.cat([equalized.get_submodule(n).weight for n in group.consumers]).detach()
        span = (columns.amax(0) - columns.amin(0)).numpy()
        np.testing.assert_allclose(span, group.weight_span * group.scales, rtol=2e-3, atol=1e-6)
        assert group.before.total <= group.after.total * (1 + 1e-6)
        tied = group.kind == "value" and name == "llama"  # grouped-query attention
        assert tied or group.after.reached == pytest.approx(1, rel=1e-5)


def test_every_exponent_reaches_the_bound():
    for alpha in (0.0, 1.0):
        for group in equalization_channels(make("opt"), tokens(), alpha=alpha):
            assert group.before.reached < 0.99
            if group.kind != "relu":  # dead inputs keep their columns
                assert group.after.reached == pytest.approx(1, rel=1e-5)
            px, pw = group.after.activation, group.after.weight
            live = (group.activation_span > 0) & (group.weight_span > 0)
            ones = (px if alpha else pw)[live]  # one side has equal channels
            np.testing.assert_allclose(ones, 1, rtol=1e-5)


def test_table_picture_and_names(tmp_path):
    channels = equalization_channels(make("llama"), tokens())
    first = channels.groups[0]
    assert channels[first.consumers[-1]] is first and len(channels) == len(channels.groups)
    assert f"{first.after.total:.2f}" in channels.table() and "input_layernorm" in str(channels)
    assert channels.to_dicts()[0]["bound"] == first.before.bound
    for path, name in ((tmp_path / "a.png", None), (tmp_path / "b.svg", first.consumers[0])):
        channels.draw(path, name)
        assert path.stat().st_size > 2000
    assert "Σ" in (tmp_path / "b.svg").read_text() or "before" in (tmp_path / "b.svg").read_text()
    with pytest.raises(KeyError, match="did you mean"):
        channels[first.consumers[0][:-1]]


def test_equalized_and_quantized_models_are_refused():
    model = make("llama")
    equalize(model, tokens(), progress=False)
    with pytest.raises(UnsupportedModuleError, match="equalized already"):
        equalization_channels(model, tokens())
    model = make("llama")
    quantize(model, "rtn", group_size=None, progress=False)
    with pytest.raises(UnsupportedModuleError, match="quantized already"):
        equalization_channels(model, tokens())


def test_options_are_those_of_equalize():
    ours, theirs = (
        {n: (p.kind, p.default, p.annotation) for n, p in inspect.signature(f).parameters.items()}
        for f in (equalization_channels, equalize)
    )
    assert theirs.pop("progress") and ours == theirs
