"""The snippets of the README and of the guides run on a tiny model, each pasted alone."""

from __future__ import annotations

import code
import gzip
import re
import sys

import pytest
from helpers.data import ROOT
from helpers.extras import HF, missing

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
if missing(HF):
    pytest.skip("the snippets quantize a model", allow_module_level=True)


def blocks(page, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)


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
    torch.manual_seed(0)
    for name in ("path/to/model", "models/small"):
        LlamaForCausalLM(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "train.txt").write_text(demo.text("calibration")[:60_000], encoding="utf-8")
    (folder / "test.txt").write_text(demo.text("test")[:2_000], encoding="utf-8")
    return folder


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # open("test.txt").read()
def test_python_runs(page, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    for number, text in enumerate(blocks(page, "python")):
        prompt = Prompt(filename=f"{page.name}, snippet {number}")
        for line in [*text.splitlines(), ""]:
            prompt.push(line)
    if page.stem in ("README", "softmax", "equalization", "recipes", "formats"):
        assert len(blocks(page, "python")) >= 1 and capsys.readouterr().out


def test_figures_of_the_softmax_page(place, monkeypatch, capsys):
    text = next(c for c in blocks(ROOT / "docs" / "softmax.md", "python") if "softmax_grid" in c)
    exec(compile(text, "softmax.md", "exec"), {})
    zero, row_sum, *_ = capsys.readouterr().out.split()
    assert f"# {float(zero):.3f}, {float(row_sum):.3f}, one beta" in text


@pytest.mark.parametrize("optional", [False, True])
def test_sweep_file_is_a_plan(place, optional):
    from ptqkit.sweep import read_plan

    (text,) = blocks(ROOT / "docs" / "sweep.md", "toml")
    if optional:
        # The lines with one key that are commented out, but for "windows", which needs another one,
        # and "tasks", which leaves a task without a model.
        one = r"^# (?!windows|tasks)(?=\w+ = (\[.*?\]|\{.*?\}|\S+) *(#.*)?$)"
        text, count = re.subn(one, "", text, flags=re.M)
        assert count > 10
    items = b'{"context": "a", "choices": ["b", "c"], "gold": 0}\n'
    (place / "piqa.jsonl.gz").write_bytes(gzip.compress(items))
    (place / "other.txt").write_text("other", encoding="utf-8")
    (place / "study.toml").write_text(text, encoding="utf-8")
    plan = read_plan(place / "study.toml")
    assert [recipe.name for recipe in plan.recipes] == ["AWEQ", "GPTQ INT3"]


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
    from ptqkit.cli import build_parser
    from ptqkit.hf import quantize

    commands = build_parser()._subparsers._group_actions[0].choices
    shown = " ".join(commands["quantize"].format_help().split())
    measured = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    (value,) = set(re.findall(r"`error_propagation=([\d.]+)`", measured))
    assert f"({value} is a good value)" in shown
    assert f"error_propagation={value}" in quantize.__doc__
    for page in PAGES:
        found = re.findall(r"error_propagation=([\d.]+)", page.read_text(encoding="utf-8"))
        assert set(found) <= {value}, page


def test_the_readme_is_a_front_door():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200
