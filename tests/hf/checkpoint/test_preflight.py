"""What a format says of a recipe before a run is what it says of the result afterwards."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
import torch
from helpers.checkpoint_models import TOKENS, build
from torch import nn
from transformers.pytorch_utils import Conv1D

import ptqkit
from ptqkit.errors import PreflightError
from ptqkit.hf.checkpoint.formats import FORMATS, choose_format
from ptqkit.hf.checkpoint.spec import describe_layers, describe_targets
from ptqkit.hf.models.structure import Target
from ptqkit.nn.activations import ActivationQuantizer
from ptqkit.nn.linear import LinearView
from ptqkit.recipe.options import ActivationQuantization
from ptqkit.recipe.recipe import Recipe

OUT, IN = 32, 32
NAME = "layers.0.linear"
INPUTS = (
    None,
    ActivationQuantization(8),
    ActivationQuantization(8, outlier_threshold=6.0),
    ActivationQuantization(8, "tensor"),
    ActivationQuantization(10, "tensor"),
)
SEEN = [
    (inputs, flat)
    for inputs in INPUTS
    for flat in ((False, True, None) if inputs is not None and inputs.dynamic else (False,))
]
METHODS = [
    {"method": "rtn", "grid": "minmax"},
    {"method": "rtn", "grid": "minmax", "per_tensor": True},
    *({"method": "gptq", "order": order} for order in ("natural", "act", "group-act")),
    {"method": "gptq", "order": "act", "static_groups": True},
]


@functools.cache
def _data() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(5)
    weight = rng.normal(size=(OUT, IN)).astype(np.float32)
    x = rng.normal(size=(256, IN)) * rng.uniform(0.3, 3, IN)
    return weight, (x.T @ x / len(x)).astype(np.float32)


@functools.lru_cache(None)
def _matrix(method, bits, group_size, symmetric, scale_dtype, min_zero_point):
    weight, hessian = _data()
    grid = {
        "bits": bits,
        "group_size": group_size,
        "symmetric": symmetric,
        "scale_dtype": scale_dtype,
        "min_zero_point": min_zero_point,
    }
    options = {k: v for k, v in method if k not in ("method", "grid")}
    if dict(method)["method"] == "rtn":
        return ptqkit.rtn(weight, **grid, **options)
    return ptqkit.gptq(weight, hessian, grid="minmax", **grid, **options)


def _quantizer(spec, dtype):
    if spec is None:
        return {}
    ranges = ptqkit.ChannelRanges(IN)
    ranges.update(np.random.default_rng(6).normal(size=(50, IN)).astype(np.float32))
    return {NAME: ActivationQuantizer.calibrate(spec, ranges, dtype)}


def _model(kind, dtype):
    linear = nn.Linear(IN, OUT) if kind == "linear" else Conv1D(OUT, IN)
    model = nn.Module()
    model.layers = nn.ModuleList([nn.ModuleDict({"linear": linear.to(dtype)})])
    return model, linear


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("linear", torch.float32),
        ("linear", torch.float16),
        ("linear", torch.bfloat16),
        ("linear", torch.float64),
        ("conv1d", torch.float32),
    ],
)
@pytest.mark.parametrize("name", FORMATS)
def test_the_recipe_tells_what_saving_will_say(name, kind, dtype):
    model, linear = _model(kind, dtype)
    quantizers = {spec: _quantizer(spec, dtype) for spec in INPUTS}
    agreed = {True: 0, False: 0}
    for method, bits, group_size, symmetric, scale_dtype in itertools.product(
        METHODS,
        (3, 5, 8, "ternary"),
        (None, 8, IN),
        (False, True),
        (None,) if dtype in (torch.float32, torch.float64) else (None, "float32"),
    ):
        if method.get("per_tensor") and group_size is not None:
            continue
        options = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
        for inputs, flat in SEEN:
            recipe = Recipe(**options, **method, scale_dtype=scale_dtype, activations=inputs)
            recipe = FORMATS[name].adapt(recipe)
            target = Target(NAME, LinearView(linear), recipe, None)
            [early] = describe_targets({NAME: target}, {NAME: flat})
            matrix = _matrix(
                tuple(method.items()),
                bits,
                group_size,
                symmetric,
                early.grid.scale_dtype,
                recipe.min_zero_point,
            )
            layers = {NAME: matrix}
            [late] = describe_layers(model, layers, quantizers[inputs], {NAME: flat})
            assert early == late
            forecast = FORMATS[name].problems(early) + FORMATS[name].forecast(early)
            try:
                choose_format([late], layers, name, quantizers[inputs])
                found = []
            except ValueError as error:
                found = [line[4:] for line in str(error).splitlines()[1:]]
            assert sorted(found) == sorted(forecast), (options, method, inputs)
            agreed[not found] += 1
    own = FORMATS[name].method == "ptqkit"
    assert agreed[False] or own
    carried = dtype != torch.float64 and (kind == "linear" or own)
    assert bool(agreed[True]) == carried


@pytest.mark.parametrize(
    ("kind", "name", "changes", "problem"),
    [
        ("llama", "gptq", {"overrides": {"*.up_proj": {"bits": 8}}}, "one bits and group_size"),
        ("llama", "gptq", {"overrides": {"*.1.*.up_proj": "skip"}}, "quantized in every block"),
        ("llama", "gptq_v2", {"include": ("lm_head",)}, "inside the repeated blocks only"),
        ("llama", "compressed-tensors", {"symmetric": False}, "loads asymmetric grids only"),
        ("gpt2", "compressed-tensors", {}, "not Conv1D"),
        (
            "opt",
            "compressed-tensors",
            {"activations": ActivationQuantization(8)},
            "inputs have no batch axis",
        ),
        ("opt", "compressed-tensors", {"activations": ActivationQuantization(8, "tensor")}, ""),
        ("llama", "compressed-tensors", {"activations": ActivationQuantization(8)}, ""),
        ("llama", "gptq", {}, ""),
        ("gpt2", "ptqkit", {"bits": "ternary"}, ""),
    ],
)
def test_a_run_is_refused_exactly_if_its_result_would_be(kind, name, changes, problem, tmp_path):
    options = {"bits": 4, "group_size": 32, "symmetric": True, **changes}
    run = functools.partial(ptqkit.quantize, build(kind), "rtn", TOKENS, **options)
    if not problem:
        run(checkpoint_format=name, out_dir=tmp_path / "out")
        return
    with pytest.raises(PreflightError, match=problem) as refused:
        run(checkpoint_format=name, out_dir=tmp_path / "out")
    result = run(**({"scale_dtype": "float16"} if name.startswith("gptq") else {}))
    with pytest.raises(ValueError, match=problem) as caught:
        result.save(tmp_path / "out", name)
    late = [line[4:] for line in str(caught.value).splitlines()[1:]]
    assert sorted(late) == sorted(p.split(": ", 1)[1] for p in refused.value.problems)
    assert not (tmp_path / "out").exists()


def test_the_command_line_offers_every_format(capsys):
    from ptqkit.cli import main

    with pytest.raises(SystemExit):
        main(["quantize", "--help"])
    assert f"--format {{{','.join(('auto', *FORMATS))}}}" in capsys.readouterr().out
