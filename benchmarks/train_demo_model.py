"""Train the small language model that ``ptqkit demo`` quantizes.

The text is the Python sources of the standard library, as ``ptqkit.demo.corpus`` finds and
splits them: files of its test split are never trained on, in any version of Python, nor are
copies of them under other names. About one file in twenty-five of the rest is set aside to
choose the best checkpoint and the best of several runs; the test split chooses nothing.

    # one file with the sources of several Pythons, newest first, to take to a GPU
    python benchmarks/train_demo_model.py --dump corpus.gz --stdlib LIB/python3.13 LIB/python3.12
    # a byte-level BPE of that text, shared by several runs
    python benchmarks/train_demo_model.py --corpus corpus.gz --tokenizer-only --out tokenizer
    # the model itself, by time or by steps
    python benchmarks/train_demo_model.py --corpus corpus.gz --tokenizer tokenizer \\
        --minutes 5 --compile --out model
    # does it run at all? (half a minute on a CPU)
    python benchmarks/train_demo_model.py --smoke

A dump is UTF-8 text, gzipped if its name ends in .gz: records closed by U+001E, each holding
split, relative path and text, with U+001F between them. Extra folders (tests, idlelib, ...) are
in it with the split "extra"; --extra-share says how many training sequences come from them.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import hashlib
import importlib.util
import json
import math
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

BOS, EOS = "<s>", "</s>"
MAX_POSITIONS = 1024
WINDOW = 512


@dataclass(frozen=True)
class Document:
    """One source file: its split, its path below the library's folder, its text."""

    split: str
    path: str
    text: str


def load_corpus_module():
    """Load ``ptqkit/demo/corpus.py`` by its path: training needs no built package."""
    path = Path(__file__).resolve().parents[1] / "ptqkit" / "demo" / "corpus.py"
    spec = importlib.util.spec_from_file_location("demo_corpus", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read_library(root: str | None) -> list[Document]:
    """Read all documents of one standard library (None: the running interpreter's)."""
    corpus = load_corpus_module()
    folder = corpus._folder(root)
    found = [(corpus.split_of(path), path) for path in corpus._sources(folder, extra=False)]
    found += [("extra", path) for path in corpus._sources(folder, extra=True)]
    texts = ((s, p, (folder / p).read_text(encoding="utf-8")) for s, p in sorted(found))
    return [Document(s, p, t) for s, p, t in texts if "\x1e" not in t and "\x1f" not in t]


def write_dump(path: Path, documents: list[Document]) -> None:
    """Write documents as the records that the module's docstring describes."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8", newline="") as out:
        for doc in documents:
            out.write(f"{doc.split}\x1f{doc.path}\x1f{doc.text}\x1e")


def read_dump(path: Path) -> list[Document]:
    """Read what `write_dump` wrote."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8", newline="") as source:
        records = source.read().split("\x1e")[:-1]
    return [Document(*record.split("\x1f", 2)) for record in records]


def gather(args: argparse.Namespace) -> list[Document]:
    """Collect documents from dumps, folders or this Python; the first of equal texts stays."""
    documents = [doc for path in args.corpus for doc in read_dump(path)]
    roots = args.stdlib or ([] if args.corpus else [None])
    documents += [doc for root in roots for doc in read_library(root)]
    unique = {hashlib.sha256(doc.text.encode()).digest(): doc for doc in reversed(documents)}
    return list(reversed(unique.values()))


def is_validation(doc: Document) -> bool:
    """Say whether a training file is set aside to choose among checkpoints and runs."""
    digest = hashlib.sha256(f"validation/{doc.path}".encode()).digest()
    return doc.split == "train" and int.from_bytes(digest[:8], "big") % 25 == 0


def long_lines(text: str) -> set[str]:
    """Return the lines that are long enough to recognise a copy by."""
    return {line for line in map(str.strip, text.split("\n")) if len(line) >= 30}


def partition(documents: list[Document]) -> dict[str, list[Document]]:
    """Split for training; of held-out files the first version of each path stays.

    A training file of whose long lines over a third stand in held-out files (a module that
    moved between versions, say) is left out altogether.
    """
    held = [doc for doc in documents if doc.split == "test" or is_validation(doc)]
    seen = set().union(*(long_lines(doc.text) for doc in held))
    train = []
    for doc in documents:
        if doc.split == "test" or is_validation(doc):
            continue
        lines = long_lines(doc.text)
        if len(lines & seen) <= len(lines) / 3:
            train.append(doc)
    newest = list({doc.path: doc for doc in reversed(held)}.values())[::-1]
    return {
        "library": [doc for doc in train if doc.split != "extra"],
        "extra": [doc for doc in train if doc.split == "extra"],
        "validation": [doc for doc in newest if doc.split != "test"],
        "test": [doc for doc in newest if doc.split == "test"],
    }


