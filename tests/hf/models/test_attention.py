"""Hooks inside attention: the model's own numbers without one, and nothing left behind."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import transformers
from helpers.data import SHARED
from helpers.driver_models import build, padded_batches, tokens

import ptqkit
from ptqkit.errors import CalibrationError, UnsupportedModuleError
from ptqkit.hf.data.calibration import prepare_calibration
from ptqkit.hf.models.attention import (
    attention_hooks,
    find_attention,
    install_attention,
    installed_attention,
    measure_ranges,
    remove_attention,
)
from ptqkit.nn.activations import ActivationQuantizer
from ptqkit.nn.attention import AttentionHook
from ptqkit.nn.attention_quantizer import ATTENTION_KINDS, AttentionQuantizer
from ptqkit.recipe.options import ActivationQuantization

SUPPORTED = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "phi3",
    "opt",
    "gpt2",
    "gpt_neox",
    "bert",
    "roberta",
)


def logits(model, batch=None):
    batch = batch or {"input_ids": tokens(2)}
    with torch.no_grad():
        return model(**batch).logits


def real(batch):
    """Logits at real tokens only: what a padding token gets is nobody's business."""
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"]).bool() if mask is None else mask.bool()


class Recorder(AttentionHook):
    """Keeps what it sees."""

    def __init__(self):
        self.seen = {}

    def query(self, x, call):
        self.seen["query"] = x.clone()
        return x

    def key(self, x, call):
        self.seen["key"] = x.clone()
        return x

    def value(self, x, call):
        self.seen["value"] = x.clone()
        return x

    def scores(self, x, call):
        self.seen["scores"], self.seen["allowed"] = x.clone(), call.allowed
        return x

    def softmax(self, p, call):
        self.seen["softmax"] = p.clone()
        return p


def recorders(model):
    return {name: Recorder() for name in find_attention(model)}


@pytest.mark.parametrize("name", SUPPORTED)
def test_hooks_that_do_nothing_give_the_eager_model(name):
    model = build(name)
    before = model.config._attn_implementation
    first = [logits(model, batch) for batch in padded_batches(name)]
    model.set_attn_implementation("eager")
    eager = [logits(model, batch) for batch in padded_batches(name)]
    model.set_attn_implementation(before)
    hooks = recorders(model)
    with attention_hooks(model, hooks):
        assert set(installed_attention(model)) == set(hooks)
        hooked = [logits(model, batch) for batch in padded_batches(name)]
    for batch, a, b in zip(padded_batches(name), eager, hooked, strict=True):
        assert torch.equal(a[real(batch)], b[real(batch)])
    # As it was, to the bit.
    assert model.config._attn_implementation == before
    assert not installed_attention(model)
    assert all(
        torch.equal(a, logits(model, batch))
        for a, batch in zip(first, padded_batches(name), strict=True)
    )


@pytest.mark.parametrize("name", ["llama", "mistral", "opt", "bert"])
def test_hooks_see_the_probabilities_and_the_mask(name):
    model = build(name)
    batch = padded_batches(name)[0]
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(**batch, output_attentions=True).attentions
    hooks = recorders(model)
    with attention_hooks(model, hooks):
        logits(model, batch)
    rows = batch["attention_mask"].bool()
    for hook, p in zip(hooks.values(), expected, strict=True):
        assert torch.equal(hook.seen["softmax"], p)
        allowed = hook.seen["allowed"].expand_as(p)
        # In the rows of real tokens, what is allowed is what has a probability.
        chosen = rows[:, None, :, None].expand_as(p)
        assert torch.equal(allowed[chosen], p[chosen] > 0)


def test_sliding_window_is_in_the_mask():
    model = build("mistral")
    hooks = recorders(model)
    with attention_hooks(model, hooks):
        logits(model)
    counts = hooks["model.layers.0.self_attn"].seen["allowed"].sum(-1)[0, 0]
    assert counts.tolist() == [min(i + 1, 8) for i in range(32)]


