"""Linear layers on fixed codes: weights, gradients for the scales, the divergence, the rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import ptqkit
from ptqkit.nn.tunable import TunableMatrix, divergence, round_to, tunable_forwards
from ptqkit.reference import tuning as reference

CPU = torch.device("cpu")


def matrix(seed=0, **options):
    rng = np.random.default_rng(seed)
    weight, x = rng.normal(size=(12, 20)), rng.normal(size=(100, 20)) * rng.uniform(0.2, 3, 20)
    return ptqkit.gptq(weight.astype(np.float32), np.float32(x.T @ x / 50), bits=3, **options)


MATRICES = {
    "channel": {"group_size": None},
    "groups": {"group_size": 5},
    "g_idx": {"group_size": 5, "order": "act"},
    "symmetric": {"group_size": 10, "symmetric": True},
}


@pytest.mark.parametrize("name", MATRICES)
def test_weights_are_the_dequantized_ones_to_the_bit(name):
    made = matrix(**MATRICES[name])
    tuned = TunableMatrix(made, CPU)
    with torch.no_grad():
        weight = tuned.weight(tuned.scales).numpy()
    assert weight.tobytes() == made.dequantize().tobytes()


def test_one_scale_for_the_whole_matrix():
    rng = np.random.default_rng(1)
    made = ptqkit.rtn(
        rng.normal(size=(6, 8)).astype(np.float32), bits=4, group_size=None, per_tensor=True
    )
    tuned = TunableMatrix(made, CPU)
    assert tuned.scales.shape == (1, 1)
    tuned.weight(tuned.scales.detach())
    gradient = torch.from_numpy(rng.normal(size=(6, 8)).astype(np.float32))
    expected = reference.scale_gradient(made.codes, made.zero_points, made.g_idx, gradient)
    found = tuned.scale_gradient(gradient)
    np.testing.assert_allclose(found, [[expected.sum()]], rtol=1e-5)


@pytest.mark.parametrize("name", MATRICES)
def test_gradients_of_the_product_are_those_of_the_twin_and_of_autograd(name):
    made, rng = matrix(**MATRICES[name]), np.random.default_rng(2)
    tuned = TunableMatrix(made, CPU)
    x = torch.from_numpy(rng.normal(size=(2, 7, 20)).astype(np.float32)).requires_grad_()
    bias = torch.zeros(12, requires_grad=True)
    up = torch.from_numpy(rng.normal(size=(2, 7, 12)).astype(np.float32))
    y = tuned.apply(tuned.scales, x, bias)
    found = torch.autograd.grad(y, [tuned.scales, x, bias], up)
    rows, ups = x.detach().view(-1, 20).double().numpy(), up.view(-1, 12).double().numpy()
    weight = made.dequantize(np.float64)
    np.testing.assert_allclose(y.detach().view(-1, 12), rows @ weight.T, atol=1e-4)
    of_scales = reference.scale_gradient(made.codes, made.zero_points, made.g_idx, ups.T @ rows)
    for a, b in zip(found, (of_scales, (ups @ weight).reshape(2, 7, 20), ups.sum(0)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-4)


@pytest.mark.parametrize("name", ["groups", "g_idx"])
def test_the_twin_s_gradients_are_finite_differences(name):
    made, rng = matrix(**MATRICES[name]), np.random.default_rng(3)
    x, head = rng.normal(size=(9, 20)), rng.normal(size=(9, 12))
    steps = made.codes.astype(float) - made.zero_points[:, made.g_idx]

    def loss(scales):
        return reference.divergence(head, x @ (steps * scales[:, made.g_idx]).T)[0]

    scales = made.scales.astype(np.float64)
    logits = x @ made.dequantize(np.float64).T
    gradient = reference.scale_gradient(
        made.codes, made.zero_points, made.g_idx, reference.divergence(head, logits)[1].T @ x
    )
    for row, group in ((0, 0), (5, 2), (11, 3)):
        change = np.zeros_like(scales)
        change[row, group] = 1e-5
        slope = (loss(scales + change) - loss(scales - change)) / 2e-5
        assert gradient[row, group] == pytest.approx(slope, rel=1e-6)


def test_divergence_and_its_gradient():
    rng = np.random.default_rng(4)
    target, logits = (3 * rng.normal(size=(600, 11)).astype(np.float32) for _ in range(2))
    target[5, 3] = -np.inf  # ruled out by the float model
    given = torch.from_numpy(logits).requires_grad_()
    loss = divergence(given, lambda rows: torch.from_numpy(target[rows]))
    assert loss.dtype == torch.float64
    (gradient,) = torch.autograd.grad(loss / 7, given)
    with np.errstate(invalid="ignore"):
        value, expected = reference.divergence(np.maximum(target, -1e30), logits)
    assert float(loss.detach()) == pytest.approx(value, rel=1e-6)
    np.testing.assert_allclose(gradient, expected / 7, atol=1e-7)
    assert reference.divergence(logits, logits)[0] == 0.0
    close = logits + 1e-3 * rng.normal(size=logits.shape).astype(np.float32)
    value = reference.divergence(close, logits)[0]  # 1e-7 per token
    near = divergence(given.detach(), lambda rows: torch.from_numpy(close[rows]))
    assert float(near) == pytest.approx(value, rel=1e-3)
    apart = np.float32([[0, -120, 3]]), np.float32([[0, 100, -30]])
    far = divergence(torch.from_numpy(apart[1]), lambda rows: torch.from_numpy(apart[0][rows]))
    assert float(far) == pytest.approx(reference.divergence(*apart)[0], rel=1e-6)
    alike = divergence(given.detach(), lambda rows: torch.from_numpy(logits[rows]))
    assert float(alike) == 0.0


def test_rounded_values_pass_gradients_unchanged():
    value = torch.tensor([1.0001, -3.3333], requires_grad=True)
    rounded = round_to(value, torch.float16, torch.float32)
    assert torch.equal(rounded, value.detach().half().float()) and rounded.dtype == torch.float32
    (gradient,) = torch.autograd.grad(rounded @ torch.tensor([2.0, 5.0]), value)
    assert gradient.tolist() == [2.0, 5.0]


def test_forwards_are_put_back_also_after_an_error():
    made = matrix(**MATRICES["groups"])
    module, other = torch.nn.Linear(20, 12), torch.nn.Linear(20, 12)
    other.forward = own = other.forward
    tuned = TunableMatrix(made, CPU)
    x = torch.ones(1, 20)
    before = module(x)
    with (
        pytest.raises(RuntimeError, match="stop"),
        tunable_forwards(
            {"a": module, "b": other}, {"a": tuned, "b": tuned}, lambda name: tuned.scales
        ),
    ):
        inside = module(input=x)
        weight = torch.from_numpy(made.dequantize())
        assert torch.equal(inside, torch.nn.functional.linear(x, weight, module.bias))
        assert torch.equal(other(x), torch.nn.functional.linear(x, weight, other.bias))
        raise RuntimeError("stop")
    assert torch.equal(module(x), before)
    assert "forward" not in module.__dict__ and other.__dict__["forward"] is own


@pytest.mark.parametrize("name", MATRICES)
def test_codes_that_learn_begin_as_they_are_and_have_the_gradient_of_their_weight(name):
    made, rng = matrix(**MATRICES[name]), np.random.default_rng(5)
    tuned = TunableMatrix(made, CPU, learn_codes=True)
    weight = tuned.weight(tuned.scales.detach()).numpy()
    assert weight.tobytes() == made.dequantize().tobytes()
    x = torch.from_numpy(rng.normal(size=(9, 20)).astype(np.float32))
    up = torch.from_numpy(rng.normal(size=(9, 12)).astype(np.float32))
    y = tuned.apply(tuned.scales, x, None)
    (found,) = torch.autograd.grad(y, [tuned.latents], up)
    expected = reference.code_gradient(made.scales, made.g_idx, up.double().T @ x.double())
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


def test_codes_that_learn_stay_on_their_grid():
    made = matrix(group_size=5)
    tuned = TunableMatrix(made, CPU, learn_codes=True)
    with torch.no_grad():
        tuned.latents += torch.linspace(-20, 20, 20)
    tuned.limit()
    codes = tuned.codes().numpy()
    assert codes.min() == 0 and codes.max() == made.max_code == 7
    # From either end, one step of a code comes back in at once.
    assert tuned.latents.min() > -0.5 and tuned.latents.max() < 7.5
    expected = np.clip(np.round(made.codes + np.linspace(-20, 20, 20)), 0, 7)
    assert (codes == expected).mean() > 0.99  # halves may round either way
