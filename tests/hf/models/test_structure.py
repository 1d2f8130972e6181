"""Which linear layers stay float by themselves."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

import ptqkit
from ptqkit.hf.models.structure import FEW_OUTPUTS, find_structure


class Block(nn.Module):
    def __init__(self, experts):
        super().__init__()
        self.wide = nn.Linear(64, FEW_OUTPUTS)
        self.narrow = nn.Linear(64, FEW_OUTPUTS - 1)
        self.shared_expert_gate = nn.Linear(64, 1, bias=False)
        self.router = nn.Linear(64, experts)


def model(experts=128):
    made = nn.Module()
    made.layers = nn.ModuleList(Block(experts) for _ in range(2))
    made.config = SimpleNamespace(num_experts=experts)
    return made


def test_routers_and_gates_stay_float_with_the_reason():
    found = find_structure(model(), ptqkit.Recipe())
    assert sorted(found.targets) == ["layers.0.wide", "layers.1.wide"]
    assert found.skipped["layers.0.shared_expert_gate"].startswith("1 output (fewer than 16)")
    assert found.skipped["layers.0.narrow"].startswith("15 outputs (fewer than 16)")
    assert found.skipped["layers.1.router"].startswith("128 outputs (one per expert)")
    assert not found.problems


def test_include_quantizes_them():
    found = find_structure(model(), ptqkit.Recipe(include=("*.router", "layers.0.narrow")))
    assert {"layers.0.router", "layers.1.router", "layers.0.narrow"} <= found.targets.keys()
    assert "layers.1.narrow" in found.skipped


def test_a_shared_expert_gate_is_in_the_report():
    import transformers as t

    torch.manual_seed(0)
    made = t.Qwen2MoeForCausalLM(
        t.Qwen2MoeConfig(
            vocab_size=96, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2,
            moe_intermediate_size=32, shared_expert_intermediate_size=64,
        )
    )  # fmt: skip
    result = ptqkit.quantize(made, "rtn", group_size=16, overrides={"*.experts": "skip"})
    gate = "model.layers.0.mlp.shared_expert_gate"
    assert gate not in result.matrices
    row = next(r for r in result.report.layers if r.name == gate)
    assert "other readers build routers" in row.status