def test_padded_prompts_of_clip():
    """Its attention modules have no number of a layer; padding is the mask's, and causal."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    config = transformers.CLIPTextConfig(
        **sizes, num_attention_heads=2, vocab_size=20, max_position_embeddings=9, eos_token_id=19
    )
    model = transformers.CLIPTextModel(config).eval()
    ids = torch.tensor([[18, 1, 2, 3, 4, 5, 6, 7, 19], [18, 1, 2, 19, 19, 19, 19, 19, 19]])
    batch = {"input_ids": ids, "attention_mask": torch.tensor([[1] * 9, [1] * 4 + [0] * 5])}
    hooks = recorders(model)
    with torch.no_grad():
        expected = model(**batch).last_hidden_state
        with attention_hooks(model, hooks):
            got = model(**batch).last_hidden_state
    torch.testing.assert_close(got, expected)
    assert len(hooks) == 2
    for hook in hooks.values():
        counts = hook.seen["allowed"].sum(-1)[:, 0]
        assert counts[0].tolist() == [*range(1, 10)]
        assert counts[1, :4].tolist() == [1, 2, 3, 4] and int(counts[1].max()) == 4
    report = ptqkit.quantize_softmax(model, [batch], bits=4, correction="row_sum").report
    assert {row.correction for row in report.layers} <= {"row_sum", None}
    with torch.no_grad():
        together = model(**batch).last_hidden_state
        alone = model(**{k: v[1:, :4] for k, v in batch.items()}).last_hidden_state
    torch.testing.assert_close(together[1:, :4], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("bloom", "inside its own forward"),
        ("falcon", "inside its own forward"),
        ("t5", "encoder-decoder"),
    ],
)
def test_models_without_a_door_are_refused(name, reason):
    model = build(name)
    before = logits(model, padded_batches(name)[0])
    with pytest.raises(UnsupportedModuleError, match=reason):
        install_attention(model, {"x": AttentionHook()})
    assert torch.equal(before, logits(model, padded_batches(name)[0]))


def test_attention_sinks_are_refused():
    config = transformers.GptOssConfig(
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=2,
        num_experts_per_tok=1,
        vocab_size=64,
    )
    model = transformers.GptOssForCausalLM(config).eval()
    with pytest.raises(UnsupportedModuleError, match=r"layers.0.self_attn.*attention sinks"):
        with attention_hooks(model, recorders(model)):
            logits(model)
    assert not installed_attention(model)
    assert model.config._attn_implementation == "eager"


def test_mistakes():
    model = build()
    name = next(iter(find_attention(model)))
    with pytest.raises(ValueError, match="hooks is empty"):
        install_attention(model, {})
    with pytest.raises(ValueError, match="'mlp' is not an attention module"):
        install_attention(model, {"mlp": AttentionHook()})
    with pytest.raises(TypeError, match="must be an AttentionHook"):
        install_attention(model, {name: print})
    with pytest.raises(UnsupportedModuleError, match="not a transformers model"):
        find_attention(torch.nn.Linear(2, 2))
    install_attention(model, {name: AttentionHook()})
    with pytest.raises(ValueError, match="hooks already"):
        install_attention(model, {name: AttentionHook()})
    assert remove_attention(model) == 1
    assert remove_attention(model) == 0


def test_an_error_inside_leaves_nothing_behind():
    model = build()

    class Failing(AttentionHook):
        def softmax(self, p, call):
            raise RuntimeError("stop")

    before = logits(model)
    with pytest.raises(RuntimeError, match="stop"):
        with attention_hooks(model, dict.fromkeys(find_attention(model), Failing())):
            logits(model)
    assert torch.equal(before, logits(model))


def test_whoever_changes_the_implementation_meanwhile_keeps_it():
    model = build()
    install_attention(model, recorders(model))
    model.set_attn_implementation("eager")
    remove_attention(model)
    assert model.config._attn_implementation == "eager"


def test_published_attention_of_a_trained_model():
    """Query, key, value and softmax of block 0 as the model's author published them."""
    folder = SHARED / "nanosort_gpt2"
    if not folder.is_dir():
        pytest.skip("the shared data is not here")
    from safetensors.torch import load_file

    published = load_file(folder / "published_activations.safetensors")
    model = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    hook = Recorder()
    with attention_hooks(model, {"transformer.h.0.attn": hook}):
        logits(model, {"input_ids": published["idx"]})
    names = {"query": "q", "key": "k", "value": "v", "softmax": "attSm"}
    for kind, name in names.items():
        torch.testing.assert_close(hook.seen[kind], published[name], rtol=1e-5, atol=2e-6)
    allowed = hook.seen["allowed"].expand(3, 3, 11, 11)
    scores, expected = hook.seen["scores"][allowed], published["att"][allowed]
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=2e-5)


def test_copies_and_files(tmp_path):
    model = build()
    hooks = {
        name: AttentionQuantizer({"value": torch.zeros_like}) for name in find_attention(model)
    }
    install_attention(model, hooks)
    changed = logits(model)
    twin = copy.deepcopy(model)
    remove_attention(model)
    assert torch.equal(logits(twin), changed) and not torch.equal(logits(model), changed)
    twin.save_pretrained(tmp_path / "m")
    assert "ptqkit" not in (tmp_path / "m" / "config.json").read_text(encoding="utf-8")
    assert set(twin.state_dict()) == set(model.state_dict())


def grid_quantizer(bits, low, high):
    """Float64 twin of a per-tensor asymmetric quantizer."""
    scale = np.float32((max(high, 0) - min(low, 0)) / (2**bits - 1))
    zero = np.rint(-min(low, 0) / scale)

    def quantize(x):
        codes = np.clip(np.rint(x.astype(np.float64) / scale) + zero, 0, 2**bits - 1)
        return scale * (codes - zero)

    return quantize, float(scale)


