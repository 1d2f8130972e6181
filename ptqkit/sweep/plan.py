"""A sweep file as checked, frozen values; see :mod:`ptqkit.sweep` for its form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ptqkit._defaults import BATCH_SIZE, SAMPLES, SEQUENCE_LENGTH
from ptqkit._repr import one_line_repr
from ptqkit.demo import DEMO

__all__ = [
    "Calibration",
    "ModelPlan",
    "Plan",
    "Published",
    "RecipePlan",
    "Sampling",
    "TaskPlan",
    "TextSource",
]


@dataclass(frozen=True)
class TextSource:
    """A text: file or ``"demo"``, which of its documents, and how their white space is kept."""

    __repr__ = one_line_repr

    path: str
    documents: tuple[int, int] | None = None
    whitespace: str = "keep"


@dataclass(frozen=True)
class Calibration:
    """What recipes are fitted to; see :func:`ptqkit.hf.prepare_calibration`.

    ``draws`` drawings of the windows, the first with ``seed``, each further one with one more.
    """

    __repr__ = one_line_repr

    text: TextSource
    samples: int = SAMPLES
    sequence_length: int = SEQUENCE_LENGTH
    batch_size: int = BATCH_SIZE
    seed: int = 0
    start_token: str | int | None = "auto"
    draws: int = 1


@dataclass(frozen=True)
class Sampling:
    """How a diffusion model samples, and how many latents it is calibrated on.

    Attributes
    ----------
    steps : int
        Of DDIM.
    guidance : float
        Of classifier-free guidance; 1 is none.
    latents : int
        For calibration, uniform over the steps.
    batch_size : int
    """

    __repr__ = one_line_repr

    steps: int = 20
    guidance: float = 1.0
    latents: int = 100
    batch_size: int = 8


@dataclass(frozen=True)
class TaskPlan:
    """A task: ``settings`` are those of its kind, defaults filled in.

    Attributes
    ----------
    name, kind : str
        Kind is ``"perplexity"``, ``"zero-shot"`` or, of diffusion models, ``"samples"``.
    source : TextSource
        Text, or file of items; empty for samples.
    settings : dict
    """

    __repr__ = one_line_repr

    name: str
    kind: str
    source: TextSource
    settings: Mapping[str, Any]
    optional: bool = False

    @property
    def missing(self) -> bool:
        """Whether its file does not exist."""
        if self.kind == "samples":
            return False
        return self.source.path != DEMO and not Path(self.source.path).is_file()


@dataclass(frozen=True)
class ModelPlan:
    """A model, what it is calibrated on, and the names of its tasks.

    ``sampling`` is that of a diffusion model, None of a language model; ``prompts`` is the file of
    them, of a text-to-image pipeline.
    """

    __repr__ = one_line_repr

    name: str
    path: str
    calibration: Calibration
    tasks: tuple[str, ...]
    dtype: str = "auto"
    optional: bool = False
    outliers: Mapping[str, Any] | None = None
    sampling: Sampling | None = None
    prompts: str | None = None

    @property
    def missing(self) -> bool:
        """Whether its folder does not exist."""
        return self.path != DEMO and not Path(self.path).is_dir()


@dataclass(frozen=True)
class RecipePlan:
    """A recipe by name, one case of a product if its table has lists.

    Attributes
    ----------
    name : str
    value
        What the file says.
    resolved : mapping or None
        The checked recipe as plain values; None leaves weights and activations float.
    models : tuple of str
    softmax : mapping or None
        Options of :func:`ptqkit.quantize_softmax`.
    parameters : mapping
        Label along each axis of the product.
    fitted : bool
        Whether it depends on calibration windows.
    """

    __repr__ = one_line_repr

    name: str
    value: Any
    resolved: Mapping[str, Any] | None
    models: tuple[str, ...]
    softmax: Mapping[str, Any] | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    fitted: bool = True


@dataclass(frozen=True)
class Published:
    """A figure that a paper or another project has published."""

    __repr__ = one_line_repr

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

    __repr__ = one_line_repr

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
