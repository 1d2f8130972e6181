"""Hooks in the attention of UNets: what they see, what they change, and that they go away."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from helpers.diffusion_models import HEADS, forward, tiny_model, tiny_unet

import ptqkit
from ptqkit import diffusion
from ptqkit.nn.attention import AttentionHook
from ptqkit.nn.attention_quantizer import ATTENTION_KINDS
from ptqkit.nn.softmax.quantizer import SoftmaxQuantizer

SELF = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
CROSS = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"


@pytest.fixture
def model():
    return tiny_model()


class Recorder(AttentionHook):
    """Keeps what it sees; ``change`` names the kind that it doubles."""

    def __init__(self, change=None):
        self.seen, self.change, self.order, self.allowed = {}, change, [], None

    def _see(self, kind, x):
        self.seen[kind] = x.detach().clone()
        self.order.append(kind)
        return 2 * x if kind == self.change else x

    def query(self, x):
        return self._see("query", x)

    def key(self, x):
        return self._see("key", x)

    def value(self, x):
        return self._see("value", x)

    def scores(self, x, allowed):
        return self._see("scores", x)

    def softmax(self, p, allowed):
        self.allowed = allowed
        return self._see("softmax", p)


def test_modules_are_found_with_heads_and_kind(model):
    found = diffusion.find_attention(model.unet)
    assert len(found) == 8 and found[SELF].heads == found[CROSS].heads == HEADS
    assert not found[SELF].cross and found[CROSS].cross
    assert found[SELF].module is model.unet.get_submodule(SELF)


@pytest.mark.parametrize("name", [SELF, CROSS])
def test_a_hook_sees_the_tensors_of_attention(model, name):
    hook, module = Recorder(), model.unet.get_submodule(name)
    captured = {}
    handle = module.to_out[0].register_forward_pre_hook(
        lambda m, args: captured.update(out=args[0])
    )
    with diffusion.attention_hooks(model.unet, {name: hook}):
        forward(model)
    handle.remove()
    seen = hook.seen
    assert [*seen] == ["value", "query", "key", "scores", "softmax"]
    keys = 4 if name == CROSS else 256
    assert seen["query"].shape == (2, HEADS, 256, 8) and seen["key"].shape == (2, HEADS, keys, 8)
    scores = seen["query"] @ seen["key"].transpose(-1, -2) * module.scale
    torch.testing.assert_close(seen["scores"], scores, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen["softmax"], scores.softmax(-1), rtol=1e-4, atol=1e-6)
    output = (seen["softmax"] @ seen["value"]).transpose(1, 2).flatten(2)
    torch.testing.assert_close(captured["out"], output, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ATTENTION_KINDS)
def test_what_a_hook_returns_is_used(model, kind):
    plain = forward(model)
    with diffusion.attention_hooks(model.unet, {SELF: Recorder(kind)}):
        changed = forward(model)
    assert (changed - plain).abs().max() > 1e-4


def test_hooks_that_do_nothing_change_no_bit_of_eager_attention(model):
    model.unet.set_attn_processor(AttnProcessor())
    plain = forward(model)
    hooks = {name: AttentionHook() for name in diffusion.find_attention(model.unet)}
    with diffusion.attention_hooks(model.unet, hooks):
        assert torch.equal(forward(model), plain)


@pytest.mark.parametrize("kind", [AttnProcessor, AttnProcessor2_0])
def test_removal_restores_the_very_processors(model, kind):
    model.unet.set_attn_processor(kind())
    before, plain = model.unet.attn_processors, forward(model)
    hooks = {name: Recorder("softmax") for name in before_names(before)[:3]}
    diffusion.install_attention(model.unet, hooks, diffusion.StepClock([1]))
    assert diffusion.installed_attention(model.unet) == hooks
    assert not torch.equal(forward(model), plain)
    assert diffusion.remove_attention(model.unet) == 3
    after = model.unet.attn_processors
    assert all(after[name] is before[name] for name in before)
    assert not model.unet._forward_pre_hooks and diffusion.remove_attention(model.unet) == 0
    assert torch.equal(forward(model), plain)
    assert "get_attention_scores" not in model.unet.get_submodule(SELF).__dict__
    assert not model.unet.get_submodule(SELF).to_v._forward_hooks


def before_names(processors):
    return [name.removesuffix(".processor") for name in processors]


def test_an_error_inside_leaves_nothing_behind(model):
    plain = forward(model)

    class Fails(AttentionHook):
        def softmax(self, p, allowed):
            raise RuntimeError("stop here")

    with (
        pytest.raises(RuntimeError, match="stop here"),
        diffusion.attention_hooks(model.unet, {SELF: Fails()}, diffusion.StepClock([1])),
    ):
        forward(model)
    assert torch.equal(forward(model), plain)
    assert not model.unet._forward_pre_hooks


def test_masked_keys_are_reported_as_not_allowed(model):
    hook, mask = Recorder(), torch.tensor([[True, True, False, True], [True, False, False, True]])
    with diffusion.attention_hooks(model.unet, {CROSS: hook}):
        forward(model, encoder_attention_mask=mask)
    assert hook.allowed.shape == (2, HEADS, 1, 4)
    assert torch.equal(hook.allowed[:, 0, 0], mask) and torch.equal(hook.allowed[:, 1, 0], mask)


def test_a_copy_of_the_model_has_hooks_and_clock_of_its_own(model):
    clock, hook = diffusion.StepClock([0, 900]), Recorder("softmax")
    diffusion.install_attention(model.unet, {SELF: hook}, clock)
    other = copy.deepcopy(model.unet)
    changed = forward(model, step=1)
    assert clock.index == (0,)
    assert torch.equal(forward(model, step=950, unet=other), forward(model, step=950))
    clock.set(1)
    forward(model, step=950, unet=other)
    assert clock.index == (0,)
    diffusion.remove_attention(model.unet)
    assert not torch.equal(forward(model, step=1), changed)
    assert torch.equal(forward(model, step=1, unet=other), changed)
    assert diffusion.remove_attention(other) == 1 and not other._forward_pre_hooks


class OtherProcessor(AttnProcessor):
    """Stands for a processor that is not known to be plain attention."""


@pytest.mark.parametrize(
    ("hooks", "error", "message"),
    [
        ({}, ValueError, "hooks is empty"),
        ({"nowhere": AttentionHook()}, ValueError, "'nowhere' is not an attention module"),
        ({SELF: print}, TypeError, "must be an AttentionHook"),
    ],
)
def test_bad_hooks_are_refused_and_nothing_is_installed(model, hooks, error, message):
    with pytest.raises(error, match=message):
        diffusion.install_attention(model.unet, {CROSS: AttentionHook(), **hooks} if hooks else {})
    assert not diffusion.installed_attention(model.unet)


def test_hooks_on_hooks_and_unknown_processors_are_refused(model):
    with (
        diffusion.attention_hooks(model.unet, {SELF: AttentionHook()}),
        pytest.raises(ValueError, match="has attention hooks already"),
    ):
        diffusion.install_attention(model.unet, {CROSS: AttentionHook()})
    model.unet.set_attn_processor(OtherProcessor())
    with pytest.raises(ptqkit.UnsupportedModuleError, match="OtherProcessor"):
        diffusion.find_attention(model.unet)
    with pytest.raises(ptqkit.UnsupportedModuleError, match="no diffusers model"):
        diffusion.find_attention(torch.nn.Linear(1, 1))


def test_the_clock_takes_the_nearest_calibrated_step():
    clock = diffusion.StepClock([900, 500, 100])
    for step, index in ((900, 0), (999, 0), (701, 0), (499, 1), (torch.tensor(0), 2), (310.0, 1)):
        clock.set(step)
        assert clock.index == (index,) and clock.now(3) == (index,) * 3
    clock.set(700)
    assert clock.index == (1,)  # the earlier of two equally far
    clock.set(torch.tensor([100, 899, 500]))
    assert clock.now(3) == (2, 0, 1)
    with pytest.raises(ValueError, match="3 time steps for a batch of 2"):
        clock.now(2)


@pytest.mark.parametrize("step", [-1, float("nan"), torch.tensor([1, -2]), torch.empty(0)])
def test_the_clock_refuses_what_is_no_step(step):
    clock = diffusion.StepClock([1])
    with pytest.raises(ValueError, match="number from 0"):
        clock.set(step)
    with pytest.raises(ValueError, match="no time step is known"):
        clock.now(1)


@pytest.mark.parametrize(
    ("steps", "message"),
    [([], "empty"), ([1, -1], "from 0"), ([1, 1], "repeats"), ([1.5], "integers"), ([True], "int")],
)
def test_steps_of_a_clock_are_checked(steps, message):
    with pytest.raises(ValueError, match=message):
        diffusion.StepClock(steps)


def test_the_clock_reads_positional_and_keyword_steps(model):
    clock = diffusion.StepClock(np.array([0, 900]))
    with diffusion.attention_hooks(model.unet, {SELF: AttentionHook()}, clock):
        for call in ("position", "keyword"):
            for step in (5, 800):
                noise, context = model.noise(1), model.context(1)
                given = {"timestep": step} if call == "keyword" else {}
                args = () if given else (step,)
                with torch.no_grad():
                    model.unet(noise, *args, encoder_hidden_states=context, **given)
                assert clock.index == (int(step == 800),)


def test_half_precision_and_upcasting_run(model):
    unet = tiny_unet(upcast_attention=True).to(torch.bfloat16)
    hook = Recorder()
    noise, context = model.noise(1).bfloat16(), model.context(1).bfloat16()
    with torch.no_grad(), diffusion.attention_hooks(unet, {SELF: hook}):
        output = unet(noise, 3, context).sample
    assert output.dtype == torch.bfloat16 and torch.isfinite(output).all()
    assert hook.seen["softmax"].sum(-1).sub(1).abs().max() < 0.01


def test_a_row_whose_keys_are_all_masked_masks_nothing(model):
    """As in diffusers, where -10,000 on every score of a row cancels in the softmax."""
    hook, mask = Recorder(), torch.tensor([[True, True, False, True], [False] * 4])
    plain = forward(model, encoder_attention_mask=mask)
    with diffusion.attention_hooks(model.unet, {CROSS: hook}):
        forward(model, encoder_attention_mask=mask)
    assert torch.equal(hook.allowed[0, 0, 0], mask[0]) and hook.allowed[1].all()
    grid = ptqkit.softmax_grid(16)
    quantizers = {
        n: SoftmaxQuantizer(grid, "row_sum") for n in diffusion.find_attention(model.unet)
    }
    result = diffusion.UNetSoftmaxQuantization(model.unet, quantizers, diffusion.StepClock([1]))
    result.install()
    torch.testing.assert_close(
        forward(model, encoder_attention_mask=mask), plain, rtol=0, atol=1e-3
    )
