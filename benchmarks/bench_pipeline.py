"""The whole pipeline on a LLaMA shape of 100 M parameters against one float forward.

W4, groups of 128, symmetric, damping 0.01. Candidates, interleaved in one run: one float forward of
the calibration tokens (the floor), ptqkit with the `reference` recipe (published form) and with
`quality`, and the published form in PyTorch, true-sequential with one forward pass over the whole
calibration set. The error is the relative squared error of the logits on held-out tokens.
"""

from __future__ import annotations

import copy
import resource
import time

import torch
from common import ceilings, medians, parser, save, show, torch_threads
from torch_gptq import accumulate, gptq
from transformers import LlamaConfig, LlamaForCausalLM

import ptqkit

GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


def build(args, dtype):
    """A random model; its inputs are correlated as far as random layers make them so."""
    config = LlamaConfig(
        vocab_size=16384,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=args.layers,
        num_attention_heads=12,
        num_key_value_heads=12,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    state = torch.get_rng_state()
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(dtype).eval()
    torch.set_rng_state(state)
    return model


@torch.no_grad()
def torch_pipeline(model, batches, bits):
    """The published form block by block: collect the inputs of each group, quantize, go on."""
    hidden, kwargs = [], {}

    def catch(module, inputs, options):
        hidden.append(inputs[0])
        kwargs.update(options)
        raise InterruptedError

    handle = model.model.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    for batch in batches:
        try:
            model(batch, use_cache=False)
        except InterruptedError:
            pass
    handle.remove()
    for layer in model.model.layers:
        for names in GROUPS:
            first = layer.get_submodule(names[0])
            H, seen = torch.zeros(first.in_features, first.in_features), 0

            def add(module, inputs):
                nonlocal seen
                seen = accumulate(H, inputs[0], seen)
                raise InterruptedError

            handle = first.register_forward_pre_hook(add)
            for x in hidden:
                try:
                    layer(x, **kwargs)
                except InterruptedError:
                    pass
            handle.remove()
            for name in names:
                weight = layer.get_submodule(name).weight
                weight.copy_(gptq(weight.float(), H, bits, 128, symmetric=True))
        hidden = [layer(x, **kwargs) for x in hidden]
        hidden = [h[0] if isinstance(h, tuple) else h for h in hidden]


@torch.no_grad()
def logits_error(model, expected, tokens):
    """Relative squared error of the logits."""
    found = model(tokens).logits.float()
    return float(((found - expected) ** 2).sum() / (expected**2).sum())


def study(args, dtype):
    """Time and check one dtype."""
    model = build(args, dtype)
    generator = torch.Generator().manual_seed(1)
    # frequencies as in text (Zipf), so that inputs are correlated and H matters
    chances = 1.0 / torch.arange(1.0, 16385.0)
    tokens = torch.multinomial(chances, (args.samples + 4) * 512, True, generator=generator)
    tokens = tokens.view(-1, 512)
    calibration, held_out = tokens[: args.samples], tokens[args.samples :]
    batches = list(calibration.split(args.batch_size))
    with torch.no_grad():
        expected = model(held_out).logits.float()
    errors, reports, copies = {}, {}, {}

    def forward():
        with torch.no_grad():
            for batch in batches:
                model(batch, use_cache=False)

    def fresh():
        for name in names:
            copies[name] = copy.deepcopy(model)

    def ours(name, recipe, **options):
        def run():
            target = copies.pop(name)
            options.setdefault("diagnostics", False)
            result = ptqkit.quantize(
                target,
                recipe,
                calibration,
                bits=4,
                group_size=128,
                symmetric=True,
                batch_size=args.batch_size,
                progress=False,
                **options,
            )
            reports[name], copies[name + " done"] = result.report, target

        return run

    def peer():
        target = copies.pop("PyTorch, published form")
        torch_pipeline(target, batches, 4)
        copies["PyTorch, published form done"] = target

    candidates = {
        "float forward": forward,
        "ptqkit reference": ours("ptqkit reference", "reference"),
        "ptqkit reference, full report": ours(
            "ptqkit reference, full report", "reference", diagnostics=True
        ),
        "ptqkit quality": ours("ptqkit quality", "quality"),
        "ptqkit rtn": ours("ptqkit rtn", "rtn"),
    }
    if not args.no_torch:
        candidates["PyTorch, published form"] = peer
    names = [n for n in candidates if n != "float forward"]
    seconds = {n: [] for n in candidates}
    for _ in range(args.repeats):
        fresh()
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    for name in names:
        errors[name] = logits_error(copies[name + " done"], expected, held_out)
    wall = medians(seconds)
    rows = [[n, wall[n], wall[n] / wall["float forward"], errors.get(n, 0.0)] for n in candidates]
    show(
        f"{dtype}, {args.samples} x 512 tokens, {args.layers} layers",
        ["candidate", "wall s", "/ forward", "logits error"],
        rows,
    )
    for name, report in reports.items():
        print(
            name,
            report.schedule,
            {k: round(v, 2) for k, v in report.seconds.items()},
            {k: v for k, v in report.memory.items()},
        )
    return {
        "seconds": seconds,
        "median": wall,
        "logits_error": errors,
        "parts": {n: r.seconds for n, r in reports.items()},
        "memory": {n: r.memory for n, r in reports.items()},
    }


def main() -> None:
    p = parser(__doc__.splitlines()[0], repeats=3)
    p.add_argument("--samples", type=int, default=32)
    p.add_argument("--layers", type=int, default=12)
    p.add_argument("--batch-size", type=int, default=4)
    p.add_argument("--dtype", choices=("float32", "bfloat16"), action="append")
    p.add_argument("--no-torch", action="store_true", help="leave out the PyTorch form (slow)")
    args = p.parse_args()
    torch_threads()
    results = {"ceilings": ceilings()}
    for name in args.dtype or ("float32", "bfloat16"):
        results[name] = study(args, getattr(torch, name))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak memory of the process: {peak:.2f} GiB")
    save(args.json, "pipeline", results)


if __name__ == "__main__":
    main()
