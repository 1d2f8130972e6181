"""Which layers write into a residual stream, and which blocks cannot be told."""

from __future__ import annotations

import pytest
import torch
from helpers.driver_models import ARCHITECTURES, build, padded_batches
from helpers.schedule_models import count_hooks, plain
from torch import nn

from ptqkit.hf.models.stream import find_writers
from ptqkit.hf.models.structure import find_blocks

BRANCHES = {
    "llama": ("self_attn.o_proj", "mlp.down_proj"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "bloom": ("self_attention.dense", "mlp.dense_4h_to_h"),
    "opt": ("self_attn.out_proj", "fc2"),
    "t5": ("layer.0.SelfAttention.o", "layer.1.DenseReluDense.wo"),
}
for _like in ("mistral", "qwen2", "qwen3", "gemma", "phi3"):
    BRANCHES[_like] = BRANCHES["llama"]
KNOWN = frozenset(ARCHITECTURES)  # other tests add variants while they run
UNTOLD = {"gemma2", "gpt_neox", "falcon", "bert", "roberta"}  # norms after a branch, or in parallel


def writers_of(model, batch):
    names = [name for names in find_blocks(model).values() for name in names]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = find_writers(model, {n: model.get_submodule(n) for n in names}, batch)
    assert count_hooks(model) == 0
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert {*found.writers, *found.unproven} == set(names)
    return found


def test_every_architecture_is_expected():
    assert set(BRANCHES) | UNTOLD == KNOWN


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(BRANCHES))
def test_branches_that_are_added_in_turn(name, dtype):
    found = writers_of(build(name).to(dtype), padded_batches(name)[0])
    assert not found.unproven
    for block, names in found.writers.items():
        expected = BRANCHES[name]
        if name == "t5" and block.startswith("decoder"):
            expected = (
                "layer.0.SelfAttention.o",
                "layer.1.EncDecAttention.o",
                "layer.2.DenseReluDense.wo",
            )
        assert names == tuple(f"{block}.{end}" for end in expected)


@pytest.mark.parametrize("name", sorted(UNTOLD))
def test_blocks_that_are_built_otherwise(name):
    found = writers_of(build(name), padded_batches(name)[0])
    assert not found.writers
    assert set(found.unproven.values()) == {
        "its output is not its input plus outputs of its layers in turn"
    }


class Scaled(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind, self.up, self.down = kind, nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        y = self.down(torch.relu(self.up(x)))
        if self.kind == "scaled":
            return x + 0.5 * y
        if self.kind == "in place":
            return x.add_(y)
        if self.kind == "narrower":
            return (x + y)[..., :8]
        return x + y


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("scaled", "not its input plus outputs"),
        ("in place", "changes its input in place"),
        ("narrower", "its output is not like its input"),
        ("plain", None),
    ],
)
def test_what_a_block_does_with_its_branch(kind, why):
    model = plain()
    model.layers[1] = Scaled(kind)
    batch = {"input_ids": torch.arange(12).reshape(2, 6)}
    found = find_writers(model, {f"layers.{i}": model.layers[i] for i in range(2)}, batch)
    assert found.writers["layers.0"] == ("layers.0.down",)
    if why is None:
        assert found.writers["layers.1"] == ("layers.1.down",)
    else:
        assert why in found.unproven["layers.1"] and "layers.1" not in found.writers
    assert count_hooks(model) == 0


def test_hooks_go_after_an_error():
    model = plain()
    model.layers[1].down = nn.Linear(5, 5)
    with pytest.raises(RuntimeError):
        find_writers(
            model,
            {f"layers.{i}": model.layers[i] for i in range(2)},
            {"input_ids": torch.arange(12).reshape(2, 6)},
        )
    assert count_hooks(model) == 0
