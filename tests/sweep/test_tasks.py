"""What a sweep measures: texts, and zero-shot items through lm-eval against sums by hand."""

from __future__ import annotations

import gzip
import json
import math
import os
import random

import numpy as np
import pytest
from helpers.data import SHARED
from helpers.sweep_cases import choices, tiny_model, words

from ptqkit.errors import CalibrationError
from ptqkit.hf.data.calibration import prepare_calibration
from ptqkit.hf.data.text import CachedTokenizer, TextFile
from ptqkit.hf.evaluation.likelihood import perplexity
from ptqkit.sweep import items
from ptqkit.sweep.items import read_items
from ptqkit.sweep.plan import TaskPlan, TextSource
from ptqkit.sweep.tasks import documents_of, measure

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A random model and its tokenizer."""
    path = tmp_path_factory.mktemp("sweep-model")
    tiny_model(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return model, transformers.AutoTokenizer.from_pretrained(path)


def load(name):
    """A trained model of the data folder."""
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"no {name} in the data folder")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def log_likelihood(model, tokenizer, context, continuation):
    """Log-probability of a continuation in float64, and whether greedy decoding writes it."""
    before = tokenizer(context)["input_ids"]
    whole = tokenizer(context + continuation)["input_ids"]
    logits = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
    places = range(len(before), len(whole))
    greedy = all(int(logits[i - 1].argmax()) == whole[i] for i in places)
    return sum(float(logits[i - 1, whole[i]]) for i in places), greedy


def by_hand(model, tokenizer, path, limit=None, norm=False):
    """Accuracy from single forward passes."""
    form, items = read_items(path, limit)
    right = 0
    for item in items:
        if form == "continuation":
            pair = item["context"], " " + item["continuation"]
            right += log_likelihood(model, tokenizer, *pair)[1]
            continue
        if form == "choices":
            pairs = [(item["context"], " " + c) for c in item["choices"]]
        else:
            pairs = [(c, " " + item["continuation"]) for c in item["contexts"]]
        found = [log_likelihood(model, tokenizer, *p)[0] for p in pairs]
        if norm:
            found = [f / len(c) for f, c in zip(found, item["choices"], strict=True)]
        right += int(np.argmax(found)) == item["gold"]
    return right / len(items)


class TestZeroShot:
    """Each value against forward passes of one item at a time."""

    pytestmark = pytest.mark.filterwarnings(
        "ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::FutureWarning"
    )

    @pytest.fixture(autouse=True)
    def needed(self):
        pytest.importorskip("lm_eval")

    @pytest.mark.parametrize("metric", ["acc", "acc_norm"])
    def test_choices_as_by_hand(self, small, tmp_path, metric):
        from ptqkit.sweep.zeroshot import zero_shot

        choices(tmp_path / "c.jsonl", 24)
        found = zero_shot(*small, str(tmp_path / "c.jsonl"), metric=metric)
        expected = by_hand(*small, tmp_path / "c.jsonl", norm=metric == "acc_norm")
        assert found.value == pytest.approx(expected, abs=1e-12)
        assert (found.count, found.left_out, found.metric) == (24, 0, metric)
        assert found.chance == pytest.approx((1 / 2 + 1 / 3) / 2)

    @pytest.mark.parametrize("task", ["copa", "winogrande", "lambada_openai"])
    def test_real_tasks_as_by_hand(self, task):
        from ptqkit.sweep.zeroshot import zero_shot

        model, tokenizer = load("stories260k")
        path = SHARED / "zeroshot" / f"{task}.jsonl.gz"
        limit = 60 if task == "lambada_openai" else 40
        found = zero_shot(model, tokenizer, str(path), limit=limit)
        assert found.value == pytest.approx(by_hand(model, tokenizer, path, limit), abs=1e-12)
        if task == "lambada_openai":
            assert found.value > 0, "some word must be right for this to say anything"

    def test_published_count(self):
        """29 of 50, as the data folder states for this model."""
        from ptqkit.sweep.zeroshot import zero_shot

        model, tokenizer = load("stories260k")
        found = zero_shot(model, tokenizer, str(SHARED / "zeroshot" / "copa.jsonl.gz"))
        assert found.value == pytest.approx(29 / 50)

    def test_hooks_of_the_model_count(self, small, tmp_path):
        from ptqkit.sweep.zeroshot import zero_shot

        choices(tmp_path / "c.jsonl", 12)
        model, tokenizer = small
        calls = []
        layer = model.model.layers[0].mlp.down_proj
        handle = layer.register_forward_pre_hook(lambda m, a: calls.append(a[0].shape))
        try:
            zero_shot(model, tokenizer, str(tmp_path / "c.jsonl"))
        finally:
            handle.remove()
        assert calls

    def test_everything_is_left_as_found(self, small, tmp_path):
        from ptqkit.sweep.zeroshot import zero_shot

        choices(tmp_path / "c.jsonl")
        model, tokenizer = small
        random.seed(5), np.random.seed(5), torch.manual_seed(5)  # noqa: NPY002
        expected = random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002
        random.seed(5), np.random.seed(5), torch.manual_seed(5)  # noqa: NPY002
        environment, padding = dict(os.environ), tokenizer.pad_token
        model.train()
        model.model.layers[0].eval()
        try:
            modes = [m.training for m in model.modules()]
            zero_shot(model, tokenizer, str(tmp_path / "c.jsonl"))
            assert [m.training for m in model.modules()] == modes
        finally:
            model.eval()
        assert (random.random(), np.random.rand(), torch.rand(1)) == expected  # noqa: NPY002
        assert dict(os.environ) == environment
        assert tokenizer.pad_token == padding
        assert [p.name for p in tmp_path.iterdir()] == ["c.jsonl"]

    def test_too_long(self, small, tmp_path):
        from ptqkit.sweep.zeroshot import zero_shot

        choices(tmp_path / "c.jsonl")
        long = {"context": "a", "choices": [words(200), "b"], "gold": 0}
        cut = {"context": words(200), "choices": ["a", "b"], "gold": 0}
        with open(tmp_path / "c.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(long) + "\n" + json.dumps(cut) + "\n")
        with pytest.raises(ValueError, match="1 of 8 items of c.jsonl are longer than the 64"):
            zero_shot(*small, str(tmp_path / "c.jsonl"))
        found = zero_shot(*small, str(tmp_path / "c.jsonl"), too_long="skip")
        assert (found.count, found.left_out, found.truncated) == (7, 1, 1)

    def test_logits_that_are_not_finite(self, small, tmp_path):
        from ptqkit.sweep.zeroshot import zero_shot

        choices(tmp_path / "c.jsonl")
        model, tokenizer = small
        gain = model.model.norm.weight
        kept = gain.detach().clone()
        try:
            with torch.no_grad():
                gain.fill_(math.nan)
            with pytest.raises(ArithmeticError, match="not finite"):
                zero_shot(model, tokenizer, str(tmp_path / "c.jsonl"))
        finally:
            with torch.no_grad():
                gain.copy_(kept)

    def test_missing_lm_eval(self, small, tmp_path, monkeypatch):
        from ptqkit.sweep import zeroshot

        monkeypatch.setattr(zeroshot, "has_lm_eval", lambda: False)
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'ptqkit\[eval\]'"):
            zeroshot.zero_shot(*small, "c.jsonl")


def test_documents(tmp_path):
    lines = [{"text": f"a  b\n{i}"} for i in range(5)]
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(x) + "\n" for x in lines), encoding="utf-8")
    assert list(documents_of(TextSource(str(path), (1, 3)))) == ["a  b\n1", "a  b\n2"]
    assert list(documents_of(TextSource(str(path), (4, 5), "collapse"))) == ["a b 4"]
    with pytest.raises(CalibrationError, match="holds 5"):
        list(documents_of(TextSource(str(path), (3, 6))))
    path.write_text('{"text": "  "}\n', encoding="utf-8")
    with pytest.raises(CalibrationError, match="holds no text"):
        list(documents_of(TextSource(str(path))))


@pytest.fixture
def reads(monkeypatch):
    """Sizes of what is read of texts from here on; a text without end must not be read whole."""
    found, real = [], TextFile.read

    def read(self, size=-1):
        assert size >= 0
        found.append(size)
        return real(self, size)

    monkeypatch.setattr(TextFile, "read", read)
    return found


@pytest.mark.parametrize("whitespace", ["keep", "collapse"])
@pytest.mark.parametrize("ending", [".txt.gz", ".jsonl.gz"])
def test_no_more_is_read_than_is_needed(small, tmp_path, reads, whitespace, ending):
    model, tokenizer = small
    line = words(40) + "  \n\n"
    line = line if ending == ".txt.gz" else json.dumps(line) + "\n"
    path = tmp_path / f"bomb{ending}"
    path.write_bytes(gzip.compress((line * 20_000).encode()) + b"damaged, if anybody comes here")
    documents = None if ending == ".txt.gz" else (1, 5)
    source = TextSource(str(path), documents, whitespace)
    settings = {"max_tokens": 90, "window": 32, "batch_size": 2}
    found = measure(model, tokenizer, TaskPlan("t", "perplexity", source, settings))
    text = [(words(40) + "  \n\n") * 8] if documents is None else [words(40) + "  \n\n"] * 8
    text = [" ".join(t.split()) for t in text] if whitespace == "collapse" else text
    assert found.value == perplexity(model, tokenizer, text, **settings).perplexity
    data = prepare_calibration(documents_of(source), tokenizer, samples=2, sequence_length=16)
    assert data.samples == 2 and sum(reads) < 1_000_000


def test_collapsed_text_is_that_of_the_whole(tmp_path):
    text = " \n a\tb\u2003\u00a0c  " + "dd \n\n" * 40_000 + " e"
    (tmp_path / "t.txt").write_text(text, encoding="utf-8", newline="")
    for size in (7, 1 << 16, -1):
        for file in documents_of(TextSource(str(tmp_path / "t.txt"), None, "collapse")):
            pieces = list(iter(lambda file=file, size=size: file.read(size), ""))
            assert "".join(pieces) == " ".join(text.split())
    (tmp_path / "t.txt").write_text(" \n ", encoding="utf-8")
    for whitespace in ("keep", "collapse"):
        task = TaskPlan("t", "", TextSource(str(tmp_path / "t.txt"), None, whitespace), {})
        with pytest.raises(CalibrationError, match="holds no text"):
            measure(None, None, task)


def test_an_item_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(items, "LONGEST_LINE", 1000)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'"' + b"a" * 5000))
    with pytest.raises(ValueError, match=r"line 1 is longer than 1,000 characters"):
        read_items(tmp_path / "a.jsonl.gz")


def test_perplexity_is_that_of_the_library(small, tmp_path):
    model, tokenizer = small
    (tmp_path / "t.txt").write_text(words(80), encoding="utf-8")
    settings = {
        "max_tokens": 90,
        "window": 32,
        "stride": 16,
        "start_token": "auto",
        "batch_size": 2,
    }
    task = TaskPlan("t", "perplexity", TextSource(str(tmp_path / "t.txt")), settings)
    remembering = CachedTokenizer(tokenizer)
    found = measure(model, remembering, task)
    expected = perplexity(model, tokenizer, words(80), **settings)
    assert (found.value, found.count) == (expected.perplexity, expected.tokens)
    assert math.isnan(found.chance) and not found.higher_is_better
    assert measure(model, remembering, task) == found or math.isnan(found.chance)
    assert len(remembering._tokens) == 1


def test_windows_are_spread_over_the_joined_text(small, tmp_path):
    model, tokenizer = small
    lines = [json.dumps(words(60, i)) for i in range(3)]
    (tmp_path / "t.jsonl").write_text("\n".join(lines), encoding="utf-8")
    settings = {
        "windows": 3,
        "window": 16,
        "max_tokens": None,
        "stride": None,
        "start_token": "auto",
        "batch_size": 2,
    }
    task = TaskPlan("t", "perplexity", TextSource(str(tmp_path / "t.jsonl")), settings)
    found = measure(model, tokenizer, task)
    ids = [i for k in range(3) for i in tokenizer(words(60, k), add_special_tokens=False).input_ids]
    count = len(ids) // 15
    rows = torch.tensor(ids[: count * 15]).view(count, 15)[[0, round((count - 1) / 2), count - 1]]
    assert found.count == 45
    assert found.value == perplexity(model, tokenizer, rows, window=16, batch_size=2).perplexity
    with pytest.raises(CalibrationError, match="windows = 900 of 15 tokens are more than"):
        measure(model, tokenizer, TaskPlan("t", "", task.source, {**settings, "windows": 900}))


def test_perplexity_that_is_not_finite(small, tmp_path):
    (tmp_path / "t.txt").write_text(words(20), encoding="utf-8")
    settings = {
        "max_tokens": None,
        "window": 32,
        "stride": None,
        "start_token": "auto",
        "batch_size": 2,
    }
    task = TaskPlan("t", "perplexity", TextSource(str(tmp_path / "t.txt")), settings)
    model, tokenizer = small
    handle = model.lm_head.register_forward_hook(lambda m, a, out: out * math.nan)
    try:
        with pytest.raises(ArithmeticError, match="nan nats per token"):
            measure(model, tokenizer, task)
    finally:
        handle.remove()
