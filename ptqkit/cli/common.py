"""What the commands share: options, models, text, output files."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ptqkit._files import plain, write_atomically
from ptqkit.errors import PreflightError

__all__ = [
    "UsageError",
    "add_common",
    "add_model_options",
    "check_json",
    "check_text",
    "compute_dtype",
    "load_model",
    "one_line",
    "quiet_transformers",
    "read_text",
    "say",
    "write_json",
]

DEMO = "demo"
"""Name that stands for the embedded model and its texts."""

SCHEMA = 1
"""Version of the ``--json`` files; raised when a field changes its meaning or goes away."""

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)
_HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


class UsageError(Exception):
    """An argument that is wrong by itself; the message names it."""


def add_common(parser: argparse.ArgumentParser) -> None:
    """Add the options that every command has."""
    group = parser.add_argument_group("output")
    group.add_argument(
        "--json", metavar="FILE", help="also write the result as JSON ('-': to standard output)"
    )
    group.add_argument("--quiet", action="store_true", help="print the result line alone")
    group.add_argument("--debug", action="store_true", help="show tracebacks (or PTQKIT_DEBUG=1)")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add where and in what precision a model runs."""
    group = parser.add_argument_group("running the model")
    group.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, ...; auto: a GPU if any"
    )
    group.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "float16", "bfloat16"),
        help="arithmetic of the model; auto: as stored, but float16 runs as float32 on a CPU",
    )


def one_line(error: BaseException) -> str:
    """Message of an error for standard error; only a list of problems keeps its lines."""
    if isinstance(error, KeyboardInterrupt):
        return str(error) or "interrupted; nothing was written"
    text = str(error) or type(error).__name__
    if isinstance(error, PreflightError):
        return text
    text = " ".join(text.split())
    if len(text) > 1000:
        text = text[:1000] + " ..."
    return text


def say(args: argparse.Namespace, text: str = "") -> None:
    """Print a line of the report, unless ``--quiet`` or ``--json -`` keep it back."""
    if not args.quiet and args.json != "-":
        print(text, flush=True)


def check_json(args: argparse.Namespace) -> None:
    """Refuse, before any work, a ``--json`` file that could not be written."""
    if args.json in (None, "-"):
        return
    path = Path(args.json)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise UsageError(f"--json {args.json}: it must be a file in a folder that exists")


def write_json(args: argparse.Namespace, values: dict[str, Any]) -> None:
    """Write the result of a command where ``--json`` says, all at once or not at all.

    Every file has ``schema`` (:data:`SCHEMA`), ``command`` and ``version`` (of ptqkit); numbers
    that are not finite are null.
    """
    if args.json is None:
        return
    from ptqkit._version import __version__

    head = {"schema": SCHEMA, "command": args.command, "version": __version__}
    text = json.dumps(plain({**head, **values}), indent=1, allow_nan=False) + "\n"
    if args.json == "-":
        sys.stdout.write(text)
        return
    write_atomically(Path(args.json), text)


def _missing(error: ModuleNotFoundError) -> str:
    return f"this command needs {error.name}; install it with: pip install 'ptqkit[hf]'"


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep the bars and hints of transformers and its helpers off the screen."""
    try:
        from tqdm import tqdm
        from transformers.utils import logging
    except ModuleNotFoundError as error:
        raise UsageError(_missing(error)) from error
    verbosity, bars, make = (
        logging.get_verbosity(),
        logging.is_progress_bar_enabled(),
        tqdm.__init__,
    )

    def silent(self: Any, *args: Any, **options: Any) -> None:
        make(self, *args, **{**options, "disable": True})

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # compressed-tensors has no switch for its bars.
    tqdm.__init__ = silent
    try:
        yield
    finally:
        tqdm.__init__ = make
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def model_folder(name: str) -> Path:
    """Folder of a model: a path, ``demo``, or a name on the Hugging Face Hub."""
    if name == DEMO:
        from ptqkit.demo import MODEL_DIR

        return MODEL_DIR
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UsageError(f"MODEL {name}: the folder has no config.json, so it is no model")
        return path
    if path.exists() or name.count("/") > 1 or not _HUB_NAME.fullmatch(name):
        raise UsageError(f"MODEL {name}: there is no such folder")
    from huggingface_hub import snapshot_download

    print(f"fetching {name} from the Hugging Face Hub", file=sys.stderr, flush=True)
    try:
        return Path(snapshot_download(name, allow_patterns=list(_HUB_FILES)))
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"MODEL {name}: there is no such folder, and as a name on the Hugging Face Hub it "
            f"cannot be had ({type(error).__name__}: {reason})"
        ) from error


def stored_dtype(folder: Path) -> str:
    """Dtype that the configuration of a model states."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{folder / 'config.json'} is not valid JSON: {error}") from None
    return str(config.get("dtype") or config.get("torch_dtype") or "float32")


