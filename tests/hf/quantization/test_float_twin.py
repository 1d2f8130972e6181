"""The float model next to one that is quantized: what they share, and that replay needs no more."""

from __future__ import annotations

import functools
import gc
import types
import warnings
import weakref

import numpy as np
import pytest
import torch
from helpers import expert_models
from helpers.driver_models import build, padded_batches, tokens
from helpers.failures import broken_activation, fail_target
from helpers.schedule_models import count_hooks, late, plain
from torch import nn

from ptqkit.errors import UnsupportedModuleError
from ptqkit.hf import FloatWeights, quantize
from ptqkit.hf.models.structure import Target, find_structure
from ptqkit.hf.quantization import float_twin as module
from ptqkit.hf.quantization.driver import QuantizationInterrupted
from ptqkit.hf.quantization.float_twin import FloatTwin, twin_bytes
from ptqkit.nn.activations import ActivationQuantizer, install_quantizer, remove_quantizers
from ptqkit.nn.linear import LinearView
from ptqkit.recipe import as_recipe
from ptqkit.recipe.options import ActivationQuantization
from ptqkit.recipe.recipe import Recipe

OPTIONS = {"bits": 3, "group_size": 16, "progress": False}
ERRORS = {"error_propagation": 0.5}


def targets_of(model):
    return find_structure(model, as_recipe("quality")).targets


def spoil(targets):
    with torch.no_grad():
        for target in targets:
            target.view.weight.mul_(0.5).add_(0.1)


def outputs(model, name="llama"):
    with torch.no_grad():
        return [model(**batch)[0] for batch in padded_batches(name)]


def equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "t5"])
def test_modules_are_others_and_parameters_the_same(name):
    model = build(name)
    found = FloatTwin(model, {}).model
    assert [n for n, _ in found.named_modules()] == [n for n, _ in model.named_modules()]
    for one, two in zip(model.modules(), found.modules(), strict=True):
        assert one is not two and type(one) is type(two)
        for table in ("_parameters", "_buffers", "_modules", "_forward_pre_hooks"):
            first, second = getattr(one, table), getattr(two, table)
            assert first is not second and first.keys() == second.keys()
        for key, value in one._parameters.items():
            assert two._parameters[key] is value
        for key, value in one._buffers.items():
            assert two._buffers[key] is value
    assert found.config is model.config
    assert equal(outputs(model, name), outputs(found, name))
    # Hooks that come later are of one model alone.
    found.register_forward_pre_hook(lambda *_: None)
    assert count_hooks(model) == 0 and count_hooks(found) == 1


class Knot(nn.Module):
    """Holds modules in ways that are no submodules."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            self.scripted = torch.jit.script(nn.ReLU())
        self.rest = [self.layer, {"layer": self.layer}]
        self.settings = {"a": [1, 2]}
        self.call = functools.partial(Knot.run, self)
        self.layer.forward = types.MethodType(nn.Linear.forward, self.layer)
        self.layer.register_forward_hook(self.after)
        self.seen = []

    def run(self, x):
        return self.scripted(self.rest[1]["layer"](x))

    def after(self, layer, args, output):
        self.seen = [*self.seen, layer]

    def forward(self, x):
        return self.call(x)


def test_attributes_that_lead_to_modules_lead_to_those_of_the_twin():
    model, x = Knot(), torch.ones(2, 4)
    target = Target("layer", LinearView(model.layer), as_recipe("quality"), None)
    twin = FloatTwin(model, {"layer": target})
    other, expected = twin.model, model(x)
    assert other.rest[0] is other.rest[1]["layer"] is other.layer is not model.layer
    assert other.settings is model.settings and other.scripted is model.scripted
    twin.keep(["layer"])
    spoil([target])
    model.seen = []
    assert torch.equal(other(x), expected) and not torch.equal(model(x), expected)
    assert other.seen[-1] is other.layer and model.seen == [model.layer]


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "t5"])
def test_it_stays_float_and_lets_go(name):
    model, floats = build(name), outputs(build(name), name)
    targets = targets_of(model)
    twin = FloatTwin(model, targets)
    twin.keep(targets)
    copies = [weakref.ref(twin.model.get_submodule(n).weight) for n in targets]
    spoil(targets.values())
    for target in targets.values():
        spec = ActivationQuantization(4, "token")
        install_quantizer(target.module, ActivationQuantizer(spec))
    assert equal(outputs(twin.model, name), floats)
    assert not torch.equal(outputs(model, name)[0], floats[0])
    first = next(iter(targets.values())).block
    twin.let_go(first)
    for key, target in targets.items():
        shared = twin.model.get_submodule(key).weight is target.module.weight
        assert shared == (target.block == first)
    twin.let_go()
    assert all(copy() is None for copy in copies)
    remove_quantizers(model)
    assert equal(outputs(twin.model, name), outputs(model, name))


def test_a_layer_that_moves_is_seen_to_move():
    """As blocks that change places with others: a parameter's data is put elsewhere."""
    model = build()
    twin = FloatTwin(model, targets_of(model))
    for parameter in model.parameters():
        parameter.data = parameter.data * 2
    assert equal(outputs(model), outputs(twin.model))


