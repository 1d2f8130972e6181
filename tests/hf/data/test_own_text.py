"""Text that a model writes itself: what it begins with, that it is likely, and repeatable."""

from __future__ import annotations

import pytest
import torch
from helpers.driver_models import build, padded_batches, tokens

from ptqkit.errors import CalibrationError, UnsupportedModuleError
from ptqkit.hf import own_text, prepare_calibration
from ptqkit.hf.quantization.float_logits import split_windows


def windows_of(count):
    return split_windows(prepare_calibration(tokens(count), samples=count).batches)


def same(windows, others):
    pairs = zip(windows, others, strict=True)
    return all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in pairs)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_windows_begin_like_those_given_and_are_as_long(name):
    model, windows = build(name), windows_of(6)
    state = torch.random.get_rng_state()
    written = own_text(model, windows, 10, prefix=3, batch_size=4, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    starts = {tuple(w["input_ids"][0, :3].tolist()) for w in windows}
    for window in written:
        ids = window["input_ids"]
        assert set(window) == set(windows[0]) and ids.shape == windows[0]["input_ids"].shape
        assert tuple(ids[0, :3].tolist()) in starts
    again = own_text(model, windows, 10, prefix=3, batch_size=4, seed=1)
    assert same(written, again)
    assert same(written, own_text(model, windows, 10, prefix=3, batch_size=10, seed=1))
    assert not same(written, own_text(model, windows, 10, prefix=3, batch_size=4, seed=2))


def test_tokens_are_drawn_from_the_model_s_predictions():
    """With logits that leave one token possible, that is what is written."""
    model = build("llama")
    values = {n: p.detach().clone() for n, p in model.named_parameters()}
    values["model.norm.weight"] = values["model.norm.weight"] * 1e4
    windows = windows_of(2)
    for window in own_text(model, windows, 3, prefix=4, parameters=values):
        ids = window["input_ids"]
        with torch.no_grad():
            likeliest = torch.func.functional_call(model, values, (ids,)).logits.argmax(-1)
        assert torch.equal(ids[0, 4:], likeliest[0, 3:-1])


def test_what_cannot_be_gone_on_from_is_refused():
    with pytest.raises(CalibrationError, match="give longer windows"):
        own_text(build("llama"), windows_of(2), 1, prefix=10_000)
    with pytest.raises(UnsupportedModuleError, match="tokens alone, not from pixel_values"):
        own_text(build("llama"), [{"pixel_values": torch.zeros(1, 3)}], 1)
    for name, value in (("prefix", 0), ("batch_size", 0)):
        with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1"):
            own_text(build("llama"), windows_of(2), 1, **{name: value})
    padded = split_windows(padded_batches("llama", 8))
    whole = [w for w in padded if bool(w["attention_mask"].all())]
    for window in own_text(build("llama"), padded, 3, prefix=2):
        assert bool(window["attention_mask"].all())
        assert window["input_ids"].shape == whole[0]["input_ids"].shape
    with pytest.raises(UnsupportedModuleError, match="keeps no cache"):
        own_text(build("bert"), windows_of(2), 1, prefix=2)
