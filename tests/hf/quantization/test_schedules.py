"""One pass, replay and the same work by hand give the same codes; fallbacks are visible."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.driver_models import (
    ARCHITECTURES,
    LAYERS_PER_BLOCK,
    build,
    by_hand,
    padded_batches,
    tokens,
)
from helpers.schedule_models import Block, Model, count_hooks, late, plain
from torch import nn

from ptqkit.errors import PreflightError, UnsupportedModuleError
from ptqkit.hf.quantization import coroutines
from ptqkit.hf.quantization.driver import quantize

OPTIONS = {"bits": 3, "group_size": 16, "progress": False}


def assert_same(first, second):
    assert set(first.matrices) == set(second.matrices)
    for name, matrix in first.matrices.items():
        other = second.matrices[name]
        for key in ("codes", "scales", "zero_points", "g_idx", "row_objectives"):
            np.testing.assert_array_equal(getattr(matrix, key), getattr(other, key), err_msg=name)
    for (name, a), b in zip(
        first.model.state_dict().items(), second.model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_schedules_agree_bit_for_bit(name):
    batches = padded_batches(name)
    one = quantize(build(name), "quality", batches, **OPTIONS)
    two = quantize(build(name), "quality", batches, **OPTIONS, schedule="replay")
    assert one.report.schedule == "one-pass" and one.report.schedule_reason == ""
    assert two.report.schedule == "replay" and two.report.schedule_reason == "asked for"
    assert len(one.matrices) == 2 * LAYERS_PER_BLOCK.get(name, 7)
    assert_same(one, two)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bert"])
@pytest.mark.parametrize("recipe", ["quality", "reference"])
def test_equals_the_plain_form_by_hand(name, recipe):
    batches = padded_batches(name)
    result = quantize(build(name), recipe, batches, **OPTIONS)
    groups = []
    for row in result.report.quantized:
        if not any(row.name in g for g in groups):
            groups.append([row.name, *row.shares_input_with])
    options = {
        k: getattr(result.recipe, k)
        for k in (
            "bits",
            "group_size",
            "order",
            "static_groups",
            "grid",
            "refine_passes",
            "damping",
        )
    }
    model = build(name)
    expected = by_hand(model, groups, batches, options)
    for key, matrix in expected.items():
        np.testing.assert_array_equal(result.matrices[key].codes, matrix.codes, err_msg=key)
        np.testing.assert_array_equal(result.matrices[key].scales, matrix.scales, err_msg=key)
    with torch.no_grad():
        assert torch.equal(model(**batches[1])[0], result.model(**batches[1])[0])


def test_each_operation_runs_once_per_batch():
    model, batches = build(), padded_batches()
    rows = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or name.endswith(("input_layernorm", "self_attn")):
            module.register_forward_hook(
                lambda m, a, o, n=name: rows.setdefault(n, []).append(
                    (o if isinstance(o, torch.Tensor) else o[0]).shape[0]
                )
            )
    quantize(model, "reference", batches, **OPTIONS)
    probe = rows.pop("lm_head")
    assert probe == [1]  # the probe alone; calibration stops at the last layer
    last = rows.pop("model.layers.1.mlp.down_proj")
    assert last == [1]
    assert all(counts == [1, 2, 2, 2] for counts in rows.values()), rows


def test_sharing_groups_follow_the_tensor():
    report = quantize(build("llama"), "reference", tokens(), **OPTIONS).report
    shares = {r.name.removeprefix("model.layers.0."): r.shares_input_with for r in report.quantized}
    ends = {k: sorted(n.rpartition(".")[2] for n in v) for k, v in shares.items()}
    assert ends["self_attn.q_proj"] == ["k_proj", "v_proj"]
    assert ends["mlp.up_proj"] == ["gate_proj"]
    assert ends["self_attn.o_proj"] == [] and ends["mlp.down_proj"] == []


@pytest.mark.parametrize("schedule", ["one-pass", "replay"])
def test_sharing_changes_no_code(schedule):
    kwargs = {**OPTIONS, "schedule": schedule}
    shared = quantize(build(), "quality", padded_batches(), **kwargs)
    alone = quantize(build(), "quality", padded_batches(), **kwargs, share_inputs=False)
    assert not any(r.shares_input_with for r in alone.report.quantized)
    for name, matrix in shared.matrices.items():
        np.testing.assert_array_equal(matrix.codes, alone.matrices[name].codes, err_msg=name)


def test_padding_does_not_count():
    """Rubbish under the padding must change nothing but the padded positions' own outputs."""
    batches = padded_batches("gpt2")
    other = [dict(b) for b in batches]
    for batch in other:
        batch["input_ids"] = torch.where(batch["attention_mask"].bool(), batch["input_ids"], 5)
    first = quantize(build("gpt2"), "reference", batches, **OPTIONS)
    second = quantize(build("gpt2"), "reference", other, **OPTIONS)
    real = int(sum(b["attention_mask"].sum() for b in batches))
    assert {r.tokens for r in first.report.quantized} == {real}
    for name, matrix in first.matrices.items():
        np.testing.assert_array_equal(matrix.codes, second.matrices[name].codes, err_msg=name)


