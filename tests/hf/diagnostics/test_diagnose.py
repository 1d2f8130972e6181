"""Diagnoses of models against the float64 twins, and outliers named as they were injected."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
import transformers as T
from helpers.data import SHARED, shared
from helpers.driver_models import build, padded_batches, tokens
from torch import nn

import ptqkit
import ptqkit.reference as reference
from ptqkit.errors import CalibrationError, UnsupportedModuleError
from ptqkit.hf.diagnostics.advice import recipe_toml, suggest_recipe
from ptqkit.hf.diagnostics.compare import compare
from ptqkit.hf.diagnostics.curves import curve
from ptqkit.hf.diagnostics.diagnose import diagnose
from ptqkit.hf.diagnostics.diagnosis import DiagnosisReport
from ptqkit.hf.diagnostics.figures import FIGURES
from ptqkit.hf.diagnostics.maxima import read_activation_maxima
from ptqkit.hf.equalization.outliers import inject_outliers
from ptqkit.hf.models.attention import installed_attention


def inputs_of(model, batches, name):
    """Input of a module over the tokens that count, float64 (tokens, channels)."""
    found = []

    def keep(module, args):
        found.append(args[0].detach())

    handle = model.get_submodule(name).register_forward_pre_hook(keep)
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    masks = [b.get("attention_mask") for b in batches]
    rows = [
        x.reshape(-1, x.shape[-1])[slice(None) if m is None else m.bool().reshape(-1)]
        for x, m in zip(found, masks, strict=True)
    ]
    return torch.cat(rows).double().numpy()


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gpt_neox", "bert", "qwen3"])
def test_numbers_equal_the_twins(name):
    model, batches = build(name), padded_batches(name)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    report = diagnose(model, batches, sensitivity=False, value=1.0)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not installed_attention(model) and not report.notes
    assert {row.part.split()[0] for row in report.inputs} == {"attention", "mlp"}
    for row in report.inputs:
        X = inputs_of(model, batches, row.name)
        expected = reference.activation_statistics(X, threshold=1.0)
        assert row.tokens == len(X)
        for key in ("rms", "std", "kurtosis", "rmse_token"):
            # attention is the eager function here, sdpa there
            np.testing.assert_allclose(getattr(row, key), expected[key], rtol=2e-5)
        np.testing.assert_allclose(row.channel_absmax, expected["channel_absmax"], rtol=1e-4)
        np.testing.assert_allclose(row.maximum, expected["largest"][0], rtol=1e-4)
    for row in report.weights:
        module = model.get_submodule(row.name)
        W = module.weight.detach().double().numpy()
        W = W.T if type(module).__name__ == "Conv1D" else W
        assert row.shape == list(W.shape)
        np.testing.assert_allclose(row.spectral_norm, reference.spectral_norm(W), rtol=1e-12)
        np.testing.assert_allclose(row.stable_rank, reference.stable_rank(W), rtol=1e-12)
        np.testing.assert_allclose([row.std, row.absmax], [W.std(), np.abs(W).max()], rtol=1e-12)
    spread = {row.name: row.std for row in report.norms}
    for path, std in spread.items():
        gain = model.get_submodule(path).weight.detach().double()
        assert std == pytest.approx(gain.std(correction=0).item(), abs=1e-12)
    assert all(row.norm_std == spread[row.norm] for row in report.inputs if row.norm)


def test_who_reads_what():
    report = diagnose(build("llama"), padded_batches("llama"), sensitivity=False)
    first = [row for row in report.inputs if row.depth == 0]
    assert [row.part for row in first] == ["attention in", "attention out", "mlp in", "mlp out"]
    names = [[c.rpartition(".")[2] for c in row.consumers] for row in first]
    assert names[0] == ["q_proj", "k_proj", "v_proj"]
    assert names[1:] == [["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert [row.norm for row in first] == [
        "model.layers.0.input_layernorm",
        None,
        "model.layers.0.post_attention_layernorm",
        None,
    ]


def test_attention_by_hand():
    model, batches = build("llama"), padded_batches("llama")
    report = diagnose(model, batches, sensitivity=False)
    model.set_attn_implementation("eager")
    found = []
    for batch in batches:
        with torch.no_grad():
            maps = model(**batch, output_attentions=True).attentions
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        found.append((maps, mask))
    for depth, row in enumerate(report.attention):
        sink, lost = [], []
        for maps, mask in found:
            for p, rows in zip(maps[depth].double(), mask, strict=True):
                first = int(rows.int().argmax())
                sink.append(p[:, rows, first])
                lost.append(1 - (p * 255).round()[:, rows].sum(-1) / 255)
        np.testing.assert_allclose(row.sink, torch.cat(sink, 1).mean(1), rtol=1e-5)
        np.testing.assert_allclose(row.mass_lost, torch.cat(lost, 1).mean(1), atol=1e-4)
        assert len(row.sink) == 4 and len(row.key_error) == len(row.value_error) == 2
        assert all(1e-4 < e < 0.02 for e in [*row.key_error, *row.value_error])
        assert all(0 <= z <= 1 for z in row.zero_fraction)


@pytest.mark.parametrize("name", ["bloom"])
def test_attention_that_cannot_be_hooked_is_noted(name):
    batch = {"input_ids": tokens(2)}
    report = diagnose(build(name), [batch], sensitivity=("kind",))
    assert report.attention == [] and "attention was not measured" in report.notes[0]
    assert math.isnan(report.sink_share) and report.inputs
    assert {row.kind for row in report.sensitivity["kind"].rows} == {"weights", "inputs"}
    assert "note: attention" in report.table()


@pytest.fixture(scope="module", params=["demo", "stories260k", "babyllama105"])
def trained(request):
    from ptqkit.demo import MODEL_DIR, text

    path = MODEL_DIR if request.param == "demo" else shared(request.param)
    tokenizer = T.AutoTokenizer.from_pretrained(path)
    source = [text("calibration")]
    if request.param != "demo":
        source = str(shared("tinystories/train_800.jsonl.gz"))
    data = ptqkit.hf.prepare_calibration(
        source, tokenizer, samples=4, sequence_length=128, batch_size=4
    )
    return lambda: T.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), data


def test_every_stage_reports_its_steps():
    events = []
    batches = padded_batches("llama")
    report = diagnose(build("llama"), batches, sensitivity=("kind",), progress=events.append)
    expected = {
        "activations": [f"batch {i + 1}" for i in range(len(batches))],
        "weights": [row.name for row in report.weights],
        "sensitivity": {row.name for row in report.sensitivity["kind"].rows},
    }
    assert list(dict.fromkeys(e.stage for e in events)) == list(expected)
    for stage, names in expected.items():
        part = [e for e in events if e.stage == stage]
        assert type(names)(e.name for e in part) == names
        assert [e.index for e in part] == list(range(1, len(names) + 1)) and names
        assert {e.total for e in part} == {len(names)}


def test_no_channel_of_a_model_as_trained_is_named(trained):
    make, data = trained
    assert diagnose(make(), data, sensitivity=False).outliers == {}


@pytest.mark.parametrize("seed", [0, 1])
def test_injected_channels_are_named_and_no_others(trained, seed):
    make, data = trained
    model = make()
    injected = inject_outliers(model, data, seed=seed, channels=4)
    report = diagnose(model, data, sensitivity=False)
    assert report.outliers == {o.consumers[0]: list(o.channels) for o in injected}
    by_norm = {row.name: row.norm for row in report.inputs}
    assert all(by_norm[o.consumers[0]] == o.producer for o in injected)


class _Norm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return nn.functional.layer_norm(x, x.shape[-1:]) * self.weight


class _Block(nn.Module):
    def __init__(self, gain, norms=True):
        super().__init__()
        self.attn_norm = _Norm(gain) if norms else nn.Identity()
        self.mlp_norm = _Norm(gain) if norms else nn.Identity()
        self.attention = nn.Linear(16, 16)
        self.fc1, self.fc2 = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        x = x + self.attention(self.attn_norm(x))
        return x + self.fc2(torch.relu(self.fc1(self.mlp_norm(x))))


class _Model(nn.Module):
    def __init__(self, gain=16, blocks=2, norms=True):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(64, 16)
        self.layers = nn.ModuleList(_Block(gain, norms) for _ in range(blocks))
        self.head = nn.Linear(16, 64)
        with torch.no_grad():
            self.embed.weight[:, 5] += 60

    def forward(self, input_ids, **_):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return type("Output", (), {"logits": self.head(x)})()


@pytest.mark.parametrize("gain", [1, 16])
@pytest.mark.parametrize("blocks", [1, 3])
def test_any_module_with_blocks(gain, blocks):
    report = diagnose(_Model(gain, blocks), [{"input_ids": tokens(2)}])
    assert [row.part for row in report.inputs] == ["attention in", "mlp in", "mlp out"] * blocks
    assert [row.norm_std for row in report.inputs[:2]] == [0, 0]
    assert [row.channels for row in report.norms] == [gain] * 2 * blocks
    assert report.depth == blocks
    assert set(report.sensitivity) == {"kind", "layer", "depth"}


def test_without_norms():
    report = diagnose(_Model(norms=False), [{"input_ids": tokens(2)}], sensitivity=False)
    assert report.norms == [] and all(row.norm is None for row in report.inputs)
    assert report.outliers["layers.0.attention"] == [5]  # later inputs mix it into other channels
    assert set(report.outliers) <= {row.name for row in report.inputs if row.part.endswith(" in")}
    assert 5 in report.outlier_dimensions
    assert all(math.isnan(row.norm_std) for row in report.inputs)


class _Uneven(_Model):
    """Three blocks: a whole one, one without attention and of another inner width, and one bare."""

    def __init__(self):
        super().__init__(blocks=3)
        second, third = self.layers[1], self.layers[2]
        second.attention = second.attn_norm = nn.Identity()
        second.fc1, second.fc2 = nn.Linear(16, 48), nn.Linear(48, 16)
        third.mlp_norm = nn.Identity()


def test_blocks_that_differ(tmp_path):
    batches = [{"input_ids": tokens(2)}]
    report = diagnose(_Uneven(), batches, name="uneven")
    found = [(row.depth, row.part, row.channels) for row in report.inputs]
    whole = [(0, "attention in", 16), (0, "mlp in", 16), (0, "mlp out", 32)]
    uneven = [(1, "mlp in", 16), (1, "mlp out", 48)]
    assert found == [*whole, *uneven, *((2, part, width) for _, part, width in whole)]
    assert [row.norm for row in report.inputs if row.depth == 2][:2] == ["layers.2.attn_norm", None]
    assert report.depth == 3 and len(report.sensitivity["layer"].rows) == 3
    depths, _ = curve(report, "std", "attention in")
    assert depths.tolist() == [0, 2]
    assert len(report.layers()) == 8 and report.table()
    for figure in FIGURES:
        report.draw(tmp_path / f"{figure}.png", figure)
    report.recipe()
    whole = diagnose(_Model(blocks=5), batches, name="whole", sensitivity=False)
    both = compare([whole, report], at=0.5)  # block 2 of 5, and between blocks 0 and 2 of 3
    values = curve(report, "std", "attention in")[1]
    assert both.values["std"][1] == pytest.approx(values.mean())
    assert both.values["std"][0] == curve(whole, "std", "attention in")[1][2]


def test_one_block_is_drawn(tmp_path):
    """Bands of one block are there to be seen."""
    batches = [{"input_ids": tokens(2)}]
    report = diagnose(_Model(blocks=1), batches, name="one", sensitivity=False)
    report.draw(tmp_path / "distributions.png", "distributions")
    from matplotlib import image

    picture = image.imread(tmp_path / "distributions.png")[..., :3]
    blue = (picture[..., 2] - picture[..., 0] > 0.1).sum()
    assert blue > 1000
    other = diagnose(_Model(blocks=4), [{"input_ids": tokens(2)}], sensitivity=False)
    assert compare([report, other], at=1.0).values["std"][0] == report.inputs[0].std


def test_what_is_refused():
    model, batches = build("llama"), [{"input_ids": tokens(2)}]
    for options, message in (
        ({"bits": 9}, "bits must lie in"),
        ({"value": 0}, "threshold"),
        ({"layers": 1.2}, "layers must be a share"),
        ({"tokens": -1}, "tokens must be a share"),
        ({"ratio": 1}, "ratio must be above 1"),
        ({"sensitivity": "block"}, "each of sensitivity must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            diagnose(model, batches, **options)
    with pytest.raises(UnsupportedModuleError, match="ModuleList"):
        diagnose(nn.Sequential(nn.Linear(3, 3)), batches)
    with pytest.raises(CalibrationError, match="tokenizer"):
        diagnose(model, ["some text"])
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.inf
    with pytest.raises(CalibrationError, match=r"the input of model\.layers\.1\.mlp\.down_proj"):
        diagnose(model, batches, sensitivity=False)
    assert not installed_attention(model)


@pytest.fixture(scope="module")
def report():
    return diagnose(build("llama"), padded_batches("llama"), name="small")


def test_depth_is_cumulative(report):
    rows = report.sensitivity["depth"].rows
    assert [row.layer for row in rows] == ["model.layers.0", "model.layers.1"]
    alone = report.sensitivity["layer"]
    assert rows[0].sqnr_db == alone["model.layers.0"].sqnr_db
    assert rows[1].sqnr_db < min(row.sqnr_db for row in alone.rows)
    assert rows[1].tensors == sum(row.tensors for row in alone.rows)


def test_json_and_back(report):
    values = json.loads(report.to_json())
    again = DiagnosisReport.from_dict(values)
    assert again.to_dict() == report.to_dict()
    assert again.table() == report.table()
    assert "small" in repr(report) and "\n" not in repr(report)


def test_layers_and_frame(report):
    rows = report.layers()
    assert len(rows) == 14 and len({row["layer"] for row in rows}) == 14
    pandas = pytest.importorskip("pandas")
    frame = report.to_dataframe()
    assert isinstance(frame, pandas.DataFrame) and frame.rmse_token.gt(0).all()


@pytest.mark.parametrize("figure", FIGURES)
def test_figures(report, figure, tmp_path):
    report.draw(tmp_path / "figure.png", figure)
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="figure must be one of"):
        report.draw(tmp_path / "other.png", "pie")


def test_recipes(report):
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight[3] *= 200
    hard = diagnose(model, padded_batches("llama"), sensitivity=("layer",))
    values = hard.recipe(bits=3, group_size=16)
    assert set(values["overrides"]) == {f"model.layers.1.mlp.{k}_proj" for k in ("gate", "up")}
    recipe = ptqkit.Recipe.from_dict(values)
    assert recipe.for_layer("model.layers.1.mlp.up_proj").bits == 8
    assert recipe.for_layer("model.layers.0.mlp.up_proj").bits == 3
    read = pytest.importorskip("tomllib").loads(recipe_toml(values, "a"))
    assert read == {"recipes": [{"name": "a", **values}]}
    blocks = hard.recipe(by="sensitivity", factor=1.01)
    assert list(blocks["overrides"]) == ["model.layers.1.*"]
    with pytest.raises(ValueError, match="factor"):
        suggest_recipe(report, factor=1)
    with pytest.raises(ValueError, match="by must be"):
        suggest_recipe(report, by="luck")
    with pytest.raises(CalibrationError, match="no sensitivity"):
        suggest_recipe(DiagnosisReport(), by="sensitivity")


def test_comparison(report, tmp_path):
    other = diagnose(_Model(blocks=5), [{"input_ids": tokens(2)}], name="five", sensitivity=False)
    found = compare([report, other], at=0.5)
    _, values = curve(other, "rmse_token", "attention in")
    assert found.values["rmse_token"][1] == values[2]
    mine = curve(report, "rmse_token", "attention in")[1]
    assert found.values["rmse_token"][0] == pytest.approx(mine.mean())
    assert found.ratios["rmse_token"][1] == pytest.approx(values[2] / mine.mean())
    assert compare([report, other]).values["std"][0] == pytest.approx(
        np.median(curve(report, "std", "attention in")[1])
    )
    assert "five" in found.table() and math.isnan(found.values["sink_share"][1])
    json.dumps(found.to_dict(), allow_nan=False)
    found.draw(tmp_path / "both.png")
    assert (tmp_path / "both.png").stat().st_size > 10_000
    for arguments, message in (
        (([report],), "at least two"),
        (([report, other], "attention"), "part must be"),
    ):
        with pytest.raises(ValueError, match=message):
            compare(arguments[0], part=arguments[1] if len(arguments) > 1 else "mlp in")
    with pytest.raises(ValueError, match="relative depth"):
        compare([report, other], at=2)


def test_published_ratios(report):
    path = shared("published/ipqs.toml")
    found = compare([report, report], published=path)
    assert found.published["RMSE fp16 / bf16"] == 6.9 and "6.9" in found.table()
    assert all(r == 1 for name in ("rmse_token", "std") for r in found.ratios[name])


@pytest.mark.skipif(not SHARED.exists(), reason="needs the data folder beside the checkout")
def test_channel_maxima(tmp_path):
    report = read_activation_maxima(shared("act_stats/opt-1.3b.safetensors"))
    assert report.depth == 24 and len(report.inputs) == 24 * 4
    row = next(r for r in report.inputs if r.name.endswith("layers.10.self_attn.k_proj"))
    assert row.part == "attention in" and len(row.consumers) == 3
    absmax = np.array(row.channel_absmax)
    expected = np.flatnonzero(absmax >= 6 * np.median(absmax)).tolist()
    assert report.outliers[row.name] == expected and len(expected) == 2
    assert math.isnan(row.rmse_token) and "note: read from channel maxima" in report.table()
    small = read_activation_maxima(shared("act_stats/opt-125m.safetensors"))
    report.draw(tmp_path / "heat.png", "channels")
    with pytest.raises(ValueError, match="none of the models"):
        compare([report, small])
    assert DiagnosisReport.from_dict(json.loads(report.to_json())).outliers == report.outliers


def test_files_without_maxima(tmp_path):
    from safetensors.numpy import save_file

    save_file({"x": np.ones(3, np.float32)}, tmp_path / "x.safetensors")
    with pytest.raises(CalibrationError, match="holds no vectors"):
        read_activation_maxima(tmp_path / "x.safetensors")
    bad = {"absmax/layers.0.fc1": np.array([1, np.nan], np.float32)}
    save_file(bad, tmp_path / "y.safetensors")
    with pytest.raises(CalibrationError, match="not a vector of magnitudes"):
        read_activation_maxima(tmp_path / "y.safetensors")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "falcon"])
def test_gpu_equals_host(name):
    batches = padded_batches(name)
    host = diagnose(build(name), batches)
    device = diagnose(build(name).cuda(), batches)
    assert [row.name for row in device.inputs] == [row.name for row in host.inputs]
    for mine, other in zip(host.inputs, device.inputs, strict=True):
        assert mine.norm == other.norm and mine.consumers == other.consumers
        for key in ("rms", "rmse_token", "rmse_tensor", "std", "kurtosis"):
            np.testing.assert_allclose(getattr(mine, key), getattr(other, key), rtol=1e-3)
    for mine, other in zip(host.attention, device.attention, strict=True):
        np.testing.assert_allclose(mine.sink, other.sink, rtol=1e-3)
        np.testing.assert_allclose(mine.key_error, other.key_error, rtol=1e-2)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_fused_attention_is_watched_as_the_hooked_one(name, monkeypatch):
    """Padded rows, causal masks and grouped heads: the same numbers by both ways."""
    batches = padded_batches(name)
    hooked = diagnose(build(name), batches, sensitivity=False)

    def refuse(model):
        raise UnsupportedModuleError("no hooks")

    monkeypatch.setattr("ptqkit.hf.diagnostics.diagnose.find_attention", refuse)
    fused = diagnose(build(name), batches, sensitivity=False)
    assert not fused.notes and len(fused.attention) == len(hooked.attention) == 2
    for mine, other in zip(fused.attention, hooked.attention, strict=True):
        assert mine.depth == other.depth
        for key in ("sink", "mass_lost", "zero_fraction", "key_error", "value_error"):
            a, b = getattr(mine, key), getattr(other, key)
            b = np.repeat(b, len(a) // len(b))  # grouped heads are repeated before the call
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
