"""The full diagnosis behind ``ptqkit diagnose``: options, and what runs without ``--sensitivity``.

:func:`add_options` adds its options to the command's parser, and :func:`run` does the work; the
options of data and models are the command's own.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ptqkit._folders import check_path, resolve
from ptqkit.cli.inputs import load_model, read_text
from ptqkit.cli.options import check_text, prefixed
from ptqkit.cli.output import check_json, progress_of, quiet_transformers, say, write_json
from ptqkit.demo import DEMO
from ptqkit.errors import UsageError

__all__ = ["add_options", "run"]

_FIGURES = ("depth", "distributions", "channels", "magnitudes")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the full diagnosis."""
    group = parser.add_argument_group("full diagnosis (without --sensitivity)")
    group.add_argument(
        "--compare",
        nargs="+",
        default=[],
        metavar="MODEL",
        help="lay these models beside MODEL, with ratios: folders, reports (.json of --out), or "
        "channel maxima (.safetensors)",
    )
    group.add_argument("--published", metavar="FILE", help="TOML with ratios that others state")
    group.add_argument("--part", help="where models are compared (attention in)")
    group.add_argument("--at", type=float, metavar="X", help="relative depth, 0 to 1 (median)")
    group.add_argument("--out", metavar="DIR", help="report.json, layers.csv and all figures")
    group.add_argument(
        "--recipe", action="store_true", help="print a recipe with more bits where they are needed"
    )
    group.add_argument(
        "--recipe-by", default="inputs", choices=("inputs", "sensitivity"), help="what decides it"
    )
    group.add_argument("--value", type=float, default=6.0, help="of outlier dimensions (6.0)")
    group.add_argument("--layers", type=float, default=0.25, help="their share of layers (0.25)")
    group.add_argument("--tokens", type=float, default=0.06, help="their share of tokens (0.06)")
    group.add_argument("--ratio", type=float, default=6.0, help="of outlier channels (6.0)")
    group.add_argument(
        "--fast", action="store_true", help="leave out the sensitivity of kinds and blocks"
    )


def _check(args: argparse.Namespace) -> None:
    check_json(args)
    if args.picture is not None:
        raise UsageError("--picture shows a sensitivity: take --out DIR, which gets all figures")
    for option in ("text", "max_tokens"):
        if getattr(args, option) is not None:
            raise UsageError(f"--{option.replace('_', '-')} goes with --sensitivity")
    if not 2 <= args.bits <= 8:
        raise UsageError(f"--bits must be from 2 to 8, not {args.bits}")
    for option in ("published", "part", "at"):
        if getattr(args, option) is not None and not args.compare:
            raise UsageError(f"--{option} needs --compare")
    if args.recipe and args.recipe_by == "sensitivity" and args.fast:
        raise UsageError("--recipe-by sensitivity needs what --fast leaves out")
    if args.calibration is not None:
        check_text("--calibration", args.calibration)
    models = [m for m in (args.model, *args.compare) if not _is_file(m)]
    if args.calibration is None and any(m != DEMO for m in models):
        raise UsageError("--calibration FILE is needed (only 'demo' brings a text of its own)")
    _check_values(args)


def _check_values(args: argparse.Namespace) -> None:
    """Refuse what the library would refuse in the end, before anything runs."""
    from ptqkit.hf.diagnostics.compare import check_place, read_published
    from ptqkit.hf.diagnostics.diagnose import check_rules

    with prefixed("--"):
        check_rules(value=args.value, layers=args.layers, tokens=args.tokens, ratio=args.ratio)
        check_place(_part(args), args.at)
    if args.published is not None:
        with prefixed("--published: "):
            read_published(args.published)
    if args.out is not None:
        check_path(resolve(args.out), f"--out {args.out}")


def _part(args: argparse.Namespace) -> str:
    return "attention in" if args.part is None else args.part


def _is_file(model: str) -> bool:
    return model.endswith((".json", ".safetensors"))


def _report(args: argparse.Namespace, model: str) -> Any:
    """Return the report of a model, of a saved report, or of channel maxima."""
    from ptqkit.hf import DiagnosisReport, diagnose, read_activation_maxima

    if model.endswith(".safetensors"):
        return read_activation_maxima(model, ratio=args.ratio)
    if model.endswith(".json"):
        try:
            return DiagnosisReport.from_dict(json.loads(Path(model).read_text(encoding="utf-8")))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UsageError(f"{model} is not a report.json that --out wrote: {error}") from error
    loaded, tokenizer, _ = load_model(argparse.Namespace(**{**vars(args), "model": model}))
    return diagnose(
        loaded,
        read_text("--calibration", args.calibration, tokenizer, "calibration"),
        tokenizer=tokenizer,
        samples=args.samples,
        sequence_length=args.sequence_length,
        batch_size=args.batch_size,
        bits=args.bits,
        value=args.value,
        layers=args.layers,
        tokens=args.tokens,
        ratio=args.ratio,
        sensitivity=not args.fast,
        name=Path(model).name or model,
        progress=progress_of(args, pause=10.0),
    )


def run(args: argparse.Namespace) -> None:
    """Diagnose the model or models, and print."""
    _check(args)
    from ptqkit.hf import compare
    from ptqkit.hf.diagnostics.advice import recipe_toml

    with quiet_transformers():
        reports = [_report(args, model) for model in (args.model, *args.compare)]
    values: dict[str, Any] = {"model": args.model, "diagnosis": reports[0].to_dict()}
    say(args, reports[0].table())
    comparison = None
    if args.compare:
        comparison = compare(reports, part=_part(args), at=args.at, published=args.published)
        values["comparison"] = comparison.to_dict()
        say(args, f"\n{comparison.table()}")
    if args.recipe:
        recipe = values["recipe"] = reports[0].recipe(by=args.recipe_by)
        text = recipe_toml(recipe)
        if args.json != "-":
            print(f"\n{text}", end="")
    if args.out is not None:
        _save(Path(args.out), reports[0], comparison)
        if args.recipe:
            Path(args.out, "recipe.toml").write_text(text, encoding="utf-8")
        say(args, f"\nwritten to {args.out}")
    write_json(args, values)


def _save(folder: Path, report: Any, comparison: Any) -> None:
    """Everything as files; existing ones of the same names are replaced."""
    import csv

    folder.mkdir(parents=True, exist_ok=True)
    report.to_json(folder / "report.json")
    layers = report.layers()
    names = list(dict.fromkeys(name for row in layers for name in row))
    with open(folder / "layers.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(layers)
    for figure in _FIGURES:
        if figure != "distributions" or report.weights:
            report.draw(folder / f"{figure}.png", figure)
    if comparison is not None:
        comparison.draw(folder / "comparison.png")