def test_batches_may_differ_in_shape():
    ids = tokens(6)
    rows = [ids[0, :9], ids[1], ids[2, :20], ids[3, :9]]
    one = quantize(build(), "reference", rows, **OPTIONS)
    assert one.report.calibration["batches"] == 3 and one.report.schedule == "one-pass"
    assert_same(one, quantize(build(), "reference", rows, **OPTIONS, schedule="replay"))


def test_experts_that_batches_do_not_share_fall_back():
    rows = [tokens()[0], tokens()[1, :31], tokens()[2], tokens()[3, :31]]
    result = quantize(plain(experts=True), "reference", rows, **OPTIONS)
    assert result.report.schedule == "replay"
    assert "did not reach" in result.report.schedule_reason
    assert len(result.matrices) == 8
    seen = {r.name: r.tokens for r in result.report.quantized}
    assert seen["layers.0.experts.0"] == 64 and seen["layers.0.experts.1"] == 62
    assert seen["layers.1.down"] == 126


def test_experts_equal_the_work_by_hand():
    rows = [tokens()[0], tokens()[1, :31], tokens()[2]]
    result = quantize(plain(experts=True), "reference", rows, **OPTIONS)
    order = [f"layers.{i}.{n}" for i in range(2) for n in ("up", "experts.0", "experts.1", "down")]
    model = plain(experts=True)
    expected = _by_hand_reached(model, order, rows)
    for name, matrix in expected.items():
        np.testing.assert_array_equal(result.matrices[name].codes, matrix.codes, err_msg=name)


def _by_hand_reached(model, order, rows):
    """As ``by_hand``, for layers that only some batches reach; batches of equal length together."""
    import ptqkit

    by_length = {}
    for row in rows:
        by_length.setdefault(len(row), []).append(row)
    batches = [torch.stack(group) for group in by_length.values()]
    result = {}
    for name in order:
        module = model.get_submodule(name)
        hessian = ptqkit.Hessian(module.in_features)
        for ids in batches:
            handle = module.register_forward_pre_hook(lambda m, a, h=hessian: h.update(a[0]))
            with torch.no_grad():
                model(ids)
            handle.remove()
        result[name] = ptqkit.gptq(
            module.weight.detach().numpy(), hessian, bits=3, group_size=16, name=name
        )
        with torch.no_grad():
            module.weight.copy_(torch.from_numpy(result[name].dequantize()))
    return result


def test_expert_without_tokens_is_an_error_naming_it():
    with pytest.raises(ValueError, match=r"layers\.0\.experts\.1 saw no token"):
        quantize(plain(experts=True), "reference", tokens(), **OPTIONS)
    result = quantize(plain(experts=True), "reference", tokens(), **OPTIONS, on_error="leave_float")
    assert {r.name for r in result.report.failed} == {"layers.0.experts.1", "layers.1.experts.1"}
    assert "layers.0.experts.1" not in result.matrices
    before = plain(experts=True).layers[0].experts[1].weight
    assert torch.equal(before, result.model.layers[0].experts[1].weight)


def test_thread_local_mode_falls_back():
    result = quantize(plain(autocast=True), "reference", tokens(), **OPTIONS)
    assert result.report.schedule == "replay"
    assert "thread-local mode" in result.report.schedule_reason
    with pytest.raises(UnsupportedModuleError, match=r"thread-local.*autocast"):
        quantize(plain(autocast=True), "reference", tokens(), **OPTIONS, schedule="one-pass")


def test_falls_back_in_the_middle_and_keeps_what_is_done():
    result = quantize(late(), "reference", tokens(), **OPTIONS)
    assert result.report.schedule == "one-pass, then replay"
    assert "layers.1.up runs inside a thread-local mode" in result.report.schedule_reason
    assert {r.schedule for r in result.report.quantized} == {"one-pass", "replay"}
    assert_same(result, quantize(late(), "reference", tokens(), **OPTIONS, schedule="replay"))


def test_a_caller_may_hold_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        one = quantize(plain(), "reference", tokens(), **OPTIONS)
        two = quantize(plain(), "reference", tokens(), **OPTIONS, schedule="replay")
        assert torch.is_autocast_enabled("cpu")
    assert one.report.schedule == "one-pass"
    assert_same(one, two)