@pytest.mark.parametrize("bits", [2, 8, 16])
@pytest.mark.parametrize("kind", ATTENTION_KINDS[:4])
def test_one_kind_alone(kind, bits):
    """Only that tensor changes, to its grid, and what follows from it."""
    model = build("llama")
    batch = padded_batches()[0]
    data = prepare_calibration([batch])
    ranges = measure_ranges(model, data)
    name = "model.layers.0.self_attn"
    plain, after = Recorder(), Recorder()
    with attention_hooks(model, {name: plain}):
        logits(model, batch)
    quantizer = ranges[name].quantizer(kind, bits, torch.float32)

    class Both(AttentionQuantizer):
        def _apply(self, kind, x, *more):
            y = super()._apply(kind, x, *more)
            after.seen[kind] = y.clone()
            return y

    with attention_hooks(model, {name: Both({kind: quantizer})}):
        changed = logits(model, batch)
    assert not torch.equal(changed, logits(model, batch))
    twin, scale = grid_quantizer(bits, ranges[name].minimum[kind], ranges[name].maximum[kind])
    x, y = (r.seen[kind].double().numpy() for r in (plain, after))
    rows = batch["attention_mask"].bool()
    if kind == "scores":
        chosen = (plain.seen["allowed"] & rows[:, None, :, None]).expand(2, 4, 32, 32).numpy()
    else:
        chosen = rows[:, None, :, None].expand(x.shape).numpy()
    # A float32 quotient may fall on the other side of a tie: one step, rarely.
    difference = np.abs(y - twin(x))[chosen]
    assert difference.max() <= 1.001 * scale + 1e-6
    assert (difference > 1e-5 * (1 + np.abs(x[chosen]))).mean() < 2e-3
    for other in ("query", "key", "value"):
        if other != kind:
            assert torch.equal(plain.seen[other], after.seen[other])


def test_forbidden_scores_stay_forbidden():
    model = build("llama")
    data = prepare_calibration(padded_batches())
    ranges = measure_ranges(model, data)
    seen = {}

    class Spy(AttentionQuantizer):
        def softmax(self, p, call):
            seen["p"], seen["allowed"] = p, call.allowed
            return p

    quantizers = {
        name: Spy({"scores": r.quantizer("scores", 2, torch.float32)}) for name, r in ranges.items()
    }
    with attention_hooks(model, quantizers):
        logits(model)
    assert seen["p"][~seen["allowed"].expand_as(seen["p"])].abs().max() == 0


def test_ranges_leave_padding_and_forbidden_scores_out():
    model = build("llama")
    batch = padded_batches()[0]
    hooks = recorders(model)
    with attention_hooks(model, hooks):
        logits(model, batch)
    ranges = measure_ranges(model, prepare_calibration([batch]))
    rows = batch["attention_mask"].bool()
    for name, hook in hooks.items():
        seen = hook.seen
        for kind in ("query", "key", "value"):
            x = seen[kind].transpose(1, 2)[rows]
            assert ranges[name].minimum[kind] == x.min() and ranges[name].maximum[kind] == x.max()
        allowed = (seen["allowed"] & rows[:, None, :, None]).expand_as(seen["scores"])
        assert ranges[name].minimum["scores"] == seen["scores"][allowed].min() > -1e4
        assert ranges[name].maximum["softmax"] == 1


def test_heads_alone():
    model = build("llama")
    name = "model.layers.0.self_attn"
    outputs = {}

    class Spy(AttentionQuantizer):
        def __call__(self, call):
            outputs["plain"], outputs["quantized"] = call.run(None)[0], call.run(self)[0]
            return call.run(self)

    with attention_hooks(model, {name: Spy({"softmax": lambda p, allowed: p / 2}, heads=[1, 3])}):
        logits(model)
    equal = [torch.equal(*(o[:, :, h] for o in outputs.values())) for h in range(4)]
    assert equal == [True, False, True, False]
    quantizer = AttentionQuantizer({"key": lambda x: x}, heads=[2])
    with pytest.raises(ValueError, match="heads has 2, but key has 2 heads"):
        with attention_hooks(model, {name: quantizer}):
            logits(model)


@pytest.mark.parametrize(
    ("quantizers", "heads", "message"),
    [
        ({}, None, "quantizers is empty"),
        ({"keys": abs}, None, r"not 'keys' \(did you mean 'key'\?\)"),
        ({"key": abs}, [], "heads is empty"),
        ({"key": abs}, [-1], "integers from 0, not -1"),
        ({"key": abs}, [1, 1], "repeats a head"),
    ],
)
def test_quantizer_mistakes(quantizers, heads, message):
    with pytest.raises(ValueError, match=message):
        AttentionQuantizer(quantizers, heads)


def test_values_that_are_not_finite():
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[0, 0] = torch.nan
    with pytest.raises(CalibrationError, match="query of model.layers.1.self_attn is not finite"):
        measure_ranges(model, prepare_calibration(tokens(2)))
    assert not installed_attention(model)


def test_half_precision_keeps_its_dtype():
    model = build("llama").bfloat16()
    spec = ActivationQuantization(8, "tensor")
    quantizer = ActivationQuantizer(spec, torch.tensor([0.1], dtype=torch.bfloat16), 3)
    hooks = {
        n: AttentionQuantizer({"query": quantizer, "softmax": lambda p, allowed: p.half().float()})
        for n in find_attention(model)
    }
    with attention_hooks(model, hooks):
        assert logits(model).dtype == torch.bfloat16
