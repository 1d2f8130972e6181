"""Perplexity against a plain loop over tokens and against published figures of real models."""

from __future__ import annotations

import gzip
import json
import math

import pytest
import torch
import transformers
from helpers.data import SHARED
from helpers.driver_models import WordTokenizer, build, numbers, tokens

from ptqkit.errors import CalibrationError, NotFiniteError
from ptqkit.hf import perplexity

needs_data = pytest.mark.skipif(
    not SHARED.is_dir(), reason="the shared data lies beside the repository only"
)


def by_hand(model, ids, body, stride, start):
    """Score each token once, in the first window that holds it with some context."""
    total, count, done = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        window = ids[begin : begin + body]
        given = ([start] if start is not None else []) + window
        logits = model(torch.tensor([given])).logits[0].double().log_softmax(-1)
        shift = 1 if start is not None else 0
        for i, token in enumerate(window):
            position = i + shift - 1
            if begin + i >= done and position >= 0:
                total -= float(logits[position, token])
                count += 1
        done = begin + len(window)
        if done >= len(ids):
            break
    return total / count, count


@pytest.mark.parametrize("start", [1, None])
@pytest.mark.parametrize(
    ("window", "stride"), [(16, None), (16, 15), (16, 8), (16, 1), (7, 3), (32, 5)]
)
@torch.no_grad()
def test_equals_a_loop_over_tokens(start, window, stride):
    model = build()
    ids = tokens(1, 61)[0]
    result = perplexity(
        model, None, ids, window=window, stride=stride, start_token=start, batch_size=3
    )
    body = window - (start is not None)
    expected, count = by_hand(model, ids.tolist(), body, stride or body, start)
    assert result.nll_per_token == pytest.approx(expected, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(expected), rel=1e-6)
    assert (result.tokens, result.window, result.stride) == (count, window, stride or body)
    assert result.start_token == start and result.texts == 1
    overlapping = stride is not None and stride < body
    lost = 0 if start is not None else (1 if overlapping else -(-61 // body))
    assert result.tokens == 61 - lost


def test_texts_are_independent():
    model, ids = build(), tokens(3, 20)
    kwargs = {"window": 12, "start_token": 1}
    parts = [perplexity(model, None, row, **kwargs) for row in ids]
    whole = perplexity(model, None, ids, **kwargs, batch_size=2)
    assert whole.texts == 3 and whole.tokens == 60
    mean = sum(p.nll_per_token * p.tokens for p in parts) / 60
    assert whole.nll_per_token == pytest.approx(mean, rel=1e-6)


def test_text_tokens_and_limits():
    model, tokenizer = build(), WordTokenizer()
    ids = torch.tensor(tokenizer(numbers(50))["input_ids"])
    text = perplexity(model, tokenizer, numbers(50))
    assert (text.window, text.stride, text.start_token, text.tokens) == (32, 31, 1, 50)
    assert text == perplexity(model, None, ids, start_token=1)
    less = perplexity(model, tokenizer, [numbers(50), numbers(50)], max_tokens=40)
    assert less.tokens == 40 and less.texts == 1
    assert perplexity(model, tokenizer, [numbers(50)] * 2, max_tokens=70).tokens == 70
    assert perplexity(model, WordTokenizer(bos=False), numbers(50)).start_token is None
    assert text.to_dict()["perplexity"] == text.perplexity


def test_windows_at_equal_distances_are_texts_of_their_own():
    model, tokenizer = build(), WordTokenizer()
    words = numbers(95)
    found = perplexity(model, tokenizer, [words[:100], words[100:]], window=11, windows=3)
    ids = [tokenizer(part)["input_ids"] for part in (words[:100], words[100:])]
    joined = torch.tensor([*ids[0], *ids[1]])
    body = 10
    last = len(joined) // body - 1
    places = [0, round(last / 2), last]
    rows = torch.stack([joined[p * body : (p + 1) * body] for p in places])
    expected = perplexity(model, tokenizer, rows, window=11)
    assert (found.texts, found.tokens) == (3, 30)
    assert found.perplexity == expected.perplexity
    with pytest.raises(CalibrationError, match="windows = 99 of 10 tokens are more than"):
        perplexity(model, tokenizer, words, window=11, windows=99)
    for options in ({"windows": 0}, {"windows": 2, "max_tokens": 9}, {"windows": 2, "stride": 4}):
        with pytest.raises(ValueError, match="must be at least 1 and excludes"):
            perplexity(model, tokenizer, words, window=11, **options)


def test_model_and_seed_stay_as_they_were():
    model = build()
    model.train()
    state = torch.random.get_rng_state()
    seen = []
    perplexity(model, None, tokens(2), start_token=1, progress=seen.append)
    assert model.training and torch.equal(torch.random.get_rng_state(), state)
    assert model.config.use_cache is True and (seen[-1].index, seen[-1].total) == (4, 4)
    assert seen[-1].stage == "measuring" and seen[-1].seconds_left == 0


def test_bad_arguments():
    model = build()
    with pytest.raises(ValueError, match="window 64 is longer than the 32 positions"):
        perplexity(model, None, tokens(1), window=64)
    for stride in (0, 32, -1):
        with pytest.raises(ValueError, match=r"stride must be from 1 to 31 .* with a start token"):
            perplexity(model, None, tokens(1), start_token=1, stride=stride)
    with pytest.raises(ValueError, match="batch_size"):
        perplexity(model, None, tokens(1), batch_size=0)
    with pytest.raises(ValueError, match="tokenizer is needed"):
        perplexity(model, None, "1 2 3")
    with pytest.raises(ValueError, match="start_token must be"):
        perplexity(model, WordTokenizer(), "1 2 3", start_token="bos")
    with pytest.raises(CalibrationError, match="too few tokens"):
        perplexity(model, WordTokenizer(), "")
    with pytest.raises(CalibrationError, match="too few tokens"):
        perplexity(model, None, tokens(1, 1), start_token=None)


@pytest.mark.parametrize(("factor", "shown"), [(math.nan, "nan"), (1e6, "inf")])
def test_what_is_not_finite_is_an_error(factor, shown):
    model = build()
    with torch.no_grad():
        model.lm_head.weight.mul_(factor)
    with pytest.raises(NotFiniteError, match=f"the perplexity of the model is {shown} "):
        perplexity(model, None, tokens(1, 32))
    result = perplexity(model, None, tokens(1, 32), check=False)
    assert not math.isfinite(result.perplexity)
    with pytest.warns(RuntimeWarning, match=f"the perplexity of W2 is {shown} "):
        result.warn_unless_finite("W2")


def load(name):
    path = SHARED / name
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    reference = json.loads((path / "reference.json").read_text())["measured_here"]
    return model, transformers.AutoTokenizer.from_pretrained(path), reference


@needs_data
@pytest.mark.parametrize("name", ["stories260k", "babyllama105"])
def test_stories_of_real_models(name):
    """Each story by itself, <s> in front, cut at the model's length."""
    model, tokenizer, reference = load(name)
    expected = reference["tinystories_train_800_first_200"]
    with gzip.open(SHARED / "tinystories" / "train_800.jsonl.gz", "rt") as file:
        stories = [next(iter(json.loads(line).values())) for line in list(file)[:200]]
    length = model.config.max_position_embeddings - 1
    nll = count = 0.0
    for story in stories:
        ids = tokenizer(story, add_special_tokens=False)["input_ids"][:length]
        result = perplexity(model, None, torch.tensor(ids), start_token=tokenizer.bos_token_id)
        nll, count = nll + result.nll_per_token * result.tokens, count + result.tokens
    assert count == expected["tokens"]
    assert nll / count == pytest.approx(expected["nll_per_token"], abs=1e-4)


@needs_data
@pytest.mark.parametrize(("name", "window"), [("stories260k", 512), ("babyllama105", 256)])
def test_wikitext_of_real_models(name, window):
    """One text, windows side by side, no start token: the first token of each is not scored."""
    model, tokenizer, reference = load(name)
    key = f"wikitext2_raw_test_first_200000_chars_first_100_windows_of_{window}"
    with gzip.open(SHARED / "wikitext2" / "wiki.test.raw.gz", "rt", encoding="utf-8") as file:
        text = file.read(200_000)
    result = perplexity(model, tokenizer, text, max_tokens=100 * window, start_token=None)
    assert (result.window, result.tokens) == (window, 100 * (window - 1))
    assert result.nll_per_token == pytest.approx(reference[key]["nll_per_token"], abs=1e-4)
    assert result.perplexity == pytest.approx(reference[key]["ppl"], abs=6e-3)
