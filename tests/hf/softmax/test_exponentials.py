"""Language models whose softmax is rounded before it is normalised: install, save, table."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
import transformers

import ptqkit
from ptqkit.hf.data.calibration import prepare_calibration
from ptqkit.hf.evaluation.likelihood import PerplexityResult, perplexity
from ptqkit.hf.evaluation.paired import perplexity_difference
from ptqkit.hf.models.attention import attention_hooks, find_attention
from ptqkit.hf.softmax.driver import SoftmaxCalibration, load_softmax, quantize_softmax
from ptqkit.hf.softmax.files import save_softmax
from ptqkit.hf.softmax.table import softmax_table
from ptqkit.nn.attention import AttentionHook
from ptqkit.nn.softmax.compare import softmax_hooks
from ptqkit.nn.softmax.file import SOFTMAX_FILE
from ptqkit.nn.softmax.variants import LANGUAGE_MODEL_VARIANTS


def build(kind="llama"):
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }
    if kind == "llama":
        config = transformers.LlamaConfig(
            **sizes, intermediate_size=48, num_key_value_heads=2, initializer_range=0.3
        )
        make = transformers.LlamaForCausalLM
    else:
        config = transformers.OPTConfig(
            **sizes, ffn_dim=48, word_embed_proj_dim=32, init_std=0.3, bos_token_id=2
        )
        make = transformers.OPTForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return make(config).eval()


def tokens(rows, length=32, seed=0):
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize(
    ("kind", "of"), [("llama", "exponentials"), ("opt", "exponentials"), ("llama", "squares")]
)
@pytest.mark.parametrize("correction", [None, "row_sum", "code_sum"])
def test_no_token_sees_a_later_one_and_files_give_it_back(tmp_path, kind, of, correction):
    model, ids = build(kind), tokens(2)
    plain = logits(model, ids)
    result = quantize_softmax(model, bits=3, correction=correction, grid_of=of)
    found = logits(model, ids)
    assert not torch.equal(found, plain) and result.report is None
    changed = ids.clone()
    changed[:, 20:] = tokens(2, 12, seed=9)
    assert torch.equal(logits(model, changed)[:, :20], found[:, :20])
    result.save(tmp_path / "m")
    values = json.loads((tmp_path / "m" / SOFTMAX_FILE).read_text(encoding="utf-8"))
    layer = next(iter(values["layers"].values()))
    assert layer["of"] == of and layer["correction"] == correction
    result.remove()
    assert torch.equal(logits(model, ids), plain)
    load_softmax(model, tmp_path / "m")
    assert torch.equal(logits(model, ids), found)
    loaded = ptqkit.load(tmp_path / "m")
    assert torch.equal(logits(loaded, ids), found)


def test_a_value_of_one_for_every_key_stays_one():
    """Whatever a layer's rows are, with values of ones its output must be ones."""

    class Ones(AttentionHook):
        def __init__(self, hook):
            self.hook, self.worst = hook, 0.0

        def fused(self, scores, call):
            return None

        def softmax(self, p, call):
            q = self.hook.softmax(p, call).double()
            self.worst = max(self.worst, float((q.sum(-1) - 1).abs().max()))
            return p

    model, data = build(), prepare_calibration(tokens(4))
    study = SoftmaxCalibration(model, data, bits=3)
    lost = {}
    exact = ("row_sum", *(f"{a}/{b}_sum" for a in ("before", "squares") for b in ("row", "code")))
    for name in ("none", "bias/head", "before", "squares", *exact):
        hooks = {
            n: Ones(h)
            for n, h in softmax_hooks(study.quantizers(*LANGUAGE_MODEL_VARIANTS[name])).items()
        }
        with attention_hooks(model, hooks):
            logits(model, tokens(4, seed=7))
        lost[name] = max(h.worst for h in hooks.values())
    assert min(lost["none"], lost["bias/head"], lost["before"], lost["squares"]) > 0.01
    assert max(lost[name] for name in exact) < 1e-6


