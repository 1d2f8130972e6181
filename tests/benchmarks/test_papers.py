"""The front door to the papers' tables: every command on a tiny model, and the page."""

from __future__ import annotations

import gzip
import json
import math

import numpy as np
import pytest

from benchmarks.papers import aweq, entry, gptq, ipqs, measure, page, published, sbc, size_series
from benchmarks.papers.table import Table, with_error

WORDS = ["sea", "ship", "wind", "sail", "law", "court", "judge", "case", "and", "of", "the"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A size series of two tiny models, trained for a moment, and texts; nothing published."""
    folder, draw = tmp_path_factory.mktemp("papers"), np.random.default_rng(0)
    books = folder / "gutenberg"
    books.mkdir()
    for name in ("train", "valid", "test"):
        lines = [" ".join(draw.choice(WORDS, 40)) for _ in range(150)]
        (books / f"{name}.txt.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    (folder / "wikitext2").mkdir()
    (folder / "c4").mkdir()
    text = " ".join(draw.choice(WORDS, 4000))
    (folder / "wikitext2" / "wiki.test.raw.gz").write_bytes(gzip.compress(text.encode()))
    line = json.dumps({"text": text}).encode()
    (folder / "c4" / "c4_sample_40.jsonl.gz").write_bytes(gzip.compress(line))
    sizes = {f"opt-{i}M": size_series.Size(32, i, 2, 1e-3, steps=2, batch=1) for i in (1, 2)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(size_series, "SIZES", sizes)
        size_series.main(["--data", str(books), "--out", str(folder / "models")])
    return folder


def command(module, name, folder, *options):
    paths = ["--models", str(folder / "models"), "--data", str(folder)]
    out = folder / "out"
    argv = [name, *paths, "--out", str(out), "--quick", *options]
    assert entry.main(module.__name__.rpartition(".")[2], module.ENTRIES, "", argv) == 0
    found = entry.load(out / f"{module.__name__.rpartition('.')[2]}_{name}.json")
    assert found["published"] is None and found["records"]
    return found["records"]


def test_perplexity_by_size(models, capsys):
    records = command(gptq, "table3", models, "--draws", "2")
    shown = capsys.readouterr()
    assert "opt-1M" in shown.out and "no gptq.toml" in shown.err
    assert {r["method"] for r in records} == {"float", *gptq.METHODS}
    assert len(records) == 2 * (1 + 2 * len(gptq.METHODS))
    sizes = {r["model"]: r["weights"] for r in records}
    assert sizes == {"opt-1M": 12 * 32**2, "opt-2M": 24 * 32**2}
    assert (models / "out" / "gptq_table3.png").stat().st_size > 1000
    assert json.loads((models / "models" / "opt-2M" / "training.json").read_text())["layers"] == 2


def test_other_grids_and_texts(models):
    assert {r["method"] for r in command(gptq, "table7", models, "--draws", "1")} >= {
        "GPTQ 2 g16",
        "GPTQ ternary g8",
    }
    texts = command(gptq, "table5", models, "--draws", "1")
    assert {r["text"] for r in texts} == set(gptq.TEXTS)


def test_equalization_on_a_model_that_is_given(models):
    folder, books = models / "models" / "opt-1M", models / "gutenberg"
    given = ["--model", str(folder), "--calibration", str(books / "valid.txt.gz"),
             "--test", str(books / "test.txt.gz"), "--draws", "1"]  # fmt: skip
    rows = command(aweq, "equations", models, *given)
    for row in rows:
        assert row["after"] == pytest.approx(row["bound"], rel=1e-3) and row["before"] > 0
    found = command(aweq, "search", models, *given)
    assert {r["method"] for r in found} == {"float", *aweq.WAYS}
    assert {r["scheme"] for r in found} == set(aweq.SCHEMES)
    command(aweq, "figure1", models, *given)
    assert (models / "out" / "aweq_figure1_opt-1M.png").stat().st_size > 1000


def test_runtime(models):
    records = command(gptq, "table2", models)
    assert {r["method"] for r in records} == {"GPTQ", "quality", "OBQ"}
    assert all(r["seconds"] > 0 for r in records)


def test_growth_is_an_exponent():
    rows = [{"method": "GPTQ", "width": n, "seconds": (n / 100) ** 3} for n in (100, 200, 800)]
    _, growth = gptq.runtime_tables(rows)
    assert [row[1] for row in growth.rows] == pytest.approx([3, 3])


@pytest.mark.parametrize("module", [gptq, aweq, sbc, ipqs])
def test_entries_that_read_what_others_measured(module):
    for one in module.ENTRIES:
        if one.source:
            records = one.measure(entry.parse([], [one]))
            tables = one.tables(records)
            assert records and all(table.rows and table.text() for table in tables), one.name


def test_the_page_is_what_the_files_make():
    assert page.PAGE.read_text(encoding="utf-8") == page.page()


def test_a_page_leaves_out_what_is_not_measured(models):
    command(gptq, "table3", models, "--draws", "1")
    text = page.page(models / "out")
    assert "table3: perplexity by size" in text and "Not measured yet: `table1`" in text
    assert "## Softmax bias" not in text


def test_published_columns_stand_apart(tmp_path):
    (tmp_path / "gptq.toml").write_text(
        '[t]\ncolumns = ["A", "B"]\n"full 16" = [1.5, 2.5]\nx = [3, 4]\n'
    )
    figures = published.read_published(tmp_path, "gptq")
    assert published.read_published(tmp_path, "aweq") == {}
    found = published.table_of(figures, "t", "Big", {"full 16": "float", "x": "x"})
    assert published.table_of(figures, "missing", "Big") is None
    table = Table("title", ["", "ours"], [["float", 7.0], ["y", math.nan]])
    columns, rows = table.beside(found)
    assert columns == ["", "ours", "Big: A", "Big: B"]
    assert rows == [["float", "7", "1.5", "2.5"], ["y", "", "", ""], ["x", "", "3", "4"]]
    assert "Columns of Big are the paper's, of another model" in table.markdown(found)
    assert "Big" not in table.markdown() and "Big" not in table.text()


def test_paired_errors_hold_windows_and_draws():
    draw = np.random.default_rng(0)
    base = draw.normal(size=(3, 10))
    first = dict(enumerate(base + 0.001))
    other = dict(enumerate(base))
    assert measure.paired(first, other) == pytest.approx((1, 0), abs=1e-9)
    moved = dict(enumerate(base + np.array([[0.001], [0.002], [0.003]])))
    assert measure.paired(moved, other) == pytest.approx((2, math.sqrt(1 / 3)))
    floats = {-1: np.zeros(10)}
    value, error = measure.paired(first, floats)
    each = 1e3 * (base + 0.001)
    assert value == pytest.approx(each.mean())
    parts = each.mean(0).var(ddof=1) / 10 + each.mean(1).var(ddof=1) / 3
    assert error == pytest.approx(math.sqrt(parts))
    assert measure.paired({-1: base[0]}, {-1: base[1]})[0] == pytest.approx(
        1e3 * (base[0] - base[1]).mean()
    )


def test_errors_say_how_many_digits():
    assert with_error(1.23456, 0.0123) == "1.235 ± 0.012"
    assert with_error(-123.4, 12.0) == "-123 ± 12"
    assert with_error(5.5, math.nan) == "5.5"


def test_commands_are_noted_one_by_one():
    argv = ["table1", "memory", "--data", "../shared data"]
    line = entry.command_of("benchmarks.papers.gptq", "memory", argv, gptq.ENTRIES)
    assert line == "python -m benchmarks.papers.gptq memory --data '../shared data'"


def test_models_without_texts_are_refused(models):
    with pytest.raises(SystemExit, match="--calibration"):
        entry.main("gptq", gptq.ENTRIES, "", ["table3", "--model", str(models)])
    with pytest.raises(SystemExit, match="--models DIR"):
        entry.main("gptq", gptq.ENTRIES, "", ["table3"])
