"""Folds: which are found, that they leave the float model as it is, and what is refused."""

from __future__ import annotations

import copy
import os
import signal

import numpy as np
import pytest
import torch
import transformers
from helpers.data import SHARED
from helpers.driver_models import tokens
from helpers.fold_models import change, logits, make, one_batch
from torch import nn

from ptqkit.errors import CalibrationError, UnsupportedModuleError
from ptqkit.hf.equalization import fold as fold_module
from ptqkit.hf.equalization import proof
from ptqkit.hf.equalization.find import Fold, apply_fold, find_folds
from ptqkit.hf.equalization.layouts import channel_layouts, row_layouts
from ptqkit.hf.equalization.proof import _exponents

# What one block holds: kind, producer, consumers.
LLAMA = [
    ("norm", "input_layernorm", "self_attn.q_proj self_attn.k_proj self_attn.v_proj"),
    ("value", "self_attn.v_proj", "self_attn.o_proj"),
    ("norm", "post_attention_layernorm", "mlp.gate_proj mlp.up_proj"),
    ("up", "mlp.up_proj", "mlp.down_proj"),
]
GEMMA2 = [(k, p.replace("post_attention", "pre_feedforward"), c) for k, p, c in LLAMA]
PHI3 = [
    ("norm", "input_layernorm", "self_attn.qkv_proj"),
    ("value", "self_attn.qkv_proj", "self_attn.o_proj"),
    ("norm", "post_attention_layernorm", "mlp.gate_up_proj"),
    ("up", "mlp.gate_up_proj", "mlp.down_proj"),
]
OPT = [
    ("norm", "self_attn_layer_norm", "self_attn.q_proj self_attn.k_proj self_attn.v_proj"),
    ("value", "self_attn.v_proj", "self_attn.out_proj"),
    ("norm", "final_layer_norm", "fc1"),
    ("relu", "fc1", "fc2"),
]
GPT2 = [
    ("norm", "ln_1", "attn.c_attn"),
    ("value", "attn.c_attn", "attn.c_proj"),
    ("norm", "ln_2", "mlp.c_fc"),
]
BLOOM = [
    ("norm", "input_layernorm", "self_attention.query_key_value"),
    ("value", "self_attention.query_key_value", "self_attention.dense"),
    ("norm", "post_attention_layernorm", "mlp.dense_h_to_4h"),
]
NEOX = [(k, p.replace("self_", ""), c.replace("self_", "")) for k, p, c in BLOOM]
FALCON = [
    ("norm", "input_layernorm", "self_attention.query_key_value mlp.dense_h_to_4h"),
    ("value", "self_attention.query_key_value", "self_attention.dense"),
]
MPT = [
    ("norm", "norm_1", "attn.Wqkv"),
    ("value", "attn.Wqkv", "attn.out_proj"),
    ("norm", "norm_2", "ffn.up_proj"),
]
EXPECTED = {
    "llama": ("model.layers", LLAMA),
    "mistral": ("model.layers", LLAMA),
    "qwen2": ("model.layers", LLAMA),
    "qwen3": ("model.layers", LLAMA),
    "gemma": ("model.layers", LLAMA),
    "gemma2": ("model.layers", GEMMA2),
    "phi3": ("model.layers", PHI3),
    "opt": ("model.decoder.layers", OPT),
    "gpt2": ("transformer.h", GPT2),
    "bloom": ("transformer.h", BLOOM),
    "gpt_neox": ("gpt_neox.layers", NEOX),
    "falcon": ("transformer.h", FALCON),
    "mpt": ("transformer.blocks", MPT),
    # The norm before the experts also feeds the router and weights that are no linear layers.
    "mixtral": ("model.layers", LLAMA[:2]),
    # Norms after the residual sum feed the next sum too.
    "opt-post": ("model.decoder.layers", [OPT[1], OPT[3]]),
    "opt-plain-norm": ("model.decoder.layers", [OPT[1], OPT[3]]),
    "bloom-post": ("transformer.h", [BLOOM[1]]),
}
SCALED = [*EXPECTED, "bert", "t5"]


