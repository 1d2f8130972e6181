"""Put recipes together from parts: ``[AWE(), GPTQ(bits=4), BiasCorrection()]``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ptqkit.recipe.options import ActivationQuantization, Equalization, check_names
from ptqkit.recipe.recipe import Recipe

__all__ = ["AWE", "GPTQ", "PARTS", "RTN", "BiasCorrection", "SmoothQuant", "combine"]


class _Solver:
    """Options of a solver, checked when they are given."""

    _preset = ""
    _method = ""

    def __init__(self, preset: str | None = None, **options: Any) -> None:
        for name in ("method", "activations", "equalization", "bias_correction"):
            if name in options:
                raise ValueError(
                    f"{type(self).__name__} has no option {name!r}: it is another part"
                )
        self.preset = preset if preset is not None else self._preset
        self.options = options
        method = self.recipe().method
        if method != self._method:
            raise ValueError(
                f"{type(self).__name__}: preset {self.preset!r} is of method {method!r}"
            )

    def recipe(self) -> Recipe:
        """The recipe of this part alone."""
        return Recipe.preset(self.preset, **self.options)

    def __repr__(self) -> str:
        shown = [f"{k}={v!r}" for k, v in self.options.items()]
        if self.preset != self._preset:
            shown.insert(0, repr(self.preset))
        return f"{type(self).__name__}({', '.join(shown)})"

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.recipe() == self.recipe()  # type: ignore[attr-defined]

    __hash__ = None  # type: ignore[assignment]


class GPTQ(_Solver):
    """Quantize weights by GPTQ; options are the fields of :class:`ptqkit.Recipe`.

    Parameters
    ----------
    preset : {"quality", "reference"}, optional
        What the options change; "quality" by default.
    **options
        ``bits``, ``group_size``, ``symmetric``, ``overrides``, ...
    """

    _preset = "quality"
    _method = "gptq"


class RTN(_Solver):
    """Round weights to nearest; options are the fields of :class:`ptqkit.Recipe`."""

    _preset = "rtn"
    _method = "rtn"


@dataclass(frozen=True)
class AWE:
    """Activation-weight equalization before the weights are quantized [AWEQ, section 3].

    Parameters
    ----------
    alpha : float from 0 to 1, or "search"
        0.5 is eq. 10 of the paper; "search" (the default) never gives a larger quantized output
        error on the calibration inputs than that, nor than no equalization.
    tokens : int
        Calibration tokens that the search measures on.
    """

    alpha: float | str = "search"
    tokens: int = 512

    def __post_init__(self) -> None:
        self.equalization()

    def equalization(self) -> Equalization:
        """The same as a field of a recipe."""
        return Equalization("awe", self.alpha, self.tokens)


@dataclass(frozen=True)
class SmoothQuant:
    """SmoothQuant's scales, ``max|x|**alpha / max|w|**(1 - alpha)``, folded into norms."""

    alpha: float = 0.5

    def __post_init__(self) -> None:
        self.equalization()

    def equalization(self) -> Equalization:
        """The same as a field of a recipe."""
        return Equalization("smoothquant", self.alpha)


@dataclass(frozen=True)
class BiasCorrection:
    """Subtract the mean error that quantized weights make from the bias [AWEQ, eqs. 11-15]."""


#: Parts by the name they have in files.
PARTS: dict[str, type] = {
    "AWE": AWE,
    "SmoothQuant": SmoothQuant,
    "GPTQ": GPTQ,
    "RTN": RTN,
    "ActivationQuantization": ActivationQuantization,
    "BiasCorrection": BiasCorrection,
}


def combine(parts: Sequence[Any]) -> Recipe:
    """Put a recipe together.

    Parameters
    ----------
    parts : sequence
        At most one equalization (:class:`AWE`, :class:`SmoothQuant`), then exactly one solver
        (:class:`GPTQ`, :class:`RTN`), and at most one each of :class:`ActivationQuantization` and
        :class:`BiasCorrection`. In files: the part's name, or ``{"part": name, option: value}``.

    Raises
    ------
    ValueError
        If the parts contradict each other; the message says which.
    """
    made = [_make(part) for part in parts]
    _check_order(made)
    solver = next(p for p in made if isinstance(p, _Solver))
    changes: dict[str, Any] = dict(solver.options)
    for part in made:
        if isinstance(part, (AWE, SmoothQuant)):
            changes["equalization"] = part.equalization()
        elif isinstance(part, ActivationQuantization):
            changes["activations"] = part
        elif isinstance(part, BiasCorrection):
            changes["bias_correction"] = True
    return Recipe.preset(solver.preset, **changes)


def _make(part: Any) -> Any:
    if isinstance(part, tuple(PARTS.values())):
        return part
    if isinstance(part, type) and part in PARTS.values():
        return part()
    name, options = part, {}
    if isinstance(part, Mapping):
        options = {k: v for k, v in part.items() if k != "part"}
        name = part.get("part")
    if not isinstance(name, str) or name not in PARTS:
        raise ValueError(
            f"{part!r} is no part of a recipe; parts are {', '.join(PARTS)}, in files a name or "
            "{part = name, option = value}"
        )
    kind = PARTS[name]
    if not issubclass(kind, _Solver):
        check_names(options, name, kind)
    return kind(**options)


def _check_order(parts: Sequence[Any]) -> None:
    """Exactly one solver, at most one of the others, equalization first."""
    kinds = {
        "solver (GPTQ or RTN)": [p for p in parts if isinstance(p, _Solver)],
        "equalization (AWE or SmoothQuant)": [
            p for p in parts if isinstance(p, (AWE, SmoothQuant))
        ],
        "ActivationQuantization": [p for p in parts if isinstance(p, ActivationQuantization)],
        "BiasCorrection": [p for p in parts if isinstance(p, BiasCorrection)],
    }
    for what, found in kinds.items():
        if len(found) > 1:
            raise ValueError(
                f"a recipe takes one {what}, not {len(found)}: {', '.join(map(repr, found))}"
            )
    solvers, equalizations = list(kinds.values())[:2]
    if not solvers:
        raise ValueError(
            "a recipe needs a solver, GPTQ(...) or RTN(...); to equalize a model alone use "
            "ptqkit.equalize"
        )
    if equalizations and parts.index(equalizations[0]) > parts.index(solvers[0]):
        raise ValueError(
            f"{equalizations[0]!r} must come before {solvers[0]!r}: it changes the float weights"
        )
