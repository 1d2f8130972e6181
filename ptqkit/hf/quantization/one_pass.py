"""One forward pass per batch, in which every layer is quantized on the way.

Every batch is a coroutine through the whole forward pass that pauses before each linear layer.
When all wait at the same layer, H is accumulated from the waiting inputs, the layers fed by that
tensor are quantized in place, and all go on: each operation runs once per batch, and every layer
sees inputs from layers that are already quantized.

With error propagation every batch has a second coroutine, through the float model (see
:mod:`ptqkit.hf.quantization.float_model`). If layers are to answer for the errors of the residual
stream, each coroutine also keeps what the block's next writer adds to.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ptqkit.errors import UnsupportedModuleError
from ptqkit.hf.models.stream import following_streams
from ptqkit.hf.quantization.coroutines import Coroutine, pause
from ptqkit.hf.quantization.float_model import OriginalWeights
from ptqkit.hf.quantization.memory import HeapPages
from ptqkit.hf.quantization.moments import Moments
from ptqkit.hf.quantization.work import Step, Steps, Work
from ptqkit.nn.activations import installed_quantizer
from ptqkit.nn.forward import device_of, forward, hooks, tensor_key, thread_state

__all__ = ["one_pass_groups"]


def one_pass_groups(work: Work) -> Steps:
    """Yield every group with its moments, in one forward pass per batch.

    Returns
    -------
    str or None
        None once every group is done; otherwise why the batches could not go on together. What is
        done by then stays done, and :func:`~ptqkit.hf.quantization.replay.replay_groups` takes the
        rest.
    """
    current: list[Coroutine] = []

    def at_layer(name: str, value: torch.Tensor) -> torch.Tensor | None:
        if name not in work.done:
            pause(name, value)
            # Torch collected this call's hooks before the pause, without the quantizer installed
            # in it; at the layers that share the input it comes after this hook.
            quantizer = installed_quantizer(work.targets[name].module)
            return None if quantizer is None else quantizer(value)
        if current[0] in floats:
            originals.ran(name)
        # A layer that was quantized with another one's H: its input must be that one's.
        seen = current[0].keys.get(work.group_of[name])
        if seen is not None and seen != tensor_key(value):
            raise UnsupportedModuleError(
                f"{name} shared its input with {work.groups[work.group_of[name]][0]} in a short "
                "probe, but not on the calibration data; quantize with share_inputs=False"
            )
        return None

    coroutines = _start(work)
    floats = _start(work) if work.propagate else []
    originals = OriginalWeights(work.targets, len(floats))
    waiting = None
    pages = HeapPages(device_of(work.model), work.spare, work.expected)
    streams = following_streams(work.model, work.writers, lambda: current[0])
    try:
        with work.places.entering(), hooks(work.modules(), at_layer), streams:
            for number, (group, position) in enumerate(
                zip(work.groups, work.positions(), strict=True)
            ):
                if number:
                    work.places.settle()
                with originals.in_place(waiting):
                    reason = _step(floats, current)
                reason = reason or _step(coroutines, current) or _met(coroutines + floats, group)
                reason = work.agree(reason)
                if reason is not None:
                    return reason
                pages.release()
                work.places.leave(position)
                if floats:
                    originals.keep(group)
                waiting = group[0]
                yield Step(
                    work.members(group),
                    _moments(work, group, coroutines, floats),
                    work.unwritten,
                )
                work.done.update(group)
    finally:
        for coroutine in [*coroutines, *floats]:
            coroutine.close()
        pages.release(ended=True)
    return None


def _start(work: Work) -> list[Coroutine]:
    """Make one coroutine per batch; none has run yet."""
    return [
        Coroutine(lambda batch=batch: forward(work.model, batch))  # type: ignore[misc]
        for batch in work.batches
    ]


def _step(coroutines: Sequence[Coroutine], current: list[Coroutine]) -> str | None:
    """Let all go on to their next pause; return why they cannot, None if they can."""
    baseline = thread_state()
    for coroutine in coroutines:
        current[:] = [coroutine]
        coroutine.step()
        # At once: the next coroutine would run inside this one's mode, and modes that are not left
        # in the order they were entered in leak.
        if thread_state() != baseline:
            return (
                f"{coroutine.name} runs inside a thread-local mode (such as autocast) set by the "
                "model"
            )
    return None


def _met(coroutines: Sequence[Coroutine], group: list[str]) -> str | None:
    """Return why the coroutines do not all wait at the group's first layer; None if they do."""
    names = {c.name for c in coroutines}
    if names == {group[0]}:
        return None
    shown = ", ".join(sorted("the end" if n is None else n for n in names)[:4])
    return f"the batches did not meet at {group[0]} (they reached {shown})"


def _moments(
    work: Work, group: list[str], coroutines: Sequence[Coroutine], floats: Sequence[Coroutine]
) -> Moments | Exception:
    """Accumulate the inputs that the coroutines wait with, and note whose inputs they are."""
    found = work.accumulator(group)
    for index, coroutine in enumerate(coroutines):
        assert coroutine.value is not None
        other, streams = None, None
        if floats:
            other, stream, now = floats[index].value, floats[index].stream, coroutine.stream
            streams = None if stream is None or now is None else (stream, now)
        found.add(coroutine.value, work.batches[index], work.masks[index], other, streams)
    work.note_routed(group, found)
    work.borrow_pool(group, found)
    if found.lacks_tokens:
        pool = None
        for index, coroutine in enumerate(coroutines):
            assert coroutine.value is not None
            batch, mask = work.batches[index], work.masks[index]
            pool = found.add_pool(coroutine.value, batch, mask, pool)
        work.use_pool(group, found, pool)
    if len(group) > 1:
        for coroutine in [*coroutines, *floats]:
            assert coroutine.value is not None
            coroutine.keys[work.group_of[group[0]]] = tensor_key(coroutine.value)
    moments = work.finish(found)
    assert moments is not None  # every process has batches
    return moments
