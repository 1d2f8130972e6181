"""The bias of a model's quantized softmax: estimated, corrected, compared, installed.

A fixed grid rounds most probabilities of a long row to zero, so that rows no longer sum to one.
What is missing on average can be taken from the offset of the grid at no cost at run time (Pandey
et al. 2023); see :mod:`ptqkit.nn.softmax.quantizer` for the formulas. What differs between
language models and UNets is in a :class:`SoftmaxBackend` each.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np
from torch import nn

from ptqkit._repr import one_line_repr
from ptqkit.arrays.softmax import GRIDS_OF, SoftmaxGrid, check_correction, softmax_grid
from ptqkit.errors import CalibrationError, UsageError, check_choice
from ptqkit.nn.attention import AttentionHook, AttentionModule
from ptqkit.nn.attention_quantizer import AttentionRanges
from ptqkit.nn.softmax.compare import OutputSQNR, SoftmaxComparison, softmax_hooks
from ptqkit.nn.softmax.quantizer import SoftmaxQuantizer
from ptqkit.nn.softmax.report import SoftmaxLayerReport, SoftmaxReport
from ptqkit.nn.softmax.search import RangeSearch, SearchEnds
from ptqkit.nn.softmax.statistics import Quantizer, SoftmaxStatistics
from ptqkit.nn.softmax.tables import (
    TWIN_SHIFTS,
    Log2Grid,
    TableGridQuantizer,
    TwinGrid,
)
from ptqkit.recipe.recipe import match_pattern

__all__ = [
    "GRIDS",
    "RANGES",
    "AttentionAccess",
    "SoftmaxBackend",
    "SoftmaxQuantization",
    "SoftmaxStudy",
    "check_heads",
    "choose_modules",
    "fixed_grid",
    "refuse_installed",
]

RANGES = ("fixed", "calibrated", "search")
GRIDS = ("probabilities", "exponentials", "squares", "log2", "twin")
"""Grids to choose from; the last two are other papers' (:mod:`ptqkit.nn.softmax.tables`)."""


class AttentionAccess(Protocol):
    """How the attention of one kind of model is hooked: a module with these functions."""

    def find_attention(self, model: nn.Module, /) -> dict[str, AttentionModule]:
        """Find the attention modules of a model by name."""

    def install_attention(self, model: nn.Module, hooks: Mapping[str, AttentionHook], /) -> Any:
        """Put hooks on attention modules."""

    def installed_attention(self, model: nn.Module, /) -> dict[str, AttentionHook]:
        """Return the hooks of a model by the name of their module."""

    def remove_attention(self, model: nn.Module, /) -> int:
        """Take all hooks off; returns how many there were."""


class SoftmaxBackend(Protocol):
    """One kind of model with calibration data.

    Attributes
    ----------
    model : nn.Module
    attention : AttentionAccess
    corrections, granularities : tuple
        Those that the kind of model can have.
    ends : SearchEnds
        Ranges that ``grid_range="search"`` tries.
    by_total : bool
        Whether the guard compares squared errors of all samples together, and not the mean of
        ratios of the samples.
    steps : tuple of int
        Time steps of the calibration data, to be distinguished; empty if there are none.
    """

    model: nn.Module
    attention: AttentionAccess
    corrections: tuple[str | None, ...]
    granularities: tuple[str, ...]
    ends: SearchEnds
    by_total: bool
    steps: tuple[int, ...]

    def run(self, hooks: Mapping[str, AttentionHook]) -> None:
        """Run the calibration data through the model with hooks that change nothing."""

    def outputs(
        self, variants: Sequence[Mapping[str, AttentionHook]]
    ) -> Iterator[Sequence[np.ndarray]]:
        """Yield, batch by batch, the output of the float model and that with each set of hooks."""

    def describe(self) -> dict[str, Any]:
        """Return what a report says about the calibration data."""