def plan_of(model, name="llama"):
    return find_folds(model, one_batch(name))


def random_scales(fold, generator):
    return np.exp(generator.normal(0.0, 1.0, fold.channels))


def snapshot(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


@pytest.mark.parametrize("name", EXPECTED)
def test_exactly_these_folds_are_found(name):
    path, block = EXPECTED[name]
    found = [(f.kind, f.producer, f.consumers) for f in plan_of(make(name), name).folds]
    wanted = [
        (kind, f"{path}.{i}.{producer}", tuple(f"{path}.{i}.{c}" for c in consumers.split()))
        for i in range(2)
        for kind, producer, consumers in block
    ]
    assert found == wanted


@pytest.mark.parametrize("name", SCALED)
def test_random_scales_leave_the_logits(name):
    model, batch = make(name), one_batch(name)
    before, generator = logits(model, batch), np.random.default_rng(3)
    plan = find_folds(model, batch)
    weights = snapshot(model)
    for fold in plan.folds:
        apply_fold(model, fold, random_scales(fold, generator))
    assert change(logits(model, batch), before) <= 1e-4
    changed = {
        k.rpartition(".")[0] for k, v in model.state_dict().items() if (v != weights[k]).any()
    }
    assert changed == {n for f in plan.folds for n in (f.producer, *f.consumers)}


@pytest.mark.parametrize("name", ["stories260k", "babyllama105", "nanosort_gpt2"])
def test_random_scales_leave_the_logits_of_real_models(name):
    if not (SHARED / name).exists():
        pytest.skip("../shared/data is not here")
    model = transformers.AutoModelForCausalLM.from_pretrained(SHARED / name, dtype=torch.float32)
    ids = torch.arange(11)[None] % 3 if "sort" in name else torch.arange(3, 51).reshape(2, 24)
    batch, generator = {"input_ids": ids}, np.random.default_rng(0)
    before = logits(model, batch)
    plan = find_folds(model, batch)
    kinds = [f.kind for f in plan.folds]
    gated = "sort" not in name
    each = ["norm", "value", "norm", "up"] if gated else ["norm", "value", "norm"]
    assert kinds == each * len(model.model.layers if gated else model.transformer.h)
    for fold in plan.folds:
        apply_fold(model, fold, random_scales(fold, generator))
    assert change(logits(model, batch), before) <= 1e-4


@pytest.mark.parametrize("kind", ["norm", "value", "up", "relu"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "gpt_neox", "phi3", "falcon", "opt"])
def test_one_wrong_channel_shows(name, kind):
    """The tests above would notice a fold that is off by two channels."""
    model, batch = make(name), one_batch(name)
    folds = [f for f in plan_of(model, name).folds if f.kind == kind]
    if kind not in [k for k, _, _ in EXPECTED[name][1]]:
        assert not folds
        return
    before = logits(model, batch)
    channel_of = folds[0].channel_of.copy()
    channel_of[[0, 1]] = channel_of[[1, 0]]
    wrong = Fold(kind, folds[0].producer, folds[0].consumers, channel_of, folds[0].rows)
    apply_fold(model, wrong, random_scales(wrong, np.random.default_rng(3)))
    assert change(logits(model, batch), before) > 1e-3


@pytest.mark.parametrize("name", SCALED)
def test_finding_changes_nothing(name):
    model = make(name).train()
    before, state = snapshot(model), torch.get_rng_state()
    plan_of(model, name)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    for module in model.modules():
        assert module.training
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_groups_of_heads_share_a_channel():
    fold = next(f for f in plan_of(make("llama")).folds if f.kind == "value")
    heads = fold.channel_of.reshape(4, 8)
    assert fold.channels == 16
    assert np.array_equal(heads, np.repeat(np.arange(16).reshape(2, 8), 2, axis=0))


def test_rows_of_fused_layers():
    rows = {
        n: next(f for f in plan_of(make(n), n).folds if f.kind == "value").rows
        for n in ("gpt2", "bloom", "gpt_neox", "phi3", "falcon")
    }
    interleaved = (np.arange(4)[:, None] * 24 + 16 + np.arange(8)).reshape(-1)
    assert np.array_equal(rows["gpt2"], np.arange(64, 96))
    assert np.array_equal(rows["bloom"], interleaved)
    assert np.array_equal(rows["gpt_neox"], interleaved)
    assert np.array_equal(rows["phi3"], np.arange(48, 64))
    assert np.array_equal(rows["falcon"], np.arange(40, 48))
    up = next(f for f in plan_of(make("phi3"), "phi3").folds if f.kind == "up")
    assert np.array_equal(up.rows, np.arange(64, 128))


def test_layouts_without_hints_reach_every_head_size():
    wanted = (np.arange(4)[:, None] * 24 + 16 + np.arange(8)).reshape(-1)
    assert any(np.array_equal(wanted, r) for r in row_layouts(96, 32, []))
    assert any(
        np.array_equal(np.repeat(np.arange(16).reshape(2, 8), 2, axis=0).reshape(-1), c)
        for c in channel_layouts(16, 32, [])
    )
    assert list(row_layouts(33, 32, [])) == [] and list(row_layouts(20, 32, [])) == []


REASONS = {
    "gpt2": ("transformer.h.0.mlp.c_proj", "NewGELUActivation"),
    "bloom": ("transformer.h.1.mlp.dense_4h_to_h", "BloomGelu"),
    "gpt_neox": ("gpt_neox.layers.0.mlp.dense_4h_to_h", "GELUActivation"),
    "bloom-post": ("transformer.h.0.mlp.dense_h_to_4h", "a residual"),
    "opt-post": ("model.decoder.layers.0.fc1", "a residual"),
    "opt-plain-norm": ("model.decoder.layers.0.fc1", "has no gain"),
    "bert": ("bert.encoder.layer.0.intermediate.dense", "a residual"),
}


@pytest.mark.parametrize("name", REASONS)
def test_what_cannot_fold_is_named_with_the_reason(name):
    layers, reason = REASONS[name]
    plan = plan_of(make(name), name)
    assert reason in plan.left_alone[layers]
    assert layers in plan.table() and plan.folds[0].producer in str(plan)
    folded = {c for f in plan.folds for c in f.consumers}
    assert not folded & {c for k in plan.left_alone for c in k.split(", ")}


def test_block_input_is_named():
    plan = plan_of(make("opt-post"), "opt-post")
    first = next(k for k in plan.left_alone if "0.self_attn.q_proj" in k)
    assert "block's own input" in plan.left_alone[first]


def test_tied_and_reused_layers_are_left_alone():
    model = make("llama")
    layers = model.model.layers
    layers[1].mlp.down_proj.weight = layers[0].mlp.down_proj.weight
    layers[1].post_attention_layernorm = layers[0].post_attention_layernorm
    plan = plan_of(model)
    shared = [k for k, v in plan.left_alone.items() if "shares its parameters" in v]
    assert [k.partition("layers.")[2] for k in shared] == [
        "0.mlp.gate_proj, model.layers.0.mlp.up_proj",
        "0.mlp.down_proj",
        "1.mlp.gate_proj, model.layers.1.mlp.up_proj",
        "1.mlp.down_proj",
    ]
    twice = make("llama")
    twice.model.layers[1] = twice.model.layers[0]
    plan = plan_of(twice)
    assert not plan.folds and all("shares" in v or "2 times" in v for v in plan.left_alone.values())


class _KeepsUp(nn.Module):
    """A gated MLP that keeps what its up projection returned."""

    def __init__(self, mlp, seen):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.seen = seen

    def forward(self, x):
        up = self.up_proj(x)
        self.seen[:] = [up]
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * up)


