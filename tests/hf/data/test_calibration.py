"""Calibration data from every source: windows, start tokens, padding, errors that help."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest
import torch
from helpers.driver_models import WordTokenizer, build, numbers
from torch.utils.data import DataLoader, TensorDataset

from ptqkit.errors import CalibrationError
from ptqkit.hf.data.calibration import (
    CalibrationSet,
    max_positions,
    padding_mask,
    prepare_calibration,
)
from ptqkit.hf.data.text import read_documents, tokenize

SIZE = {"samples": 4, "sequence_length": 8, "batch_size": 3}


def all_ids(data):
    return torch.cat([b["input_ids"] for b in data.batches])


def test_windows_are_consecutive_runs_with_a_start_token():
    tokenizer = WordTokenizer()
    text = numbers(200)
    data = prepare_calibration([text], tokenizer, **SIZE)
    ids = torch.tensor(tokenizer(text)["input_ids"])
    windows = ids[: 200 // 7 * 7].view(-1, 7).tolist()
    rows = all_ids(data)
    assert rows.shape == (4, 8) and (rows[:, 0] == 1).all() and data.start_token == "<1>"
    found = [windows.index(row[1:].tolist()) for row in rows]
    assert found == sorted(found) and len(set(found)) == 4
    assert [len(b["input_ids"]) for b in data.batches] == [3, 1]
    assert (data.tokens, data.samples, data.sequence_length) == (32, 4, 8)
    assert data.masks() == [None, None]


def test_without_a_start_token():
    for tokenizer, start in ((WordTokenizer(bos=False), "auto"), (WordTokenizer(), None)):
        data = prepare_calibration([numbers(64)], tokenizer, **SIZE, start_token=start)
        assert data.start_token == "none" and data.tokens == 32
    data = prepare_calibration([numbers(64)], WordTokenizer(), **SIZE, start_token=5)
    assert (all_ids(data)[:, 0] == 5).all()
    with pytest.raises(CalibrationError, match="leaves no room next to the start token"):
        prepare_calibration([numbers(9)], WordTokenizer(), samples=1, sequence_length=1)


def test_seed_decides_and_the_global_one_is_left_alone():
    state = torch.random.get_rng_state()
    first, again, other = (
        all_ids(prepare_calibration([numbers(500)], WordTokenizer(), **SIZE, seed=s))
        for s in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_length_is_capped_by_the_model():
    data = prepare_calibration(
        [numbers(200)], WordTokenizer(), samples=2, sequence_length=512, max_length=16
    )
    assert data.sequence_length == 16 and all_ids(data).shape == (2, 16)


def test_too_little_text_says_how_much():
    with pytest.raises(CalibrationError, match=r"holds 20 tokens, but samples=4 .* need 28"):
        prepare_calibration([numbers(20)], WordTokenizer(), **SIZE)


def test_files(tmp_path):
    text = numbers(100)
    (tmp_path / "a.txt").write_text(text)
    with gzip.open(tmp_path / "a.txt.gz", "wt") as file:
        file.write(text)
    lines = [json.dumps({"id": 3, "story": numbers(50)}), "", json.dumps(numbers(50, 50))]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write(json.dumps({"label": "no", "text": text}))
    expected = all_ids(prepare_calibration([text], WordTokenizer(), **SIZE))
    for name in ("a.txt", "a.txt.gz", "a.jsonl", "a.jsonl.gz"):
        for path in (tmp_path / name, str(tmp_path / name)):
            data = prepare_calibration(path, WordTokenizer(), **SIZE)
            assert torch.equal(all_ids(data), expected) and data.source == name
    assert len(list(read_documents(tmp_path / "a.jsonl"))) == 2


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a file nor") as error:
        prepare_calibration(str(tmp_path / "none.txt"), WordTokenizer(), **SIZE)
    assert isinstance(error.value, CalibrationError)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        prepare_calibration(tmp_path / "none.txt", WordTokenizer(), **SIZE)
    cases = {
        "bad.jsonl": (b"{]", "line 1 is not JSON"),
        "number.jsonl": (b'"1"\n3\n', "line 2 holds no text"),
        "latin.txt": (b"\xff\xfe\xff", "not readable as UTF-8"),
        "cut.txt.gz": (gzip.compress(b"1 2 3" * 500)[:-9], "not readable"),
        "plain.txt.gz": (b"no gzip", "not readable"),
        "empty.txt": (b"", "holds 0 tokens"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CalibrationError, match=message):
            prepare_calibration(tmp_path / name, WordTokenizer(), **SIZE)


def test_long_text_is_tokenized_in_pieces_and_no_further_than_needed():
    tokenizer = WordTokenizer()
    text = numbers(60_000)
    assert tokenize(tokenizer, [text]) == tokenizer(text)["input_ids"]
    assert tokenizer.calls > 3
    tokenizer.calls = 0
    prepare_calibration([text] * 100, tokenizer, **SIZE)
    assert tokenizer.calls == 1


def test_tokens():
    ids = torch.arange(3, 35).view(4, 8)
    for source in (ids, ids.numpy(), list(ids), ids.tolist()):
        data = prepare_calibration(source, **SIZE)
        assert torch.equal(all_ids(data), ids) and data.start_token == "as given"
    assert prepare_calibration(ids, **{**SIZE, "samples": 3}).samples == 3
    ragged = prepare_calibration([ids[0], ids[1, :5], ids[2]], **SIZE)
    assert [tuple(b["input_ids"].shape) for b in ragged.batches] == [(2, 8), (1, 5)]
    assert ragged.tokens == 21


def test_a_data_loader_gives_batches():
    ids = torch.arange(3, 43).view(5, 8)
    for dataset in (TensorDataset(ids), ids, [{"input_ids": row} for row in ids]):
        data = prepare_calibration(DataLoader(dataset, batch_size=2), **SIZE)
        assert [len(batch["input_ids"]) for batch in data.batches] == [2, 2, 1]
        assert torch.equal(all_ids(data), ids) and data.tokens == 40
    single = prepare_calibration(DataLoader(TensorDataset(ids), batch_size=1), **SIZE)
    assert torch.equal(all_ids(single), ids[:4])
    with pytest.raises(CalibrationError, match=r"is a list of 2, .*give dicts"):
        prepare_calibration(DataLoader(TensorDataset(ids, ids), batch_size=2))


def test_a_prepared_set_is_taken_as_it_is():
    data = prepare_calibration(torch.arange(3, 43).view(5, 8))
    assert isinstance(data, CalibrationSet)
    assert prepare_calibration(data, samples=1, batch_size=1) is data


def test_batches_keep_their_masks():
    ids = torch.arange(3, 19).view(2, 8)
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[0, 5:] = 0
    data = prepare_calibration(
        [{"input_ids": ids, "attention_mask": mask, "labels": ids}, {"input_ids": ids[0]}]
    )
    assert data.tokens == 21 and "labels" not in data.batches[0]
    assert torch.equal(data.masks()[0], mask.bool()) and data.masks()[1] is None
    assert padding_mask({"input_ids": ids, "attention_mask": torch.ones(2, 8)}) is None


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "calibration is missing"),
        ([], "calibration is empty"),
        (3, "calibration cannot be a int"),
        (torch.zeros(4), r"shape \(samples, sequence\), not \(4,\)"),
        ([torch.zeros(0, dtype=torch.long)], r"calibration\[0\] must be a non-empty 1-D"),
        ([np.zeros(3)], r"calibration\[0\] must be .* not torch.float64"),
        ([object()], r"calibration\[0\] is a object"),
        ([{"ids": [1]}], r"calibration\[0\] has no input_ids"),
        (
            [{"input_ids": [[1, 2]], "attention_mask": [[1, 1, 1]]}],
            r"attention_mask has shape \(1, 3\), input_ids \(1, 2\)",
        ),
        ([{"input_ids": [[1, 2]], "attention_mask": [[0, 0]]}], "holds no token"),
        ([torch.zeros(2, 3, 8, 8)], r"shape \(2, 3, 8, 8\); name other inputs, .*pixel_values"),
        (
            [(torch.ones(2, 3, dtype=torch.long), torch.ones(2))],
            r"calibration\[0\] is a tuple of 2, .*give dicts, such as \{'input_ids'",
        ),
        (["1 2 3"], "tokenizer= is needed"),
        ("no-such-file.txt", "neither a file nor"),
    ],
)
def test_bad_sources(source, message):
    with pytest.raises(CalibrationError, match=message):
        prepare_calibration(source)


@pytest.mark.parametrize("name", ["samples", "sequence_length", "batch_size"])
def test_bad_numbers(name):
    with pytest.raises(CalibrationError, match=f"{name} must be an integer of at least 1"):
        prepare_calibration(["1"], WordTokenizer(), **{**SIZE, name: 0})


def test_dataset_names(monkeypatch):
    import sys
    import types

    class Rows(list):
        column_names = ("text",)

    def load_dataset(path, config, split):
        if path == "broken":
            raise OSError("offline")
        assert (path, config, split) == ("some/set", "raw", "train")
        return Rows([{"text": numbers(40)}, {"text": " "}, {"text": numbers(40, 40)}])

    fake = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    data = prepare_calibration("some/set:raw:train", WordTokenizer(), **SIZE)
    assert data.source == "some/set:raw:train"
    expected = prepare_calibration([numbers(80)], WordTokenizer(), **SIZE)
    assert torch.equal(all_ids(data), all_ids(expected))
    with pytest.raises(CalibrationError, match="cannot load the dataset 'broken:x:y': offline"):
        prepare_calibration("broken:x:y", WordTokenizer(), **SIZE)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CalibrationError, match="'datasets' is not installed"):
        prepare_calibration("some/set:raw:train", WordTokenizer(), **SIZE)


def test_max_positions():
    assert max_positions(build("llama")) == 32
    assert max_positions(build("gpt2")) == 32
    assert max_positions(build("bloom")) is None
    # A table of 33 rows that starts behind the padding index 0 holds 32 positions.
    assert max_positions(build("roberta")) == 32


def test_any_iterable_of_text():
    text = numbers(100)
    halves = [text[: len(text) // 2], text[len(text) // 2 :]]
    expected = all_ids(prepare_calibration(halves, WordTokenizer(), **SIZE))
    sources = {
        "generator": (part for part in halves),
        "array": np.array(halves),
        "array of objects": np.array(halves, dtype=object),
        "dicts": [{"text": part, "id": 3} for part in halves],
        "generator of dicts": ({"text": part} for part in halves),
        "a dict of lists": {"text": halves},
        "dict view": dict.fromkeys(halves),
    }
    for name, source in sources.items():
        if name == "dict view":
            source = source.keys()
        data = prepare_calibration(source, WordTokenizer(), **SIZE)
        assert torch.equal(all_ids(data), expected), name


def test_iterables_are_read_no_further_than_needed():
    read = []

    def endless():
        while True:
            read.append(1)
            yield {"text": numbers(100)}

    data = prepare_calibration(endless(), WordTokenizer(), **SIZE)
    assert data.samples == 4 and len(read) < 10


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([numbers(5), None], r"calibration\[1\] is a NoneType, not a text as the first is"),
        ([{"text": numbers(5)}, {"text": 3}], r"calibration\[1\] is a int, not a text"),
        ([{"text": [numbers(5), b"x"]}], r"calibration\[0\] is a bytes, not a text"),
        ([{"text": numbers(5)}, {"other": "x"}], r"calibration\[1\] is a dict, not a text"),
    ],
)
def test_items_that_are_no_text(items, message):
    for source in (items, iter(items)):
        with pytest.raises(CalibrationError, match=message):
            prepare_calibration(source, WordTokenizer(), **SIZE)


def test_other_inputs_and_what_is_missing():
    for key in ("pixel_values", "input_features", "input_values", "inputs_embeds", "signal"):
        data = prepare_calibration([{key: torch.zeros(3, 2, 4), "labels": torch.ones(3)}] * 2)
        assert data.samples == data.tokens == 6 and list(data.batches[0]) == [key]
        assert data.masks() == [None, None] and data.source == "inputs as given"
    bad = [
        (
            [{"labels": torch.ones(3), "idx": [3]}],
            r"no input_ids, nor .* pixel_values.* has labels",
        ),
        ([{}], "it has nothing"),
        ([{"pixel_values": torch.zeros(0, 3)}], "pixel_values is empty"),
        (
            [{"input_ids": [[3, 4]], "path": ["a"]}],
            r"calibration\[0\]: path is a list, not a tensor",
        ),
        (torch.zeros(2, 3, 8, 8), r"not \(2, 3, 8, 8\); name other inputs, .*pixel_values"),
    ]
    for source, message in bad:
        with pytest.raises(CalibrationError, match=message):
            prepare_calibration(source)