def test_the_report_is_of_the_grid_that_was_used():
    model, data = build(), tokens(6)
    report = quantize_softmax(
        model, data, bits=4, correction="row_sum", grid_of="exponentials"
    ).report
    ptqkit.hf.remove_attention(model)
    other = quantize_softmax(model, data, bits=4, correction="row_sum").report
    assert {row.grid for row in report.layers} == {"exponentials"}
    assert {row.grid for row in other.layers} == {"probabilities"}
    for row, before in zip(other.layers, report.layers, strict=True):
        assert before.zero_fraction < row.zero_fraction
        assert abs(before.mean_row_sum - 1) < 0.2 and before.sqnr_db > row.sqnr_db


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid_of": "exponentials"}, "correction of a grid of exponentials must be one of"),
        ({"grid_of": "log2", "correction": None}, "grid_of must be one of"),
        ({"correction": "code_sum"}, "correction of a grid of probabilities must be one of"),
        (
            {"grid_of": "exponentials", "correction": "row_sum", "grid_range": "search"},
            "is for probabilities",
        ),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        quantize_softmax(build(), tokens(4), **options)


def test_other_papers_grids_are_measured_but_not_saved(tmp_path):
    model = build()
    study = SoftmaxCalibration(model, prepare_calibration(tokens(4)), bits=4)
    for grid in ("log2", "twin"):
        quantizers = study.quantizers("row_sum", "tensor", grid)
        assert {q.grid.of for q in quantizers.values()} == {grid}
        with pytest.raises(ValueError, match=f"a {grid} grid has no place in"):
            save_softmax(model, quantizers, tmp_path / "m")
        assert not (tmp_path / "m").exists()


def test_table_with_errors_grids_and_rounded_weights():
    model = build()
    rounded = build()
    ptqkit.quantize(rounded, "rtn", bits=3, group_size=None, progress=False, diagnostics=False)
    text = tokens(5, 33, seed=5)
    table = softmax_table(
        model,
        None,
        text,
        prepare_calibration(tokens(4)),
        bits=(3,),
        corrections=("row_sum", "before/row_sum", "log2", "twin/row_sum"),
        rounded=rounded,
        rounded_name="W3A16",
        start_token=None,
    )
    names = [row.name for row in table.rows]
    plain = ["SM3", "SM3 + row_sum", "SM3 + before/row_sum", "SM3 + log2", "SM3 + twin/row_sum"]
    assert names == ["float softmax", *plain, "W3A16", *(f"W3A16-{name}" for name in plain)]
    rows = {row.name: row for row in table.rows}
    assert rows["W3A16"].excess == rows["W3A16"].perplexity - rows["float softmax"].perplexity
    lost = rows["W3A16-SM3"].perplexity - rows["W3A16"].perplexity
    left = rows["W3A16-SM3 + row_sum"].perplexity - rows["W3A16"].perplexity
    if lost > 0:
        assert rows["W3A16-SM3 + row_sum"].recovered == pytest.approx(1 - left / lost)
    assert all(row.excess_error > 0 for row in table.rows[1:])
    assert "±" in table.table() and find_attention(model)


def test_paired_errors_by_leaving_out_windows():
    model, other, text = build(), build("opt"), tokens(12, 40, seed=3)
    a, b = (perplexity(m, None, text, start_token=None) for m in (model, other))
    difference, error = perplexity_difference(a, b)
    assert difference == a.perplexity - b.perplexity

    def without(result, i):
        losses = np.delete(np.array(result.losses), i)
        return math.exp(losses.sum() / np.delete(np.array(result.scored), i).sum())

    left = np.array([without(a, i) - without(b, i) for i in range(12)])
    jackknife = math.sqrt(11 / 12 * ((left - left.mean()) ** 2).sum())
    assert error == pytest.approx(jackknife, rel=0.1)
    assert perplexity_difference(a, a) == (0.0, 0.0)
    one = PerplexityResult(1.0, math.e, 3, 4, 4, None, 1, (3.0,), (3,))
    assert math.isnan(perplexity_difference(one, one)[1])
    with pytest.raises(ValueError, match="different windows"):
        perplexity_difference(a, one)
