"""What changes of weights cost the model, estimated by one backward pass."""

import pytest
import torch
import torch.nn.functional as F
from helpers.driver_models import build

from ptqkit.hf.models.structure import find_structure
from ptqkit.nn.rounding_loss import rounding_losses
from ptqkit.recipe import Recipe


def _case(name="llama", rows=4):
    model = build(name)
    structure = find_structure(model, Recipe(group_size=None))
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 64, (rows, 16), generator=generator)
    changes = {
        n: 0.01 * torch.randn(t.view.shape, generator=generator)
        for n, t in structure.targets.items()
    }
    layers = {n: t.module for n, t in structure.targets.items()}
    return model, layers, [model.get_submodule(b) for b in structure.blocks], ids, changes


def _losses(case, mask=None, **options):
    model, layers, blocks, ids, changes = case
    batch = {"input_ids": ids}
    if mask is not None:
        batch["attention_mask"] = mask.long()
    return rounding_losses(
        model, layers, blocks, [batch], [mask], lambda n: {3: changes[n]}, **options
    )


@pytest.mark.parametrize("name", ["llama", "opt", "falcon", "bert"])
def test_equals_gradients_without_running_blocks_again(name):
    case = _case(name)
    model, layers, _, ids, changes = case
    found = _losses(case)
    inputs, outputs = {}, {}
    handles = []
    for n, layer in layers.items():

        def keep(module, args, output, n=n):
            output = output.clone()  # some models add to it in place
            output.retain_grad()
            inputs[n], outputs[n] = args[0].detach().clone(), output
            return output.clone()

        handles.append(layer.register_forward_hook(keep))
    logits = model.eval()(ids).logits.flatten(0, 1)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
    F.cross_entropy(logits, drawn, reduction="sum").backward()
    for handle in handles:
        handle.remove()
    for n, change in changes.items():
        moved = (inputs[n].reshape(-1, change.shape[1]) @ change.T).double()
        gradient = outputs[n].grad.reshape(-1, change.shape[0]).double()
        expected = float((gradient * moved).square().sum()) / 2 / ids.numel()
        assert found[n][3] == pytest.approx(expected, rel=2e-5), n


def test_predicts_the_divergence_of_small_random_changes():
    case = _case(rows=64)
    model, layers, _, ids, changes = case
    found = _losses(case)
    with torch.no_grad():
        before = F.log_softmax(model(ids).logits.double(), -1)
        for n, layer in layers.items():
            kept = layer.weight.clone()
            layer.weight += changes[n]
            after = F.log_softmax(model(ids).logits.double(), -1)
            layer.weight.copy_(kept)
            divergence = float((before.exp() * (before - after)).sum()) / ids.numel()
            # Of the Fisher information the diagonal alone; attention adds up errors of tokens.
            assert 0.45 < found[n][3] / divergence < 2, n


def test_leaves_the_model_as_it_was():
    case = _case("gpt2")
    model = case[0].train()
    model.get_submodule("transformer.wpe").weight.requires_grad_(False)
    before = {n: (p.requires_grad, p.detach().clone()) for n, p in model.named_parameters()}
    _losses(case)
    for n, p in model.named_parameters():
        assert p.requires_grad == before[n][0] and torch.equal(p, before[n][1]) and p.grad is None
    assert model.training and not any("forward" in m.__dict__ for m in model.modules())
    assert not any(m._forward_hooks for m in model.modules())


def test_padding_counts_nothing():
    model, layers, blocks, ids, changes = _case()
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, 10:] = False
    padded = _losses((model, layers, blocks, ids, changes), mask)
    alone = _losses((model, layers, blocks, ids[:, :10], changes), mask[:, :10])
    for n in layers:
        assert padded[n][3] == pytest.approx(alone[n][3], rel=1e-4)


def test_without_logits_the_squared_error_of_the_outputs():
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2, bias=False)
    rows, change = torch.randn(5, 3), torch.randn(2, 3)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x)

    found = rounding_losses(
        Model(), {"layer": layer}, [], [{"x": rows}], [None], lambda n: {2: change}
    )
    # The signs of the gradients do not matter where an output is the layer's own.
    assert found["layer"][2] == pytest.approx(float((rows @ change.T).square().sum()) / 2 / 5)
