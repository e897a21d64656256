"""Markdown: tables that stay tables whatever is in their cells."""

from moe_vlm_jax.reporting import markdown
from moe_vlm_jax.reporting.layout import Cell, Head, Row, Section, Table, figure

NASTY = "a|b\n<script>x</script> [y](z) `c` *d* & ~e~ | \\"

TABLE = Table(
    "Caption | *",
    [Head("model"), Head("POPE", ("F1", NASTY)), Head("of")],
    [
        Section("", [Row(NASTY, [Cell("86.3", NASTY), Cell(NASTY)])]),
        Section("theirs", [Row("x", [Cell("1"), Cell("2")])], published=True),
    ],
    notes=[NASTY],
    texts=(1,),
)


def columns(line: str) -> int:
    return line.replace("\\\\", "").replace("\\|", "").count("|")


def test_every_line_of_a_table_has_as_many_columns_as_its_head():
    lines = [line for line in markdown.render(TABLE).splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 1 + 2
    assert [columns(line) for line in lines] == [4] * 5
    assert lines[1] == "| --- | ---: | --- |"
    assert lines[3] == "| **theirs** |  |  |"


def test_no_text_becomes_html_or_markdown():
    text = markdown.document(title=NASTY, note=NASTY, tables=[TABLE])
    assert "\\<script\\>" in text
    for mark in ("<script", "](", "`c`", "*d*", "~e~"):
        assert mark not in text.replace("\\<", "").replace("\\]", "").replace("\\`", "").replace("\\*", "").replace(
            "\\~", ""
        )
    assert text.count("\n#") == 1  # the title is the first line
    assert text.startswith("# a\\|b ")


def test_a_text_stays_in_one_line():
    assert markdown.escape("a\n\n# b\r\u2028c\n- d") == "a \\# b c - d"


def test_a_figure_has_one_decimal_and_no_minus_for_nothing():
    assert [figure(x) for x in (-0.04, 86.25, 1423.0, None)] == ["0.0", "86.2", "1423.0", "–"]
    assert [figure(x, signed=True) for x in (-0.04, 2.0, -2.0)] == ["+0.0", "+2.0", "-2.0"]