class _Side(nn.Module):
    """Adds to a model's output what a layer deep inside returned: no block shows that."""

    def __init__(self, model):
        super().__init__()
        self.inner, self.config, self.seen = model, model.config, []
        model.model.layers[1].mlp = _KeepsUp(model.model.layers[1].mlp, self.seen)

    def forward(self, input_ids, use_cache=False):
        logits = self.inner(input_ids=input_ids, use_cache=use_cache).logits
        return {"logits": logits + self.seen[0].sum()}


def test_a_reader_outside_the_block_is_found():
    plan = plan_of(_Side(make("llama")))
    name = "inner.model.layers.1.mlp.down_proj"
    assert "outside its block" in plan.left_alone[name]
    # The columns of up_proj may be scaled all the same: what it returns does not change.
    assert len(plan.folds) == 7 and all(name not in f.consumers for f in plan.folds)


def test_gains_stored_less_one():
    for name in ("gemma", "gemma2"):
        folds = [f for f in plan_of(make(name), name).folds if f.kind == "norm"]
        assert [f.offset for f in folds] == [1.0] * 4
    assert {f.offset for f in plan_of(make("llama")).folds} == {0.0}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    for name in ("llama", "opt", "gpt_neox"):
        model, batch = make(name, dtype), one_batch()
        plan = find_folds(model, batch)
        found = [(f.kind, f.producer, f.consumers) for f in plan.folds]
        assert found == [(f.kind, f.producer, f.consumers) for f in plan_of(make(name)).folds]
        before = logits(model, batch)
        for fold in plan.folds:
            apply_fold(model, fold, 2.0 ** np.random.default_rng(0).integers(-3, 4, fold.channels))
        assert change(logits(model, batch), before) <= (1e-12 if dtype == torch.float64 else 1e-3)
        assert all(p.dtype == dtype for p in model.parameters())


