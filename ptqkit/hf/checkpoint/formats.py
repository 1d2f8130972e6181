"""List the checkpoint formats, and choose among them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ptqkit.arrays.matrix import QuantizedMatrix
from ptqkit.errors import by_cause, check_choice
from ptqkit.hf.checkpoint.base import CheckpointFormat
from ptqkit.hf.checkpoint.compressed_tensors import CompressedTensorsFormat
from ptqkit.hf.checkpoint.gptq import GptqFormat
from ptqkit.hf.checkpoint.native import NativeFormat, PanelFormat
from ptqkit.hf.checkpoint.spec import LayerSpec
from ptqkit.nn.activations import ActivationQuantizer

__all__ = ["FORMATS", "NATIVE", "PANELS", "choose_format", "format_problems", "stored_format"]

NATIVE = NativeFormat()
PANELS = PanelFormat()
_PREFERRED = CompressedTensorsFormat()

#: Every format by the name that ``checkpoint_format`` takes; "auto" is the choice among them.
FORMATS: Mapping[str, CheckpointFormat] = {
    f.name: f for f in (_PREFERRED, GptqFormat(1), GptqFormat(2), NATIVE, PANELS)
}


def stored_format(settings: Mapping[str, Any]) -> CheckpointFormat:
    """Return the format of a file with this ``quantization_config``.

    Raises
    ------
    ValueError
        If it is none of these.
    """
    for candidate in FORMATS.values():
        if candidate.reads(settings):
            return candidate
    method = settings.get("quant_method")
    kin = [f.name for f in FORMATS.values() if f.method == method]
    if kin:
        stored = settings.get("checkpoint_format")
        raise ValueError(f"checkpoint_format {stored!r} is not read, only {' and '.join(kin)}")
    methods = list(dict.fromkeys(f.method for f in FORMATS.values()))
    raise ValueError(
        f"quant_method {method!r} is not read, only {', '.join(methods[:-1])} and {methods[-1]}"
    )


def format_problems(
    specs: Sequence[LayerSpec], name: str, linears: Sequence[str] | None = None
) -> list[str]:
    """Return every reason why a format cannot carry the layers; empty if it can.

    Parameters
    ----------
    specs : sequence of LayerSpec
    name : str
    linears : sequence of str, optional
        Names of all linear modules of the model; by default those of the layers.

    Raises
    ------
    ValueError
        If ``name`` is not one of :data:`FORMATS`.
    """
    check_choice("checkpoint_format", name, FORMATS)
    found = [problem for spec in specs for problem in FORMATS[name].problems(spec)]
    every = [spec.name for spec in specs] if linears is None else linears
    return found + FORMATS[name].joint_problems(specs, every)


def choose_format(
    specs: Sequence[LayerSpec],
    layers: Mapping[str, QuantizedMatrix],
    name: str = "auto",
    activations: Mapping[str, ActivationQuantizer] | None = None,
    foreign: Sequence[str] = (),
    linears: Sequence[str] | None = None,
    absent: Sequence[str] = (),
    prove: Callable[[], Sequence[str]] | None = None,
    prove_stock: Callable[[], Sequence[str]] | None = None,
) -> tuple[CheckpointFormat, str]:
    """Return the format to write and the reason for it.

    Parameters
    ----------
    foreign : sequence of str
        Further reasons against every format but ptqkit's own.
    linears : sequence of str, optional
        Names of all linear modules of the model; by default those of the layers.
    absent : sequence of str
        Reasons against every format.
    prove : callable, optional
        Returns the reasons why the model class cannot load packed layers; asked for a format that
        ``from_pretrained`` reads without ptqkit, once nothing else speaks against it.
    prove_stock : callable, optional
        Returns the reasons why transformers alone cannot, though ptqkit can; they count for "auto".

    Raises
    ------
    ValueError
        If the format asked for cannot carry every layer exactly; lists each layer and reason.
    """

    def problems(candidate: str) -> list[str]:
        found = format_problems(specs, candidate, linears)
        for spec in specs:
            quantizer = (activations or {}).get(spec.name)
            found += FORMATS[candidate].data_problems(spec, layers[spec.name], quantizer)
        found += absent
        if not FORMATS[candidate].foreign:
            return found
        found += foreign
        stock = not FORMATS[candidate].float_parts
        return list(prove()) if prove is not None and stock and not found else found

    if name != "auto":
        found = problems(name)
        if found:
            raise ValueError(_listing(f"format {name!r} cannot carry this model", found, layers))
        return FORMATS[name], "asked for"
    found = problems(_PREFERRED.name)
    if not found and prove_stock is not None:
        found = list(prove_stock())
    if not found:
        return _PREFERRED, "every layer fits it exactly; stock transformers loads it"
    own = problems(NATIVE.name)
    if own:
        raise ValueError(_listing("no checkpoint format can carry this model", own, layers))
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return NATIVE, f"{_PREFERRED.name} cannot carry {found[0]}{more}"


def _listing(head: str, found: Sequence[str], layers: Mapping[str, Any]) -> str:
    problems = by_cause(found, layers)
    return f"{head}, {len(problems)} problem(s):\n" + "\n".join(f"  - {p}" for p in problems)
