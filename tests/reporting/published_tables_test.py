"""Published figures as tables: marked, apart by judge, and with what does not follow named."""

import dataclasses

from moe_vlm_jax.reporting import published, published_tables
from tests.reporting.tables_test import cells, heads


def test_published_figures_stand_in_a_table_of_their_own_marked_in_every_head():
    chosen = published.choose(["project_report", "moe_llava"])
    table = published_tables.beside(chosen, ["mmvet", "gqa", "embedded"])
    assert heads(table) == ["model", "activated", "MM-Vet", "MM-Vet", "GQA"]
    assert [head.small for head in table.heads[1:]] == [
        ("published",),
        ("published", "by project report"),
        ("published", "by MoE-LLaVA"),
        ("published",),
    ]
    assert all(section.published for section in table.sections)
    assert cells(table)["GPT-4V"] == ["–", "67.7", "–", "–"]
    assert cells(table)["MoE-LLaVA-2.7Bx4-Top2"] == ["3.6B", "–", "34.3", "61.4"]


def test_what_is_printed_as_not_available_stays_so_and_models_without_a_figure_are_not_there():
    chosen = published.choose(["project_report"])
    assert cells(published_tables.beside(chosen, ["mmbench"]))["GPT-4V"] == ["–", "N/A"]
    assert published_tables.beside(chosen, ["gqa"]) is None
    (stgc,) = published.choose(["stgc_1"])
    assert "Qwen-VL" not in cells(published_tables.beside([stgc], ["docvqa"]))


def test_judged_figures_of_one_named_judge_share_a_published_column():
    (table,) = published.choose(["project_report"])
    judged = dataclasses.replace(table, judges={"mmvet": "gpt-4-0613"})
    other = dataclasses.replace(judged, id="other", short="other")
    assert len(published_tables.beside([judged, other], ["mmvet"]).heads) == 3
    assert len(published_tables.beside([table, dataclasses.replace(table, short="other")], ["mmvet"]).heads) == 4


def test_a_published_row_that_does_not_close_is_named_in_its_table():
    (pope,) = published.choose(["moe_llava_pope"])
    table = published_tables.as_printed(pope)
    assert table.caption == "Published: MoE-LLaVA: POPE by split (average that does not follow: 1)"
    assert "MoE-LLaVA-2.7Bx4-Top2-384 does not close: its cells give 85.2, printed is 85.7." in table.notes
    row = next(row for row in table.sections[0].rows if row.name.startswith("MoE-LLaVA-2.7Bx4-Top2-384"))
    assert [tuple(cell) for cell in row.cells[-2:]] == [("85.7", ""), ("85.2", "≠")]
    closing = [published_tables.as_printed(table) for table in published.tables() if table.id != "moe_llava_pope"]
    assert not any("does not" in text for table in closing for text in (table.caption, *table.notes))
