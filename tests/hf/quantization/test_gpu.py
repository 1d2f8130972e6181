"""A model on a GPU: H is accumulated there, the result is that of the host but for ties."""

from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

import numpy as np
import torch.distributed as dist
from helpers import expert_models
from helpers.driver_models import build, padded_batches, tokens

from benchmarks.large.models import Size, draw_tokens
from benchmarks.large.models import build as build_random
from ptqkit import AWE, RTN, ActivationQuantization, BiasCorrection
from ptqkit.hf import perplexity, quantize, tune
from ptqkit.hf.quantization import tuning_step
from ptqkit.nn.half_products import multiplies_halves
from ptqkit.nn.statistics import TorchHessian
from ptqkit.nn.transfer import HostCopies

OPTIONS = {"bits": 3, "group_size": 16, "progress": False}


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("schedule", ["one-pass", "replay"])
def test_gpu_equals_host(name, schedule):
    host = quantize(build(name), "quality", padded_batches(name), **OPTIONS)
    device = quantize(
        build(name).cuda(), "quality", padded_batches(name), **OPTIONS, schedule=schedule
    )
    assert device.report.schedule == schedule and device.report.memory["peak"] > 0
    first = host.report.quantized[0].name
    for key, matrix in host.matrices.items():
        different = float(np.mean(device.matrices[key].codes != matrix.codes))
        assert different < (0.01 if key == first else 0.1), key
        weight = device.model.get_submodule(key).weight
        values = device.matrices[key].dequantize()
        assert weight.is_cuda
        expected = torch.from_numpy(values.T if name == "gpt2" else values)
        assert torch.equal(weight.cpu(), expected)


@pytest.mark.parametrize(
    ("recipe", "schedule"), [("quality", "one-pass"), ("quality", "replay"), ("best", "replay")]
)
def test_blocks_wait_on_the_host_where_room_is_short(recipe, schedule):
    size = Size(128, 256, 8, 2, 2, 64)
    data = draw_tokens(size, 16, 64)
    options = {**OPTIONS, "group_size": 32, "row_coupling": 0, "schedule": schedule}
    model = build_random(size, 64, "bfloat16", "cuda")
    block = sum(p.numel() * p.element_size() for p in model.model.layers[0].parameters())
    torch.cuda.reset_peak_memory_stats()
    whole = quantize(model, recipe, data, **options)
    needed = whole.report.memory[f"estimate_{schedule.replace('-', '_')}"]
    assert "blocks_on_host" not in whole.report.memory
    model = build_random(size, 64, "bfloat16", "cuda")
    torch.cuda.reset_peak_memory_stats()
    away = quantize(model, recipe, data, memory_budget=needed - 3 * block, **options)
    assert away.report.memory["blocks_on_host"] == 3
    assert all(p.is_cuda for p in model.parameters())
    for key, matrix in whole.matrices.items():
        assert np.array_equal(matrix.codes, away.matrices[key].codes), key
        weight = model.get_submodule(key).weight
        assert torch.equal(weight, whole.model.get_submodule(key).weight)


