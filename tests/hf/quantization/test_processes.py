"""Several processes that quantize one model: shares, agreement, and ends."""

from __future__ import annotations

import os
import signal
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers.driver_models import build, tokens
from helpers.forked_groups import in_processes

from ptqkit.errors import CalibrationError, UsageError
from ptqkit.hf import quantize
from ptqkit.hf.quantization import moments, solve, work
from ptqkit.hf.quantization.processes import Processes, SharedMoments
from ptqkit.hf.quantization.row_shares import RowShare
from ptqkit.nn import output_moments, transfer
from ptqkit.nn.statistics import TorchDrift, TorchHessian
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
        ("best", {"schedule": "replay"}),
    ],
)
def test_two_processes_give_the_codes_of_one(recipe, options, tmp_path, monkeypatch):
    """Five batches are not divided evenly, and only the first process writes."""
    # Runs of coupled rows short enough for both to have some.
    monkeypatch.setattr(output_moments, "MOST_ROWS", 12)
    alone = run(recipe=recipe, **options)

    def call(rank):
        out = None if rank else tmp_path / "out"
        result = run(recipe=recipe, distributed=True, out_dir=tmp_path / "out", **options)
        assert (result.checkpoint is None) == (out is None)
        names = alone.activations
        scales = {n: float(result.activations[n].scale) for n in names}
        tokens_seen = {row.name: row.tokens for row in result.report.layers}
        # Of a process's own batches: three of five at most.
        memory = [r.report.memory["estimate_one_pass"] for r in (result, alone)]
        assert memory[0] < memory[1]
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


def test_schedules_agree_where_the_float_model_runs_along():
    def call(rank):
        results = [run(recipe="best", distributed=True, schedule=s) for s in ("one-pass", "replay")]
        assert [r.report.schedule for r in results] == ["one-pass", "replay"]
        return [{n: (m.codes, m.scales) for n, m in r.matrices.items()} for r in results]

    for one, replay in in_processes(call):
        assert all(
            np.array_equal(a, b) for n in one for a, b in zip(one[n], replay[n], strict=True)
        )


def test_what_a_device_makes_does_not_depend_on_it_either(monkeypatch):
    """The way of a GPU, by torch on the host: sums of every batch in float64, rows solved there."""

    class Wide(SharedMoments):
        def __init__(self, name, needs_ranges, writer, narrow, on_host):
            super().__init__(name, needs_ranges, writer, narrow, False)

    monkeypatch.setattr(solve, "computes", lambda device: True)
    monkeypatch.setattr(work, "SharedMoments", Wide)
    monkeypatch.setattr(moments, "accumulator", TorchHessian)
    monkeypatch.setattr(moments, "drift_accumulator", TorchDrift)

    def call(rank):
        result = run(tokens(6), "best", row_coupling=0, refit_rounds=0, distributed=True)
        return {n: (m.codes, m.scales) for n, m in result.matrices.items()}

    (one,), two = (in_processes(call, size) for size in (1, 2))
    for other in two:
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
    for count in (1, 40, 16 * size, 16 * size + 5, 700):
        runs = [slice(i, min(i + 60, count)) for i in range(8, count, 60)]
        shares, coupled = [], []
        for rank in range(size):
            processes = object.__new__(Processes)
            processes.rank, processes.size = rank, size
            shares.append(RowShare(processes, count).own)
            coupled.append(RowShare(processes, count, runs).own)
        for found in (shares, coupled):
            if count < 16 * size:
                assert all(s == slice(0, count) for s in found)
            elif found is shares or count == 700:
                assert [i for s in found for i in range(s.start, s.stop)] == list(range(count))
        for run in runs:  # one process has all of it, or all have
            assert any(s.start <= run.start and run.stop <= s.stop for s in coupled)


def test_copies_come_in_parts(monkeypatch):
    monkeypatch.setattr(transfer, "_STAGE", 1000)
    values = torch.arange(3001, dtype=torch.int32).view(-1, 1)
    found = np.zeros(values.shape, np.int32)
    flat = torch.from_numpy(found.reshape(-1).view(np.uint8))
    copies = transfer.HostCopies()
    copies._copy(values.view(-1).view(torch.uint8), flat, None)
    assert np.array_equal(found, values)
    assert copies.begin(values).base is not None  # the host's own is not copied
    copies.wait()


def test_a_copy_that_fails_is_told_of_in_the_end(monkeypatch):
    told = []

    def copy(self, values, target, ready):
        told.append(len(values))
        if len(told) == 2:
            raise RuntimeError("copy of the second")

    monkeypatch.setattr(transfer.HostCopies, "_copy", copy)
    monkeypatch.setattr(transfer, "_WAITING", 3)
    copies = transfer.HostCopies()
    for size in range(1, 10):  # whoever begins a later copy is not to blame
        copies.begin(torch.empty(size, dtype=torch.uint8, device="meta"))
    with pytest.raises(RuntimeError, match="copy of the second"):
        copies.wait()
    assert told == list(range(1, 10))
    copies.begin(torch.empty(1, dtype=torch.uint8, device="meta"))
    copies.wait()


def test_sums_are_added_up_in_one_order():
    seen = []

    class Alone(Processes):
        def __init__(self):
            self.rank, self.size, self._device = 0, 1, torch.device("cpu")

        def gather_numbers(self, *own):
            return [list(own)]

        def _mean(self, own, shape, tokens):
            seen.append(int(own[0, 0]))
            return own.float()

    for names in (("/hessian", "/drift", "w"), ("w", "/drift", "/hessian")):
        own = SharedMoments("layer", False, "w", None, True)
        own.sums = {n: torch.full((2, 2), float(len(n)), dtype=torch.float64) for n in names}
        own.tokens = 1
        found = Alone().reduce(own)
        assert found.drift.matrix[0, 0] == 6 and found.residuals["w"].matrix[0, 0] == 1
    assert seen[:3] == seen[3:] and len(seen) == 6


def test_a_group_without_hosts_is_refused(monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend_config", lambda: "cuda:nccl")
    with pytest.raises(UsageError, match="cpu:gloo,cuda:nccl"):
        Processes(torch.device("cpu"))
