"""Diffusion models in a sweep: final samples against those of the float model."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ptqkit._repr import one_line_repr
from ptqkit.errors import PreflightError
from ptqkit.recipe import as_recipe
from ptqkit.recipe.recipe import Recipe
from ptqkit.study.engine import Quantized
from ptqkit.study.measured import Measured
from ptqkit.sweep.diffusion_files import SAMPLES_METRIC, read_prompts
from ptqkit.sweep.plan import ModelPlan, RecipePlan, Sampling, TaskPlan

__all__ = ["UNetBench", "open_unet"]

_W, _A = 32.0, 16.0  # what the literature calls activations that stay as they are: W8A16

# Far from the seeds that people give to tasks: other noise.
_CALIBRATION_SEED = 1 << 20


@dataclass
class UNetBench:
    """A diffusion model of a sweep, opened.

    Attributes
    ----------
    plan : ModelPlan
    model : ptqkit.diffusion.ClassConditionalUNet
    threads : int
        Of the solver.
    """

    __repr__ = one_line_repr

    plan: ModelPlan
    model: Any
    threads: int = 0
    _samples: dict[str, np.ndarray] = field(default_factory=dict, repr=False)
    _calibration: dict[int, Any] = field(default_factory=dict, repr=False)

    @property
    def _sampling(self) -> Sampling:
        return self.plan.sampling or Sampling()

    @property
    def _options(self) -> dict[str, Any]:
        known = self._sampling
        return {
            "steps": known.steps,
            "guidance": known.guidance,
            "batch_size": known.batch_size,
            "no_class": self.model.labels[-1],
        }

    def calibration(self, draw: int) -> Any:
        """Return the calibration latents of a draw: those of the float model."""
        from ptqkit.diffusion import draw_calibration

        if draw not in self._calibration:
            latents, steps = self._sampling.latents, self._sampling.steps
            count = max(8, -(-latents // steps))
            seed = _CALIBRATION_SEED + self.plan.calibration.seed + draw
            self._calibration[draw] = draw_calibration(
                self.model.unet,
                self.model.scheduler,
                self.model.noise(count, seed=seed),
                self.model.context(count),
                count=latents,
                seed=seed,
                **self._options,
            )
        return self._calibration[draw]

    def make(self, recipe: RecipePlan | None, draw: int) -> Quantized:
        """Quantize a copy of the UNet; None is the model as it is."""
        if recipe is None:
            return Quantized(self.model.unet, _W, _A)
        started = time.perf_counter()
        unet, bits = copy.deepcopy(self.model.unet), _W
        if recipe.resolved is not None:
            bits = self._quantize(unet, as_recipe(recipe.resolved), draw)
        if recipe.softmax is not None:
            from ptqkit.diffusion import quantize_softmax

            quantize_softmax(unet, self.calibration(draw), diagnostics=False, **recipe.softmax)
        return Quantized(unet, bits, _A, time.perf_counter() - started)

    def _quantize(self, unet: Any, recipe: Recipe, draw: int) -> float:
        from ptqkit.nn.module_driver import quantize_module

        batches = None
        if recipe.needs_calibration():
            batches = [
                {"sample": x, "timestep": t, "encoder_hidden_states": c}
                for x, t, c in self.calibration(draw).batches()
            ]
        result = quantize_module(unet, batches, recipe, threads=self.threads)
        return float(result.totals()["bits_per_weight"])

    def measure(self, unet: Any, task: TaskPlan) -> Measured:
        """Compare the final samples of a UNet with those of the float model, from the same noise.

        Raises
        ------
        ArithmeticError
            If a sample is not finite.
        """
        reference = self._sampled(self.model.unet, task, task.name)
        found = reference if unet is self.model.unet else self._sampled(unet, task)
        if not np.isfinite(found).all():
            raise ArithmeticError("final samples hold NaN or Inf")
        exact, other = (np.asarray(x, np.float64).reshape(len(x), -1) for x in (reference, found))
        ratios = ((other - exact) ** 2).sum(1) / (exact**2).sum(1)
        return Measured(
            float(ratios.mean()),
            SAMPLES_METRIC,
            False,
            len(ratios),
            losses=ratios.tolist(),
            scored=[1] * len(ratios),
        )

    def _sampled(self, unet: Any, task: TaskPlan, keep: str | None = None) -> np.ndarray:
        from ptqkit.diffusion import sample

        if keep is not None and keep in self._samples:
            return self._samples[keep]
        images, seed = task.settings["images"], task.settings["seed"]
        noise, context = self.model.noise(images, seed=seed), self.model.context(images)
        found = sample(unet, self.model.scheduler, noise, context, **self._options).numpy()
        if keep is not None:
            self._samples[keep] = found
        return found


def open_unet(plan: ModelPlan, device: str = "cpu", threads: int = 0) -> UNetBench:
    """Load a diffusion model of a sweep.

    Raises
    ------
    PreflightError
        If diffusers is missing, or the prompts of a pipeline are.
    """
    import torch

    try:
        from ptqkit.diffusion import load_text_to_image, load_unet
    except ModuleNotFoundError as error:
        raise PreflightError([str(error)]) from error
    dtype = torch.float32 if plan.dtype == "auto" else getattr(torch, plan.dtype)
    if plan.prompts is None:
        return UNetBench(plan, load_unet(plan.path, device=device, dtype=dtype), threads)
    prompts = read_prompts(plan.prompts)
    model = load_text_to_image(plan.path, prompts, device=device, dtype=dtype)
    return UNetBench(plan, model, threads)
