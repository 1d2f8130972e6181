"""Models made hard on purpose: the same in float, hard to quantize, and repaired by AWE."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from helpers.data import SHARED
from helpers.driver_models import padded_batches
from helpers.fold_models import change, logits, make, one_batch

import ptqkit
from ptqkit.hf import inject_outliers
from ptqkit.hf.data.calibration import prepare_calibration
from ptqkit.hf.equalization.find import find_folds
from ptqkit.hf.equalization.inputs import measure_inputs

W8A8 = {
    "preset": "rtn",
    "bits": 8,
    "group_size": None,
    "per_tensor": True,
    "symmetric": True,
    "activations": {"bits": 8, "granularity": "tensor"},
}


def ranges_of(model, names):
    modules = {n: model.get_submodule(n) for n in names}
    found = measure_inputs(model, modules, prepare_calibration(padded_batches()), 0)
    return {n: found[n].ranges.span for n in names}


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "bloom", "gpt_neox", "gemma"])
def test_float_model_stays_and_ranges_grow(name):
    model, batch = make(name), one_batch(name)
    before = logits(model, batch)
    folds = find_folds(model, batch).folds
    names = [f.consumers[0] for f in folds]
    old = ranges_of(model, names)
    made = inject_outliers(model, batch, channels=3, factor=30.0)
    assert change(logits(model, batch), before) <= 1e-4
    assert [o.producer for o in made] == [f.producer for f in folds if f.kind == "norm"]
    new = ranges_of(model, names)
    chosen = {o.consumers[0]: list(o.channels) for o in made}
    for name in names:
        factors = np.ones(len(old[name]))
        factors[chosen.get(name, [])] = 30.0
        np.testing.assert_allclose(new[name], old[name] * factors, rtol=1e-4, atol=1e-4)
    assert all(len(set(o.channels)) == 3 and o.factor == 30.0 for o in made)
    assert len({o.channels for o in made}) > 1


def test_the_seed_alone_decides():
    state = torch.get_rng_state()
    made = [inject_outliers(make("llama"), one_batch(), seed=s) for s in (0, 0, 1)]
    assert made[0] == made[1] != made[2]
    assert torch.equal(state, torch.get_rng_state())
    whole = inject_outliers(make("llama"), prepare_calibration(padded_batches()))
    assert whole == made[0] and len(whole) == 4 and len(whole[0].channels) == 6


def test_bad_arguments():
    model, batch = make("llama"), one_batch()
    for options, text in (
        ({"channels": 0}, "channels"),
        ({"channels": 33}, "has 32"),
        ({"channels": True}, "channels"),
        ({"factor": 0}, "factor"),
        ({"factor": float("inf")}, "factor"),
    ):
        with pytest.raises(ValueError, match=text):
            inject_outliers(model, batch, **options)
    with pytest.raises(ValueError, match="no norm"):
        inject_outliers(make("bert"), one_batch("bert"))


@pytest.mark.parametrize("alpha", [0.5, "search"])
def test_awe_recovers_a_real_model(alpha):
    """Per-tensor W8A8 fails on the hard model; with AWE it is as on the model it was."""
    if not (SHARED / "stories260k").exists():
        pytest.skip("../shared/data is not here")
    ids = torch.randint(3, 512, (8, 64), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids}
    errors = {}
    for kind in ("easy", "hard", "equalized"):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            SHARED / "stories260k", dtype=torch.float32
        )
        before = logits(model, batch)
        if kind != "easy":
            inject_outliers(model, batch)
        equalization = {"alpha": alpha} if kind == "equalized" else None
        recipe = {**W8A8, "equalization": equalization}
        ptqkit.quantize(model, recipe, ids, progress=False)
        errors[kind] = float((logits(model, batch) - before).square().mean())
    assert errors["hard"] > 20 * errors["easy"]
    assert errors["equalized"] < 1.5 * errors["easy"]
