"""Say what to do with each linear layer: method, bits, groups, and exceptions by name."""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from ptqkit._repr import one_line_repr
from ptqkit.arrays.factorization import ORDERS
from ptqkit.arrays.matrix import GRID_METHODS, SCALE_TYPES, WeightGrid, parse_bits
from ptqkit.arrays.targets import TARGETS
from ptqkit.errors import check_choice
from ptqkit.recipe.budget import LEAST_BITS, MOST_BITS
from ptqkit.recipe.options import ActivationQuantization, Equalization, check_int, check_names
from ptqkit.recipe.presets import PRESETS

__all__ = ["Recipe", "match_pattern"]

_CHOICES = {
    "method": ("gptq", "rtn", "obq"),
    "calibrate_on": ("quantized", "float"),
    "order": ORDERS,
    "grid": tuple(GRID_METHODS),
    "target": TARGETS,
    "scale_dtype": (None, *SCALE_TYPES),
}

#: Fields that need the float model to run along.
PROPAGATIONS = ("error_propagation", "residual_propagation")


#: Fields of tuning, which comes after the run.
_TUNING = ("tune", "tune_codes", "tune_own_text")


def _check_share(name: str, value: Any) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 <= value <= 1:
        raise ValueError(f"{name} must be a number from 0 to 1, not {value!r}")


def _without_channel(group_size: Any) -> Any:
    """Return None for the word that files and the command line have for it."""
    return None if isinstance(group_size, str) and group_size == "channel" else group_size


def _change(change: Any) -> Any:
    """Return a change of an override with its group size as a recipe holds it."""
    if not isinstance(change, Mapping) or "group_size" not in change:
        return change
    return {**change, "group_size": _without_channel(change["group_size"])}


def match_pattern(pattern: str, name: str) -> bool:
    r"""Return whether a layer name matches a glob (``*.mlp.*``) or a regex (``re:.*\.q_proj``)."""
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    return fnmatch.fnmatchcase(name, pattern)


