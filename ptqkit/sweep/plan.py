"""A sweep file as checked, frozen values; see :mod:`ptqkit.sweep` for its form."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ptqkit.errors import PreflightError

__all__ = [
    "DEMO",
    "FLOAT",
    "Calibration",
    "ModelPlan",
    "Plan",
    "Published",
    "RecipePlan",
    "TaskPlan",
    "TextSource",
    "read_plan",
]

DEMO = "demo"
"""Stands for the embedded model, and for its texts."""

FLOAT = "float"
"""Name of the row of the model as it is."""


@dataclass(frozen=True)
class TextSource:
    """A text: file or ``"demo"``, which of its documents, and how their white space is kept."""

    path: str
    documents: tuple[int, int] | None = None
    whitespace: str = "keep"


@dataclass(frozen=True)
class Calibration:
    """What recipes are fitted to; see :func:`ptqkit.hf.prepare_calibration`."""

    text: TextSource
    samples: int = 128
    sequence_length: int = 512
    batch_size: int = 4
    seed: int = 0
    start_token: str | int | None = "auto"


@dataclass(frozen=True)
class TaskPlan:
    """A task: ``settings`` are those of its kind, defaults filled in.

    Attributes
    ----------
    name, kind : str
        Kind is ``"perplexity"`` or ``"zero-shot"``.
    source : TextSource
        Text, or file of items.
    settings : dict
    """

    name: str
    kind: str
    source: TextSource
    settings: Mapping[str, Any]
    optional: bool = False

    @property
    def missing(self) -> bool:
        """Whether its file does not exist."""
        return self.source.path != DEMO and not Path(self.source.path).is_file()


@dataclass(frozen=True)
class ModelPlan:
    """A model, what it is calibrated on, and the names of its tasks."""

    name: str
    path: str
    calibration: Calibration
    tasks: tuple[str, ...]
    dtype: str = "auto"
    optional: bool = False
    outliers: Mapping[str, Any] | None = None

    @property
    def missing(self) -> bool:
        """Whether its folder does not exist."""
        return self.path != DEMO and not Path(self.path).is_dir()


@dataclass(frozen=True)
class RecipePlan:
    """A recipe by name: what the file says, the checked recipe as a dict, and its models."""

    name: str
    value: Any
    resolved: Mapping[str, Any]
    models: tuple[str, ...]


@dataclass(frozen=True)
class Published:
    """A figure that a paper or another project has published."""

    model: str
    recipe: str
    task: str
    value: float
    source: str


@dataclass(frozen=True)
class Plan:
    """All of a sweep file.

    Attributes
    ----------
    file : Path
    name : str
    output : str
        Folder of the results, relative to the current one.
    models, tasks, recipes, published : tuple
    """

    file: Path
    name: str
    output: str
    models: tuple[ModelPlan, ...]
    tasks: tuple[TaskPlan, ...]
    recipes: tuple[RecipePlan, ...]
    published: tuple[Published, ...] = field(default=())

    def task(self, name: str) -> TaskPlan:
        """Task of that name."""
        return next(t for t in self.tasks if t.name == name)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain values."""
        return {**asdict(self), "file": self.file.name}


def read_plan(path: str | os.PathLike[str]) -> Plan:
    """Read and check a sweep file.

    Parameters
    ----------
    path : path
        A TOML file.

    Returns
    -------
    Plan

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    PreflightError
        With all problems of the file: syntax, unknown keys, wrong types, names used twice or not
        at all, files that do not exist, recipes that contradict themselves.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no sweep file {str(path)!r}")
    # It makes the values of this module.
    from ptqkit.sweep.plan_reader import PlanReader

    problems: list[str] = []
    plan = PlanReader(path, _load(path), problems).plan()
    if problems:
        raise PreflightError(problems)
    return plan


def _load(path: Path) -> dict[str, Any]:
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        try:
            import tomli as tomllib
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "a sweep file needs tomli on Python 3.10; install it with: pip install tomli",
                name="tomli",
            ) from error
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise PreflightError([f"{path.name} is not valid TOML: {error}"]) from None
