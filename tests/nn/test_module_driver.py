"""Any torch module, layer by layer: the same work by hand, both kinds of inputs, bad input."""

import copy
import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import ptqkit
import ptqkit.reference as reference
from ptqkit import Recipe
from ptqkit.errors import CalibrationError, PreflightError, UsageError
from ptqkit.nn import quantize_module
from ptqkit.nn.convolution import is_convolution
from ptqkit.nn.forward import hooks
from ptqkit.reference import im2col

PUBLISHED = Recipe.preset("reference", bits=3, group_size=None)


class Net(nn.Module):
    """A small network with grouped, depthwise, strided and pointwise convolutions."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 3, padding=1, padding_mode="circular", bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depth = nn.Conv2d(8, 8, 3, groups=8, stride=2)
        self.point = nn.Conv2d(8, 12, 1)
        self.skip = nn.Conv2d(8, 12, 3, groups=2, dilation=2, padding=2)
        self.line = nn.Conv1d(12, 6, 3, padding="same")
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        x = torch.relu_(self.norm(self.stem(x)))
        x = torch.relu(self.depth(x))
        x = torch.relu(self.point(x) + self.skip(x))
        return self.head(self.line(x.flatten(2)).mean(2))


NAMES = ["stem", "depth", "point", "skip", "line", "head"]


def build(seed=0, kind=Net):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind().eval()


def batches(count=3, seed=1):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 2, 9, 9, generator=draw) for _ in range(count)]


def inputs_of(model, name, data):
    found = []
    with torch.no_grad(), hooks({name: model.get_submodule(name)}, lambda _, v: found.append(v)):
        for batch in data:
            model(batch)
    return torch.cat(found)


def patches(module, x):
    """Rows of inputs per group, float64."""
    if not is_convolution(module):
        return x.double().numpy().reshape(1, -1, x.shape[-1])
    pads = {"same": 1, "valid": 0}
    pad = module.padding
    pad = [pads[pad]] * len(module.kernel_size) if isinstance(pad, str) else pad
    return im2col(
        x.numpy(),
        module.kernel_size,
        module.stride,
        [(p, p) for p in pad],
        module.dilation,
        module.groups,
        module.padding_mode,
    )


def by_hand(solve, seen=None):
    """Quantize layer by layer; ``seen`` is the model whose inputs are taken, by default the same.

    ``solve(weight, H)`` takes float64 and returns codes, scales and zero-points of one group.
    """
    model, found = build(), {}
    for name in NAMES:
        module = model.get_submodule(name)
        columns = patches(module, inputs_of(seen or model, name, batches()))
        weight = module.weight.detach().flatten(1).double().numpy()
        parts = [
            solve(w, reference.hessian(x))
            for w, x in zip(np.split(weight, len(columns)), columns, strict=True)
        ]
        codes, scales, zeros = (np.concatenate(p) for p in zip(*parts, strict=True))
        values = scales * (codes - zeros.astype(float))
        with torch.no_grad():
            module.weight.copy_(torch.from_numpy(values).view_as(module.weight))
        found[name] = codes
    return model, found


def published(weight, H):
    q = reference.gptq(weight, H, max_code=7)
    return q["codes"], q["scales"], q["zeros"]


@pytest.mark.parametrize("calibrate_on", ["quantized", "float"])
def test_codes_are_those_of_the_twins_by_hand(calibrate_on):
    result = quantize_module(build(), batches(), PUBLISHED, calibrate_on=calibrate_on)
    seen = build() if calibrate_on == "float" else None
    model, codes = by_hand(published, seen)
    assert [row.name for row in result.rows] == list(result.matrices) == NAMES
    for name in NAMES:
        np.testing.assert_array_equal(result.matrices[name].codes, codes[name], err_msg=name)
    assert [row.groups for row in result.rows] == [1, 8, 1, 2, 1, 1]
    x = batches(1, 5)[0]
    torch.testing.assert_close(result.model(x), model(x), rtol=1e-4, atol=1e-5)


def test_the_two_kinds_of_inputs_differ_only_after_the_first_layer():
    first = quantize_module(build(), batches(), PUBLISHED)
    other = quantize_module(build(), batches(), PUBLISHED, calibrate_on="float")
    same = [np.array_equal(first.matrices[n].codes, other.matrices[n].codes) for n in NAMES]
    assert same[0] and not all(same)


def test_weights_are_the_dequantized_codes():
    model = build()
    before = copy.deepcopy(model.state_dict())
    result = quantize_module(model, batches(), bits=4)
    assert result.model is model and not model.training
    for name, tensor in model.state_dict().items():
        layer = name.rpartition(".")[0]
        if name.endswith("weight") and layer in NAMES:
            want = torch.from_numpy(result.matrices[layer].dequantize()).view_as(tensor)
            assert torch.equal(tensor, want) and not torch.equal(tensor, before[name])
        else:
            assert torch.equal(tensor, before[name])


def test_obq_per_group():
    result = quantize_module(build(), batches(), "obq", bits=3, calibrate_on="float")
    model = build()
    for name in ("skip", "point"):
        module = model.get_submodule(name)
        columns = patches(module, inputs_of(model, name, batches()))
        weight = module.weight.detach().flatten(1).numpy()
        for w, x, found in zip(
            np.split(weight, len(columns)),
            columns,
            np.split(result.matrices[name].codes, len(columns)),
            strict=True,
        ):
            want, _, _ = reference.obq(w, reference.hessian(x), max_code=7)
            np.testing.assert_array_equal(found, want)


def test_obq_and_gptq_beat_rounding():
    options = {"bits": 3, "group_size": None, "calibrate_on": "float"}
    totals = {
        name: quantize_module(build(), batches(), name, **options).totals()["objective"]
        for name in ("rtn", "reference", "obq")
    }
    assert totals["obq"] < totals["reference"] < totals["rtn"]


@pytest.mark.parametrize("options", [{"grid": "hessian"}, {"per_tensor": True}, {}])
def test_rounding_needs_batches_only_for_grids_under_h(options):
    recipe = Recipe.preset("rtn", bits=4, **{"group_size": None, **options})
    if options.get("grid"):
        with pytest.raises(PreflightError, match="stem: grid 'hessian' needs batches"):
            quantize_module(build(), None, recipe)
        data = batches()
    else:
        data = None
    result = quantize_module(build(), data, recipe)
    for name, matrix in result.matrices.items():
        weight = build().get_submodule(name).weight.detach().flatten(1).numpy()
        assert (len(np.unique(matrix.scales)) == 1) == bool(options.get("per_tensor"))
        if data is None:
            want = ptqkit.rtn(
                weight, bits=4, group_size=None, per_tensor=bool(options.get("per_tensor"))
            )
            np.testing.assert_array_equal(matrix.codes, want.codes)
    assert math.isnan(result.rows[0].objective) == (data is None)


@torch.no_grad()
def test_the_report_counts_what_it_says():
    result = quantize_module(build(), batches(), PUBLISHED)
    row = {r.name: r for r in result.rows}["skip"]
    model = build()  # the input of skip with the layers before it quantized
    for name in ("stem", "depth", "point"):
        values = torch.from_numpy(result.matrices[name].dequantize())
        model.get_submodule(name).weight.data.copy_(
            values.view_as(model.get_submodule(name).weight)
        )
    x = inputs_of(model, "skip", batches())
    module = copy.deepcopy(model.skip)
    want = module(x)
    power = (want - module.bias[:, None, None]).double().square().sum()
    module.weight.data.copy_(result.model.skip.weight)
    error = (module(x) - want).double().square().sum()
    assert row.tokens == len(x) * 16 and row.shape == (12, 4, 3, 3) and row.calls == 1
    assert row.objective == pytest.approx(2 * float(error) / row.tokens, rel=1e-4)
    assert row.output_power == pytest.approx(2 * float(power) / row.tokens, rel=1e-4)
    assert row.objective < row.objective_rtn
    assert "skip" in result.table() and "/8" in result.table()
    assert result.to_dict()["totals"]["weights"] == sum(
        build().get_submodule(n).weight.numel() for n in NAMES
    )


def test_bias_correction_takes_the_mean_error_away():
    model = build()
    floats = {n: inputs_of(model, n, batches()) for n in NAMES}
    plain = copy.deepcopy(model)
    quantize_module(model, batches(), PUBLISHED, bias_correction=True, calibrate_on="float")
    for name in NAMES:
        axes = [0] if name == "head" else [0, *range(2, floats[name].dim())]
        with torch.no_grad():
            error = model.get_submodule(name)(floats[name]) - plain.get_submodule(name)(
                floats[name]
            )
        assert float(error.mean(axes).abs().max()) < 1e-5 < float(error.abs().max())
    assert model.stem.bias is not None and plain.stem.bias is None


class Repeated(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
        self.end = nn.Conv2d(2, 2, 1)

    def forward(self, x):
        return self.end(torch.relu(self.conv(torch.relu(self.conv(x)))))


def test_a_layer_that_runs_twice_has_one_h_of_both_inputs():
    model = build(kind=Repeated)
    x = inputs_of(model, "conv", batches())
    result = quantize_module(build(kind=Repeated), batches(), PUBLISHED)
    (columns,) = patches(model.conv, x)
    weight = model.conv.weight.detach().flatten(1).double().numpy()
    want = reference.gptq(weight, reference.hessian(columns), max_code=7)
    np.testing.assert_array_equal(result.matrices["conv"].codes, want["codes"])
    assert [r.calls for r in result.rows] == [2, 1] and result.rows[0].tokens == 2 * 3 * 4 * 81


class Siblings(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(2, 3, 3, padding=1)
        self.c, self.d = nn.Conv2d(2, 3, 1), nn.Conv2d(3, 2, 1)
        self.runs = 0

    def forward(self, x):
        self.runs += 1
        return self.d(self.a(x) + self.b(x) * self.c(x))


def test_layers_with_one_input_share_the_pass():
    model = build(kind=Siblings)
    quantize_module(model, batches(2), PUBLISHED)
    assert model.runs == 2 * (1 + 2)  # the look at the model, a-b-c, d
    model = build(kind=Siblings)
    quantize_module(model, batches(2), PUBLISHED, calibrate_on="float")
    assert model.runs == 2 * (1 + 1)


def test_batches_may_be_tuples_mappings_or_called_by_hand():
    first = quantize_module(build(), batches(), PUBLISHED)
    for data, call in (
        ([(x,) for x in batches()], None),
        ([{"x": x} for x in batches()], None),
        ([(x, torch.arange(4)) for x in batches()], lambda model, batch: model(batch[0])),
        (iter(batches()), None),
    ):
        other = quantize_module(build(), data, PUBLISHED, call=call)
        np.testing.assert_array_equal(other.matrices["head"].codes, first.matrices["head"].codes)
    with pytest.raises(CalibrationError, match="say how with call=lambda"):
        quantize_module(build(), [(x, torch.arange(4)) for x in batches()], PUBLISHED)


def test_groups_overrides_and_half_precision():
    model = build().to(torch.bfloat16)
    data = [x.to(torch.bfloat16) for x in batches()]
    result = quantize_module(
        model,
        data,
        PUBLISHED,
        group_size=3,
        overrides={"head": "skip", "depth": {"bits": 8}, "point": {"group_size": None}},
    )
    assert [r.name for r in result.rows] == NAMES[:-1]
    assert result.matrices["skip"].scales.shape == (12, 12)
    assert result.matrices["depth"].bits == 8
    assert result.matrices["point"].scales.shape == (12, 1)
    assert result.matrices["stem"].scale_dtype == "bfloat16"


@pytest.mark.parametrize("order", ["act", "group-act"])
def test_grouped_convolutions_with_an_order(order):
    options = {"order": order, "group_size": 3, "static_groups": order == "act"}
    result = quantize_module(build(), batches(), PUBLISHED, overrides={"point": "skip"}, **options)
    assert not any(m.permuted_groups for m in result.matrices.values())
    with pytest.raises(PreflightError, match="depth: order 'act' permutes the inputs of each of"):
        quantize_module(
            build(), batches(), PUBLISHED, order="act", group_size=3, overrides={"point": "skip"}
        )


def test_threads_change_nothing():
    first, other = (quantize_module(build(), batches(), bits=3, threads=t) for t in (1, 2))
    for name in NAMES:
        np.testing.assert_array_equal(first.matrices[name].codes, other.matrices[name].codes)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("calibrate_on", ["quantized", "float"])
def test_gpu_equals_host(calibrate_on):
    options = {"calibrate_on": calibrate_on, "bias_correction": True}
    host = quantize_module(build(), batches(), PUBLISHED, **options)
    device = quantize_module(build().cuda(), batches(), PUBLISHED, **options)
    for name in NAMES:
        different = np.mean(device.matrices[name].codes != host.matrices[name].codes)
        assert different < (0.01 if name == "stem" or calibrate_on == "float" else 0.1), name
        weight = device.model.get_submodule(name).weight
        values = torch.from_numpy(device.matrices[name].dequantize())
        assert weight.is_cuda and torch.equal(weight.cpu(), values.view_as(weight))


# --- what cannot be ---


def tied(model):
    model.extra = nn.Conv2d(8, 12, 1)
    model.extra.weight = model.point.weight


def unused(model):
    model.extra = nn.Conv2d(8, 12, 1)


def normed(model):
    nn.utils.parametrizations.weight_norm(model.point)


class Standardized(nn.Conv2d):
    def forward(self, x):
        return nn.functional.conv2d(x, self.weight / self.weight.std(), self.bias)


def standardized(model):
    model.point = Standardized(8, 12, 1)


def damaged(model):
    model.point.weight.data[2, 3] = math.nan


def lazy(model):
    model.point = nn.LazyConv2d(12, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (tied, "point: this Conv2d shares its weight with extra"),
        (unused, "extra: never called by the model's forward on these batches"),
        (normed, "point: the weight of this \\w+ is computed from others"),
        (standardized, "point: Standardized has a forward of its own"),
        (damaged, "point: 1 of its 96 weights are not finite"),
        (lazy, "point: this LazyConv2d has no weight yet"),
        (lambda m: m.to("meta"), "stem: the weight of this Conv2d is on the meta device"),
    ],
)
def test_models_that_are_refused_before_a_weight_changes(change, message):
    model = build()
    change(model)
    before = {n: p.clone() for n, p in model.named_parameters() if n == "stem.weight"}
    with pytest.raises(PreflightError, match=message):
        quantize_module(model, batches(), PUBLISHED)
    assert all(
        p.is_meta or torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 5}, "stem: group_size 5 does not divide its 18 inputs"),
        ({"overrides": {"nothing": "skip"}}, "pattern 'nothing' of the recipe matches no module"),
        ({"overrides": {"*": "skip"}}, "Net has no linear layer or convolution to quantize"),
    ],
)
def test_recipes_that_are_refused(options, message):
    with pytest.raises(PreflightError, match=message):
        quantize_module(build(), batches(), PUBLISHED, **options)


def test_obq_that_would_take_hours_is_refused():
    model = nn.Sequential(nn.Conv2d(512, 512, 3))
    with pytest.raises(PreflightError, match=r"would take about \d+ hours on 2 threads .* for 0"):
        quantize_module(model, [torch.zeros(1, 512, 3, 3)], "obq", threads=2)


@pytest.mark.parametrize("name", ["activations", "equalization", "error_propagation"])
def test_parts_that_are_not_for_any_module(name):
    recipe = {
        "activations": Recipe.preset("vector-wise"),
        "equalization": Recipe.preset("aweq", activations=None, bias_correction=False),
        "error_propagation": Recipe(error_propagation=0.5),
    }[name]
    with pytest.raises(UsageError, match=f"leave {name} out"):
        quantize_module(build(), batches(), recipe)
    with pytest.raises(UsageError, match="bits 3.2 is an average"):
        quantize_module(build(), batches(), bits=3.2)
    with pytest.raises(UsageError, match="recipe has no option 'bit'"):
        quantize_module(build(), batches(), bit=3)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "batches is empty"),
        (batches(1)[0], "must be a list of batches, not one Tensor"),
        ([*batches(1), torch.zeros(0, 2, 9, 9)], r"batches\[1\] holds an empty tensor"),
    ],
)
def test_batches_that_are_refused(data, message):
    with pytest.raises(CalibrationError, match=message):
        quantize_module(build(), data, PUBLISHED)


@pytest.mark.parametrize("calibrate_on", ["quantized", "float"])
def test_the_layer_whose_inputs_are_not_finite_is_named(calibrate_on):
    data = batches()
    data[1][2, 0, 3, 3] = math.inf
    model = build()
    before = model.stem.weight.clone()
    with pytest.raises(ValueError, match="layer stem: .*NaN or Inf"):
        quantize_module(model, data, PUBLISHED, calibrate_on=calibrate_on)
    assert torch.equal(model.stem.weight, before)


def test_an_error_in_the_middle_says_what_is_quantized():
    model = build()
    model.norm.weight.data[3] = math.nan  # relu(nan) reaches the next layer
    with pytest.raises(ValueError, match="layer depth") as info:
        quantize_module(model, batches(), PUBLISHED)
    assert "1 of 6 layers are already quantized" in info.value.__notes__[0]
    model = build()
    model.norm.weight.data[3] = math.nan
    before = model.stem.weight.clone()
    with pytest.raises(ValueError, match="layer depth"):
        quantize_module(model, batches(), PUBLISHED, calibrate_on="float")
    assert torch.equal(model.stem.weight, before)


def test_a_second_run_is_refused():
    model = build()
    quantize_module(model, batches(), PUBLISHED)
    with pytest.raises(PreflightError, match="this layer is quantized already"):
        quantize_module(model, batches(), PUBLISHED)


def test_progress_gets_every_row():
    rows = []
    result = quantize_module(build(), batches(), PUBLISHED, progress=rows.append)
    assert rows == result.rows


def test_what_stays_float_is_named():
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ConvTranspose2d(4, 4, 2), nn.Flatten(2), nn.MultiheadAttention(81, 1)
    )
    data = [torch.randn(4, 2, 10, 10)]

    def call(net, x):
        x = net[:3](x)
        net[3](x, x, x)

    options = {"bits": 4, "group_size": None, "call": call, "overrides": {"3.*": "skip"}}
    with pytest.warns(UserWarning, match="transposed convolutions .* stay float: 1;") as caught:
        result = quantize_module(copy.deepcopy(model), data, "rtn", **options)
    assert caught[0].filename == __file__
    expected = {
        "1": "ConvTranspose2d",
        "3": "MultiheadAttention",
        "3.out_proj": "NonDynamicallyQuantizableLinear",
    }
    assert result.left_float == expected == result.to_dict()["left_float"]
    assert result.table().endswith(
        "in float: 1 (ConvTranspose2d), 3 (MultiheadAttention), "
        "3.out_proj (NonDynamicallyQuantizableLinear)"
    )
    options["overrides"] |= {"1": "skip"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = quantize_module(model, data, "rtn", **options)
    assert again.left_float == expected and again.matrices.keys() == {"0"}
