"""Options of a recipe that have fields of their own, and checks of single fields."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ptqkit._repr import one_line_repr
from ptqkit.arrays.activations import GRANULARITIES
from ptqkit.errors import UsageError, check_choice, did_you_mean

__all__ = ["ActivationQuantization", "Equalization", "check_int", "check_names"]


@dataclass(frozen=True)
class ActivationQuantization:
    """Say how the inputs of linear layers are quantized.

    Parameters
    ----------
    bits : int from 2 to 16
    granularity : {"token", "tensor"}
        One scale per token, computed while the model runs (dynamic), or one per tensor, fixed by
        the calibration data (static).
    symmetric : bool, optional
        By default True per token, False per tensor.
    outlier_threshold : float, optional
        Per token only: columns of the input in which some magnitude reaches it stay float, and
        the scales come from the other columns ([LLM.int8()]: 6.0).

    Raises
    ------
    ValueError
        If a field is outside its range; the message names it.
    """

    __repr__ = one_line_repr

    bits: int = 8
    granularity: str = "token"
    symmetric: bool | None = None
    outlier_threshold: float | None = None

    def __post_init__(self) -> None:
        if (
            isinstance(self.bits, bool)
            or not isinstance(self.bits, int)
            or not 2 <= self.bits <= 16
        ):
            raise ValueError(f"activation bits must be an integer from 2 to 16, not {self.bits!r}")
        check_choice("granularity of activations", self.granularity, GRANULARITIES)
        if self.symmetric is None:
            object.__setattr__(self, "symmetric", self.granularity == "token")
        if not isinstance(self.symmetric, bool):
            raise ValueError(
                f"symmetric of activations must be True, False or None, not {self.symmetric!r}"
            )
        self._check_threshold()

    def _check_threshold(self) -> None:
        value = self.outlier_threshold
        if value is None:
            return
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or value <= 0:
            raise ValueError(f"outlier_threshold must be a positive number or None, not {value!r}")
        if self.granularity != "token":
            raise ValueError(
                "outlier_threshold needs granularity 'token': a static grid is fixed before the "
                "outliers of a tensor are known"
            )

    @property
    def dynamic(self) -> bool:
        """Whether the scales are computed while the model runs."""
        return self.granularity == "token"

    def to_dict(self) -> dict[str, Any]:
        """Return the options as plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ActivationQuantization:
        """Return the options of :meth:`to_dict`'s mapping; missing options have their defaults."""
        check_names(values, "activations", (f.name for f in fields(cls)))
        return cls(**values)

    @classmethod
    def parse(cls, value: ActivationQuantization | Mapping[str, Any]) -> ActivationQuantization:
        """Accept an ActivationQuantization or the mapping that :meth:`to_dict` gives."""
        if isinstance(value, ActivationQuantization):
            return value
        if isinstance(value, Mapping):
            return cls.from_dict(value)
        raise TypeError(
            f"activations must be ActivationQuantization or a mapping, not {type(value).__name__}"
        )


@dataclass(frozen=True)
class Equalization:
    """Say how the float model is equalized before it is quantized (:func:`ptqkit.equalize`).

    Parameters
    ----------
    method : {"awe", "smoothquant"}
        AWE [AWEQ, section 3] takes ranges and folds wherever folding is exact; SmoothQuant takes
        absolute maxima and folds into norms only.
    alpha : float from 0 to 1, or "search"
        Share of the activations in ``s = r_x**alpha / r_w**(1 - alpha)``. 0.5 is AWEQ's eq. 10;
        "search" takes, per group of layers, the one with the least quantized output error on the
        calibration inputs.
    tokens : int
        Calibration tokens that the search measures on.
    """

    __repr__ = one_line_repr

    method: str = "awe"
    alpha: float | str = 0.5
    tokens: int = 512

    def __post_init__(self) -> None:
        check_choice("equalization: method", self.method, ("awe", "smoothquant"))
        alpha = self.alpha
        number = isinstance(alpha, (int, float)) and not isinstance(alpha, bool)
        if alpha != "search" and not (number and 0 <= float(alpha) <= 1):
            raise ValueError(
                f"equalization: alpha must be a number from 0 to 1 or 'search', not {alpha!r}"
            )
        if self.method == "smoothquant" and alpha == "search":
            raise ValueError("equalization: smoothquant takes a number for alpha (0.5 is usual)")
        check_int("equalization: tokens", self.tokens, 2)

    @classmethod
    def parse(cls, value: Equalization | Mapping[str, Any] | None) -> Equalization | None:
        """Accept an Equalization, the mapping of its fields, or None."""
        if value is None or isinstance(value, Equalization):
            return value
        if not isinstance(value, Mapping):
            raise ValueError(f"equalization must be an Equalization or a mapping, not {value!r}")
        check_names(value, "equalization", (f.name for f in fields(cls)))
        return cls(**value)


def check_int(name: str, value: Any, low: int, high: int | None = None, hint: str = "") -> None:
    """Raise ValueError unless value is an integer in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name} must be an integer of at least {low}, not {value!r}{hint}")
    if high is not None and value > high:
        raise ValueError(f"{name} must be at most {high}, not {value!r}{hint}")


def check_names(changes: Mapping[str, Any], where: str, names: Iterable[str]) -> None:
    """Raise ValueError unless every key of the changes is one of the names."""
    known = sorted(names)
    unknown = sorted(set(changes) - set(known), key=str)
    if unknown:
        hint = did_you_mean(unknown[0], known) or f"; options are {', '.join(known)}"
        raise UsageError(f"{where} has no option {unknown[0]!r}{hint}")