def test_dead_gains_and_units():
    """A gain of exactly 0 stays 0; units that never fire leave the pattern to the others."""
    model, batch = make("opt"), one_batch()
    layer = model.model.decoder.layers[0]
    with torch.no_grad():
        layer.final_layer_norm.weight[3] = 0
        layer.final_layer_norm.bias[3] = 0
        layer.fc1.bias[:40] = -1e4
    before = logits(model, batch)
    plan = find_folds(model, batch)
    assert [f.kind for f in plan.folds] == ["norm", "value", "norm", "relu"] * 2
    for fold in plan.folds:
        apply_fold(model, fold, random_scales(fold, np.random.default_rng(1)))
    assert layer.final_layer_norm.weight[3] == 0 and layer.final_layer_norm.bias[3] == 0
    assert change(logits(model, batch), before) <= 1e-4
    gemma = make("gemma")
    with torch.no_grad():
        gemma.model.layers[0].input_layernorm.weight[5] = -1
    fold = plan_of(gemma).folds[0]
    apply_fold(gemma, fold, np.full(fold.channels, 3.0))
    assert gemma.model.layers[0].input_layernorm.weight[5] == -1


def test_scales_are_checked():
    model = make("llama")
    fold = plan_of(model).folds[1]
    before = snapshot(model)
    bad = np.ones(16)
    for scales, text in (
        (np.ones(32), r"shape \(16,\)"),
        (np.zeros(16), "above 0"),
        (np.where(bad, np.nan, 0), "finite"),
        (-bad, "above 0"),
    ):
        with pytest.raises(ValueError, match=text):
            apply_fold(model, fold, scales)
    half = make("llama", torch.float16)
    with pytest.raises(ValueError, match=r"v_proj.*range of torch.float16"):
        apply_fold(half, fold, np.full(16, 1e-7))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with torch.device("meta"):
        empty = make("llama")
    with pytest.raises(UnsupportedModuleError, match="meta"):
        apply_fold(empty, fold, bad)


def test_one_token_is_refused():
    with pytest.raises(CalibrationError, match="at least 2"):
        find_folds(make("llama"), {"input_ids": tokens(1, 1)})


