"""What an 8-bit softmax costs a diffusion model, and what the correction of its bias gives back.

The tables and the figure of Pandey et al. 2023, "Softmax Bias Correction for Quantized Generative
Models", on the small class-conditional UNet of ``benchmarks/train_unet.py``. Their figures are of
another and much larger model and stand for the effect, not for a value to reach.

    python benchmarks/softmax_unet.py --table 1        # which tensor of attention is sensitive
    python benchmarks/softmax_unet.py --table 2        # one bias per tensor, head, step, both
    python benchmarks/softmax_unet.py --table 3        # FP32, SM8, W8A16, with and without
    python benchmarks/softmax_unet.py --figure 1       # expected row sum against SQNR
    python benchmarks/softmax_unet.py --picture        # Figure 2: samples side by side, 20 steps
    python benchmarks/softmax_unet.py --table 1 2 3 --figure 1 --picture --out results

With --out each part is also written there: table1.json, ..., figure1.png, samples.png.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import unet_tables as tables
from common import header, show, torch_threads

from ptqkit import diffusion, sqnr

HERE = Path(__file__).resolve().parent


def tiny_model() -> diffusion.ClassConditionalUNet:
    """A random UNet for --smoke."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = diffusers.UNet2DConditionModel(
            sample_size=16,
            in_channels=1,
            out_channels=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            block_out_channels=(16, 16),
            layers_per_block=1,
            cross_attention_dim=8,
            attention_head_dim=2,
            norm_num_groups=8,
        )
        labels = torch.randn(11, 4, 8)
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
    )
    return diffusion.ClassConditionalUNet(unet.eval(), scheduler, labels)


def settings(experiment: tables.Experiment) -> dict[str, Any]:
    """What a result file says about the run."""
    names = ("samples", "steps", "latents", "batch_size", "seed")
    found = {name: getattr(experiment, name) for name in names}
    found["parameters"] = sum(p.numel() for p in experiment.model.unet.parameters())
    found["diffusers"] = diffusers.__version__
    return found


