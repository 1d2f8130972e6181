"""Results are data frames, and tables of notebooks."""

from __future__ import annotations

import math
import re

import pytest
from helpers.extras import HF, missing

from ptqkit._frames import Tabular, html_table

ROWS = [{"name": "a<b", "value": 1.23456, "none": None}, {"name": "c", "value": math.nan}]


class Pair(Tabular):
    def _rows(self):
        return ROWS


def test_a_table_of_a_notebook():
    page = Pair()._repr_html_()
    assert re.findall("<th>(.*?)</th>", page) == ["name", "value"]
    assert re.findall("<td>(.*?)</td>", page) == ["a&lt;b", "1.235", "c", ""]
    long = html_table([{"k": i} for i in range(100)], "numbers")
    assert "and 40 more" in long and "<caption>numbers</caption>" in long


def test_a_data_frame():
    pandas = pytest.importorskip("pandas")
    frame = Pair().to_dataframe()
    assert isinstance(frame, pandas.DataFrame) and list(frame) == ["name", "value", "none"]
    assert frame["value"][0] == 1.23456


def test_pandas_is_named_if_it_is_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(ModuleNotFoundError, match="needs pandas; install it with"):
        Pair().to_dataframe()


@pytest.mark.skipif(bool(missing((*HF, "diffusers"))), reason="imports all modules")
def test_every_public_result_is_one():
    import ptqkit
    from ptqkit.demo.result import DemoResult
    from ptqkit.sweep.grid import SweepResult

    public = [getattr(m, n) for m in (ptqkit, ptqkit.hf, ptqkit.nn) for n in m.__all__]
    named = re.compile(r"(?<!Layer)(Report|Result|Table|Comparison)$")
    found = {c for c in public if isinstance(c, type) and named.search(c.__name__)}
    found |= {DemoResult, SweepResult}
    assert len(found) >= 12
    assert [c.__name__ for c in found if not issubclass(c, Tabular)] == []


def test_a_report_shows_its_layers():
    pytest.importorskip("torch")
    from ptqkit.hf.quantization.report import LayerReport, Report

    report = Report([LayerReport("layers.0.q", "quantized", (4, 8), bits=3)])
    assert "<td>layers.0.q</td>" in report._repr_html_()
    assert report._rows() == report.to_dicts()
