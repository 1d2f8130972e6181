"""Row coupling in whole models: what is measured, and what is done with it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.driver_models import build, padded_batches, tokens

from ptqkit.errors import UsageError
from ptqkit.hf import quantize
from ptqkit.hf.models.structure import find_structure
from ptqkit.hf.quantization import row_coupling
from ptqkit.hf.quantization.plan import Plan
from ptqkit.nn.module_driver import quantize_module
from ptqkit.nn.output_moments import OutputMoments, output_moments
from ptqkit.recipe.recipe import Recipe

OPTIONS = {"bits": 3, "group_size": 16, "progress": False}


def by_autograd(model, names, ids):
    """Gradients at the outputs of layers, without running blocks again."""
    found, handles = {}, []
    for name in names:

        def keep(module, args, output, name=name):
            output = output.clone()  # some models add to it in place
            output.retain_grad()
            found[name] = output
            return output.clone()

        handles.append(model.get_submodule(name).register_forward_hook(keep))
    logits = model.eval()(ids).logits.flatten(0, 1)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
    F.cross_entropy(logits, drawn, reduction="sum").backward()
    for handle in handles:
        handle.remove()
    return {n: v.grad.reshape(-1, v.shape[-1]).double().numpy() for n, v in found.items()}


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_moments_are_those_of_plain_gradients(name, monkeypatch):
    monkeypatch.setattr("ptqkit.nn.output_moments.MOST_ROWS", 40)
    model = build(name)
    structure = find_structure(model, Recipe(group_size=None))
    layers = {n: t.module for n, t in structure.targets.items()}
    ends = ("q_proj", "k_proj", "v_proj")
    first = [n for n in layers if ".0." in n and n.endswith(ends)]
    groups = [{n: layers[n] for n in first}, *({n: m} for n, m in layers.items() if n not in first)]
    ids = torch.randint(3, 64, (2, 16), generator=torch.Generator().manual_seed(5))
    blocks = [model.get_submodule(b) for b in structure.blocks]
    found = output_moments(model, groups, blocks, [{"input_ids": ids}], [None])
    gradients = by_autograd(model, layers, ids)
    for group in groups:
        g = np.concatenate([gradients[n] for n in group], axis=1)
        whole = g.T @ g
        done = 0
        for rows, moments in found.parts(list(group)):
            assert rows.start == done and len(moments) <= 40
            done = rows.stop
            np.testing.assert_allclose(
                moments, whole[rows, rows], rtol=2e-3, atol=1e-5 * np.abs(whole).max()
            )
        assert done == len(whole)


def test_parts_of_a_group_are_cut_out_of_it():
    rng = np.random.default_rng(0)
    runs = [rng.normal(size=(n, n)) for n in (5, 4)]
    found = OutputMoments({("a", "b"): runs}, {"a": 3, "b": 6})
    parts = list(found.parts(["b", "c"]))
    assert [rows for rows, _ in parts] == [slice(0, 2), slice(2, 6)]
    np.testing.assert_array_equal(parts[0][1], runs[0][3:, 3:])
    np.testing.assert_array_equal(parts[1][1], runs[1])
    assert [rows for rows, _ in found.parts(["a", "b"])] == [slice(0, 5), slice(5, 9)]


class Told:
    """Two processes in turn: what the first one tells is kept for the second."""

    def __init__(self):
        self.rank, self.value, self.sent = 0, None, []

    def first(self, value):
        if not self.rank:
            self.value = value
        return self.value

    def broadcast(self, values):
        if not self.rank:
            self.sent.append(values.clone())
        else:
            values.copy_(self.sent.pop(0))


def test_processes_take_what_the_first_has_measured():
    draw = np.random.default_rng(0)

    def measured(seed):
        runs = [draw.normal(size=(n, n)).astype(np.float32) for n in (5, 3)]
        return OutputMoments({("q", "k"): runs, ("v",): [runs[1] + seed]}, {"q": 5, "k": 3, "v": 3})

    own, other, told = measured(0), measured(1), Told()
    for rank, mine in enumerate((own, other)):
        told.rank = rank
        found = row_coupling.outputs_of_first(mine, told)
        assert found.sizes == own.sizes and list(found.groups) == list(own.groups)
        for group, runs in own.groups.items():
            assert all(map(np.array_equal, found.groups[group], runs))


def test_first_layers_are_coupled_as_by_hand(monkeypatch):
    seen = {}
    own = row_coupling.couple_rows

    def couple(weight, matrix, H, B, **options):
        found = own(weight, matrix, H, B, **options)
        seen[options["name"]] = (weight, matrix, np.array(H.matrix), B, found)
        return found

    monkeypatch.setattr(row_coupling, "couple_rows", couple)
    coupled = quantize(build(), "quality", padded_batches(), row_coupling=2, **OPTIONS)
    plain = quantize(build(), "quality", padded_batches(), **OPTIONS)
    names = [f"model.layers.0.self_attn.{end}_proj" for end in "qkv"]
    weight, before, H, B, after = seen[", ".join(names)]
    start = 0
    for name in names:
        stop = start + len(plain.matrices[name].codes)
        np.testing.assert_array_equal(before.codes[start:stop], plain.matrices[name].codes)
        np.testing.assert_array_equal(after.codes[start:stop], coupled.matrices[name].codes)
        start = stop
    E, E0 = (weight - m.dequantize() for m in (after, before))
    assert ((B @ E @ H) * E).sum() < 0.97 * ((B @ E0 @ H) * E0).sum()
    row = next(r for r in coupled.report.quantized if r.name == names[0])
    assert row.objective == pytest.approx(coupled.matrices[names[0]].objective)
    assert coupled.report.seconds["row_coupling"] > 0
    assert "row_coupling" not in plain.report.seconds


def test_blocks_run_again_only_if_much_would_be_kept(monkeypatch):
    own, again = row_coupling.output_moments, []

    def measured(model, groups, blocks, *rest):
        again.append(len(blocks))
        return own(model, groups, blocks, *rest)

    monkeypatch.setattr(row_coupling, "output_moments", measured)
    found = []
    for kept, room in ((1 << 30, 0), (0, 0), (0, 1 << 30)):
        monkeypatch.setattr(row_coupling, "_KEPT", kept)
        monkeypatch.setattr(Plan, "expected", room)
        result = quantize(build(), "quality", padded_batches(), row_coupling=2, **OPTIONS)
        found.append({n: m.codes for n, m in result.matrices.items()})
    assert again == [0, 2, 0]
    for name, codes in found[0].items():
        for other in found[1:]:
            np.testing.assert_array_equal(codes, other[name])


def test_an_override_names_the_layers():
    only = {"*.layers.1.mlp.down_proj": {"row_coupling": 3}}
    found = quantize(build(), "quality", tokens(4), overrides=only, **OPTIONS)
    plain = quantize(build(), "quality", tokens(4), **OPTIONS)
    changed = [n for n, m in found.matrices.items() if (m.codes != plain.matrices[n].codes).any()]
    assert changed == ["model.layers.1.mlp.down_proj"]


def test_best_couples_and_its_model_is_nearer_to_float():
    ids = tokens(32)
    losses = {}
    for passes in (0, None):
        model, floats = build(), build()
        extra = {} if passes is None else {"row_coupling": passes}
        result = quantize(model, "best", ids, **OPTIONS, **extra)
        assert (result.recipe.row_coupling > 0) == (passes is None)
        with torch.no_grad():
            p, q = (m(ids).logits.log_softmax(-1) for m in (floats, model))
        losses[passes] = float((p.exp() * (p - q)).sum())
    assert losses[None] < losses[0]


def test_a_caller_in_inference_mode_gets_the_same_codes():
    options = {**OPTIONS, "row_coupling": 1}
    plain = quantize(build(), "quality", tokens(4), **options)
    model, ids = build(), tokens(4)
    with torch.inference_mode():
        found = quantize(model, "quality", ids, **options)
    for name, matrix in plain.matrices.items():
        np.testing.assert_array_equal(matrix.codes, found.matrices[name].codes)


def test_where_it_cannot_be_is_told():
    with pytest.raises(ValueError, match="row_coupling=3 needs method 'gptq'"):
        Recipe.preset("rtn", row_coupling=3)
    with pytest.raises(ValueError, match="row_coupling must be"):
        Recipe(row_coupling=-1)
    layers = torch.nn.Sequential(torch.nn.Linear(32, 32))
    with pytest.raises(UsageError, match="leave row_coupling out"):
        quantize_module(layers, torch.zeros(4, 32), row_coupling=1)
