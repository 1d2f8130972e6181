"""Generation and prompts of a 1.1-billion LLaMA: ptqkit beside llama.cpp, in turn, random weights.

Both have the same sizes, 4 bits in all matrices, the head among them (llama.cpp's Q4_0: groups of
32; ptqkit: groups of 128), and the same threads. Each measurement is a process of its own; they
take turns, so that a busy machine is busy for both. llama.cpp comes as a package with a library;
the file it reads is written by its own writer of GGUF::

    pip install xllamacpp gguf
    python -m benchmarks.bench_llama_cpp --json benchmarks/results/llama_cpp_zen1.json

The package's library knows AVX2 and no more. On a processor with more, build llama.cpp's own
program for it, which then takes the package's place (gguf is still needed)::

    cmake -B build -DGGML_NATIVE=ON && cmake --build build --target llama-bench
    python -m benchmarks.bench_llama_cpp --llama-bench build/bin/llama-bench --threads 8
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import save, show
from ptqkit.hf.speed.run import SpeedCase, measure_speed, random_cases
from ptqkit.hf.speed.shapes import ONE_B, ModelShape

CONTEXT = 16
PEER = "llama.cpp Q4_0"
FLOATS = ("float32", "bfloat16")
RATES = ("generation_rate", "prompt_rate")
#: Bytes of a block of 32 weights: a float16 scale and the codes.
BLOCK = {"Q4_0": 2 + 16, "Q8_0": 2 + 32}


def write_gguf(path: Path, shape: ModelShape, kind: str) -> None:
    """Write a LLaMA of random codes; scales make outputs of a usual size."""
    import gguf

    draw = np.random.default_rng(0)
    quantized = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(2048)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(shape.head_size)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind}"])
    special, count = ["<unk>", "<s>", "</s>"], shape.vocabulary
    letters = [f"<0x{i:02X}>" for i in range(256)]
    words = [f"w{i}" for i in range(count - len(special) - len(letters))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*special, *letters, *words])
    writer.add_token_scores([0.0] * count)
    writer.add_token_types([2, 3, 3, *[6] * len(letters), *[1] * len(words)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

    def matrix(name: str, rows: int, columns: int) -> None:
        blocks = draw.integers(0, 256, (rows, columns // 32, BLOCK[kind]), dtype=np.uint8)
        scale = np.float16(0.01 if kind == "Q4_0" else 0.0006)
        blocks[:, :, :2] = np.frombuffer(scale.tobytes(), np.uint8)
        writer.add_tensor(name, blocks.reshape(rows, -1), raw_dtype=quantized)

    def gains(name: str) -> None:
        writer.add_tensor(name, np.ones(shape.hidden, np.float32))

    kv = shape.kv_heads * shape.head_size
    matrix("token_embd.weight", shape.vocabulary, shape.hidden)
    for i in range(shape.layers):
        gains(f"blk.{i}.attn_norm.weight")
        matrix(f"blk.{i}.attn_q.weight", shape.hidden, shape.hidden)
        matrix(f"blk.{i}.attn_k.weight", kv, shape.hidden)
        matrix(f"blk.{i}.attn_v.weight", kv, shape.hidden)
        matrix(f"blk.{i}.attn_output.weight", shape.hidden, shape.hidden)
        gains(f"blk.{i}.ffn_norm.weight")
        matrix(f"blk.{i}.ffn_gate.weight", shape.intermediate, shape.hidden)
        matrix(f"blk.{i}.ffn_up.weight", shape.intermediate, shape.hidden)
        matrix(f"blk.{i}.ffn_down.weight", shape.hidden, shape.intermediate)
    gains("output_norm.weight")
    matrix("output.weight", shape.vocabulary, shape.hidden)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def run_llama_cpp(path: str, prompt: int, tokens: int, threads: int) -> dict[str, float]:
    """Tokens per second of a prompt and of greedy steps, as llama.cpp's server tells them."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx = 1024
    params.n_gpu_layers = 0
    params.cpuparams.n_threads = threads
    params.cpuparams_batch.n_threads = threads
    params.cache_prompt = False
    params.ui = False
    params.verbosity = 0
    server = xllamacpp.Server(params)
    ids = np.random.default_rng(1).integers(300, 30000, max(prompt, CONTEXT)).tolist()

    def ask(count: int, steps: int) -> dict[str, Any]:
        given = {"prompt": ids[:count], "n_predict": steps, "ignore_eos": True, "temperature": 0}
        answer = server.handle_completions({**given, "cache_prompt": False})
        if "timings" not in answer:
            raise RuntimeError(f"llama.cpp answered {answer}")
        return answer["timings"]

    ask(CONTEXT, 2)
    first, second = ask(prompt, 1), ask(CONTEXT, tokens)
    return {
        "prompt_rate": first["prompt_per_second"],
        "generation_rate": second["predicted_per_second"],
        "info": xllamacpp.get_system_info(),
    }


