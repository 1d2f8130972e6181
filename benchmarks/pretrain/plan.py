"""What the ablation consists of: axes and their choices, ways to quantize, what others state."""

from __future__ import annotations

from typing import Any

#: Every axis changes one choice of the base: weight decay 0.1, clipping at 1, no dropout, bf16,
#: learned positions, Adam, a gain per channel. The paper studies clipping at weight decay 0.001.
AXES: dict[str, list[dict[str, str]]] = {
    "weight decay": [{"weight-decay": "0.1"}, {"weight-decay": "0.01"}, {"weight-decay": "0.001"}],
    "gradient clipping": [
        {"weight-decay": d, "clip": c} for d in ("0.1", "0.01", "0.001") for c in ("1", "0")
    ],
    "dropout": [{"dropout": d} for d in ("0", "0.1", "0.4", "0.8")],
    "half precision": [
        {"precision": p, "weight-decay": d} for p in ("bf16", "fp16") for d in ("0.1", "0.01")
    ],
    "positions": [{"positions": p} for p in ("learned", "sinusoidal", "alibi")],
    "optimizer and gain": [
        {"optimizer": o, "gain": g} for o in ("adam", "muon") for g in ("channel", "single")
    ],
}
BASE = {
    "weight-decay": "0.1", "clip": "1", "dropout": "0", "precision": "bf16",
    "positions": "learned", "optimizer": "adam", "gain": "channel",
}  # fmt: skip
#: Choices whose effect an axis studies; the others of the axis are its background.
STUDIED = {
    "weight decay": {"weight-decay"}, "gradient clipping": {"clip"}, "dropout": {"dropout"},
    "half precision": {"precision"}, "positions": {"positions"},
    "optimizer and gain": {"optimizer", "gain"},
}  # fmt: skip

#: How weights and inputs are quantized. "INT8 static" and "W4A4" are the hard cases.
SCHEMES: dict[str, dict[str, Any]] = {
    "INT8 vector-wise": {"preset": "vector-wise"},
    "INT8 static": {
        "preset": "rtn", "bits": 8, "group_size": None, "symmetric": True, "per_tensor": True,
        "activations": {"bits": 8, "granularity": "tensor", "symmetric": False},
    },
    "INT4 columns": {"preset": "rtn", "bits": 4, "group_size": None, "symmetric": True},
    "W4A4": {
        "preset": "rtn", "bits": 4, "group_size": None, "symmetric": True,
        "activations": {"bits": 4, "granularity": "token"},
    },
}  # fmt: skip
TASKS = ("lambada_openai", "hellaswag", "piqa", "arc_easy", "winogrande", "copa")


def name_of(choices: dict[str, str]) -> str:
    """Name a run by what differs from the base."""
    changed = {k: v for k, v in choices.items() if BASE[k] != v}
    return "+".join(f"{k}={v}" for k, v in sorted(changed.items())) or "base"


def runs(seeds: int) -> dict[str, dict[str, str]]:
    """Return every run of every axis once, by name, the seeds of a choice one after the other."""
    unique: dict[str, dict[str, str]] = {}
    for seed in range(seeds):
        for axis in AXES.values():
            for change in axis:
                choices = {**BASE, **change}
                unique.setdefault(f"{name_of(choices)},seed={seed}", {**choices, "seed": str(seed)})
    return unique


def label(choices: dict[str, str], axis: str) -> str:
    """Name a choice of an axis as the paper does."""
    words = {
        "weight-decay": "weight decay {}", "clip": "clipping {}", "dropout": "dropout {}",
        "precision": "{}", "positions": "{}", "optimizer": "{}", "gain": "{} gain",
    }  # fmt: skip
    names = {"0": "none"}
    found = []
    for key in [k for k in BASE if any(k in change for change in AXES[axis])]:
        value = names.get(choices[key], choices[key]) if key == "clip" else choices[key]
        found.append(words[key].format(value))
    return ", ".join(found)


def choices_of(axis: str) -> list[tuple[str, str]]:
    """Return (label, run name without its seed) of every choice of an axis."""
    full = [{**BASE, **change} for change in AXES[axis]]
    return [(label(choices, axis), name_of(choices)) for choices in full]


def contrasts(axis: str) -> list[tuple[int, int, int | None]]:
    """Return the pairs of an axis that differ in one studied choice, and which is held harder.

    The third number is 0 or 1, the one of the pair that others state to degrade more; None where
    they state that there is no difference. Of the optimizer and the gain the paper says nothing:
    the statement is that of Outlier-Safe Pre-Training (arXiv:2506.19697), on outliers.
    """
    full = [{**BASE, **change} for change in AXES[axis]]
    found = []
    for i, a in enumerate(full):
        for j in range(i + 1, len(full)):
            b = full[j]
            changed = [k for k in BASE if a[k] != b[k]]
            if len(changed) == 1 and changed[0] in STUDIED[axis]:
                found.append((i, j, _harder(changed[0], a[changed[0]], b[changed[0]])))
    return found


def _harder(key: str, a: str, b: str) -> int | None:
    if key == "positions":
        return None
    if key in ("weight-decay", "clip"):  # less of it; clipping 0 is none
        return int(float(b) < float(a))
    if key == "dropout":
        return int(float(b) > float(a))
    return int(b == {"precision": "fp16", "optimizer": "adam", "gain": "channel"}[key])
