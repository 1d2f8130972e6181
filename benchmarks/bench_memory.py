"""What quantizing grows the process by, against the estimate: every case in a fresh process.

The growth is the peak of the resident memory during the run less what was resident before it; page
faults and CPU seconds (of all threads) are those of the run. The first case is the LLaMA shape of
100 M parameters of ``bench_pipeline.py``.
"""

from __future__ import annotations

import ctypes
import gc
import json
import resource
import subprocess
import sys
from pathlib import Path

from common import parser, save, show, torch_threads

# name: (hidden, intermediate, layers, samples of 512 tokens, batch size, options of quantize)
CASES = {
    "100 M": (768, 2048, 12, 32, 4, {}),
    "100 M, replay": (768, 2048, 12, 32, 4, {"schedule": "replay"}),
    "100 M, batches of 16": (768, 2048, 12, 32, 16, {}),
    "100 M, batches of 1": (768, 2048, 12, 32, 1, {}),
    "100 M, propagation": (768, 2048, 12, 32, 4, {"error_propagation": 0.5}),
    "6 wide layers": (1024, 2816, 6, 16, 4, {}),
    "6 wide layers, bfloat16": (1024, 2816, 6, 16, 4, {"dtype": "bfloat16"}),
}
MIB = 2**20


def status(field: str) -> int:
    """Return VmRSS or VmHWM (its peak), in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise SystemExit(f"/proc/self/status has no {field}: this benchmark needs Linux")


def study(name: str, layers: int) -> dict[str, float]:
    """Quantize one case in this process."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import ptqkit

    torch_threads()
    hidden, intermediate, own_layers, samples, batch_size, options = CASES[name]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16384,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers or own_layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    options = dict(options)
    model = LlamaForCausalLM(config).to(getattr(torch, options.pop("dtype", "float32"))).eval()
    tokens = torch.randint(16384, (samples, 512))
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)  # or what building the model has freed would hide growth
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, use = status("VmRSS"), resource.getrusage(resource.RUSAGE_SELF)
    result = ptqkit.quantize(
        model,
        "reference",
        tokens,
        bits=4,
        group_size=128,
        symmetric=True,
        batch_size=batch_size,
        diagnostics=False,
        progress=False,
        **{"schedule": "one-pass", **options},
    )
    growth, after = status("VmHWM") - before, resource.getrusage(resource.RUSAGE_SELF)
    replay = options.get("schedule") == "replay"
    estimate = result.report.memory["estimate_replay" if replay else "estimate_one_pass"]
    return {
        "before": before / MIB,
        "estimate": estimate / MIB,
        "growth": growth / MIB,
        "ratio": growth / estimate,
        "kept": (status("VmRSS") - before) / MIB,
        "faults": after.ru_minflt - use.ru_minflt,
        "cpu": after.ru_utime + after.ru_stime - use.ru_utime - use.ru_stime,
        "system": after.ru_stime - use.ru_stime,
        "wall": result.report.seconds["total"],
    }


def main() -> None:
    p = parser(__doc__.splitlines()[0], repeats=1)
    p.add_argument("--case", choices=CASES, action="append", help="all by default")
    p.add_argument("--layers", type=int, default=0, help="instead of each case's own")
    p.add_argument("--here", action="store_true", help="one case, in this process")
    args = p.parse_args()
    if args.here:
        print(json.dumps(study(args.case[0], args.layers)))
        return
    results: dict[str, list[dict[str, float]]] = {}
    rows = []
    for name in args.case or CASES:
        command = [sys.executable, __file__, "--here", "--case", name, "--layers", str(args.layers)]
        for _ in range(args.repeats):
            run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found = json.loads(run.stdout.splitlines()[-1])
            results.setdefault(name, []).append(found)
            rows.append([name, *found.values()])
    units = ["before", "estimate", "growth", "ratio", "kept", "faults", "CPU s", "system s", "wall"]
    show("Memory of quantizing, MiB", ["case", *units], rows)
    save(args.json, "memory", {"cases": results})


if __name__ == "__main__":
    main()