def test_the_largest_block_counts():
    model = build()
    targets = targets_of(model)
    groups = [[name] for name in targets]
    block = sum(t.view.weight.numel() for n, t in targets.items() if ".layers.0." in n)
    assert twin_bytes(targets, groups) == 4 * block
    assert twin_bytes(targets, groups[:-1]) == 4 * block  # the first one is whole
    assert twin_bytes(targets, []) == 0
    # Layers of later blocks that share an input, and layers of none, stay.
    last = [n for n in targets if n.endswith("layers.1.mlp.down_proj")]
    weight = targets[last[0]].view.weight.numel()
    together = [*groups[:6], [*groups[6], *last], *groups[7:-1]]
    assert twin_bytes(targets, together) == 4 * (block + weight)
    outside = {**targets, "head": Target("head", targets[last[0]].view, Recipe(), None)}
    assert twin_bytes(outside, [["head"], *groups]) == 4 * (block + weight)


def assert_same(one, two):
    assert one.matrices.keys() == two.matrices.keys() and one.matrices
    for name, matrix in one.matrices.items():
        for key in ("codes", "scales", "zero_points", "g_idx", "row_objectives"):
            found = getattr(two.matrices[name], key)
            np.testing.assert_array_equal(getattr(matrix, key), found, err_msg=name)
    state = two.model.state_dict()
    assert one.model.state_dict().keys() == state.keys()
    assert all(torch.equal(v, state[k]) for k, v in one.model.state_dict().items())
    rows = [{r.name: (r.target, r.objective) for r in x.report.quantized} for x in (one, two)]
    assert rows[0] == rows[1]


def both(make, recipe, data, **options):
    one, two = (
        quantize(make(), recipe, data, **{**OPTIONS, **options}, schedule=schedule)
        for schedule in ("one-pass", "replay")
    )
    assert (one.report.schedule, two.report.schedule) == ("one-pass", "replay")
    assert_same(one, two)
    return two


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("best", {}),
        ("quality", ERRORS),
        ("quality", {"residual_propagation": 1.0}),
        ("reference", {"error_propagation": 1.0, "target": "qronos"}),
        ("reference", {"error_propagation": 1.0, "target": "gptaq", "share_inputs": False}),
    ],
)
@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_schedules_agree_bit_for_bit(name, recipe, options):
    found = both(lambda: build(name), recipe, padded_batches(name), **options)
    assert any(row.target for row in found.report.quantized)


@pytest.mark.parametrize("name", ["qwen2", "falcon", "bert", "t5", "gemma2"])
def test_schedules_agree_on_others(name):
    """Tied embeddings, parallel branches, two stacks, norms behind the branches."""
    both(lambda: build(name), "best", padded_batches(name))


def test_schedules_agree_in_half_precision_and_on_skipped_layers():
    overrides = {"*.layers.0.mlp.up_proj": "skip", "*.k_proj": {"bits": 4}}
    both(lambda: build().bfloat16(), "best", padded_batches(), overrides=overrides)


@pytest.mark.parametrize(
    ("kind", "every"), [("mixtral", False), ("mixtral", True), ("qwen3_moe", True)]
)
def test_schedules_agree_on_experts(kind, every):
    options = {"group_size": 8, "calibrate_all_experts": every, **ERRORS}
    found = both(lambda: expert_models.build(kind), "quality", expert_models.batches(2), **options)
    targets = {r.name: r.target for r in found.report.quantized if ".experts." in r.name}
    assert targets and all(bool(target) == every for target in targets.values())


