"""Put recipes together from parts: ``[AWE(), GPTQ(bits=4), BiasCorrection()]``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ptqkit.recipe.options import ActivationQuantization, Equalization, check_names
from ptqkit.recipe.recipe import Recipe

__all__ = ["AWE", "GPTQ", "PARTS", "RTN", "BiasCorrection", "Equalize", "SmoothQuant", "combine"]


class _Solver:
    """Hold the options of a solver, which are checked at once."""

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
        """Return the recipe of this part alone."""
        return Recipe.preset(self.preset, **self.options)

    def __repr__(self) -> str:
        shown = [f"{k}={v!r}" for k, v in self.options.items()]
        if self.preset != self._preset:
            shown.insert(0, repr(self.preset))
        return f"{type(self).__name__}({', '.join(shown)})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, type(self)) and other.recipe() == self.recipe()


class GPTQ(_Solver):
    """Quantize weights by GPTQ; options are the fields of :class:`ptqkit.Recipe`.

    Parameters
    ----------
    preset : {"quality", "best", "reference"}, optional
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


def Equalize(
    method: str = "awe", alpha: float | str | None = None, tokens: int = 512
) -> Equalization:
    """Equalize the float model before its weights are quantized.

    Parameters
    ----------
    method : {"awe", "smoothquant"}
        "awe": activation-weight equalization [AWEQ, section 3]. "smoothquant": scales
        ``max|x|**alpha / max|w|**(1 - alpha)`` [SmoothQuant], folded into norms.
    alpha : float from 0 to 1, or "search", optional
        Default: "search" for AWE, which never gives a larger quantized output error on the
        calibration inputs than 0.5 [AWEQ, eq. 10] or no equalization; 0.5 for SmoothQuant.
    tokens : int
        Calibration tokens that the search measures on.
    """
    if alpha is None:
        alpha = "search" if method == "awe" else 0.5
    return Equalization(method, alpha, tokens)


def AWE(alpha: float | str = "search", tokens: int = 512) -> Equalization:
    """Return ``Equalize("awe", alpha, tokens)``."""
    return Equalize("awe", alpha, tokens)


def SmoothQuant(alpha: float = 0.5) -> Equalization:
    """Return ``Equalize("smoothquant", alpha)``."""
    return Equalize("smoothquant", alpha)


@dataclass(frozen=True)
class BiasCorrection:
    """Subtract the mean error that quantized weights make from the bias [AWEQ, eqs. 11-15]."""


#: Parts by their names in files.
PARTS: dict[str, Callable[..., Any]] = {
    "Equalize": Equalize,
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
        At most one equalization (:func:`Equalize`, :func:`AWE`, :func:`SmoothQuant`), then exactly
        one solver (:class:`GPTQ`, :class:`RTN`), and at most one each of
        :class:`ActivationQuantization` and :class:`BiasCorrection`. In files: the part's name, or
        ``{"part": name, option: value}``.

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
        if isinstance(part, Equalization):
            changes["equalization"] = part
        elif isinstance(part, ActivationQuantization):
            changes["activations"] = part
        elif isinstance(part, BiasCorrection):
            changes["bias_correction"] = True
    return Recipe.preset(solver.preset, **changes)


def _make(part: Any) -> Any:
    if isinstance(part, (_Solver, Equalization, ActivationQuantization, BiasCorrection)):
        return part
    if callable(part) and part in PARTS.values():
        return part()
    name, options = part, {}
    if isinstance(part, Mapping):
        options = {k: v for k, v in part.items() if k != "part"}
        name = part.get("part")
    if not isinstance(name, str) or name not in PARTS:
        raise ValueError(
            f"{part!r} is not a part of a recipe; parts are {', '.join(PARTS)}, in files a name or "
            "{part = name, option = value}"
        )
    if name not in ("GPTQ", "RTN"):
        check_names(options, name, inspect.signature(PARTS[name]).parameters)
    return PARTS[name](**options)


def _check_order(parts: Sequence[Any]) -> None:
    """Require exactly one solver and at most one of the others, equalization first."""
    kinds: dict[str, list[Any]] = {
        "solver (GPTQ or RTN)": [p for p in parts if isinstance(p, _Solver)],
        "equalization (AWE or SmoothQuant)": [p for p in parts if isinstance(p, Equalization)],
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
