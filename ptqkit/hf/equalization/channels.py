"""Ranges of the channels that equalization moves, before and after, and their picture."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ptqkit._defaults import BATCH_SIZE, SAMPLES, SEQUENCE_LENGTH
from ptqkit._repr import one_line_repr
from ptqkit._tables import join_names, text_table
from ptqkit.arrays.equalization import EqualizationPrecision, equalization_precision
from ptqkit.errors import UnsupportedModuleError, did_you_mean
from ptqkit.hf.data.calibration import max_positions, prepare_calibration
from ptqkit.hf.equalization.driver import check_equalizable, check_float
from ptqkit.hf.equalization.run import Choice, EqualizationRun
from ptqkit.hf.models.wrappers import unwrap_compiled
from ptqkit.recipe import as_recipe
from ptqkit.recipe.options import Equalization
from ptqkit.recipe.recipe import Recipe

__all__ = ["EqualizationChannels", "GroupChannels", "equalization_channels"]


@dataclass(frozen=True)
class GroupChannels:
    """The channels of one group of layers that read the same tensor.

    Attributes
    ----------
    kind, producer : str
        See :class:`ptqkit.hf.equalization.fold.Fold`.
    consumers : tuple of str
    alpha : float
        Of the scales; NaN if a search found that no equalization is best.
    activation_span, weight_span : ndarray of float32, shape (in,)
        max - min of the inputs' channels over the calibration tokens and of the columns of all
        consumers together. Rows of a consumer that is itself a producer are as they will be.
    scales : ndarray of float64, shape (in,)
        Inputs are divided and columns multiplied by them.
    """

    __repr__ = one_line_repr

    kind: str
    producer: str
    consumers: tuple[str, ...]
    alpha: float
    activation_span: np.ndarray
    weight_span: np.ndarray
    scales: np.ndarray

    @property
    def before(self) -> EqualizationPrecision:
        """Precision of the channels of the float model [AWEQ, eqs. 4-8]."""
        return equalization_precision(self.activation_span, self.weight_span)

    @property
    def after(self) -> EqualizationPrecision:
        """Precision of the channels with the scales."""
        return equalization_precision(self.activation_span, self.weight_span, self.scales)


@dataclass(frozen=True)
class EqualizationChannels:
    """All groups, in order of execution.

    Attributes
    ----------
    groups : tuple of GroupChannels
    """

    __repr__ = one_line_repr

    groups: tuple[GroupChannels, ...]

    def __iter__(self) -> Iterator[GroupChannels]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, name: str) -> GroupChannels:
        """Return the group of a consumer by name."""
        for group in self.groups:
            if name in group.consumers:
                return group
        known = [name for group in self.groups for name in group.consumers]
        raise KeyError(f"no group holds {name!r}{did_you_mean(name, known)}")

    def to_dicts(self) -> list[dict[str, Any]]:
        """Return a row per group: precision as sum(p^X p^W), before, after, and its bound."""
        return [
            {
                "kind": group.kind,
                "producer": group.producer,
                "consumers": list(group.consumers),
                "alpha": group.alpha,
                "before": group.before.total,
                "after": group.after.total,
                "bound": group.before.bound,
            }
            for group in self.groups
        ]

    def table(self) -> str:
        """Return plain text: a line per group."""
        header = ("kind", "producer", "alpha", "before", "after", "bound", "consumers")
        rows = [
            (
                row["kind"],
                row["producer"],
                f"{row['alpha']:g}",
                *(f"{row[k]:.2f}" for k in ("before", "after", "bound")),
                join_names(row["consumers"], row["producer"]),
            )
            for row in self.to_dicts()
        ]
        return text_table(header, rows, left=(0, 1, -1))

    def __str__(self) -> str:
        return self.table()

    def draw(self, path: str | os.PathLike[str], name: str | None = None) -> None:
        """Draw the spans of a group's channels before and after [AWEQ, figure 1].

        Parameters
        ----------
        path : str or path
            The ending says which form: .png, .svg, .pdf.
        name : str, optional
            A consumer of the group; by default the group whose precision grows most.

        Raises
        ------
        KeyError
            If no group has that consumer.
        """
        from matplotlib.figure import Figure

        group = self._steepest() if name is None else self[name]
        figure = Figure(figsize=(8.5, 4.6), layout="constrained")
        axes = figure.subplots(2, 2, sharex=True, sharey="row")
        order = np.argsort(-group.activation_span, kind="stable")
        spans = (
            ("before", group.activation_span, group.weight_span, group.before),
            (
                "after",
                group.activation_span / group.scales,
                group.weight_span * group.scales,
                group.after,
            ),
        )
        tops = [0.0, 0.0]
        for column, (when, activation, weight, precision) in enumerate(spans):
            for line, (what, values) in enumerate((("inputs", activation), ("weights", weight))):
                axis = axes[line, column]
                axis.vlines(np.arange(len(order)), 0, values[order], lw=0.9, color=f"C{line}")
                axis.axhline(values.max(), color="0.4", lw=0.8, ls="--")
                tops[line] = max(tops[line], float(values.max()))
                if column == 0:
                    axis.set_ylabel(f"span of the {what}")
            axes[0, column].set_title(f"{when}: Σ pˣ pʷ = {precision.total:.1f}", fontsize=10)
            axes[1, column].set_xlabel("input channel, the widest first")
        for line, top in enumerate(tops):
            axes[line, 0].set_ylim(0, 1.05 * top or 1)  # shared by the two of a row
        names = join_names(list(group.consumers), group.producer)
        bound = group.before.bound
        figure.suptitle(f"{names} behind {group.producer}; at most {bound:.1f}", fontsize=10)
        figure.savefig(Path(path), dpi=130)

    def _steepest(self) -> GroupChannels:
        if not self.groups:
            raise UnsupportedModuleError("nothing folds in this model: there is nothing to draw")
        return max(self.groups, key=lambda g: g.after.reached - g.before.reached)


def equalization_channels(
    model: nn.Module,
    calibration: Any,
    *,
    tokenizer: Any = None,
    method: str = "awe",
    alpha: float | str = 0.5,
    tokens: int = 512,
    recipe: Recipe | str | Mapping[str, Any] | None = None,
    samples: int = SAMPLES,
    sequence_length: int = SEQUENCE_LENGTH,
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
    start_token: str | int | None = "auto",
    blocks: Sequence[str] | None = None,
    threads: int = 0,
) -> EqualizationChannels:
    """Measure what :func:`ptqkit.equalize` would do to each channel; the model stays as it is.

    Options and errors are those of :func:`ptqkit.equalize`. The precision after equals its bound in
    every group, with any ``alpha`` [AWEQ, eqs. 4-10], but where one channel has several readers
    (grouped-query attention), a dead channel of one side is the widest of the other, or a scale is
    at its limit.

    Returns
    -------
    EqualizationChannels

    Examples
    --------
    >>> channels = ptqkit.hf.equalization_channels(model, "train.txt", tokenizer=tokenizer)
    >>> print(channels.table())
    >>> channels.draw("channels.png")
    """
    options = Equalization(method, alpha, tokens)
    parsed = None if recipe is None else as_recipe(recipe)
    check_float(model)
    prepared = prepare_calibration(
        calibration,
        tokenizer,
        samples=samples,
        sequence_length=sequence_length,
        batch_size=batch_size,
        seed=seed,
        start_token=start_token,
        max_length=max_positions(model),
    )
    model = unwrap_compiled(model)
    check_equalizable(model, prepared, options, parsed)
    places = None if blocks is None else tuple(blocks)
    run = EqualizationRun(model, prepared, options, parsed, places, threads, None)
    return EqualizationChannels(tuple(map(_channels, run.choose())))


def _channels(choice: Choice) -> GroupChannels:
    fold = choice.fold
    return GroupChannels(
        kind=fold.kind,
        producer=fold.producer,
        consumers=fold.consumers,
        alpha=choice.row.alpha,
        activation_span=choice.activation,
        weight_span=choice.weight,
        scales=choice.scales[fold.channel_of],
    )