def train_tokenizer(texts: list[str], pieces: int):
    """Train a byte-level BPE that puts ``<s>`` before a text, as transformers' own class."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=pieces, special_tokens=[BOS, EOS], initial_alphabet=alphabet
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(tokenizer, out: Path) -> None:
    """Save a tokenizer under the class name that old and new transformers both know."""
    tokenizer.save_pretrained(out)
    path = out / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    for key in ("is_local", "local_files_only", "model_max_length"):
        settings.pop(key, None)
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def encode(tokenizer, documents: list[Document]):
    """Return one stream of token numbers, each document as ``<s> text </s>``."""
    import torch

    encoded = tokenizer.backend_tokenizer.encode_batch([doc.text for doc in documents])
    stream = [token for item in encoded for token in (*item.ids, tokenizer.eos_token_id)]
    return torch.tensor(stream, dtype=torch.long)


def build_model(args: argparse.Namespace, vocabulary: int):
    """Build the model with random weights, with dropout behind each branch and embedding."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        max_position_embeddings=MAX_POSITIONS,
        attention_dropout=args.dropout,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)

    def drop(module, inputs, output):
        return torch.nn.functional.dropout(output, args.dropout, module.training)

    branches = [part for b in model.model.layers for part in (b.self_attn.o_proj, b.mlp.down_proj)]
    hooks = [part.register_forward_hook(drop) for part in (model.model.embed_tokens, *branches)]
    return model, hooks


def optimizer_of(model, args: argparse.Namespace, device: str):
    """AdamW with weight decay on matrices only."""
    import torch

    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": args.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=device == "cuda")


def learning_rate(peak: float, done: float) -> float:
    """Return the rate at a fraction of the run: short linear rise, cosine down to a fiftieth."""
    warm = 0.02
    if done < warm:
        return peak * max(done, 1e-4) / warm
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min((done - warm) / 0.98, 1.0))))


