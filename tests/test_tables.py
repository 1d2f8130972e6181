"""The printer of plain text tables."""

from __future__ import annotations

import pytest
from helpers.extras import HF, missing

from ptqkit._tables import join_names, text_table, wrap_line


def test_columns_align_under_a_rule_as_long_as_the_longest_line():
    found = text_table(("layer", "bits", "notes"), [("a", "10", ""), ("head.2", "4", "kept as is")])
    assert found.splitlines() == [
        "layer   bits       notes",
        "------------------------",
        "a         10",
        "head.2     4  kept as is",
    ]


def test_left_columns_count_from_both_ends_and_widths_are_minima():
    found = text_table(("a", "b", "c"), [("x", "1", "yes")], left=(0, -1), widths=(3, 4, 0))
    assert found.splitlines() == ["a       b  c", "--------------", "x       1  yes"]


def test_a_header_alone_is_a_table():
    assert text_table(("a", "bb"), []) == "a  bb\n-----"


def test_rows_of_another_length_are_refused():
    with pytest.raises(ValueError):
        text_table(("a", "b"), [("x",)])


def test_lines_have_at_most_100_columns_and_names_keep_their_ends():
    names = [f"model.language_model.layers.{k}.self_attn.q_projection" for k in (1, 22)]
    rows = [(name, "1" * 39, "2" * 30) for name in names]
    first = text_table(("layer", "a", "b"), rows).splitlines()[2:]
    assert [line.split()[0] for line in first] == [
        "..1.self_attn.q_projection",
        "..22.self_attn.q_projection",
    ]
    rows = [(name, "1" * 50, "2" * 30) for name in names]
    cut = text_table(("layer", "a", "b"), rows).splitlines()
    assert max(map(len, cut)) <= 100
    assert [line.split()[0] for line in cut[2:]] == ["..1...projection", "..22..projection"]


def test_names_are_joined_without_what_they_share():
    names = ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"]
    assert join_names(names, "model.layers.0.input_layernorm") == "self_attn.q_proj, k_proj"
    assert join_names(names[:1], "other") == names[0]
    assert join_names(["q", "k"], "norm") == "q, k"
    assert join_names([], "norm") == ""


def test_long_lines_break_between_words():
    line = "warning: " + "word " * 40
    assert wrap_line("short") == "short"
    assert all(len(part) <= 100 for part in wrap_line(line).splitlines())
    assert wrap_line(line).splitlines()[1].startswith("  word")
    assert max(map(len, wrap_line("x" * 250).splitlines())) <= 100


NAME = "model.language_model.decoder.layers.{}.mixture_of_experts.experts.127.down_projection"
WHY = "a reason that is as long as reasons are, about a layer that cannot be quantized; " * 2


def layers(count: int, wild: bool) -> list:
    from ptqkit.hf.quantization.report import LayerReport

    return [
        LayerReport(
            NAME.format(k),
            (128_256 + k * wild, 16_384),
            "skipped: " + WHY if wild and k == 3 else "quantized",
            bits=3 + k * wild % 2,
            group_size=None if wild and k % 2 else 128,
            objective=1.2345e-05 * (k + 1),
            objective_rtn=2.3456e-05 * (k + 1),
            improvement=0.437,
            weight_sqnr_db=-12.3,
            output_sqnr_db=20.1,
            bits_per_weight=3.25 + k * wild,
            activations="8 token <6.5" if wild and k % 2 else "4 tensor",
            damping=0.0123,
            damping_raised=k * wild,
            dead_inputs=12_345 * k * wild,
            tokens=65_536 + k * wild,
            notes=WHY if wild else "",
        )
        for k in range(count)
    ]


