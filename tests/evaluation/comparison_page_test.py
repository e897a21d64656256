"""The page of a comparison: all runs' answers side by side, what is shown first, and the filter in a real browser."""

import dataclasses
import re

import pytest
from PIL import Image

from moe_vlm_jax.data import records as records_lib
from moe_vlm_jax.evaluation import comparison_page
from tests import browser as browser_lib
from tests.evaluation.comparison_test import led_runs, prediction
from tests.evaluation.page_test import Reader

NASTY = "<script>document.title = 'gone'</script> & \"<b>x</b>\""


def record(row: dict, image: str) -> records_lib.Record:
    turns = (records_lib.Turn("human", f"<image>\n{row['question']}"),)
    return records_lib.Record(row["id"], (image,), turns, tuple(row["answers"]), row["answer_type"])


def load_image(ref: str) -> Image.Image:
    return Image.new("RGB", (60, 40), {"sheet": (200, 30, 30), "chart": (30, 30, 200)}[ref])


@pytest.fixture
def write(tmp_path):
    """Writes the page of runs, the first two questions about one image, and returns its text."""

    def write(runs=None, num_samples=9, **changes):
        runs = runs or led_runs()
        first = next(iter(runs.values()))
        records = [record(row, "sheet" if i < 2 else "chart") for i, row in enumerate(first)]
        unasked = [dataclasses.replace(records[0], id="another")]
        arguments = {"title": "A & B", "note": NASTY, "records": unasked + records, **changes}
        comparison_page.write_comparison(
            tmp_path / "page.html", runs=runs, num_samples=num_samples, load_image=load_image, **arguments
        )
        assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
        return (tmp_path / "page.html").read_text(encoding="utf-8")

    return write


def said(text: str) -> str:
    return " ".join(" ".join(Reader(text).texts).split())


def test_the_table_has_a_row_for_each_run_with_the_difference_to_the_first(write):
    text = said(write())
    assert (
        "in small type the difference to before sft run questions exact match ANLS (VLMEvalKit) words per answer"
        in text
    )
    assert "all before sft 4 0.000 0.0" in text
    assert "dpo 4 0.750 +0.750" in text
    assert "1.25 -2.25 0.000 -0.250 0 -1 image-span before sft 2 0.000" in text


def test_a_case_shows_every_answer_with_its_score_its_unit_and_what_is_wordy(write):
    text = said(write())
    assert (
        "What is the maximum forward current of the LED? image-span gold 20 mA "
        "before sft The LED is designed to support a maximum forward current of 20A ✗ wrong wrong unit "
        "repeats the question sft The LED can support a maximum forward current of 20 mA. ✗ wrong same quantity "
        "repeats the question dpo 20 mA ✓ right same quantity"
    ) in text
    assert "What is the sum? non-extractive gold 4 before sft nothing ✗ wrong cut off sft it is 4 ✗ wrong dpo 4" in text
    assert "gold red or Red before sft blue ✗ wrong sft red ✓ right" in text


def test_every_text_is_escaped_and_nothing_is_loaded_or_run(write):
    runs = {
        f"{NASTY}{i}": [
            prediction(NASTY, f"{NASTY}{i}", question=NASTY, answers=(NASTY,), kind=NASTY),
            prediction("other", "4", kind=f"{NASTY}2"),
        ]
        for i in range(2)
    }
    text = write(runs, title=NASTY)
    reader = Reader(text)
    assert not reader.all("script") + reader.all("link") + reader.all("iframe")
    assert NASTY not in text
    assert "<b>x" not in text
    assert "://" not in text
    # Two titles, note, caption; the table's two types and three times two names; two buttons; two cases with type and
    # names, one of them with question, accepted answer and two answers.
    assert sum(found.count(NASTY) for found in reader.texts) == 2 + 1 + 1 + 2 + 6 + 2 + 6 + 4
    sources = [attrs["src"] for attrs in reader.all("img")]
    assert sources
    assert all(source.startswith("data:image/png;base64,") for source in sources)


def cases(**kinds_and_answers):
    """Returns cases by id, of the kind before the first underscore: one answer of each run; 'right' is accepted."""
    return [
        {
            f"run {i}": prediction(name, text, answers=("right",), kind=name.split("_")[0])
            for i, text in enumerate(texts)
        }
        for name, texts in kinds_and_answers.items()
    ]