def loss_of(model, ids, device: str):
    """Return the mean loss of predicting each token of ``ids`` from those before it."""
    import torch

    with torch.autocast(device, dtype=torch.bfloat16):
        logits = model(input_ids=ids[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


def held_out_loss(model, stream, device: str, max_windows: int | None = None) -> float:
    """Mean loss per token in windows of 512 (stride 512), ``<s>`` put before each."""
    import torch

    count = min(len(stream) // WINDOW, max_windows or len(stream))
    windows = stream[: count * WINDOW].view(count, WINDOW)
    windows = torch.cat([torch.zeros_like(windows[:, :1]), windows], dim=1)
    model.eval()
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        parts = [loss_of(model, w, device).item() * len(w) for w in windows.split(32)]
    model.train()
    return sum(parts) / count


def batches(library, extra, args: argparse.Namespace):
    """Yield random windows for ever, ``<s>`` in the first place of each."""
    import torch

    draw = torch.Generator().manual_seed(args.seed)
    stream = torch.cat([library, extra])
    reach = torch.arange(args.length, device=stream.device)
    size = (args.batch, 1)
    while True:
        starts = torch.randint(len(library) - args.length, size, generator=draw)
        if args.extra_share:
            other = torch.randint(len(extra) - args.length, size, generator=draw) + len(library)
            other_turn = torch.rand(size, generator=draw) < args.extra_share
            starts = torch.where(other_turn, other, starts)
        window = stream[starts.to(stream.device) + reach]
        yield torch.cat([torch.zeros_like(window[:, :1]), window], dim=1)


def progress(step: int, started: float, args: argparse.Namespace) -> float:
    """Return the fraction of the run that is done, by time or by steps."""
    if args.minutes:
        return (time.perf_counter() - started) / (60 * args.minutes)
    return step / args.steps


def fit(model, library, extra, validation, args: argparse.Namespace, device: str) -> dict:
    """Train; leave the checkpoint of lowest validation loss in ``model``."""
    import torch

    optimizer = optimizer_of(model, args, device)
    best, kept, step, started = math.inf, None, 0, time.perf_counter()
    source = batches(library, extra, args)
    while (done := progress(step, started, args)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args.lr, done)
        loss = loss_of(model, next(source), device)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % args.every and progress(step, started, args) < 1:
            continue
        score = held_out_loss(model, validation, device)
        if score < best:
            best, kept = score, copy.deepcopy(model.state_dict())
        report(step, progress(step, started, args), started, loss.item(), score)
    model.load_state_dict(kept)
    seconds = round(time.perf_counter() - started, 1)
    tokens = step * args.batch * args.length
    return {"validation_loss": best, "steps": step, "tokens": tokens, "seconds": seconds}


def report(step: int, done: float, started: float, loss: float, score: float) -> None:
    """Print one line of progress."""
    spent = time.perf_counter() - started
    left = max(spent / max(done, 1e-9) - spent, 0)
    line = f"step {step:6d}  {100 * min(done, 1):3.0f} %  loss {loss:.4f}  validation {score:.4f}"
    print(f"{line} (perplexity {math.exp(score):.3f})  {left:.0f} s left", flush=True)


def save(model, hooks, tokenizer, out: Path) -> None:
    """Save model and tokenizer, weights in float16, settings of training taken back."""
    for hook in hooks:
        hook.remove()
    model.config.attention_dropout = 0.0
    model.config.use_cache = model.generation_config.use_cache = True
    model.generation_config.pad_token_id = tokenizer.eos_token_id
    model.half().save_pretrained(out)
    save_tokenizer(tokenizer, out)


def sample(model, tokenizer, prompt: str, seed: int) -> str:
    """Return a prompt with what the model writes behind it."""
    import torch

    torch.manual_seed(seed)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device)
    written = model.generate(ids, max_new_tokens=80, do_sample=True, temperature=0.7, top_p=0.9)
    return tokenizer.decode(written[0], skip_special_tokens=True)


def get_tokenizer(args: argparse.Namespace, library: list[Document]):
    """Load the tokenizer given, or train one on the training text of the library."""
    from transformers import AutoTokenizer

    if args.tokenizer:
        return AutoTokenizer.from_pretrained(args.tokenizer)
    return train_tokenizer([doc.text for doc in library], args.pieces)


def run(args: argparse.Namespace) -> None:
    """Do everything that is behind the corpus: tokenizer, training, measuring, saving."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() and not args.smoke else "cpu"
    parts = {k: docs[:40] if args.smoke else docs for k, docs in partition(gather(args)).items()}
    tokenizer = get_tokenizer(args, parts["library"])
    if args.tokenizer_only:
        return save_tokenizer(tokenizer, args.out)
    streams = {name: encode(tokenizer, docs).to(device) for name, docs in parts.items()}
    if args.smoke:
        streams = {name: stream[: 8 * WINDOW] for name, stream in streams.items()}
    sizes = {name: len(stream) for name, stream in streams.items()}
    test = streams.pop("test")
    model, hooks = build_model(args, len(tokenizer))
    model.to(device).train()
    if args.compile:
        for layer in model.model.layers:
            layer.compile()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, tokens: {sizes}", flush=True)
    result = fit(model, **streams, args=args, device=device)
    save(model, hooks, tokenizer, args.out)
    model = AutoModelForCausalLM.from_pretrained(args.out, dtype=torch.float32).to(device)
    result["test_perplexity"] = math.exp(held_out_loss(model, test, device))
    print(sample(model.eval(), tokenizer, "def read_lines(path):\n", args.seed))
    result |= {"tokens_of": sizes, "options": {k: str(v) for k, v in vars(args).items()}}
    (args.out / "training.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"saved in {args.out}: {json.dumps(result)}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line; ``--smoke`` shrinks everything."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    add = parser.add_argument
    add("--dump", type=Path, metavar="FILE", help="write the merged text and stop")
    add("--corpus", type=Path, nargs="+", default=[], metavar="FILE", help="dumps to read")
    add("--stdlib", nargs="+", metavar="DIR", help="standard libraries to read, newest first")
    add("--extra-share", type=float, default=0.3, help="sequences from extra folders (0.3)")
    add("--tokenizer", type=Path, metavar="DIR", help="use this tokenizer instead of a new one")
    add("--tokenizer-only", action="store_true", help="train the tokenizer, save it and stop")
    add("--out", type=Path, metavar="DIR", help="where to save (default: a temporary folder)")
    add("--pieces", type=int, default=4096, help="size of the vocabulary (4096)")
    add("--hidden", type=int, default=256, help="width (256)")
    add("--intermediate", type=int, default=768, help="width inside the MLP (768)")
    add("--layers", type=int, default=8, help="blocks (8)")
    add("--heads", type=int, default=4, help="attention heads (4)")
    add("--kv-heads", type=int, default=2, help="key and value heads (2)")
    add("--dropout", type=float, default=0.1, help="in attention and behind each branch (0.1)")
    add("--weight-decay", type=float, default=0.1, help="on matrices (0.1)")
    add("--lr", type=float, default=2e-3, help="highest learning rate (2e-3)")
    add("--batch", type=int, default=32, help="sequences in a step (32)")
    add("--length", type=int, default=1024, help="tokens in a sequence (1024)")
    add("--steps", type=int, default=4000, help="steps, where --minutes is not given (4000)")
    add("--minutes", type=float, help="train for this long; the schedule follows the clock")
    add("--every", type=int, default=200, help="steps between validations (200)")
    add("--compile", action="store_true", help="compile each block with torch.compile")
    add("--seed", type=int, default=0, help="of weights, dropout and batches (0)")
    add("--smoke", action="store_true", help="a few steps of a tiny model, on the CPU")
    args = parser.parse_args(argv)
    if args.smoke:
        small = {"hidden": 128, "intermediate": 128, "layers": 2, "steps": 6, "every": 3}
        vars(args).update(small, batch=4, length=64, pieces=512, minutes=None)
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the script."""
    args = parse(argv)
    if args.dump:
        write_dump(args.dump, gather(args))
        return 0
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        run(args)
    else:
        with tempfile.TemporaryDirectory() as folder:
            args.out = Path(folder)
            run(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