class SoftmaxStudy:
    """Statistics of the softmax of a model, from one pass over calibration data.

    Any number of corrections can be made from it, at one bit width.

    Parameters
    ----------
    backend : SoftmaxBackend
        Its own probabilities are used, as in the paper: those of a model whose softmax is float.
    bits : int from 2 to 16
    grid_range : {"fixed", "calibrated", "search"}
        Grid on [0, 1]; from the smallest to the largest probability (0 included), which needs one
        more pass; or for every module the one of several ranges with the least output error under
        the correction, which needs one more pass for every correction. Of probabilities alone.
    layers : iterable of str, optional
        Patterns of attention modules, or their kinds; by default all.

    Attributes
    ----------
    modules : dict of str to AttentionModule
    statistics : dict of str to SoftmaxStatistics
        For the range chosen last.
    """

    def __init__(
        self,
        backend: SoftmaxBackend,
        *,
        bits: int = 8,
        grid_range: str = "fixed",
        layers: Iterable[str] | None = None,
    ) -> None:
        check_choice("grid_range", grid_range, RANGES)
        softmax_grid(bits)
        self.backend, self.bits = backend, bits
        self.modules = choose_modules(backend.attention.find_attention(backend.model), layers)
        refuse_installed(backend.attention.installed_attention(backend.model))
        self._search: RangeSearch | None = None
        if grid_range == "search":
            self._search = self._search_ranges(bits)
            self.statistics = {n: found[0] for n, found in self._search.candidates.items()}
        else:
            seen = self._ranges() if grid_range == "calibrated" else {}
            ends = {n: (r.minimum["softmax"], r.maximum["softmax"]) for n, r in seen.items()}
            self.statistics = {
                name: SoftmaxStatistics(
                    name, m.heads, softmax_grid(bits, *ends.get(name, (0.0, 1.0))), backend.steps
                )
                for name, m in self.modules.items()
            }
            backend.run(self.statistics)
        missed = [name for name, s in self.statistics.items() if not s.longest]
        if missed:
            raise CalibrationError(
                f"no calibration data reached the softmax of {missed[0]} "
                f"({len(missed)} of {len(self.modules)} attention modules); leave it out with "
                "layers="
            )

    def _ranges(self) -> dict[str, AttentionRanges]:
        hooks = {name: AttentionRanges(name) for name in self.modules}
        self.backend.run(hooks)
        return hooks

    def _search_ranges(self, bits: int) -> RangeSearch:
        backend = self.backend
        seen = self._ranges() if backend.ends.shrinks else {}
        largest = {name: ranges.maximum["softmax"] for name, ranges in seen.items()}
        ends = {name: backend.ends.of(largest.get(name, 1.0)) for name in self.modules}
        return RangeSearch(self.modules, bits, ends, backend.steps, backend.run)

    def quantizers(
        self,
        correction: str | None = "bias",
        granularity: str = "head",
        grid: str = "probabilities",
    ) -> dict[str, Quantizer]:
        """Return quantizers with a correction; see ``quantize_softmax``.

        Parameters
        ----------
        grid : {"probabilities", "exponentials", "squares", "log2", "twin"}
            Those other than of probabilities need nothing from the calibration data, but for the
            bound of "twin", which is found in one more pass over it.
        """
        check_choice("grid", grid, GRIDS)
        check_choice("correction", correction, self.backend.corrections)
        check_choice("granularity", granularity, self.backend.granularities)
        if grid in ("exponentials", "squares"):
            on = softmax_grid(self.bits, of=grid)
            return {name: SoftmaxQuantizer(on, correction) for name in self.modules}
        if grid == "log2":
            one = TableGridQuantizer(Log2Grid(self.bits), correction)
            return {name: one for name in self.modules}
        if grid == "twin":
            return self._twins(correction)
        if self._search is not None:
            self.statistics = self._search.best(correction, granularity)
        return {n: s.quantizer(correction, granularity) for n, s in self.statistics.items()}

    def _twins(self, correction: str | None) -> dict[str, Quantizer]:
        """Return the twin grids whose bounds give each module's output the least error."""
        tried = [TableGridQuantizer(TwinGrid(self.bits, m), correction) for m in TWIN_SHIFTS]
        hooks = {name: SoftmaxComparison(name, tried) for name in self.modules}
        self.backend.run(hooks)
        chosen: dict[str, Quantizer] = {}
        for name, hook in hooks.items():
            decibels = [sqnr.total for sqnr in hook.sqnr]
            chosen[name] = tried[decibels.index(max(decibels))]
        return chosen

    def compare(self, quantizers: dict[str, Quantizer], guard: bool = True) -> SoftmaxReport:
        """Measure layers and model with and without corrections: one pass, then three forwards.

        If ``guard`` is set, a correction that lowers the signal-to-noise ratio of its layer's
        output on the calibration set is taken out of ``quantizers``, and all are if together they
        lower that of the model's output; the report says so.
        """
        plain: dict[str, Quantizer] = {n: q.uncorrected for n, q in quantizers.items()}
        hooks = {name: SoftmaxComparison(name, [plain[name], q]) for name, q in quantizers.items()}
        self.backend.run(hooks)
        report = SoftmaxReport(calibration=self.backend.describe())
        for name, hook in hooks.items():
            row = softmax_row(self.statistics[name], quantizers[name], hook)
            if guard and hook.sqnr[1].below(hook.sqnr[0], self.backend.by_total):
                _leave_out(quantizers, row)
            report.layers.append(row)
        without, corrected = OutputSQNR("output of the model"), OutputSQNR("output of the model")
        variants = [softmax_hooks(plain), softmax_hooks(quantizers)]
        for reference, *outputs in self.backend.outputs(variants):
            for meter, output in zip((without, corrected), outputs, strict=True):
                meter.update(reference, output)
        report.output_db, report.output_corrected_db = without.decibel, corrected.decibel
        if guard and corrected.below(without, self.backend.by_total):
            report.notes = f"corrections left out: {report.output_corrected_db:.2f} dB with them"
            report.output_corrected_db = report.output_db
            for row in report.layers:
                if row.correction is not None:
                    _leave_out(quantizers, row)
        return report


