"""Several processes that quantize one model: shares, agreement, and ends."""

from __future__ import annotations

import os
import signal
import time

import numpy as np
import pytest
import torch
from helpers.driver_models import build, tokens
from helpers.forked_groups import in_processes

from ptqkit.errors import CalibrationError, UsageError
from ptqkit.hf import quantize
from ptqkit.hf.quantization.processes import Processes
from ptqkit.recipe.options import ActivationQuantization

OPTIONS = {"bits": 3, "group_size": 16, "batch_size": 2, "progress": False}
# Moments are added up in another order: a code may flip where a value lies on a rounding tie.
TIES = 1e-3


def run(data=None, recipe="reference", **options):
    return quantize(build(), recipe, tokens(10) if data is None else data, **OPTIONS, **options)


@pytest.mark.parametrize(
    "recipe, options",
    [
        ("quality", {"schedule": "one-pass"}),
        (
            "reference",
            {
                "schedule": "replay",
                "bias_correction": True,
                "activations": ActivationQuantization(8, "tensor"),
            },
        ),
        ("best", {}),
    ],
)
def test_two_processes_give_the_codes_of_one(recipe, options, tmp_path):
    """Five batches are not divided evenly, and only the first process writes."""
    alone = run(recipe=recipe, **options)

    def call(rank):
        out = None if rank else tmp_path / "out"
        result = run(recipe=recipe, distributed=True, out_dir=tmp_path / "out", **options)
        assert (result.checkpoint is None) == (out is None)
        names = alone.activations
        scales = {n: float(result.activations[n].scale) for n in names}
        tokens_seen = {row.name: row.tokens for row in result.report.layers}
        return {n: m.codes for n, m in result.matrices.items()}, scales, tokens_seen

    first, second = in_processes(call)
    for codes, scales, seen in (first, second):
        wrong = sum(int((m.codes != codes[n]).sum()) for n, m in alone.matrices.items())
        assert wrong <= TIES * sum(m.codes.size for m in alone.matrices.values())
        # Biases are corrected by means of sums in another order.
        held = {n: float(q.scale) for n, q in alone.activations.items()}
        assert scales == pytest.approx(held, rel=1e-6)
        assert seen == {row.name: row.tokens for row in alone.report.layers}
    assert all(np.array_equal(first[0][n], second[0][n]) for n in first[0])


def test_codes_do_not_depend_on_the_number_of_processes():
    """Every batch has sums of its own, added up in float64: no tie comes out another way."""

    def call(rank):
        result = run(recipe="quality", distributed=True)
        return {n: (m.codes, m.scales) for n, m in result.matrices.items()}

    (one,), two, three = (in_processes(call, size) for size in (1, 2, 3))
    for other in (*two, *three):
        assert all(np.array_equal(a, b) for n in one for a, b in zip(one[n], other[n], strict=True))


def test_each_process_runs_its_own_batches():
    ids = tokens(10)

    def call(rank):
        seen = []
        model = build()
        layer = model.model.layers[1].mlp.down_proj
        layer.register_forward_pre_hook(lambda m, a: seen.append(a[0].shape[:-1].numel()))
        quantize(model, "reference", ids, distributed=True, schedule="one-pass", **OPTIONS)
        return sum(seen)

    probe = 16  # tokens of the short forward pass
    assert [count - probe for count in in_processes(call)] == [4 * 32, 6 * 32]


def test_a_process_that_dies_ends_the_others():
    def call(rank):
        def look(event):
            if event.index == 5:
                os.kill(os.getpid(), signal.SIGKILL)

        quantize(
            build(), "reference", tokens(10), distributed=True, **{**OPTIONS, "progress": look}
        )

    start = time.perf_counter()
    first, second = in_processes(call)
    assert first is None
    assert isinstance(second, ConnectionError)
    assert "another process of this run has ended" in str(second)
    assert time.perf_counter() - start < 50


def test_what_one_meets_all_are_told():
    """The second process alone has a batch whose inputs are not finite."""

    def call(rank):
        model = build()
        with torch.no_grad():
            model.model.embed_tokens.weight[63] = torch.inf
        ids = tokens(10).clamp(max=62)
        ids[-1, 5] = 63
        quantize(model, "reference", ids, distributed=True, **OPTIONS)

    for error in in_processes(call):
        assert isinstance(error, CalibrationError | ValueError)
        assert "q_proj" in str(error)
        assert "holds NaN or Inf" in str(error)


def test_no_process_is_without_data():
    def call(rank):
        quantize(build(), "reference", tokens(2), distributed=True, **OPTIONS)

    for error in in_processes(call):
        assert isinstance(error, CalibrationError)
        assert "2 processes share 1 batches" in str(error)


def test_rounding_to_nearest_needs_no_data():
    alone = quantize(build(), "rtn", **OPTIONS)

    def call(rank):
        result = quantize(build(), "rtn", distributed=True, **OPTIONS)
        return {n: m.codes for n, m in result.matrices.items()}

    for found in in_processes(call):
        assert all(np.array_equal(m.codes, found[n]) for n, m in alone.matrices.items())


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(UsageError, match="needs the processes of torchrun"):
        run(distributed=True)
    build().save_pretrained(tmp_path / "model")
    with pytest.raises(UsageError, match="quantized by one process"):
        quantize(tmp_path / "model", "rtn", stream=True, distributed=True, out_dir=tmp_path / "o")


@pytest.mark.parametrize("size", [2, 3, 7])
def test_rows_are_shared_out_and_joined(size):
    for count in (1, 40, 16 * size, 16 * size + 5):
        shares = []
        for rank in range(size):
            processes = object.__new__(Processes)
            processes.rank, processes.size = rank, size
            shares.append(processes.rows(count))
        if count < 16 * size:
            assert all(s == slice(0, count) for s in shares)
        else:
            assert [i for s in shares for i in range(s.start, s.stop)] == list(range(count))
