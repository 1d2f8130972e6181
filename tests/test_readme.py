"""The snippets of the README and of the documentation: Python runs, commands are understood.

A Python snippet is pasted alone, on a tiny model, unless the line before it says
``<!-- goes on -->``: then it has the names of the one before. One that cannot run here has the
reason there: ``<!-- not run: reason -->``.
"""

from __future__ import annotations

import ast
import code
import functools
import gzip
import re
import shlex
import sys

import pytest
from helpers.data import ROOT
from helpers.extras import HF, missing

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
if missing(HF):
    pytest.skip("the snippets quantize a model", allow_module_level=True)


NOT_RUN = r"<!-- not run: (.+) -->"
BLOCK = r"^(?:<!-- (not run|goes on)\b.*? -->\n)?```([\w-]+)\n(.*?)^```$"


def blocks(page, language: str) -> list[str]:
    """The blocks of a language that run; one that goes on is part of the one before."""
    found: list[str] = []
    for mark, kind, text in re.findall(BLOCK, page.read_text(encoding="utf-8"), re.M | re.S):
        if kind != language or mark == "not run":
            continue
        if mark == "goes on":
            found[-1] += "\n" + text
        else:
            found.append(text)
    return found


def links(page) -> list[str]:
    return re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text(encoding="utf-8"))


class Prompt(code.InteractiveConsole):
    """A Python prompt without any names, that raises the errors of what is pasted into it."""

    def showtraceback(self) -> None:
        raise sys.exc_info()[1]

    def showsyntaxerror(self, filename=None, **options) -> None:
        raise sys.exc_info()[1]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder in which the names of the snippets exist: a model with a tokenizer, two texts."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from ptqkit import demo

    folder = tmp_path_factory.mktemp("readme")
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL_DIR)
    torch.manual_seed(0)
    for name in ("path/to/model", "models/small"):
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        LlamaForCausalLM(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "train.txt").write_text(demo.text("calibration")[:60_000], encoding="utf-8")
    (folder / "test.txt").write_text(demo.text("test")[:2_000], encoding="utf-8")
    return folder


def name(page) -> str:
    return page.relative_to(ROOT).with_suffix("").as_posix()


WITH_PYTHON = [page for page in PAGES if blocks(page, "python")]
STUDY = "from ptqkit import Study"
QUICK = [page for page in WITH_PYTHON if any(STUDY not in text for text in blocks(page, "python"))]
already_run: set[str] = set()  # in this process; what a snippet writes stays in its folder


def paste(page, texts: list[str]) -> None:
    """Paste each text alone, unless it was pasted before."""
    for number, text in enumerate(texts):
        if text in already_run:
            continue
        already_run.add(text)
        prompt = Prompt(filename=f"{page.name}, snippet {number}")
        for line in [*text.splitlines(), ""]:
            prompt.push(line)