def names(chosen) -> list[str]:
    return [case["run 0"]["id"] for case in chosen]


def test_cases_with_most_different_answers_come_first_then_those_with_different_scores():
    found = cases(
        x_same=("right", "right", "right"),
        x_case=("a", "A", " a"),
        x_wrong=("a", "a", "b"),
        x_near=("rigt", "a", "a"),
        x_two=("a", "right", "right"),
        x_three=("a", "b", "c"),
        x_best=("a", "b", "right"),
    )
    assert names(comparison_page.choose_cases(found, 9)) == [
        *("x_best", "x_three", "x_two", "x_near", "x_wrong", "x_same", "x_case")
    ]
    assert names(comparison_page.choose_cases(found, 2)) == ["x_best", "x_three"]
    assert comparison_page.choose_cases(found, 0) == []


def test_every_answer_type_gets_as_many_cases_as_it_has():
    found = cases(
        a_1=("a", "right"), a_2=("a", "right"), a_3=("a", "right"), b_1=("a", "b"), b_2=("a", "a"), c_1=("a", "a")
    )
    assert names(comparison_page.choose_cases(found, 3)) == ["a_1", "b_1", "c_1"]
    assert names(comparison_page.choose_cases(found, 5)) == ["a_1", "a_2", "b_1", "b_2", "c_1"]
    assert names(comparison_page.choose_cases(found, 6)) == ["a_1", "a_2", "a_3", "b_1", "b_2", "c_1"]


def test_cases_about_one_image_stand_beside_it_once(write):
    reader = Reader(write())
    assert len(reader.all("img")) == len(reader.all("article")) == 2
    assert len(reader.all("li")) == 4
    assert "Cases (4 of 4 questions)" in said(write())
    fewer = write(num_samples=2)
    assert "Cases (2 of 4 questions)" in said(fewer)
    assert len(Reader(fewer).all("article")) == 2  # one of each type
    assert "Cases (0 of 4 questions)" in said(write(num_samples=0))


def test_one_answer_type_has_no_filter(write):
    assert not Reader(write({name: rows[:2] for name, rows in led_runs().items()})).all("input")


def test_runs_that_cannot_be_compared_and_missing_records_leave_no_page(write, tmp_path):
    runs = led_runs()
    runs["dpo"].pop()
    with pytest.raises(ValueError, match="'dpo' and 'before sft' were asked different questions: 1 only the latter"):
        write(runs)
    with pytest.raises(ValueError, match=re.escape("4 of 4 questions are not among the 0 records (e.g. 'led'); ")):
        write(records=[])
    assert not list(tmp_path.iterdir())


@pytest.mark.browser
@pytest.mark.skipif(browser_lib.executable() is None, reason=browser_lib.MISSING)
def test_the_filter_hides_other_types_in_a_real_browser(write, tmp_path, tmp_path_factory):
    runs = led_runs()
    runs["dpo"][1]["prediction"] = NASTY
    runs["dpo"][1]["answer_type"] = runs["sft"][1]["answer_type"] = runs["before sft"][1]["answer_type"] = NASTY
    write(runs)
    visible = "[...document.querySelectorAll('{}')].filter(e => e.checkVisibility()).length"
    with browser_lib.Browser(tmp_path_factory.mktemp("profile")) as browser:
        browser.open((tmp_path / "page.html").as_uri())
        browser.wait("document.readyState === 'complete'")
        assert browser.evaluate("document.title") == "A & B"
        assert browser.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
        labels = browser.evaluate("[...document.querySelectorAll('label')].map(label => label.textContent)")
        assert labels == ["all (4)", f"{NASTY} (1)", "image-span (1)", "non-extractive (2)"]
        for number, (articles, questions) in enumerate([(2, 4), (1, 1), (1, 1), (1, 2), (2, 4)]):
            browser.evaluate(f"document.querySelectorAll('label')[{number % 4}].click()")
            assert browser.evaluate(visible.format("article")) == articles
            assert browser.evaluate(visible.format("li")) == questions
        assert browser.evaluate("document.querySelectorAll('script').length") == 0
        assert browser.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        assert browser.errors == []