def test_memory_budget_chooses_the_schedule():
    full = quantize(build(), "reference", tokens(), **OPTIONS, memory_budget="1GiB")
    memory = full.report.memory
    assert full.report.schedule == "one-pass" and memory["budget"] == 2**30
    assert memory["peak"] > 0
    ids = tokens(60)
    small = quantize(build(), "reference", ids, **OPTIONS, batch_size=1, memory_budget=1_000_000)
    needs = small.report.memory
    assert needs["estimate_replay"] < 1_000_000 < needs["estimate_one_pass"]
    assert small.report.schedule == "replay"
    assert "memory budget" in small.report.schedule_reason
    assert_same(small, quantize(build(), "reference", ids, **OPTIONS, batch_size=1))
    with pytest.raises(PreflightError, match=r"memory_budget: replay needs about"):
        quantize(build(), "reference", ids, **OPTIONS, memory_budget=1000)


def test_without_greenlet_it_falls_back(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "greenlet", None)
    result = quantize(build(), "reference", tokens(), **OPTIONS)
    assert result.report.schedule == "replay" and "greenlet" in result.report.schedule_reason


def test_shared_input_that_the_probe_saw_wrongly():
    class Liar(Block):
        def forward(self, x):
            h = self.up(x)
            long = x.shape[1] > 16
            return x + self.down(torch.relu(h + self.experts[0](x + 1 if long else x)))

    class Holder(Model):
        def __init__(self):
            nn.Module.__init__(self)
            self.embedding = nn.Embedding(64, 16)
            self.layers = nn.ModuleList([Liar(), Liar()])
            for layer in self.layers:
                layer.experts[0] = nn.Linear(16, 32)

    with pytest.raises(UnsupportedModuleError, match=r"share_inputs=False"):
        quantize(Holder(), "reference", tokens(), **OPTIONS)
    assert (
        len(quantize(Holder(), "reference", tokens(), **OPTIONS, share_inputs=False).matrices) == 6
    )


@pytest.mark.parametrize("schedule", ["one-pass", "replay"])
def test_everything_is_restored_after_an_error(schedule, monkeypatch):
    model = build()
    model.train()
    model.model.layers[1].eval()
    modes = [m.training for m in model.modules()]
    own = model.model.layers[1].mlp.act_fn
    calls = [0]

    class Broken(nn.Module):
        def forward(self, x):
            calls[0] += 1
            if calls[0] == 4:
                raise FloatingPointError("in the model")
            return own(x)

    model.model.layers[1].mlp.act_fn = Broken()
    modes.insert(list(model.modules()).index(model.model.layers[1].mlp.act_fn), True)
    modes = [m.training for m in model.modules()]
    seed, threads = torch.random.get_rng_state(), torch.get_num_threads()
    with pytest.raises(FloatingPointError, match="in the model") as error:
        quantize(model, "reference", padded_batches(), **OPTIONS, schedule=schedule)
    if hasattr(error.value, "__notes__"):
        assert "12 of 14" in error.value.__notes__[0] or "of 14 layers" in error.value.__notes__[0]
    assert count_hooks(model) == 0
    assert [m.training for m in model.modules()] == modes
    assert model.config.use_cache is True
    assert not any("forward" in m.__dict__ for m in model.modules())
    assert torch.is_grad_enabled() and torch.get_num_threads() == threads
    assert torch.equal(torch.random.get_rng_state(), seed)
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("schedule", ["one-pass", "replay"])
def test_everything_is_restored_after_success(schedule):
    model = build()
    model.train()
    seed = torch.random.get_rng_state()
    grads = [p.requires_grad for p in model.parameters()]
    quantize(model, "quality", padded_batches(), **OPTIONS, schedule=schedule)
    assert count_hooks(model) == 0 and all(m.training for m in model.modules())
    assert [p.requires_grad for p in model.parameters()] == grads
    assert model.config.use_cache is True and torch.is_grad_enabled()
    assert torch.equal(torch.random.get_rng_state(), seed)
    assert not any("forward" in m.__dict__ for m in model.modules())


@pytest.mark.parametrize("schedule", ["one-pass", "replay"])
def test_the_model_runs_without_gradients_dropout_or_cache(schedule):
    model = build("gpt2")
    model.train()
    seen = set()

    def look(module, args, kwargs):
        cache = kwargs.get("past_key_values")
        seen.add((torch.is_grad_enabled(), module.training, cache is None))

    for block in model.transformer.h:
        block.register_forward_pre_hook(look, with_kwargs=True)
    quantize(model, "reference", padded_batches("gpt2"), **OPTIONS, schedule=schedule)
    assert seen == {(False, False, True)}


def test_coroutines_see_context_variables():
    import contextvars

    variable = contextvars.ContextVar("variable", default="unset")
    variable.set("caller's")
    seen = []
    coroutine = coroutines.Coroutine(lambda: seen.append(variable.get()))
    coroutine.step()
    assert seen == ["caller's"] and coroutine.name is None