def write(args: argparse.Namespace, experiment: tables.Experiment, name: str, results: Any) -> None:
    """Write one part as JSON, where a folder was asked for."""
    if args.out is None:
        return
    content = {"settings": settings(experiment), "machine": header(), **results}
    text = json.dumps(content, indent=1, default=str).replace("Infinity", '"inf"')
    (args.out / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def print_rows(title: str, rows: list[dict[str, Any]]) -> None:
    """Print a table, dB with two places."""
    columns = [*rows[0]]
    cells = [[f"{row[c]:.2f}" if c.endswith("_db") else row[c] for c in columns] for row in rows]
    show(title, columns, cells)


def table(args: argparse.Namespace, experiment: tables.Experiment, number: int) -> None:
    """Compute and print one table."""
    if number == 1:
        rows = tables.sensitivity_table(experiment, args.bits)
        title = "Table 1: one kind of tensor quantized alone, SQNR of final samples"
    elif number == 2:
        rows = tables.granularity_table(
            experiment, args.bits, args.range, args.variants, not args.latents_only
        )
        title = "Table 2: corrections of a quantized softmax, SQNR of final samples, UNet outputs"
    else:
        rows = tables.total_table(experiment, args.bits[0], args.correction)
        title = "Table 3: softmax and weights, SQNR of final samples"
    print_rows(title, rows)
    write(args, experiment, f"table{number}", {"rows": rows})


def figure(args: argparse.Namespace, experiment: tables.Experiment) -> None:
    """Compute, print and draw Figure 1."""
    found = tables.row_sum_figure(experiment, args.bits[0])
    rows = [{**p, "zero_fraction": f"{100 * p['zero_fraction']:.1f}%"} for p in found["points"]]
    print_rows("Figure 1: only this layer's softmax quantized, SQNR of the UNet's output", rows)
    print(f"correlation of row sum and SQNR: {found['pearson']:.3f}, ranks {found['spearman']:.3f}")
    write(args, experiment, "figure1", found)
    if args.out is not None:
        draw_figure(args.out / "figure1.png", found, args.bits[0])


def draw_figure(path: Path, found: dict[str, Any], bits: int) -> None:
    """Scatter of row sum and SQNR, self- and cross-attention in two colours."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    picture, axes = plt.subplots(figsize=(6, 4))
    for cross, label in ((False, "self-attention"), (True, "cross-attention")):
        points = [p for p in found["points"] if p["cross"] == cross]
        points = [p for p in points if math.isfinite(p["sqnr_db"])]
        axes.scatter(
            [p["mean_row_sum"] for p in points],
            [p["sqnr_db"] for p in points],
            label=label,
            zorder=3,
        )
    axes.set_xlabel(f"expected row sum of the {bits}-bit softmax")
    axes.set_ylabel("SQNR of the UNet's output, dB")
    axes.set_title(f"one point per layer, correlation {found['pearson']:.2f}")
    axes.grid(alpha=0.3)
    axes.legend()
    picture.tight_layout()
    picture.savefig(path, dpi=120)
    plt.close(picture)


PICTURED = {
    "none": "no correction",
    "per head": "β per head (paper)",
    "row sum": "row sum",
    "before + row sum": "before normalising,\nrow sum",
}
"""Variants of the picture and what its lines are called after."""


def samples_side_by_side(args: argparse.Namespace, experiment: tables.Experiment) -> None:
    """Draw the same samples by the float model and with a quantized softmax, row by row.

    Figure 2 of the paper, which has the first three lines of both kinds of weights.
    """
    label = f"SM{args.bits[0]}"
    rows, decibels = {"float": experiment.reference}, {}
    for name, unet in (("", experiment.model.unet), ("W8A16", experiment.rounded)):
        if name:
            rows[name] = experiment.run(unet)
        study = experiment.study(args.bits[0], unet)
        for variant, ending in PICTURED.items():
            experiment.progress(f"picture: {name} {label}, {variant}".replace("  ", " "))
            with diffusion.attention_hooks(unet, tables.variant_hooks(study, variant)):
                line = f"{name}-{label}" if name else label
                rows[f"{line}\n{ending}"] = experiment.run(unet)
    for name, images in list(rows.items())[1:]:
        decibels[name] = float(sqnr(experiment.reference, images, per="sample"))
    title = f"{experiment.steps} steps of DDIM; SQNR of {experiment.samples} samples on the right"
    draw_samples(args.out / "samples.png", rows, decibels, title, min(experiment.samples, 10))
    found = [
        {"model": n.replace(",\n", ", ").replace("\n", ", "), "sqnr_db": d}
        for n, d in decibels.items()
    ]
    write(args, experiment, "figure2", {"rows": found})


def draw_samples(
    path: Path, rows: dict[str, np.ndarray], decibels: dict[str, float], title: str, count: int
) -> None:
    """One line of images per model, in gray, with its name and its decibels."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    picture, grid = plt.subplots(
        len(rows),
        count,
        figsize=(0.75 * count + 3, 0.78 * len(rows) + 0.5),
        squeeze=False,
        layout="constrained",
    )
    for line, (name, images) in zip(grid, rows.items(), strict=True):
        for axes, image in zip(line, images[:count, 0], strict=True):
            axes.imshow(image, cmap="gray", vmin=-1, vmax=1)
            axes.set_xticks([])
            axes.set_yticks([])
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=10)
        if name in decibels:
            line[-1].yaxis.set_label_position("right")
            line[-1].set_ylabel(
                f"{decibels[name]:.1f} dB", rotation=0, ha="left", va="center", fontsize=10
            )
    picture.suptitle(title, fontsize=11)
    picture.savefig(path, dpi=110)
    plt.close(picture)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line; ``--smoke`` shrinks everything."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    add = parser.add_argument
    add("--model", type=Path, default=HERE / "unet", metavar="DIR", help="of train_unet.py")
    add("--table", type=int, nargs="+", choices=(1, 2, 3), default=[], help="tables to compute")
    add("--figure", type=int, nargs="+", choices=(1,), default=[], help="figures to compute")
    add("--picture", action="store_true", help="samples side by side (needs --out)")
    add("--out", type=Path, metavar="DIR", help="write JSON and pictures there")
    add("--bits", type=int, nargs="+", default=[8], help="of the softmax (8); table 3: the first")
    add(
        "--range",
        nargs="+",
        choices=("fixed", "calibrated", "search"),
        default=["fixed"],
        help="grids of table 2: [0, 1], up to the largest seen, least error (fixed)",
    )
    add(
        "--correction",
        choices=tables.BIASES,
        default="per step and head",
        help="of table 3 (per step and head)",
    )
    add(
        "--variants",
        nargs="+",
        choices=[*tables.VARIANTS],
        default=[*tables.VARIANTS],
        help="of table 2 (all)",
    )
    add("--latents-only", action="store_true", help="table 2 without final samples, which are slow")
    add("--samples", type=int, default=32, help="final samples to compare (32)")
    add("--steps", type=int, help="of DDIM (50; with --picture alone 20, as the paper's figure)")
    add("--latents", type=int, default=400, help="calibration latents (400)")
    add("--batch-size", type=int, default=8, help="samples that run together (8)")
    add("--seed", type=int, default=0, help="of the starting noise (0)")
    add("--device", default="cpu")
    add("--smoke", action="store_true", help="a random tiny model, two steps")
    args = parser.parse_args(argv)
    if not (args.table or args.figure or args.picture):
        parser.error("nothing to do: give --table, --figure or --picture")
    if args.picture and args.out is None:
        parser.error("--picture needs --out")
    if args.steps is None:
        args.steps = 50 if args.table or args.figure else 20
    if args.smoke:
        vars(args).update(samples=4, steps=2, latents=4)
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the script."""
    args = parse(argv)
    torch_threads()
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
    model = tiny_model() if args.smoke else diffusion.load_unet(args.model, device=args.device)
    started = time.perf_counter()

    def progress(text: str) -> None:
        print(f"[{time.perf_counter() - started:6.0f} s] {text}", file=sys.stderr, flush=True)

    experiment = tables.Experiment(
        model, args.samples, args.steps, args.latents, args.batch_size, args.seed, progress
    )
    for number in args.table:
        table(args, experiment, number)
    if args.figure:
        figure(args, experiment)
    if args.picture:
        samples_side_by_side(args, experiment)
    return 0


if __name__ == "__main__":
    sys.exit(main())