def run_llama_bench(
    program: str, path: Path, prompt: int, tokens: int, threads: int
) -> dict[str, Any]:
    """Tokens per second of a prompt and of steps, as llama.cpp's own benchmark tells them."""
    command = [program, "-m", str(path), "-t", str(threads), "-r", "1", "-ngl", "0", "-o", "json"]
    command += ["-p", str(prompt), "-n", str(tokens)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout)
    rates = {"generation_rate" if case["n_gen"] else "prompt_rate": case for case in found}
    result: dict[str, Any] = {what: case["avg_ts"] for what, case in rates.items()}
    return {**result, "info": f"llama-bench, build {found[0]['build_commit']}, built here"}


def _case(form: str, shape: ModelShape, dtype: str) -> list[SpeedCase]:
    if form in FLOATS:
        return random_cases("1.1B", shape, (), floats=(form,))
    variant, _, compute = form.partition(" ")
    return random_cases("1.1B", shape, (variant,), dtype, (), compute or "packed")


def _peer(path: Path, args: argparse.Namespace) -> dict[str, Any]:
    if args.llama_bench:
        return run_llama_bench(args.llama_bench, path, args.prompt, args.tokens, args.threads)
    command = [sys.executable, "-m", "benchmarks.bench_llama_cpp", "--peer", str(path)]
    for name in ("prompt", "tokens", "threads"):
        command += [f"--{name}", str(getattr(args, name))]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    p.add_argument("--prompt", type=int, default=128, help="tokens of the prompt")
    p.add_argument("--tokens", type=int, default=32, help="greedy steps")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--repeats", type=int, default=3, help="turns")
    p.add_argument("--json", type=Path, help="write the results to this file")
    p.add_argument("--layers", type=int, help="fewer layers, for a trial")
    p.add_argument("--llama-bench", metavar="PROGRAM", help="llama.cpp's own, for the peer")
    p.add_argument("--dtype", default="float32", choices=FLOATS, help="inputs of packed weights")
    p.add_argument(
        "--forms",
        nargs="+",
        default=["float32", "W4", "W4 int8"],
        choices=(*FLOATS, "W8A8", "W4", "W4 int8", "W3", "W2", "W2 int8"),
        help="ptqkit's (float32, W4, W4 int8)",
    )
    p.add_argument("--peer", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.peer:
        print(json.dumps(run_llama_cpp(args.peer, args.prompt, args.tokens, args.threads)))
        return
    shape = ONE_B
    if args.layers:
        shape = ModelShape(**{**vars(ONE_B), "layers": args.layers})
    cases = {name: _case(name, shape, args.dtype) for name in args.forms}
    rates: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "q4_0.gguf")
        write_gguf(path, shape, "Q4_0")
        for turn in range(args.repeats):
            rates.setdefault(PEER, []).append(_peer(path, args))
            for name, made in cases.items():
                report = measure_speed(
                    made, prompt=args.prompt, tokens=args.tokens, repeat=1, threads=args.threads
                )
                row = report.rows[0]
                rates.setdefault(name, []).append({what: getattr(row, what) for what in RATES})
            print(f"turn {turn + 1} of {args.repeats}", file=sys.stderr)
    info = rates[PEER][0]["info"]
    found = {
        name: {what: [round(one[what], 3) for one in runs] for what in RATES}
        for name, runs in rates.items()
    }
    base = {what: statistics.median(found[PEER][what]) for what in RATES}
    rows = []
    for name, one in found.items():
        row: list[Any] = [name]
        for what in RATES:
            middle = statistics.median(one[what])
            row += [middle, middle / base[what]]
        rows.append(row)
    columns = ["", "generation/s", "x llama.cpp", "prompt/s", "x llama.cpp"]
    show(f"1.1B, {args.threads} threads, prompt {args.prompt}", columns, rows)
    print(f"llama.cpp: {info}")
    settings = {k: getattr(args, k) for k in ("prompt", "tokens", "threads", "repeats", "dtype")}
    save(args.json, "llama_cpp", {"settings": settings, "llama_cpp": info, "rates": found})


if __name__ == "__main__":
    main()