def reports() -> dict:
    from types import SimpleNamespace

    import numpy as np

    from ptqkit.hf.diagnostics.report import SensitivityReport, SensitivityRow
    from ptqkit.hf.equalization.fold import Fold, FoldPlan
    from ptqkit.hf.equalization.report import EqualizationReport, EqualizedGroup
    from ptqkit.hf.quantization.report import Report
    from ptqkit.hf.softmax.table import SoftmaxTable, SoftmaxTableRow
    from ptqkit.nn.softmax.report import SoftmaxLayerReport, SoftmaxReport

    seconds = dict.fromkeys(
        ("total", "setup", "hessian", "solve", "diagnostics", "forward"), 1234.5
    )
    consumers = tuple(NAME.format(7).replace("down", n) for n in ("gate", "up", "query"))
    index = np.arange(4)
    group = EqualizedGroup(
        "elementwise", NAME.format(0), list(consumers), 123.4, 0.5, 0.25, 0.12, 9e-5, 1e5, 3, 65_536
    )
    facts = [{"zero_fraction": 0.5, "mean_row_sum": 0.9}] * 3
    found = {
        f"{kind} of {count}": Report(
            layers(count, kind == "wild"),
            schedule="one-pass, then replay",
            schedule_reason=WHY,
            seconds=seconds,
            memory={"peak": 1 << 40},
            recipe={"error_propagation": 0.75},
            warnings=[WHY, NAME * 3],
        )
        for kind in ("plain", "wild")
        for count in (0, 1, 2, 40)
    }
    found["equalization"] = EqualizationReport(
        "smoothquant", 0.5, [group] * 3, {NAME: WHY}, 1e-7, 10**6, 512, seconds, [WHY]
    )
    fold = Fold("norm", NAME.format(1), consumers, index, index)
    found["folds"] = FoldPlan([fold] * 3, {", ".join(consumers): WHY})
    found["softmax"] = SoftmaxReport(
        [
            SoftmaxLayerReport(NAME.format(k), 64, 8, notes=WHY, correction="row_length")
            for k in (1, 2)
        ],
        notes=WHY,
    )
    rows = [SensitivityRow("softmax", NAME.format(k), 1234, 12.3, 0, 456.7) for k in (1, 2)]
    found["sensitivity"] = SensitivityReport(rows, 8, "module", {}, 12.3)
    rows = [SoftmaxTableRow(8, "row_length/head", 12345.6789, 123.4, 0.5, 12.3, 45.6)]
    found["softmax table"] = SoftmaxTable(SimpleNamespace(), {}, rows, {8: facts, 16: facts})
    return found


@pytest.mark.skipif(bool(missing(HF)), reason="reports import the rooms of models")
def test_no_table_is_wider_than_100_columns():
    for name, report in reports().items():
        text = report.table()
        assert max(map(len, text.splitlines())) <= 100, text
        assert "nan" not in text or name == "softmax", text


@pytest.mark.skipif(bool(missing(HF)), reason="sweeps run models")
def test_a_table_of_many_tasks_goes_on_below_itself():
    from ptqkit.sweep.results import _in_parts

    header = [
        "model",
        "W bits",
        "A bits",
        *(f for k in range(9) for f in (f"task {k}", "%")),
        "mean",
    ]
    row = ["GPTQ INT3", "3.25", "16", *["12.345", "+1.23"] * 9, "+1.23"]
    parts = _in_parts([header, row, row], [3, *[2] * 9, 1]).split("\n\n")
    assert len(parts) == 2 and all(part.startswith("model") for part in parts)
    assert max(len(line) for part in parts for line in part.splitlines()) <= 100
    assert sum(part.count("12.345") for part in parts) == 18 and parts[1].count("mean") == 1


def test_a_usual_report_fits_80_columns():
    from ptqkit.hf.quantization.report import LayerReport, Report

    rows = [
        LayerReport(
            f"model.layers.{k}.self_attn.q_proj",
            (4096, 4096),
            bits=4,
            group_size=128,
            objective=0.012345,
            objective_rtn=0.023456,
            improvement=0.437,
            weight_sqnr_db=12.3,
            output_sqnr_db=20.1,
            tokens=65_536,
        )
        for k in range(3)
    ]
    table = Report(rows).table().split("\n\n")[0]
    assert max(map(len, table.splitlines())) <= 80, table


def test_rounding_to_nearest_without_text_shows_no_number_that_was_not_computed():
    from ptqkit.hf.progress import ProgressEvent
    from ptqkit.hf.quantization.report import LayerReport, Report

    text = Report([LayerReport("a", (2, 2), bits=4, bits_per_weight=4.0)]).table()
    assert "nan" not in text and "objective" not in text and "-  -" not in text
    assert "loss" not in str(ProgressEvent("a", 1, 2))
