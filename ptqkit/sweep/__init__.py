"""Grids of recipes, models and tasks: the study behind ``ptqkit sweep FILE.toml``.

A sweep file says what to compare. Every key is checked, and all problems are reported at once,
before anything runs. Paths in it are relative to the file itself::

    name = "w8a8"
    output = "w8a8"              # folder of the results, below the current one; or --out

    [calibration]                # what recipes are fitted to
    text = "train.txt"           # .txt, .jsonl, either as .gz; "demo": the embedded model's text
    samples = 32                 # windows (128)
    sequence_length = 256        # tokens per window (512)
    # documents = [0, 400]       # of a .jsonl file, only these lines: first, and end
    # whitespace = "collapse"    # every run of white space becomes one space ("keep")
    # seed = 0, batch_size = 4, start_token = "auto" | "none" | id
    # draws = 3                  # each recipe on so many drawings of the windows (1)

    [[models]]
    name = "small"
    path = "models/small"        # a folder; "demo": the embedded model
    # dtype = "float32"          # arithmetic; "auto": as stored, float16 as float32 on a CPU
    # optional = true            # a folder that does not exist skips the model
    # outliers = {channels = 6, factor = 30, seed = 0}   # inject outliers first
    # calibration = {text = "other.txt"}                 # changes of [calibration] for this model
    # tasks = ["wiki"]           # by name; without, all

    [[models]]                   # a diffusion model: a UNet with labels, or a pipeline of diffusers
    name = "unet"
    path = "models/unet"
    # prompts = "prompts.txt"    # of a text-to-image pipeline, one on each line
    # sampling = {steps = 20, guidance = 1.0, latents = 100, batch_size = 8}

    [[tasks]]
    name = "wiki"
    kind = "perplexity"
    text = "test.txt"            # as above, with documents and whitespace; each line one text
    # max_tokens = 20000, window = 256, stride = 128, start_token = "auto", batch_size = 4
    # windows = 20               # with window: so many, at equal distances from the joined text
    # optional = true            # a file that does not exist skips the task (zero-shot too)

    [[tasks]]
    name = "piqa"
    kind = "zero-shot"           # needs lm-eval: pip install 'ptqkit[eval]'
    file = "piqa.jsonl.gz"
    # limit = 200                # the first items only
    # metric = "acc_norm"        # "acc" (default): by the log-likelihood as it is
    # too_long = "skip"          # leave out items longer than the model takes ("error")
    # batch_size = 8

    [[tasks]]
    name = "samples"
    kind = "samples"             # of diffusion models: final samples against the float model's
    # images = 8, seed = 0

    [[recipes]]
    name = "AWEQ"                # parts, or preset and options of one recipe, as in the next
    parts = ["AWE", {part = "RTN", bits = 8, group_size = "channel"}, "BiasCorrection"]

    [[recipes]]
    name = "GPTQ INT3"
    preset = "reference"
    bits = 3
    # models = ["small"]         # by name; without, all

    [[recipes]]
    name = "grid"                # a list is an axis of a product: 8 recipes
    preset = "quality"
    bits = [3, 4]
    group_size = [64, "channel"]
    softmax = ["float", {bits = 8, correction = "bias"}]   # range, grid_of

    [[recipes]]
    name = "SM8"                 # weights and activations stay float
    preset = "float"
    softmax = {bits = 8, correction = "row_sum"}

    [[published]]                # figures of papers: a table of their own, never among ours
    model = "LLaMA-7B"
    recipe = "GPTQ INT4"
    task = "WikiText-2"
    value = 6.09
    source = "where it stands"

Items of a zero-shot file are JSON lines of one of three forms: ``context``, ``choices``, ``gold``
(the index of the right choice); ``contexts``, ``continuation``, ``gold`` (which context makes the
continuation likeliest); ``context``, ``continuation`` (right if greedy decoding writes it). A space
goes before every choice and continuation.

Each model runs as it is (row ``float``) and with each recipe. What is measured is a *cell*: one
model, one recipe, one task, kept in ``OUT/cells/`` under a hash of all that decides it: recipe,
calibration settings and text, model files, task settings and text, and the version of ptqkit. A
second run measures only what is missing; a cell that failed is tried again. With ``draws``, a
recipe that is fitted to calibration text has a cell per draw (``GPTQ#1`` is the second).

``OUT`` gets ``results.csv`` (a row per cell), ``results.json`` (the same with the settings),
``results.png``, and ``published.csv`` where the file has published figures. Degradation is
``100 (quantized - float) / float`` per task: above 0 is worse for perplexity, below 0 is worse
for an accuracy. Means are over the tasks of one kind. An accuracy near ``chance`` says nothing
about a recipe, however far it moves in percent.
"""

from __future__ import annotations

from typing import Any

from ptqkit.study.cells import CellsFailed
from ptqkit.sweep.plan import Plan
from ptqkit.sweep.plan_reader import read_plan

__all__ = ["CellsFailed", "Plan", "read_plan", "run_sweep"]


def __getattr__(name: str) -> Any:
    if name == "run_sweep":
        # It imports PyTorch and transformers.
        from ptqkit.sweep.run import run_sweep

        return run_sweep
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
