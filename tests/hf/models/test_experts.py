"""Experts as linear layers: the same memory, the same results, the names that files have."""

from __future__ import annotations

import pytest
import torch
from helpers.expert_models import MODELS, TOKENS, build, mixtures, projection

from ptqkit.hf.models.experts import ExpertSwap, expert_modules, saved_expert_names
from ptqkit.nn.experts import ExpertLinears, expert_shape, routed_rows
from ptqkit.nn.linear import LinearView


def every(name: str) -> bool:
    return True


@pytest.mark.parametrize("kind", MODELS)
def test_layers_are_views_of_the_parameters(kind):
    model = build(kind)
    fused = mixtures(model)
    with ExpertSwap(model, every) as swap:
        assert swap.modules.keys() == fused.keys() and fused
        assert expert_modules(model).keys() == fused.keys()
        for name, module in swap.modules.items():
            for inside, layer in module.linears():
                expert, which = inside.split(".")
                assert (
                    LinearView(layer).read() == projection(fused[name], int(expert), which)
                ).all()
            layer = module.get_submodule("2.up_proj")
            LinearView(layer).write(LinearView(layer).read() * 0 + 7)
            assert (projection(fused[name], 2, "up_proj") == 7).all()
            assert not (projection(fused[name], 2, "gate_proj") == 7).any()
    assert mixtures(model) == fused and not expert_modules(model)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("kind", MODELS)
def test_results_are_the_same_bit_for_bit(kind, implementation):
    if kind == "llama4" and implementation != "eager":
        pytest.skip("its experts have one implementation")
    model = build(kind, implementation)
    with torch.no_grad():
        wanted = model(TOKENS).logits
        with ExpertSwap(model, every) as swap:
            assert torch.equal(model(TOKENS).logits, wanted)
            for every_token in (False, True):
                with swap.calibrating(every_token):
                    assert (model(TOKENS).logits - wanted).abs().max() < 2e-5
        assert torch.equal(model(TOKENS).logits, wanted)


@pytest.mark.parametrize("kind", ["mixtral", "llama4"])
def test_inputs_say_which_tokens_they_are(kind):
    model = build(kind)
    seen = {}

    def note(module, args):
        seen[module] = args[0], routed_rows(args[0])

    with ExpertSwap(model, every) as swap, torch.no_grad():
        module = next(iter(swap.modules.values()))
        for _, layer in module.linears():
            layer.register_forward_pre_hook(note)
        with swap.calibrating(False):
            module.short.add(1)
            model(TOKENS)
    chosen = 2 if kind == "mixtral" else 1
    firsts = [seen[module.get_submodule(f"{e}.gate_proj")] for e in range(4)]
    assert sum(len(rows.rows) for _, rows in firsts) == chosen * TOKENS.numel()
    for expert, (value, rows) in enumerate(firsts):
        assert len(value) == len(rows.rows) and rows.tokens == TOKENS.numel()
        assert rows.experts == module.name and not rows.everything
        assert len(rows.pool) == len(rows.pool_rows) == TOKENS.numel()
        last, of_last = seen[module.get_submodule(f"{expert}.down_proj")]
        assert torch.equal(of_last.rows, rows.rows) and last.shape == (len(value), 48)
        assert (of_last.pool is not None) == (expert == 1)
    assert routed_rows(TOKENS) is None


def test_names_are_those_of_published_files():
    names = {}
    for kind in MODELS:
        model = build(kind)
        shapes = {n: expert_shape(m) for n, m in mixtures(model).items()}
        found = saved_expert_names(model, shapes)
        assert found.keys() == shapes.keys()
        names[kind] = list(found.values())[-1]
        assert len(names[kind]) in (0, 12)
    gate = "model.layers.1.mlp.experts.3.gate_proj"
    for kind in ("qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3"):
        assert all(saved == name for name, saved in names[kind].items()) and gate in names[kind]
    assert names["mixtral"][gate] == "model.layers.1.block_sparse_moe.experts.3.w1"
    down = "model.layers.1.mlp.experts.0.down_proj"
    assert names["mixtral"][down] == "model.layers.1.block_sparse_moe.experts.0.w2"
    assert names["mixtral"][gate.replace("gate", "up")].endswith(".experts.3.w3")
    # Those are published with all experts in one tensor.
    assert names["gpt_oss"] == names["llama4"] == {}


def test_other_modules_are_no_experts():
    assert expert_shape(torch.nn.Linear(4, 4)) is None
    module = torch.nn.Module()
    module.gate_up_proj = torch.nn.Parameter(torch.zeros(4, 6, 8))
    module.down_proj = torch.nn.Parameter(torch.zeros(4, 8, 3))
    assert expert_shape(module) is None  # its class says nothing about how it uses them
    module.is_concatenated, module.is_transposed = True, False
    assert (expert_shape(module).hidden, expert_shape(module).inner) == (8, 3)
    module.is_transposed = True
    assert expert_shape(module) is None
    with pytest.raises(ValueError, match="Linear has no experts of a known form"):
        ExpertLinears(torch.nn.Linear(4, 4), "x")