def test_ctrl_c_waits_for_the_whole_fold(monkeypatch):
    model, batch = make("llama"), one_batch()
    fold, before = plan_of(model).folds[0], logits(model, batch)
    weights = snapshot(model)
    original = fold_module._folded

    def folded(*args):
        for i, (name, parameter, values) in enumerate(original(*args)):
            if i == 2:  # a tensor whose copying is interrupted
                values = values.as_subclass(_Interrupts)
            yield name, parameter, values

    monkeypatch.setattr(fold_module, "_folded", folded)
    with pytest.raises(KeyboardInterrupt):
        apply_fold(model, fold, random_scales(fold, np.random.default_rng(0)))
    changed = [k for k, v in model.state_dict().items() if not torch.equal(v, weights[k])]
    assert len(changed) == 4, "the norm and its three readers"
    assert change(logits(model, batch), before) <= 1e-4
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_in_a_proof_restores_the_parameters(monkeypatch):
    model = make("llama")
    before, calls = snapshot(model), []

    def fold(*args):
        apply_fold(*args)
        calls.append(1)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(proof, "apply_fold", fold)
    with pytest.raises(KeyboardInterrupt):
        plan_of(model)
    assert calls and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_ctrl_c_in_the_restoring_waits(monkeypatch):
    model = make("llama")
    before, ran = snapshot(model), []
    run_block, copy_ = proof.run_block, torch.Tensor.copy_

    def run(*args):
        ran.append(any(not torch.equal(v, before[k]) for k, v in model.state_dict().items()))
        return run_block(*args)

    def copy(target, values):
        if ran and ran[-1]:  # the run with scaled parameters is over
            ran.append(False)
            os.kill(os.getpid(), signal.SIGINT)
        return copy_(target, values)

    monkeypatch.setattr(proof, "run_block", run)
    monkeypatch.setattr(torch.Tensor, "copy_", copy)
    with pytest.raises(KeyboardInterrupt):
        plan_of(model)
    assert True in ran
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class _Twice(nn.Module):
    """A gated MLP whose one norm runs twice."""

    def __init__(self, mlp, norm):
        super().__init__()
        self.norm, self.mlp = norm, mlp

    def forward(self, x):
        return self.mlp(self.norm(self.norm(x)))


def test_a_norm_that_runs_twice():
    model = make("llama")
    layer = model.model.layers[0]
    layer.mlp = _Twice(layer.mlp, layer.post_attention_layernorm)
    layer.post_attention_layernorm = nn.Identity()
    plan = plan_of(model)
    name = "model.layers.0.mlp.mlp.gate_proj, model.layers.0.mlp.mlp.up_proj"
    assert "more than once" in plan.left_alone[name] and len(plan.folds) == 7


class _Interrupts(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.Tensor.copy_:
            os.kill(os.getpid(), signal.SIGINT)
        return super().__torch_function__(func, types, args, kwargs or {})


def test_only_one_factor_per_channel_is_proportional():
    old = torch.tensor([[1.0, 2.0, 0.0, 4.0], [-0.5, 4.0, 0.0, 1.0]])
    found = _exponents(old * torch.tensor([0.5, 4.0, 8.0, 1.0]), old, 1e-5)
    np.testing.assert_array_equal(found, [-1, 2, np.nan, 0])
    for place in ((1, 0), (0, 1), (1, 2)):
        new = old.clone()
        new[place] += 0.25
        assert _exponents(new, old, 1e-5) is None
    assert _exponents(-old, old, 1e-5) is None
    assert _exponents(old * torch.nan, old, 1e-5) is None
    assert _exponents(old[:1], old, 1e-5) is None


def test_spread_and_gather_are_inverse():
    fold = next(f for f in plan_of(make("llama")).folds if f.kind == "value")
    scales = np.arange(1.0, 17.0)
    assert np.array_equal(fold.gather(fold.spread(scales)), scales)
    assert copy.deepcopy(fold).channels == 16