def compute_dtype(asked: str, stored: str, device: str) -> str:
    """Arithmetic for a model: float16 is several times slower than float32 on a CPU."""
    if asked != "auto":
        return asked
    return "float32" if stored == "float16" and device == "cpu" else stored


def pick_device(asked: str) -> str:
    """Resolve ``auto``, and refuse a device that is not there."""
    import torch

    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=asked)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--device {asked} cannot be used here: {reason}") from None
    return asked


def load_model(args: argparse.Namespace) -> tuple[Any, Any, dict[str, str]]:
    """Load the model and tokenizer that the arguments name.

    Returns
    -------
    model, tokenizer
        The tokenizer is None where the folder holds none.
    facts : dict of str to str
        ``folder``, ``stored_dtype``, ``dtype``, ``device``, ``class``.
    """
    try:
        import torch
        import transformers
    except ModuleNotFoundError as error:
        raise UsageError(_missing(error)) from error
    from ptqkit.hf import load

    folder = model_folder(args.model)
    stored, device = stored_dtype(folder), pick_device(args.device)
    dtype = compute_dtype(args.dtype, stored, device)
    if not hasattr(torch, dtype):
        raise UsageError(
            f"{folder / 'config.json'} states an unknown dtype {dtype!r}; give --dtype"
        )
    model = load(folder, dtype=getattr(torch, dtype)).to(device).eval()
    # Without any file, transformers makes up an empty tokenizer for some model types.
    found = any((folder / name).is_file() for name in _TOKENIZER_FILES)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder) if found else None
    facts = {
        "folder": str(folder),
        "stored_dtype": stored,
        "dtype": dtype,
        "device": device,
        "class": type(model).__name__,
    }
    return model, tokenizer, facts


def check_text(option: str, name: str) -> None:
    """Refuse a text file that is not there before PyTorch is imported."""
    if name.endswith(".npy") and not Path(name).is_file():
        raise UsageError(f"{option} {name}: there is no such file")
    if not Path(name).is_file() and ":" not in name:
        raise UsageError(f"{option} {name}: there is no such file")


def read_tokens(option: str, name: str) -> Any:
    """Read token ids from a ``.npy`` file of integers with shape (samples, sequence)."""
    import numpy as np

    try:
        tokens = np.load(name, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise UsageError(f"{option} {name} is no .npy file: {error}") from None
    if not np.issubdtype(tokens.dtype, np.integer) or tokens.ndim != 2:
        raise UsageError(
            f"{option} {name}: tokens must be integers of shape (samples, sequence), not "
            f"{tokens.dtype} of shape {tokens.shape}"
        )
    return tokens.astype(np.int64)


def read_text(option: str, name: str, tokenizer: Any) -> Any:
    """Documents of a text or ``.jsonl`` file (``.gz`` too), or a tensor of tokens (``.npy``)."""
    if name.endswith(".npy"):
        import torch

        return torch.from_numpy(read_tokens(option, name))
    if tokenizer is None:
        raise UsageError(f"{option} {name} is text, but MODEL has no tokenizer; give tokens (.npy)")
    from ptqkit.hf.data.calibration import read_documents

    documents = list(read_documents(name))
    if not any(text.strip() for text in documents):
        raise UsageError(f"{option} {name}: the file is empty")
    return documents