@dataclass(frozen=True)
class Recipe:
    """Hold the options of a quantization run; the defaults are the ``quality`` preset.

    Parameters
    ----------
    method : {"gptq", "rtn", "obq"}
        "obq" is the slow reference (:func:`ptqkit.obq`) for small models: of the options of the
        solve it has ``damping`` alone, and its grids are fitted to the original weights.
    bits : int or float from 2 to 8, or "ternary"
        A float, such as 3.2, is an average: each layer gets whole bits by what rounding it costs
        the model, for which a few windows of the calibration data run forward and backward. Layers
        whose bits an override names keep them, and do not count.
    group_size : int or None
        Inputs that share a scale; None, or "channel", for one scale per output channel.
    symmetric : bool
    order : {"natural", "act", "group-act"}
        Quantization order: as stored, by decreasing diagonal of H, or group-aware.
    static_groups : bool
        With ``order="act"`` and groups: grids fixed beforehand on runs of consecutive inputs.
    grid : {"minmax", "mse", "hessian", "feedback"}
        "feedback" is of method "gptq", with whole groups: not with ``static_groups``.
    refine_passes : int
        Coordinate-descent passes after the solve.
    refit_rounds : int
        After them, so often: all scales of a row fitted at once to its codes, and one more pass.
    beam_width : int from 1 to 16
        Above 1: in the end the codes of each row are searched anew on its grids, keeping so many
        partial roundings.
    row_coupling : int
        Last of all, so many passes over the codes in which the rows of layers that share their
        inputs make up for each other's errors (:func:`ptqkit.couple_rows`): where an output matters
        to the model's loss together with others. Above 0 a few calibration windows run backward
        through the float model first.
    damping, max_damping : float
        Fraction of the mean diagonal added to H; how far it may be raised.
    feedback : bool
        False: no error feedback, which makes GPTQ equal round-to-nearest.
    scale_dtype : {None, "float32", "float16", "bfloat16"}
        None: the dtype of the layer's weight.
    min_zero_point : {0, 1}
        1 for the GPTQ format, version 1, which cannot store a zero-point of 0.
    block_size : int
        Columns per lazy block of the solver (changes no code).
    error_propagation : float
        Alpha of :func:`ptqkit.target_weights`: 0 (off) to 1. Above 0 the float model runs next
        to the quantized one, at twice the activations' memory, and each weight is corrected for the
        errors of the layers before it. It holds for the whole run: an override cannot change it.
    residual_propagation : float
        The same for layers that write into a residual stream (o_proj, down_proj, fc2): above 0
        they answer for the errors that the stream carries, with this alpha. Where the stream cannot
        be told from the structure (parallel branches, norms after a branch), they get
        ``error_propagation`` and the report says so. It holds for the whole run.
    target : {"least-squares", "qronos", "gptaq"}
        How the correction is made, see :func:`ptqkit.target_weights`.
    target_damping : float or None
        Damping of the correction alone; None: as that of the solve.
    per_tensor : bool
        One scale for the whole weight matrix (``method="rtn"``, ``group_size=None``).
    activations : ActivationQuantization or None
        Also quantize the layer's inputs (simulated: exact grids in float); None: leave them float.
    equalization : Equalization or None
        Equalize the float model first. It holds for the whole run.
    bias_correction : bool
        Subtract ``(W_hat - W) E[x]`` from each layer's bias [AWEQ, eqs. 11-15]; a layer without a
        bias gains one.
    tune : int
        Steps of tuning after the run (:func:`ptqkit.hf.tune`; 150 is a good number): scales, norm
        gains and biases learn from the float model's logits. 0: none. It holds for the whole run.
    tune_codes : float
        Rate at which codes learn in tuning, in codes per step (0.01 is a good number, with 1000
        steps and more and ``tune_own_text``). 0: codes stay. It holds for the whole run.
    tune_own_text : int
        Windows that the float model writes itself (:func:`ptqkit.hf.own_text`), to be tuned on
        besides the calibration windows. It holds for the whole run.
    calibrate_on : {"quantized", "float"}
        Whose inputs a layer is calibrated on: those that it gets from the quantized layers before
        it, or those of the float model. It holds for the whole run.
    calibrate_all_experts : bool
        Every expert of a mixture is calibrated on all tokens, not on those routed to it alone;
        what the model goes on with stays routed. It holds for the whole run.
    overrides : mapping of pattern to a mapping of changes, or to "skip"
        Patterns are globs on the full module name, or regular expressions after ``re:``. All
        matching patterns apply in order, the last one wins.
    include : sequence of patterns
        Linear layers outside the repeated blocks (such as an untied ``lm_head``) to quantize too.

    Raises
    ------
    ValueError
        If a field has a value outside its range; the message names the field.

    Examples
    --------
    >>> recipe = Recipe(bits=3, group_size=64, overrides={"*.down_proj": {"bits": 4}})
    >>> recipe.for_layer("model.layers.0.mlp.down_proj").bits
    4
    """

    __repr__ = one_line_repr

    method: str = "gptq"
    bits: int | float | str = 4
    group_size: int | None = 128
    symmetric: bool = False
    order: str = "group-act"
    static_groups: bool = False
    grid: str = "hessian"
    refine_passes: int = 1
    refit_rounds: int = 0
    beam_width: int = 1
    row_coupling: int = 0
    damping: float = 0.01
    max_damping: float = 1.0
    feedback: bool = True
    scale_dtype: str | None = None
    min_zero_point: int = 0
    block_size: int = 128
    error_propagation: float = 0.0
    residual_propagation: float = 0.0
    target: str = "least-squares"
    target_damping: float | None = None
    per_tensor: bool = False
    activations: ActivationQuantization | None = None
    equalization: Equalization | None = None
    bias_correction: bool = False
    tune: int = 0
    tune_codes: float = 0.0
    tune_own_text: int = 0
    calibrate_on: str = "quantized"
    calibrate_all_experts: bool = False
    overrides: Mapping[str, Mapping[str, Any] | str] = field(default_factory=dict)
    include: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.activations is not None:
            object.__setattr__(self, "activations", ActivationQuantization.parse(self.activations))
        object.__setattr__(self, "equalization", Equalization.parse(self.equalization))
        object.__setattr__(self, "group_size", _without_channel(self.group_size))
        self._check_fields()
        self._check_propagation()
        self._check_per_tensor()
        if self.tune and self.activations is not None:
            raise ValueError(
                f"tune={self.tune} cannot be combined with activations: no gradient passes through "
                "quantized inputs; use tune=0"
            )
        if isinstance(self.include, str):
            raise ValueError("include must be a sequence of patterns, not one string")
        object.__setattr__(self, "include", tuple(self.include))
        self._check_patterns()
        object.__setattr__(self, "overrides", {k: _change(v) for k, v in self.overrides.items()})
        for pattern, change in self.overrides.items():
            self._check_override(f"overrides[{pattern!r}]", change)

    def _check_fields(self) -> None:
        for name, allowed in _CHOICES.items():
            check_choice(name, getattr(self, name), allowed)
        self._check_bits()
        if self.group_size is not None:
            check_int(
                "group_size",
                self.group_size,
                1,
                hint="; None or 'channel' means one scale per output channel",
            )
        check_int("refine_passes", self.refine_passes, 0)
        check_int("refit_rounds", self.refit_rounds, 0)
        check_int("beam_width", self.beam_width, 1, 16)
        check_int("row_coupling", self.row_coupling, 0)
        if self.row_coupling and not (self.feedback and self.method == "gptq"):
            raise ValueError(
                f"row_coupling={self.row_coupling} needs method 'gptq' with feedback=True; use 0"
            )
        if self.beam_width > 1 and not self.feedback:
            raise ValueError(f"beam_width={self.beam_width} needs feedback=True")
        if self.grid == "feedback" and (
            self.method != "gptq" or self.static_groups or not self.feedback
        ):
            raise ValueError(
                "grid='feedback' needs method 'gptq' with feedback=True and static_groups=False"
            )
        check_int("block_size", self.block_size, 1)
        check_int("tune", self.tune, 0)
        check_int("tune_own_text", self.tune_own_text, 0)
        _check_share("tune_codes", self.tune_codes)
        for name in ("tune_codes", "tune_own_text"):
            if getattr(self, name) and not self.tune:
                raise ValueError(
                    f"{name}={getattr(self, name)} needs steps of tuning; give tune (--tune)"
                )
        check_int("min_zero_point", self.min_zero_point, 0, 1)
        for name in (
            "symmetric",
            "static_groups",
            "feedback",
            "per_tensor",
            "bias_correction",
            "calibrate_all_experts",
        ):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, not {getattr(self, name)!r}")
        for name in ("damping", "max_damping", "target_damping"):
            value = getattr(self, name)
            if name == "target_damping" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
                raise ValueError(f"{name} must be a number of at least 0, not {value!r}")
        if self.max_damping < self.damping:
            raise ValueError(
                f"max_damping ({self.max_damping}) must not be below damping ({self.damping})"
            )

    def _check_bits(self) -> None:
        if not isinstance(self.bits, float):
            parse_bits(self.bits)
        elif not LEAST_BITS <= self.bits <= MOST_BITS:
            raise ValueError(
                f"bits as an average must be from {LEAST_BITS} to {MOST_BITS}, not {self.bits!r}"
            )

    def _check_propagation(self) -> None:
        for name in PROPAGATIONS:
            _check_share(name, getattr(self, name))
        setting = self.propagation
        if not setting:
            return
        off = f"use {setting.split('=')[0]}=0"
        if self.method != "gptq":
            raise ValueError(
                f"{setting} needs method 'gptq', not {self.method!r}: it is made for a solver with "
                f"the Hessian; {off}, or 'skip' the layer"
            )
        if self.calibrate_on == "float":
            raise ValueError(
                f"{setting} cannot be combined with calibrate_on='float': it corrects weights for "
                f"what the quantized layers before them change; {off}"
            )
        for name in ("bias_correction", "activations"):
            if getattr(self, name):
                raise ValueError(
                    f"{setting} cannot be combined with {name}: its float model runs in the same "
                    f"modules; {off}"
                )
        if self.residual_propagation and self.target != "least-squares":
            raise ValueError(
                f"residual_propagation={self.residual_propagation:g} needs target 'least-squares', "
                f"not {self.target!r}: that takes no residual; use residual_propagation=0"
            )

    @property
    def propagation(self) -> str:
        """The first setting that has the float model run along, as text; empty if none does."""
        for name in PROPAGATIONS:
            if getattr(self, name):
                return f"{name}={getattr(self, name):g}"
        return ""

    def _check_per_tensor(self) -> None:
        if not self.per_tensor:
            return
        if self.method != "rtn":
            raise ValueError(
                "per_tensor=True needs method 'rtn': GPTQ fits grids per channel or group"
            )
        if self.group_size is not None:
            raise ValueError(
                f"per_tensor=True needs group_size=None (one scale), not {self.group_size}"
            )
        if self.grid != "minmax":
            raise ValueError(f"per_tensor=True needs grid 'minmax', not {self.grid!r}")

    def _check_patterns(self) -> None:
        if not isinstance(self.overrides, Mapping):
            raise ValueError(f"overrides must be a mapping, not {type(self.overrides).__name__}")
        for pattern in [*self.overrides, *self.include]:
            if not isinstance(pattern, str):
                raise ValueError(f"a pattern must be a string, not {pattern!r}")
            if pattern.startswith("re:"):
                try:
                    re.compile(pattern[3:])
                except re.error as error:
                    raise ValueError(
                        f"pattern {pattern!r} is not a regular expression: {error}"
                    ) from None

    def _check_override(self, where: str, change: Mapping[str, Any] | str) -> None:
        """Raise ValueError unless the change, alone, is a valid one of this recipe."""
        if change == "skip":
            return
        if not isinstance(change, Mapping):
            raise ValueError(f"{where} must be a mapping of changes or 'skip', not {change!r}")
        check_names(change, where, _names())
        if {"overrides", "include"} & set(change):
            raise ValueError(f"{where} cannot hold overrides or include")
        whole = ("equalization", "calibrate_on", "calibrate_all_experts", *_TUNING)
        for name in (*PROPAGATIONS, *whole):
            if name in change:
                raise ValueError(f"{where} cannot hold {name}: it holds for the whole run")
        if isinstance(change.get("bits"), float):
            raise ValueError(
                f"{where}: bits must be whole, not {change['bits']!r}: an average holds for all "
                "layers that no override gives bits"
            )
        try:
            replace(self, **change, overrides={}, include=())
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Recipe:
        """Return a named recipe (see :data:`PRESETS`) with changes applied."""
        check_choice("recipe", name, PRESETS)
        check_names(changes, "recipe", _names())
        if changes.get("per_tensor"):
            changes.setdefault("group_size", None)
        return cls(**{**PRESETS[name], **changes})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """Return the recipe of a mapping (:meth:`to_dict`); ``preset`` may name where it starts."""
        values = dict(values)
        name = values.pop("preset", "quality")
        return cls.preset(name, **values)

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as plain values that ``json.dumps`` accepts."""
        values = asdict(self)
        values["overrides"] = {
            k: v if isinstance(v, str) else _plain(v) for k, v in self.overrides.items()
        }
        values["include"] = list(self.include)
        return values

    def for_layer(self, name: str) -> Recipe | None:
        """Return the options of one layer with the overrides applied; None if it is skipped."""
        changes: dict[str, Any] | None = {}
        for pattern, change in self.overrides.items():
            if match_pattern(pattern, name):
                changes = None if isinstance(change, str) else {**(changes or {}), **change}
        if changes is None:
            return None
        return replace(self, **changes, overrides={}, include=())

    @property
    def beyond_weights(self) -> str:
        """Option that only models of transformers have, such as ``"activations"``; '' if none."""
        for name in _BEYOND_WEIGHTS:
            if getattr(self, name):
                return name.removeprefix("most_")
        return ""

    @property
    def most_row_coupling(self) -> int:
        """Most passes of ``row_coupling`` that a layer has, by the recipe or an override."""
        changes = (c for c in self.overrides.values() if isinstance(c, Mapping))
        return max(self.row_coupling, *(int(c.get("row_coupling", 0)) for c in changes), 0)

    @property
    def bits_budget(self) -> float | None:
        """Average bits that are to be shared out among layers; None if each has its own."""
        return self.bits if isinstance(self.bits, float) else None

    @property
    def whole_bits(self) -> int | str:
        """Bits of a layer; for an average that is not shared out yet the next whole number."""
        return math.ceil(self.bits) if isinstance(self.bits, float) else self.bits

    @property
    def weight_grid(self) -> WeightGrid:
        """Grid of a layer's weight; float32 scales if the recipe leaves them to the weight."""
        symmetric = self.symmetric or self.bits == "ternary"
        scale_dtype = self.scale_dtype or "float32"
        return WeightGrid(self.whole_bits, self.group_size, symmetric, self.per_tensor, scale_dtype)

    def with_scale_dtype(self, dtype: str) -> Recipe:
        """Return the recipe with the dtype of the scales if it has none yet.

        Parameters
        ----------
        dtype : str
            Of the layer's weight; float64 weights get float32 scales.
        """
        if self.scale_dtype is not None:
            return self
        return replace(self, scale_dtype="float32" if dtype == "float64" else dtype)

    @property
    def needs_ranges(self) -> bool:
        """Whether the ranges of the layer's inputs are needed: bias correction, static grids."""
        return self.bias_correction or (
            self.activations is not None and not self.activations.dynamic
        )

    def needs_calibration(self) -> str:
        """Return what needs calibration data, such as ``"method 'gptq'"``; '' if nothing does.

        An override that needs data counts, whether or not it matches a layer.
        """
        reasons = {
            "equalization": self.equalization is not None,
            f"method {self.method!r}": self.method != "rtn",
            f"bits {self.bits}": self.bits_budget is not None,
            "grid 'hessian'": self.grid == "hessian",
            "bias_correction": self.bias_correction,
            f"tune={self.tune}": self.tune > 0,
            "a static grid of activations": self.needs_ranges,
        }
        for what, needed in reasons.items():
            if needed:
                return what
        for pattern, change in self.overrides.items():
            if isinstance(change, Mapping):
                what = replace(self, **change, overrides={}, include=()).needs_calibration()
                if what:
                    return f"{what} of overrides[{pattern!r}]"
        return ""

    def unmatched(self, names: Iterable[str]) -> list[str]:
        """Return the patterns of ``overrides`` and ``include`` that match none of the names."""
        names = list(names)
        patterns = [*self.overrides, *self.include]
        return [p for p in patterns if not any(match_pattern(p, n) for n in names)]


def _plain(change: Mapping[str, Any]) -> dict[str, Any]:
    """Return an override as values that ``json.dumps`` accepts."""
    return {
        k: v.to_dict() if isinstance(v, ActivationQuantization) else v for k, v in change.items()
    }


#: Properties of a recipe that are more than rounding the weights of one layer after the other.
_BEYOND_WEIGHTS = (
    "activations",
    "equalization",
    "error_propagation",
    "residual_propagation",
    "most_row_coupling",
)


def _names() -> list[str]:
    return [f.name for f in fields(Recipe)]
