"""Published tables: their printed averages follow from their printed cells, and what does not is named."""

from decimal import Decimal

import pytest

from moe_vlm_jax.reporting import published

# Every row of which a paper's own table prints an average that its cells do not give.
OPEN = {("moe_llava_pope", "MoE-LLaVA-2.7Bx4-Top2-384")}
# MME's column would make these thousands; the founding checklist names them.
NAMED = {
    ("stgc_2", "MoE-LLaVA-4-Top-1", "StableLM-1.6B"): "53.5",
    ("stgc_2", "MoE-LLaVA-4-Top-2", "StableLM-1.6B"): "57.3",
    ("stgc_2", "MoE-LLaVA-4-Top-2", "Phi-2 2.7B"): "61.1",
    ("stgc_2", "MoE-LLaVA-4-Top-2, SigLIP", "Phi-2 2.7B"): "62.9",
    ("stgc_2", "MoE-LLaVA-4-Top-2, SigLIP + STGC", "Phi-2 2.7B"): "63.5",
    ("stgc_5", "MoE-LLaVA-4-Top-2, SigLIP, 1021K + STGC", "Phi-2 2.7B"): "64.9",
    ("stgc_1", "STGC, SigLIP", "Phi-2 2.7B"): "61.0",
    ("stgc_1", "MoE-LLaVA", "Phi-2 2.7B"): "53.5",
}
AVERAGED = [(table, row) for table in published.tables() for row in table.rows if row.average is not None]


@pytest.mark.parametrize(("table", "row"), AVERAGED, ids=[f"{t.id}-{r.model}-{r.language_model}" for t, r in AVERAGED])
def test_the_printed_average_is_the_mean_of_the_printed_cells(table, row):
    mean = sum(Decimal(dict(zip(table.columns, row.cells, strict=True))[name].rstrip("*")) for name in table.average_of)
    mean /= len(table.average_of)
    differs = abs(mean - Decimal(row.average)) > Decimal("0.05")
    assert differs == ((table.id, row.model) in OPEN)
    assert published.closes(table, row) != differs


def test_the_averages_of_the_checklist_are_reproduced_without_mme():
    found = {(t.id, r.model, r.language_model): (t, r) for t, r in AVERAGED}
    for name, printed in NAMED.items():
        table, row = found[name]
        assert (str(published.average(table, row)), row.average) == (printed, printed)
        assert "mme" in table.columns
        assert "mme" not in table.average_of
        assert len(table.average_of) == len(table.columns) - 1


def test_every_table_with_averages_was_checked():
    assert len(AVERAGED) == 5 + 5 + 5 + 8 + 4
    assert {table.id for table, _ in AVERAGED} == {
        *("moe_llava_pope", "moe_llava_readme", "stgc_1", "stgc_2", "stgc_5")
    }


def test_a_mean_between_two_printed_ones_is_rounded_up_as_the_paper_does():
    table = next(table for table in published.tables() if table.id == "stgc_2")
    row = table.rows[3]
    assert row.average == "58.0"
    assert published.average(table, row) == Decimal("58.0")  # the cells give 57.95 exactly


def test_a_row_that_lacks_a_cell_has_no_average():
    table = next(table for table in published.tables() if table.id == "stgc_1")
    row = next(row for row in table.rows if row.model == "Qwen-VL")
    assert published.average(table, row) is None
    assert published.closes(table, row)


def test_the_project_reports_table_is_as_printed():
    (table,) = published.choose(["project_report"])
    assert table.columns == ("mmbench", "mmvet", "llavabench")
    assert [(row.model, *row.cells) for row in table.rows] == [
        ("Baseline", "65.2", "34.3", "94.1"),
        ("SFT", "68.7", "66.2", "73.8"),
        ("DPO", "67.6", "64.9", "75.5"),
        ("GPT-4V", "N/A", "67.7", "N/A"),
        ("Gemini Pro Vision", "73.6", "64.3", "N/A"),
    ]


def test_rows_that_two_tables_print_agree():
    """The last row of STGC's first table is the 1021K row of its fifth; a misprint here would show."""
    tables = {table.id: table for table in published.tables()}
    assert tables["stgc_1"].rows[-1].cells[:9] == tables["stgc_5"].rows[-1].cells
    assert tables["stgc_2"].rows[-2].cells == tables["stgc_5"].rows[0].cells
    paper, readme = tables["moe_llava"], tables["moe_llava_readme"]
    differing = {
        (a.model, name, dict(zip(paper.columns, a.cells, strict=True))[name], cell)
        for a, b in zip(paper.rows, readme.rows, strict=True)
        for name, cell in zip(readme.columns, b.cells, strict=True)
        if dict(zip(paper.columns, a.cells, strict=True))[name] != cell
    }
    assert differing == {
        ("MoE-LLaVA-1.6Bx4-Top2", "mme", "1318.2", "1318.1"),
        ("MoE-LLaVA-1.8Bx4-Top2", "mmbench", "59.7", "59.6"),
    }


def test_every_figure_is_a_number_and_every_table_has_a_source_and_whole_rows():
    for table in published.tables():
        assert table.source
        assert set(table.judges) | set(table.average_of) <= set(table.columns)
        for row in table.rows:
            assert len(row.cells) == len(table.columns)
            assert all(cell in (None, "N/A") or published.number(cell) > 0 for cell in row.cells)


def test_an_unknown_table_is_refused_with_the_known_ones():
    with pytest.raises(
        ValueError, match=r"no published table 'stgc'; use one of project_report, moe_llava, .*, or none"
    ):
        published.choose(["moe_llava", "stgc"])