def _leave_out(quantizers: dict[str, Quantizer], row: SoftmaxLayerReport) -> None:
    row.notes = f"correction {row.correction!r} left out: {row.sqnr_corrected_db:.2f} dB"
    row.correction, row.sqnr_corrected_db = None, row.sqnr_db
    quantizers[row.name] = quantizers[row.name].uncorrected


def softmax_row(
    statistics: SoftmaxStatistics, quantizer: Quantizer, compared: SoftmaxComparison
) -> SoftmaxLayerReport:
    """Build the row of one attention module, compared without and with its correction."""
    # The statistics are of probabilities, exact and of any range; other grids were only compared.
    on_probabilities = quantizer.grid.of == "probabilities"
    counts = statistics.bias if on_probabilities else compared.sums[0]
    return SoftmaxLayerReport(
        name=statistics.name,
        heads=statistics.heads,
        bits=quantizer.grid.bits,
        scale=float(quantizer.grid.scale),
        zero_point=int(quantizer.grid.zero_point),
        correction=quantizer.correction,
        grid=quantizer.grid.of,
        # mean() of None is never asked for: only the other corrections have no bias.
        bias=float(np.mean(quantizer.bias)) if quantizer.correction == "bias" else np.nan,  # type: ignore[arg-type]
        zero_fraction=float(counts.zero_fraction),
        mean_row_sum=float(counts.mean_row_sum),
        sqnr_db=compared.sqnr[0].decibel,
        sqnr_corrected_db=compared.sqnr[1].decibel,
        longest=statistics.longest,
    )


@dataclass
class SoftmaxQuantization:
    """A quantized softmax on a model.

    Attributes
    ----------
    model : nn.Module
    quantizers : dict of str to SoftmaxQuantizer or StepSoftmaxQuantizer
        By attention module.
    report : SoftmaxReport or None
        None if there was no calibration data.
    """

    __repr__ = one_line_repr

    attention: ClassVar[AttentionAccess]

    model: nn.Module = field(repr=False)
    quantizers: dict[str, Quantizer]
    report: SoftmaxReport | None = None

    def install(self) -> None:
        """Put the quantizers on the model.

        Raises
        ------
        ValueError
            If the model has attention hooks already, or other heads than the quantizers.
        """
        check_heads(self.attention.find_attention(self.model), self.quantizers)
        self.attention.install_attention(self.model, softmax_hooks(self.quantizers))

    def remove(self) -> int:
        """Take the quantizers off: the model is as before; returns how many there were."""
        return self.attention.remove_attention(self.model)

    @property
    def installed(self) -> bool:
        """Whether the model's attention has hooks now."""
        return bool(self.attention.installed_attention(self.model))


def check_heads(
    modules: Mapping[str, AttentionModule], quantizers: Mapping[str, Quantizer]
) -> None:
    """Raise ValueError if corrections are for other modules or other numbers of heads."""
    for name, quantizer in quantizers.items():
        if name not in modules:
            raise ValueError(
                f"there is a softmax correction for {name}, but the model has no such attention "
                f"module (its first is {next(iter(modules))})"
            )
        heads = modules[name].heads
        if quantizer.heads not in (None, heads):
            raise ValueError(
                f"{name} has {heads} heads, its softmax correction is for {quantizer.heads}"
            )


def refuse_installed(installed: Mapping[str, AttentionHook]) -> None:
    """Raise UsageError if a model has hooks, which may change its probabilities."""
    if installed:
        raise UsageError(
            "the attention of the model has hooks already (a quantized softmax?): remove them "
            "first with .remove() or remove_attention(model)"
        )


def fixed_grid(
    bits: int, grid_of: str, correction: str | None, grid_range: str = "fixed"
) -> SoftmaxGrid:
    """Return the grid on [0, 1] that ``quantize_softmax`` starts from.

    Raises
    ------
    UsageError
        If the correction, or the range, is not one of this kind of grid's.
    """
    check_choice("grid_of", grid_of, GRIDS_OF)
    if grid_of != "probabilities" and grid_range != "fixed":
        raise UsageError(
            f"grid_range={grid_range!r} is for probabilities: the largest exponential of every row "
            "is 1, so leave it out"
        )
    grid = softmax_grid(bits, of=grid_of)
    check_correction(grid, correction)
    return grid


def choose_modules(
    modules: Mapping[str, AttentionModule], layers: Iterable[str] | None
) -> dict[str, AttentionModule]:
    """Return the attention modules whose name or kind matches a pattern; all if there is none."""
    if layers is None:
        return dict(modules)
    patterns = [layers] if isinstance(layers, str) else list(layers)
    chosen: set[str] = set()
    for pattern in patterns:
        found = {n for n, m in modules.items() if pattern == m.kind or match_pattern(pattern, n)}
        if not found:
            kinds = sorted({m.kind for m in modules.values() if m.kind})
            also = f", and {' and '.join(map(repr, kinds))} name all of a kind" if kinds else ""
            raise ValueError(
                f"layers: {pattern!r} matches no attention module; the first is "
                f"{next(iter(modules))}{also}"
            )
        chosen |= found
    if not chosen:
        raise ValueError("layers is empty: name at least one pattern, or leave it out for all")
    return {name: module for name, module in modules.items() if name in chosen}
