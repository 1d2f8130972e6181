"""Text is read as far as it is needed, and gives the tokens that all of it would."""

from __future__ import annotations

import gzip
import json

import pytest

from ptqkit.demo import MODEL_DIR, text
from ptqkit.errors import CalibrationError
from ptqkit.hf.data import text as text_module
from ptqkit.hf.data.text import TextFile, open_documents, read_beginning, read_documents, tokenize

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(MODEL_DIR)


def ids(tokenizer, document):
    return tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]


@pytest.mark.parametrize("kind", ["prose", "spaces", "one word", "no end of line"])
@pytest.mark.parametrize("needed", [1, 10, 700, 3000, 10**9])
def test_the_beginning_gives_the_first_tokens(tmp_path, tokenizer, kind, needed):
    document = {
        "prose": text("test")[:60_000],
        "spaces": " " * 50_000,
        "one word": "abracadabra" * 5_000,
        "no end of line": text("test")[:60_000].replace("\n", " "),
    }[kind]
    (tmp_path / "a.txt").write_text(document, encoding="utf-8", newline="")
    [beginning] = read_beginning(open_documents(tmp_path / "a.txt"), tokenizer, needed)
    assert document.startswith(beginning)
    assert ids(tokenizer, beginning)[:needed] == ids(tokenizer, document)[:needed]
    if needed <= 10:
        assert len(beginning) < 20_000


def test_the_beginning_of_lines(tmp_path, tokenizer):
    lines = [json.dumps(f"document {i} of many") for i in range(100)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    each = len(ids(tokenizer, "document 0 of many"))
    assert len(read_beginning(open_documents(tmp_path / "a.jsonl"), tokenizer, 3 * each)) == 3
    assert len(read_beginning(open_documents(tmp_path / "a.jsonl"), tokenizer, 10**6)) == 100


def test_calibration_reads_pieces_of_a_file(tmp_path, tokenizer, monkeypatch):
    document = text("calibration")[:400_000]
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(document.encode()))
    whole = tokenize(tokenizer, [document])
    assert tokenize(tokenizer, open_documents(tmp_path / "a.txt.gz")) == whole
    read, real = [], TextFile.read
    monkeypatch.setattr(
        TextFile, "read", lambda self, size=-1: read.append(size) or real(self, size)
    )
    found = tokenize(tokenizer, open_documents(tmp_path / "a.txt.gz"), 1000)
    assert found == whole[: len(found)] and len(found) >= 1000
    assert min(read) > 0 and sum(read) < 140_000
    assert list(read_documents(tmp_path / "a.txt.gz")) == [document]


def test_a_line_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(text_module, "LONGEST_LINE", 1000)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'"' + b"a" * 5000))
    with pytest.raises(CalibrationError, match=r"line 1 is longer than 1,000 characters"):
        list(open_documents(tmp_path / "a.jsonl.gz"))