@pytest.mark.parametrize("recipe", ["quality", "best"])
def test_schedules_agree_on_the_gpu(recipe):
    options = {**OPTIONS, "row_coupling": 0}  # gradients may come in another order
    one = quantize(build().cuda(), recipe, padded_batches(), **options)
    two = quantize(build().cuda(), recipe, padded_batches(), **options, schedule="replay")
    for key, matrix in one.matrices.items():
        np.testing.assert_array_equal(matrix.codes, two.matrices[key].codes, err_msg=key)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_of_halves_are_those_of_float32_to_rounding(dtype):
    device = torch.device("cuda")
    assert multiplies_halves(device, dtype)
    x = torch.randn(5000, 96, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    found, wide = TorchHessian(96, device), TorchHessian(96, device)
    found.update(x)
    wide.update(x.float())
    exact = 2 * (x.double().T @ x.double()).cpu().numpy() / len(x)
    for matrix in (found.finish().matrix, wide.finish().matrix):
        np.testing.assert_allclose(matrix, exact, rtol=0, atol=2e-6 * exact.max())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_best_is_as_good_as_on_the_host(name):
    host = quantize(build(name), "best", padded_batches(name), **OPTIONS)
    device = quantize(build(name).cuda(), "best", padded_batches(name), **OPTIONS)
    for key, matrix in host.matrices.items():
        assert device.matrices[key].row_objectives.shape == matrix.row_objectives.shape
        assert device.report[key].target == host.report[key].target
    totals = [sum(r.objective for r in x.report.quantized) for x in (host, device)]
    assert totals[1] == pytest.approx(totals[0], rel=0.1)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_a_recorded_step_learns_what_steps_on_their_own_do(name, monkeypatch):
    """Kernels add up in an order that may differ, so codes at a tie may too."""
    found = []
    for recorded in (True, False):
        if not recorded:
            monkeypatch.setattr(tuning_step, "can_record", lambda device: False)
        result = quantize(build(name).cuda(), "rtn", tokens(16), **OPTIONS)
        tune(
            result, tokens(16), 20, float_model=build(name).cuda(), own_text=24, code_rate=0.1,
            samples=16, progress=False,
        )  # fmt: skip
        assert result.tuning.recorded == recorded
        found.append(result.tuning)
    assert [step for step, _ in found[0].checks] == [step for step, _ in found[1].checks]
    for (_, one), (_, other) in zip(found[0].checks[:5], found[1].checks, strict=False):
        assert one == pytest.approx(other, rel=1e-3)
    assert found[0].loss_after == pytest.approx(found[1].loss_after, rel=0.05)


def test_half_precision_and_perplexity():
    model = build().to("cuda", torch.bfloat16)
    before = perplexity(model, None, tokens(2), start_token=1)
    quantize(model, "quality", tokens(), bits=8, group_size=16, progress=False)
    after = perplexity(model, None, tokens(2), start_token=1)
    assert after.nll_per_token == pytest.approx(before.nll_per_token, rel=0.05)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_w8a8_on_the_gpu_equals_the_host(name):
    parts = [
        AWE(alpha=0.5),
        RTN(bits=8, per_tensor=True, symmetric=True),
        ActivationQuantization(8, "tensor"),
        BiasCorrection(),
    ]
    batches = padded_batches(name)
    host = quantize(build(name), parts, batches, progress=False)
    device = quantize(build(name).cuda(), parts, batches, progress=False)
    for key, matrix in host.matrices.items():
        assert float(np.mean(device.matrices[key].codes != matrix.codes)) < 0.02, key
        scale, expected = (r.activations[key].scale for r in (device, host))
        torch.testing.assert_close(scale.cpu(), expected, rtol=1e-2, atol=0, msg=key)
    ids = batches[0]["input_ids"][:1]
    with torch.no_grad():
        found = device.model(ids.cuda()).logits.cpu()
        expected = host.model(ids).logits
    error = (found - expected).square().mean() / expected.square().mean()
    assert float(error) < 1e-2


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "llama4"])
@pytest.mark.parametrize("schedule", ["one-pass", "replay"])
def test_experts_on_the_gpu_equal_those_of_the_host(kind, schedule):
    # On the float model's inputs: one code that differs before a router sends tokens elsewhere.
    options = {"bits": 4, "group_size": 8, "symmetric": True, "calibrate_on": "float"}
    options["progress"] = False
    data = expert_models.batches(2, 1, 24)  # too few tokens for some
    host = quantize(expert_models.build(kind), "quality", data, **options)
    device = quantize(
        expert_models.build(kind).cuda(), "quality", data, **options, schedule=schedule
    )
    name = next(iter(expert_models.mixtures(device.model)))
    assert device.model.get_submodule(name).down_proj.is_cuda
    short = 0
    for key, matrix in host.matrices.items():
        one, two = device.report[key], host.report[key]
        assert (one.tokens, one.rule) == (two.tokens, two.rule), key
        # With few tokens single codes follow the last bits of H.
        assert float(np.mean(device.matrices[key].codes != matrix.codes)) < 0.1, key
        assert one.objective == pytest.approx(two.objective, rel=0.1), key
        short += bool(one.rule)
    assert short


def test_copies_are_made_meanwhile():
    generator = torch.Generator("cuda").manual_seed(0)
    copies, found = HostCopies(), []
    for size in (3, 1 << 20, 123_456_789, 50 << 20, 1000):  # over a stage, and more than may wait
        values = torch.randint(0, 255, (size,), generator=generator, device="cuda").byte()
        expected = values.cpu().numpy()
        found.append((copies.begin(values), expected))
        del values  # what comes next may not take its memory
    copies.wait()
    for array, expected in found:
        assert np.array_equal(array, expected)


@pytest.mark.parametrize("recipe", ["reference", "quality", "best"])
def test_a_process_of_its_own_joins_rows_there(recipe, tmp_path):
    """One process takes every step of several: sums in float64, rows put together, copies."""
    alone = quantize(build().cuda(), recipe, padded_batches(), **OPTIONS)
    where = f"file://{tmp_path / 'meeting'}"
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=where, rank=0, world_size=1)
    try:
        first, again = (
            quantize(build().cuda(), recipe, padded_batches(), distributed=True, **OPTIONS)
            for _ in range(2)
        )
    finally:
        dist.destroy_process_group()
    for key, matrix in first.matrices.items():
        assert np.array_equal(matrix.codes, again.matrices[key].codes)
        weight = first.model.get_submodule(key).weight
        assert torch.equal(weight.cpu(), torch.from_numpy(matrix.dequantize()))
        different = float(np.mean(matrix.codes != alone.matrices[key].codes))
        assert different < 0.1, key


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_tuning_learns_there_as_on_the_host(name):
    data = padded_batches(name, 16)
    found = []
    for device in ("cpu", "cuda"):
        model = build(name).to(device)
        result = quantize(model, "rtn", data, bits=2, group_size=16, progress=False, tune=10)
        assert result.tuning.kept > 0
        for key, matrix in result.matrices.items():
            expected = matrix.dequantize()
            weight = model.get_submodule(key).weight.detach().cpu().numpy()
            np.testing.assert_array_equal(weight, expected.T if name == "gpt2" else expected)
        found.append(result.tuning)
    host, device = found
    assert device.loss_before == pytest.approx(host.loss_before, rel=1e-3)
    assert device.loss_after == pytest.approx(host.loss_after, rel=0.02)
    assert device.memory["estimate"] > 0
