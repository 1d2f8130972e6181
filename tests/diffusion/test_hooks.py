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
from ptqkit.diffusion.clock import read_steps
from ptqkit.nn.attention import AttentionHook
from ptqkit.nn.attention_quantizer import ATTENTION_KINDS
from ptqkit.nn.softmax.quantizer import SoftmaxQuantizer
from ptqkit.nn.softmax.steps import check_steps, nearest_steps

SELF = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
CROSS = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"


@pytest.fixture
def model():
    return tiny_model()


class Recorder(AttentionHook):
    """Keeps what it sees; ``change`` names the kind that it doubles."""

    def __init__(self, change=None):
        self.seen, self.change, self.order, self.allowed = {}, change, [], None
        self.steps = ()

    def _see(self, kind, x):
        self.seen[kind] = x.detach().clone()
        self.order.append(kind)
        return 2 * x if kind == self.change else x

    def query(self, x, call):
        return self._see("query", x)

    def key(self, x, call):
        return self._see("key", x)

    def value(self, x, call):
        return self._see("value", x)

    def scores(self, x, call):
        return self._see("scores", x)

    def softmax(self, p, call):
        self.allowed, self.steps = call.allowed, call.steps
        return self._see("softmax", p)


def test_modules_are_found_with_heads_and_kind(model):
    found = diffusion.find_attention(model.unet)
    assert len(found) == 8 and found[SELF].heads == found[CROSS].heads == HEADS
    assert found[SELF].kind == "self" and found[CROSS].kind == "cross"
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
    diffusion.install_attention(model.unet, hooks)
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
        def softmax(self, p, call):
            raise RuntimeError("stop here")

    with (
        pytest.raises(RuntimeError, match="stop here"),
        diffusion.attention_hooks(model.unet, {SELF: Fails()}),
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


def test_a_copy_of_the_model_has_hooks_and_time_steps_of_its_own(model):
    hook = Recorder("softmax")
    diffusion.install_attention(model.unet, {SELF: hook})
    other = copy.deepcopy(model.unet)
    changed = forward(model, step=1)
    assert hook.steps == (1,)
    copied = forward(model, step=950, unet=other)
    assert diffusion.installed_attention(other)[SELF].steps == (950,) and hook.steps == (1,)
    assert torch.equal(copied, forward(model, step=950))
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
    with pytest.raises(ptqkit.UnsupportedModuleError, match="not a diffusers model"):
        diffusion.find_attention(torch.nn.Linear(1, 1))


def test_the_nearest_calibrated_step_counts():
    known = [900, 500, 100]
    for step, index in ((900, 0), (999, 0), (701, 0), (499, 1), (torch.tensor(0), 2), (310.0, 1)):
        assert nearest_steps(known, read_steps(step)) == (index,)
    assert nearest_steps(known, read_steps(700)) == (1,)  # the earlier of two equally far
    assert nearest_steps(known, read_steps(torch.tensor([100, 899, 500]))) == (2, 0, 1)
    assert nearest_steps(known[::-1], [700]) == (1,)


def test_as_many_time_steps_as_samples():
    quantizer = diffusion.StepSoftmaxQuantizer(ptqkit.softmax_grid(8), [0.0, 0.1, 0.2], [9, 5, 1])
    p = torch.full((2, 1, 1, 2), 0.5)
    with pytest.raises(ValueError, match="3 time steps for a batch of 2"):
        quantizer.at((1, 5, 9))(p)
    with pytest.raises(ValueError, match="no time step is known"):
        quantizer.at(())


@pytest.mark.parametrize("step", [-1, float("nan"), torch.tensor([1, -2]), torch.empty(0)])
def test_what_is_not_a_time_step_is_refused(model, step):
    with pytest.raises(ValueError, match="number from 0"):
        read_steps(step)
    with (
        diffusion.attention_hooks(model.unet, {SELF: AttentionHook()}),
        pytest.raises(ValueError, match="number from 0"),
    ):
        forward(model, step=step)


@pytest.mark.parametrize(
    ("steps", "message"),
    [([], "empty"), ([1, -1], "from 0"), ([1, 1], "repeats"), ([1.5], "integers"), ([True], "int")],
)
def test_calibrated_steps_are_checked(steps, message):
    with pytest.raises(ValueError, match=message):
        check_steps(steps)
    assert check_steps(np.array([0, 900])) == (0, 900)


def test_hooks_see_positional_and_keyword_steps(model):
    hook = Recorder()
    with diffusion.attention_hooks(model.unet, {SELF: hook}):
        for call in ("position", "keyword"):
            for step in (5, 800):
                noise, context = model.noise(1), model.context(1)
                given = {"timestep": step} if call == "keyword" else {}
                args = () if given else (step,)
                with torch.no_grad():
                    model.unet(noise, *args, encoder_hidden_states=context, **given)
                assert hook.steps == (step,)


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
    result = diffusion.UNetSoftmaxQuantization(model.unet, quantizers)
    result.install()
    torch.testing.assert_close(
        forward(model, encoder_attention_mask=mask), plain, rtol=0, atol=1e-3
    )