@pytest.mark.parametrize("page", QUICK, ids=name)
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # open("test.txt").read()
def test_python_runs(page, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    paste(page, [text for text in blocks(page, "python") if STUDY not in text])
    if page.stem in ("softmax", "equalization", "recipes", "formats"):
        assert capsys.readouterr().out


@pytest.mark.slow  # a hundred recipes, however small the model is
def test_studies_run(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    pages = [page for page in WITH_PYTHON if any(STUDY in text for text in blocks(page, "python"))]
    assert len(pages) >= 2
    for page in pages:
        paste(page, [text for text in blocks(page, "python") if STUDY in text])
    assert "standard errors" in capsys.readouterr().out
    assert (place / "ablation.png").exists()


def test_few_snippets_are_not_run():
    reasons = [r for page in PAGES for r in re.findall(NOT_RUN, page.read_text(encoding="utf-8"))]
    assert len(reasons) <= 2 and all(len(reason.split()) > 3 for reason in reasons)
    assert len(WITH_PYTHON) > 10 and sum(len(blocks(page, "python")) for page in PAGES) > 20


def commands(text: str) -> list[list[str]]:
    """The commands of a shell snippet, without redirections and settings of variables."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        words: list[str] = []
        line = re.sub(r"\s>+\s*\S+", "", line)
        for word in [*shlex.split(line, comments=True), "&&"]:
            if word in ("|", "&&", ";"):
                found += [words] if words else []
                words = []
            elif words or "=" not in word.partition("/")[0]:
                words.append(word)
    return found


def test_commands_are_cut_where_others_begin():
    text = "A=1 ptqkit info > b/ptqkit | head  # a\npip install x && ptqkit eval demo \\\n  --quiet"
    assert commands(text) == [
        ["ptqkit", "info"],
        ["head"],
        ["pip", "install", "x"],
        ["ptqkit", "eval", "demo", "--quiet"],
    ]


@functools.cache
def parser():
    from ptqkit.cli import build_parser

    return build_parser()


def module_of(words: list[str]) -> tuple[str, list[str]]:
    """The module that a Python runs, and its arguments."""
    at = words.index("-m")
    return words[at + 1], words[at + 2 :]


def understood(words: list[str]) -> bool:
    """Whether a command names something that is there, with arguments that it takes."""
    program = words[0].rpartition("/")[2]
    if program in ("python", "torchrun") and "-m" in words[:4]:
        module, rest = module_of(words)
        if module != "ptqkit":
            path = ROOT.joinpath(*module.split("."))
            return module == "venv" or path.with_suffix(".py").is_file() or path.is_dir()
        words, program = ["ptqkit", *rest], "ptqkit"
    if program == "ptqkit":
        if words[1] != "--print-completion":
            parser().parse_args(words[1:])
        return True
    if program == "python":
        return (ROOT / words[1]).is_file()
    return program in ("pip", "git", "pytest", "sphinx-build", "run", "vllm", "cibuildwheel")


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "sh")], ids=name)
def test_commands_are_understood(page):
    for text in blocks(page, "sh"):
        for words in commands(text):
            try:
                assert understood(words), words
            except SystemExit:
                pytest.fail(f"the command line refuses {shlex.join(words)}")


@pytest.mark.parametrize(
    "words", [["ptqkit", "quantise", "demo"], ["ptqkit", "eval", "demo", "--txt", "a"]]
)
def test_wrong_commands_are_not(words):
    with pytest.raises(SystemExit):
        understood(words)
    assert not understood(["python", "benchmarks/absent.py"])
    assert not understood(["python", "-m", "benchmarks.absent"])


def test_commands_of_the_coverage_page_exist():
    text = (ROOT / "docs" / "coverage.md").read_text(encoding="utf-8")
    found = re.findall(r"`((?:ptqkit|python|pytest) [^`]+)`", text)
    assert len(found) > 50
    for command in found:
        (words,) = commands(command)
        assert understood(words), command
        if words[0] == "pytest":
            assert all((ROOT / path).exists() for path in words[1:]), command
        elif words[:2] == ["python", "-m"] and ".papers." in words[2] and words[3] != "--list":
            source = ROOT.joinpath(*words[2].split(".")).with_suffix(".py").read_text("utf-8")
            assert re.search(rf'(Entry|picture)\("{words[3]}"', source), command


def test_the_walks_name_what_is_there():
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    named = re.findall(
        r"`((?:ptqkit|csrc|tests|benchmarks)/[\w/.]+)`(?:\s+\(((?:`[^`]+`,?\s*)+)\))?", text
    )
    assert len(named) > 25
    for path, names in named:
        file = ROOT / path
        assert file.exists(), path
        for word in re.findall(r"`([^`]+)`", names):
            assert word in file.read_text(encoding="utf-8"), f"{path} has no {word}"


def public_names(facade: str) -> set[str]:
    """What a facade lists, read from its stub or its source."""
    folder = ROOT.joinpath(*facade.split("."))
    stub = folder / "__init__.pyi"
    if stub.exists():
        return set(re.findall(r"^from \S+ import (\w+) as", stub.read_text("utf-8"), re.M))
    listed = re.search(
        r"^__all__ = (\[.*?\])", (folder / "__init__.py").read_text("utf-8"), re.M | re.S
    )
    assert listed
    return set(ast.literal_eval(listed[1]))


@pytest.mark.parametrize(
    "facade", ["ptqkit", "ptqkit.hf", "ptqkit.nn", "ptqkit.sweep", "ptqkit.diffusion"]
)
def test_the_reference_lists_every_public_name(facade):
    page = ROOT / "docs" / "api" / f"{facade.removeprefix('ptqkit.')}.md"
    text = page.read_text(encoding="utf-8")
    listed = set(re.findall(r"^   (\w+)$", text, re.M)) | set(re.findall(r"`(\w+)`, which", text))
    assert listed == public_names(facade) - {"demo", "diffusion", "hf", "reference"}


def test_figures_of_the_softmax_page(place, monkeypatch, capsys):
    text = next(c for c in blocks(ROOT / "docs" / "softmax.md", "python") if "softmax_grid" in c)
    exec(compile(text, "softmax.md", "exec"), {})
    zero, row_sum, *_ = capsys.readouterr().out.split()
    assert f"# {float(zero):.3f}, {float(row_sum):.3f}, one beta" in text


def _with_options(text: str) -> str:
    """Take in the lines with one key that are commented out.

    All but `windows`, which needs another one, and `tasks`, which leaves a task without a model.
    """
    one = r"^# (?!windows|tasks)(?=\w+ = (\[.*?\]|\{.*?\}|\S+) *(#.*)?$)"
    return re.sub(one, "", text, flags=re.M)


@pytest.mark.parametrize("optional", [False, True])
def test_sweep_file_is_a_plan(place, optional):
    from ptqkit.sweep import read_plan

    text = blocks(ROOT / "docs" / "sweep.md", "toml")[0]
    if optional:
        assert _with_options(text).count("\n# ") < text.count("\n# ") - 10
        text = _with_options(text)
    items = b'{"context": "a", "choices": ["b", "c"], "gold": 0}\n'
    (place / "piqa.jsonl.gz").write_bytes(gzip.compress(items))
    (place / "other.txt").write_text("other", encoding="utf-8")
    (place / "study.toml").write_text(text, encoding="utf-8")
    plan = read_plan(place / "study.toml")
    names = [recipe.name for recipe in plan.recipes]
    assert names[:2] == ["AWEQ", "GPTQ INT3"] and names[-1] == "SM8"
    assert sum(name.startswith("grid, ") for name in names) == 8 and len(names) == 11


@pytest.mark.parametrize("pipeline", [False, True])
def test_diffusion_part_of_a_sweep_file_is_a_plan(tmp_path, pipeline):
    from ptqkit.sweep import read_plan

    text = blocks(ROOT / "docs" / "sweep.md", "toml")[1]
    unet = tmp_path / "models" / "unet"
    unet.mkdir(parents=True)
    (unet / ("model_index.json" if pipeline else "labels.safetensors")).write_text("{}")
    (tmp_path / "prompts.txt").write_text("a red square\n", encoding="utf-8")
    file = tmp_path / "study.toml"
    text = _with_options(text) if pipeline else text
    file.write_text(f'name = "unet"\noutput = "out"\n{text}', encoding="utf-8")
    plan = read_plan(file)
    assert [recipe.name for recipe in plan.recipes] == ["UNet INT4"]
    assert (plan.models[0].prompts is not None) == pipeline


@pytest.mark.parametrize(
    "page",
    [*PAGES, ROOT / "benchmarks" / "README.md"],
    ids=lambda page: f"{page.parent.name}-{page.stem}",
)
def test_links_lead_somewhere(page):
    for link in links(page):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        if anchor:
            text = target.read_text(encoding="utf-8")
            titles = re.findall(r"^#+ (.+)$", text, re.M)
            assert anchor in [re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles]


def test_one_good_value_of_error_propagation():
    from ptqkit.hf import quantize

    commands = parser()._subparsers._group_actions[0].choices
    shown = " ".join(commands["quantize"].format_help().split())
    measured = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    (value,) = set(re.findall(r"`error_propagation=([\d.]+)`", measured))
    assert f"({value} is a good value)" in shown
    assert f"error_propagation={value}" in quantize.__doc__
    for page in PAGES:
        found = re.findall(r"error_propagation=([\d.]+)", page.read_text(encoding="utf-8"))
        assert set(found) <= {value}, page


def test_the_readme_is_a_front_door():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 180
