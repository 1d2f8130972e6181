"""A language model and a UNet in one sweep file."""

from __future__ import annotations

import json

import numpy as np
import pytest
from helpers.sweep_cases import HEAD, folder, write

from ptqkit.errors import PreflightError
from ptqkit.study.cells import FLOAT, OK
from ptqkit.sweep import read_plan, run_sweep
from ptqkit.sweep.results import rows, table, write_results

diffusers = pytest.importorskip("diffusers")

UNET = """
[[models]]
name = "unet"
path = "unet"
sampling = {steps = 2, latents = 4}

[[tasks]]
name = "images"
kind = "samples"
images = 3
"""

RECIPES = """
[[recipes]]
name = "W4"
models = ["unet"]
preset = "rtn"
bits = 4
group_size = "channel"
softmax = ["float", {bits = 4, correction = ["none", "row_sum"], grid_of = "exponentials"}]

[[recipes]]
name = "SM4"
models = ["unet"]
preset = "float"
softmax = {bits = 4, granularity = "step_head"}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The files of a sweep, with a tiny UNet beside them."""
    from helpers.diffusion_models import tiny_model
    from safetensors.torch import save_file

    path, model = folder(tmp_path_factory.mktemp("sweep")), tiny_model()
    model.unet.save_pretrained(path / "unet" / "unet")
    model.scheduler.save_pretrained(path / "unet" / "scheduler")
    save_file({"embeddings": model.labels}, path / "unet" / "labels.safetensors")
    return path


def test_samples_are_compared_with_those_of_the_float_model(place):
    plan = read_plan(write(place, UNET, RECIPES))
    result = run_sweep(plan, place / "out")
    found = {c.recipe: c for c in result.cells}
    assert result.count(OK) == 5 and found[FLOAT].value == 0
    assert all(len(c.losses) == 3 for c in result.cells)
    rounded, plain, summed, *_ = (found[n] for n in found if n.startswith("W4"))
    # What rounding the softmax costs comes on top of what the weights cost; correcting it, less.
    assert rounded.value < summed.value < plain.value and found["SM4"].value > 0
    assert rounded.bits_per_weight < 6 and found["SM4"].bits_per_weight == 32
    assert rounded.value == pytest.approx(np.mean(rounded.losses))

    from helpers.diffusion_models import tiny_model

    from ptqkit.diffusion import sample
    from ptqkit.nn import quantize_module

    model = tiny_model()
    options = {"steps": 2}
    noise, context = model.noise(3), model.context(3)
    x = sample(model.unet, model.scheduler, noise, context, **options)
    quantize_module(model.unet, None, "rtn", bits=4, group_size=None)
    y = sample(model.unet, model.scheduler, noise, context, **options)
    ratios = ((y - x) ** 2).flatten(1).sum(1) / (x**2).flatten(1).sum(1)
    np.testing.assert_allclose(rounded.losses, ratios, rtol=1e-4)

    shown = table(result)
    assert f"{-10 * np.log10(rounded.value):.2f} dB ± " in shown
    again = run_sweep(plan, place / "out")
    assert all(c.reused for c in again.cells) and rows(again) == rows(result)
    write_results(result)
    assert json.loads((place / "out" / "results.json").read_text())["rows"][0]["value"] == 0


def test_draws_change_what_is_fitted_alone(place):
    plan = read_plan(write(place, "[calibration]\ndraws = 2\n", UNET, RECIPES))
    result = run_sweep(plan, place / "draws", only="unet/SM4*/*")
    fitted = [c for c in result.cells if c.recipe == "SM4"]
    assert [c.draw for c in fitted] == [0, 1] and fitted[0].value != fitted[1].value
    assert sum(c.recipe.startswith("W4") for c in result.cells) == 3


def test_both_kinds_in_one_file(place):
    plan = read_plan(write(place, HEAD, UNET, RECIPES))
    assert {m.name: m.tasks for m in plan.models} == {"small": ("wiki",), "unet": ("images",)}
    assert plan.models[0].sampling is None and plan.models[1].sampling.steps == 2


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ('[[recipes]]\nname = "x"\npreset = "rtn"\nbits = 4\ngroup_size = "channel"\n'
         'row_coupling = 3\nmethod = "gptq"\nfeedback = true\n',
         "'x': row_coupling is for language models; leave 'unet' out"),
        ('[[recipes]]\nname = "x"\npreset = "float"\nsoftmax = {correction = "row_length"}\n',
         "'x': row_length is for language models; leave 'unet' out"),
        ('[[recipes]]\nname = "x"\npreset = "float"\nsoftmax = {granularity = "step"}\n',
         "'x': corrections per time step are not for language models; leave 'small' out"),
    ],
)  # fmt: skip
def test_recipes_of_the_other_kind_are_refused(place, part, message):
    with pytest.raises(PreflightError) as error:
        read_plan(write(place, HEAD, UNET, part))
    assert message in str(error.value)


def test_mistakes(place):
    wrong = UNET.replace("steps = 2", "step = 2").replace(
        "[[tasks]]", 'tasks = ["wiki"]\n[[tasks]]'
    )
    with pytest.raises(PreflightError) as error:
        read_plan(
            write(
                place, HEAD, wrong.replace('path = "unet"', 'path = "unet"\nprompts = "x"'), RECIPES
            )
        )
    text = str(error.value)
    assert "unknown key 'step'" in text and "prompts are for a pipeline" in text
    assert "tasks names 'wiki', which is no task of its kind" in text
    own = UNET.replace("sampling", "calibration = {samples = 4, seed = 1}\nsampling")
    with pytest.raises(PreflightError, match="samples of its own, without samples: give seed"):
        read_plan(write(place, own, RECIPES))
    with pytest.raises(PreflightError, match="unknown key 'sed'"):
        read_plan(write(place, "[calibration]\nsed = 1\n", UNET, RECIPES))
    with pytest.raises(PreflightError, match="key 'calibration' is missing"):
        read_plan(write(place, HEAD.replace("[calibration]", "[other]"), RECIPES))
