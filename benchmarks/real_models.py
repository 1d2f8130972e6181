"""Quantize small trained models with the command line, load them back, compare.

For each model folder below --data: `ptqkit quantize` (quality and rtn), then in this process plain
`AutoModelForCausalLM.from_pretrained`; its logits against the float model with the dequantized
weights, and perplexity beside the float model's and RTN's.
"""

from __future__ import annotations

import gzip
import itertools
import json
import math
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from common import parser, save, show
from transformers import AutoModelForCausalLM, AutoTokenizer

from ptqkit.cli import main as ptqkit_main
from ptqkit.hf import perplexity, read_matrices

# Group sizes that divide every layer's inputs: 64 and 172; 128 and 352; 48 and 192.
MODELS = {"stories260k": 4, "babyllama105": 32, "nanosort_gpt2": 16}
CASES = ((4, True), (4, False), (3, False))


def stories(path: Path) -> list[str]:
    """The TinyStories texts."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [next(v for v in row.values() if isinstance(v, str)) for row in rows]


def sorting_rows() -> torch.Tensor:
    """All 729 tasks of the sorting model: six digits, then the same in order."""
    rows = [[*d, *sorted(d)][:11] for d in itertools.product(range(3), repeat=6)]
    return torch.tensor(rows)


@torch.no_grad()
def sorting_loss(model) -> float:
    """Perplexity of the sorted digits, given all before them."""
    rows = torch.tensor([[*d, *sorted(d)] for d in itertools.product(range(3), repeat=6)])
    logits = model(rows[:, :11]).logits[:, 5:]
    return math.exp(torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 6:].flatten()))


@torch.no_grad()
def exactness(folder: Path, original: Path, probe: torch.Tensor) -> float:
    """Largest difference of the loaded checkpoint's logits to the fake-quantized float model's."""
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    fake = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32)
    for name, matrix in read_matrices(folder).items():
        weight = fake.get_submodule(name).weight
        values = torch.from_numpy(matrix.dequantize())
        weight.copy_(
            values
            if values.shape == weight.shape
            and "Conv1D" not in type(fake.get_submodule(name)).__name__
            else values.T
        )
    return float((loaded(probe).logits - fake(probe).logits).abs().max())


def study(args, name: str, group: int, work: Path):
    """Rows of one model."""
    folder = args.data / name
    text = stories(args.data / "tinystories" / "train_800.jsonl.gz")
    sorting = name == "nanosort_gpt2"
    calibration = work / f"{name}.{'npy' if sorting else 'txt'}"
    if sorting:
        np.save(calibration, sorting_rows().numpy())
    else:  # no newlines: one of the tokenizers has none
        calibration.write_text(" ".join(" ".join(text[:400]).split()))
    tokenizer = None if sorting else AutoTokenizer.from_pretrained(folder)

    def score(path):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        if sorting:
            return sorting_loss(model)
        window = model.config.max_position_embeddings
        return perplexity(
            model,
            tokenizer,
            " ".join(" ".join(text[600:]).split()),
            window=window,
            max_tokens=args.tokens,
        ).perplexity

    probe = (
        sorting_rows()[:64] if sorting else torch.tensor([tokenizer(text[700])["input_ids"][:128]])
    )
    base = score(folder)
    for bits, symmetric in CASES:
        found = {}
        for method in ("rtn", "gptq"):
            out = work / f"{name}-{method}-{bits}-{symmetric}"
            options = [
                "--method",
                method,
                "--bits",
                str(bits),
                "--group-size",
                str(group),
                "--calibration",
                str(calibration),
                "--out",
                str(out),
                "--quiet",
            ]
            if sorting:
                options += ["--samples", "729", "--sequence-length", "11"]
            else:
                options += ["--samples", "64", "--sequence-length", "256"]
            code = ptqkit_main(
                ["quantize", str(folder), *options, *(["--symmetric"] if symmetric else [])]
            )
            if code:
                raise SystemExit(f"ptqkit quantize failed with {code}")
            config = json.loads((out / "config.json").read_text())["quantization_config"]
            found[method] = (score(out), exactness(out, folder, probe), config["quant_method"])
        yield [
            f"{name}, {bits} bit g{group} {'sym' if symmetric else 'asym'}",
            base,
            found["rtn"][0],
            found["gptq"][0],
            found["gptq"][1],
            found["gptq"][2],
        ]


def main() -> None:
    p = parser(__doc__.splitlines()[0], repeats=1)
    p.add_argument("--data", type=Path, required=True, help="folder that holds the model folders")
    p.add_argument("--tokens", type=int, default=40_000, help="test tokens")
    args = p.parse_args()
    transformers.utils.logging.disable_progress_bar()
    rows = []
    with tempfile.TemporaryDirectory() as work:
        for name, group in MODELS.items():
            rows += study(args, name, group, Path(work))
    columns = ["model", "float", "rtn", "quality", "largest logit difference", "format"]
    show("perplexity (for the sorting model: of the sorted digits)", columns, rows)
    save(args.json, "real_models", {"rows": [dict(zip(columns, r, strict=True)) for r in rows]})


if __name__ == "__main__":
    main()