@pytest.fixture
def copies(monkeypatch):
    """Weak references to all copies, and how many bytes of them there were at once."""
    found = types.SimpleNamespace(refs=[], most=0)
    own = FloatTwin.keep

    def keep(self, names):
        names = list(names)
        own(self, names)
        found.refs += [weakref.ref(self.model.get_submodule(n).weight) for n in names]
        alive = [c for ref in found.refs if (c := ref()) is not None]
        found.most = max(found.most, sum(c.numel() * c.element_size() for c in alive))

    monkeypatch.setattr(FloatTwin, "keep", keep)
    return found


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_only_one_blocks_copies_are_there_at_once(name, copies, monkeypatch):
    promised = []
    own = module.twin_bytes
    monkeypatch.setattr(
        "ptqkit.hf.quantization.plan.twin_bytes",
        lambda *rest: promised.append(own(*rest)) or promised[-1],
    )
    model = build(name)
    before = [weakref.ref(p) for p in model.parameters()]
    layers = len(targets_of(model))
    gc.collect()
    gc.disable()
    try:
        result = quantize(model, "best", padded_batches(name), **OPTIONS, schedule="replay")
        assert len(copies.refs) == layers and all(ref() is None for ref in copies.refs)
    finally:
        gc.enable()
    assert copies.most == promised[0]
    # The model holds its own parameters, and nothing else holds them.
    assert [ref() for ref in before] == list(model.parameters())
    assert count_hooks(model) == 0 and not any("forward" in m.__dict__ for m in model.modules())
    modules = [weakref.ref(m) for m in model.modules()]
    del result, model
    gc.collect()
    assert all(ref() is None for ref in modules) and all(ref() is None for ref in before)


@pytest.mark.parametrize("kind", [FloatingPointError, KeyboardInterrupt])
@pytest.mark.parametrize("call", [3, 4, 9, 10, 14])
def test_an_error_in_the_middle_leaves_what_was_written(call, kind, copies):
    """Calls 3, 5, 7 are of the float path up to a layer, 9, 11, 13 of it to the block's end."""
    data, options = padded_batches(), {**OPTIONS, "row_coupling": 0}
    finished = quantize(build(), "best", data, **options).model.state_dict()
    model = build()
    model.train()
    with broken_activation(model.model.layers[0].mlp, call, kind) as calls:
        with pytest.raises(kind) as error:
            quantize(model, "best", data, **options, schedule="replay")
    if kind is KeyboardInterrupt:
        assert isinstance(error.value, QuantizationInterrupted)
        assert len(error.value.quantized) == (6 if call < 9 else 7)
    assert calls[0] == call and count_hooks(model) == 0
    assert model.training and torch.is_grad_enabled() and model.config.use_cache is True
    assert not any("forward" in m.__dict__ for m in model.modules())
    floats, written = build().state_dict(), set()
    for key, value in model.state_dict().items():
        if torch.equal(value, finished[key]) and not torch.equal(value, floats[key]):
            written.add(key.removesuffix(".weight"))
        else:
            assert torch.equal(value, floats[key]), key
    if kind is KeyboardInterrupt:
        assert written == set(error.value.quantized)
    assert all(ref() is None for ref in copies.refs)


def test_a_layer_that_fails_stays_float_in_both(monkeypatch):
    fail_target(monkeypatch, "layers.0.mlp.down_proj")
    result = both(build, "quality", padded_batches(), on_error="leave_float", **ERRORS)
    assert [r.name for r in result.report.failed] == ["model.layers.0.mlp.down_proj"]


def test_float_weights_can_be_put_back():
    model = build()
    with FloatWeights(model):
        quantize(model, "best", padded_batches(), **OPTIONS, schedule="replay")
    assert all(torch.equal(v, build().state_dict()[k]) for k, v in model.state_dict().items())


def test_a_block_that_calls_the_first_models_layer_is_refused():
    """A function of its own, which nobody can look into, would give the quantized outputs."""
    model = plain()
    layer = model.layers[1].up
    model.layers[1].forward = lambda x: x + model.layers[1].down(torch.relu(layer(x)))
    with pytest.raises(UnsupportedModuleError, match=r"layers\.1\.up: .* did not come to this"):
        quantize(model, "quality", tokens(), **OPTIONS, **ERRORS, schedule="replay")


def test_one_pass_that_stops_at_once_is_replayed_and_later_is_refused():
    model, other = late(), late()
    with pytest.raises(UnsupportedModuleError, match=r"layers\.1\.up runs ins.*schedule='replay'"):
        quantize(model, "quality", tokens(), **OPTIONS, **ERRORS)
    assert count_hooks(model) == 0 and not torch.is_autocast_enabled("cpu")
    assert torch.equal(model.layers[1].up.weight, other.layers[1].up.weight)
    assert not torch.equal(model.layers[0].down.weight, other.layers[0].down.weight)
    replayed = quantize(other, "quality", tokens(), **OPTIONS, **ERRORS, schedule="replay")
    early = late()
    early.layers = nn.ModuleList([early.layers[1], early.layers[0]])
    early.forward = types.MethodType(_first_long, early)
    found = quantize(early, "quality", tokens(), **OPTIONS, **ERRORS)
    assert found.report.schedule == "one-pass, then replay"
    assert len(found.matrices) == len(replayed.matrices) == 6


def _first_long(self, input_ids):
    x = self.embedding(input_ids)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=input_ids.shape[1] > 16):
        x = self.layers[0](x)
    return self.layers[1](x)
