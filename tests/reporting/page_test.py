"""The page of a report: self-contained, escaped, pictures within limits, and its filters in a real browser."""

import base64
import dataclasses
import hashlib
import io
import re

import pytest
from PIL import Image

from moe_vlm_jax.reporting import folders, page
from moe_vlm_jax.reporting.layout import Cell, Head, Row, Section, Table
from tests import browser as browser_lib
from tests.evaluation.page_test import Reader
from tests.reporting import examples

NASTY = (
    "</script><script>document.title = 'gone'</script><img src=x onerror=\"document.title='gone'\"> & \"<b>'x'</b>\""
)


def write(found, *, num_cases=9, max_images=9, tables=(), folded=(), title="A & B", note="n") -> str:
    return page.document(
        title=title,
        note=note,
        tables=tables,
        folded=folded,
        found=found,
        num_cases=num_cases,
        max_images=max_images,
    )


def said(text: str) -> str:
    reader = Reader(text)
    return " ".join(" ".join(reader.texts).split())


def image(url: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


def test_a_case_shows_every_models_answer_with_its_verdict(tmp_path):
    text = said(write(examples.three_models(tmp_path)))
    assert (
        "What is the maximum forward current of the LED? MM-Vet test · led · domain: electrical · capability: rec · "
        "capability: ocr gold 20 mA baseline The LED is designed to support a maximum forward current of 20A ✗ wrong "
        "wrong unit repeats the question sft The LED can support a maximum forward current of 20 mA. "
        "◐ in part (score 0.50) same quantity repeats the question dpo 20mA ✓ right same quantity"
    ) in text
    assert "Cases (31 of 134 questions)" in text


def test_options_and_answers_that_nobody_scored_are_said(tmp_path):
    line = examples.row("a", None, options={"A": "<red>", "B": "blue"}, answers=[], prediction="")
    folder = examples.write(tmp_path / "a", {"gqa": (examples.benchmark(None, 1, title="GQA"), [line])})
    assert "options A. <red> B. blue a nothing ? not scored" in said(write(folders.read(str(folder))))


def nasty_models(tmp_path):
    """Returns two models with markup in every text that a folder of results can have."""
    lines = [
        examples.row(
            f"{NASTY}{i}",
            float(i),
            asked=NASTY,
            question=NASTY,
            answers=[NASTY],
            options={NASTY: NASTY},
            prediction=NASTY,
            images=[NASTY],
            group={NASTY: [NASTY]},
            unit=NASTY,
        )
        for i in range(2)
    ]
    figures = examples.benchmark(
        50.0, 2, title=NASTY, rule=NASTY, label=NASTY, split=NASTY, metric=NASTY, scores={NASTY: {NASTY: NASTY}}
    )
    head = examples.manifest() | {"device": NASTY}
    folder = examples.write(tmp_path / "a", {"gqa": (figures, lines)}, head)
    (first,) = folders.read(str(folder))
    return [dataclasses.replace(first, name=f"{NASTY}{i}") for i in range(2)]


def nasty_table() -> Table:
    rows = [Row(NASTY, [Cell(NASTY, NASTY)])]
    return Table(
        NASTY, [Head(NASTY, (NASTY,)), Head(NASTY)], [Section(NASTY, rows, published=True)], [NASTY], texts=(0,)
    )


def test_every_text_is_escaped(tmp_path):
    text = write(nasty_models(tmp_path), tables=[nasty_table()], folded=[nasty_table()], title=NASTY, note=NASTY)
    reader = Reader(text)
    assert NASTY not in text
    assert not re.search(r"<b>'x'|onerror=\"document|<script>document", text)
    assert len(reader.all("script")) == 1
    assert not reader.all("img")
    assert not [attrs for _, attrs in reader.elements if any(name.startswith("on") for name in attrs)]
    assert sum(found.count(NASTY) for found in reader.texts) > 40


def test_nothing_is_loaded_and_only_the_one_script_may_run(tmp_path):
    text = write(examples.three_models(tmp_path))
    reader = Reader(text)
    assert "://" not in text
    assert not reader.all("link") + reader.all("iframe")
    (policy,) = [attrs["content"] for attrs in reader.all("meta") if "http-equiv" in attrs]
    script = text.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def test_a_page_without_cases_has_no_script(tmp_path):
    text = write(examples.three_models(tmp_path), num_cases=0)
    assert not Reader(text).all("script")
    assert "script-src" not in text


def test_a_picture_is_there_once_and_small(tmp_path):
    reader = Reader(write(examples.three_models(tmp_path)))
    (picture,) = reader.all("img")  # of led and chip, for all three models
    assert image(picture["src"]).size == (320, 107)


def test_a_photograph_is_stored_as_jpeg_and_a_drawing_as_png(tmp_path):
    found = examples.three_models(tmp_path)[:1]
    assert Reader(write(found)).all("img")[0]["src"].startswith("data:image/png")
    Image.effect_noise((500, 400), 90).save(tmp_path / "baseline" / "mmvet" / "images" / "led.png")
    assert Reader(write(found)).all("img")[0]["src"].startswith("data:image/jpeg")


def test_pictures_beyond_the_limit_are_counted(tmp_path):
    text = write(examples.three_models(tmp_path), max_images=0)
    assert not Reader(text).all("img")
    assert "1 pictures are not embedded: there are more than max_images=0." in said(text)
    assert "picture not embedded" in said(text)


def test_pictures_that_cannot_be_read_are_counted_and_named(tmp_path, caplog):
    found = examples.three_models(tmp_path)[:1]
    path = tmp_path / "baseline" / "mmvet" / "images" / "led.png"
    path.write_bytes(b"no picture")
    text = said(write(found))
    assert f"1 cannot be read, the first is {path}: cannot identify image file" in text
    assert "picture cannot be read" in text
    path.unlink()
    assert "No such file or directory" in said(write(found))
    assert str(path) in caplog.text


def test_a_picture_that_one_model_lacks_is_taken_from_another(tmp_path):
    found = examples.three_models(tmp_path)
    (tmp_path / "baseline" / "mmvet" / "images" / "led.png").unlink()
    reader = Reader(write([found[0], dataclasses.replace(found[1], find_images=lambda answer: ())]))
    assert not reader.all("img")
    questions = next(iter(found[0].answers))
    none = tuple(dataclasses.replace(answer, images=()) for answer in found[0].answers[questions])
    first = dataclasses.replace(found[0], answers=found[0].answers | {questions: none})
    assert len(Reader(write([first, found[1]])).all("img")) == 1


VISIBLE = "[...document.querySelectorAll('{}')].filter(e => e.checkVisibility()).length"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with browser_lib.Browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def choose(browser, name: str, text: str) -> int:
    """Chooses the option that begins with a text, as a user does, and returns how many cases show."""
    browser.evaluate(
        f"(() => {{ const s = document.querySelector('select[name={name}]');"
        f" s.value = [...s.options].find(o => o.text.startsWith({text!r})).value;"
        " s.dispatchEvent(new Event('input', {bubbles: true})); })()"
    )
    return browser.evaluate(VISIBLE.format("#cases li"))


@pytest.mark.browser
@pytest.mark.skipif(browser_lib.executable() is None, reason=browser_lib.MISSING)
def test_filters_show_the_cases_that_fit_in_a_real_browser(browser, tmp_path):
    (tmp_path / "page.html").write_text(write(examples.three_models(tmp_path / "x")), encoding="utf-8")
    browser.errors.clear()
    browser.open((tmp_path / "page.html").as_uri())
    browser.wait("document.readyState === 'complete'")
    assert browser.evaluate(VISIBLE.format("#cases li")) == 31
    assert choose(browser, "benchmark", "MM-Vet") == 4
    assert browser.evaluate("document.getElementById('shown').textContent") == "4 of 31 cases"
    assert choose(browser, "tag", "domain: electrical") == 2
    assert browser.evaluate(VISIBLE.format("#cases article")) == 1
    assert choose(browser, "kind", "a wrong unit") == 1
    assert choose(browser, "tag", "domain: thermal") == 0
    assert browser.evaluate(VISIBLE.format("#cases article")) == 0
    assert choose(browser, "kind", "all") == 1
    assert choose(browser, "tag", "all") == 4
    browser.evaluate(
        "(() => { const i = document.querySelector('input'); i.value = 'NE555';"
        " i.dispatchEvent(new Event('input', {bubbles: true})); })()"
    )
    assert browser.evaluate(VISIBLE.format("#cases li")) == 1
    assert browser.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
    assert browser.errors == []


@pytest.mark.browser
@pytest.mark.skipif(browser_lib.executable() is None, reason=browser_lib.MISSING)
def test_markup_in_texts_does_nothing_in_a_real_browser(browser, tmp_path):
    text = write(
        nasty_models(tmp_path / "x"), tables=[nasty_table()], folded=[nasty_table()], title="A & B", note=NASTY
    )
    (tmp_path / "page.html").write_text(text, encoding="utf-8")
    browser.errors.clear()
    browser.open((tmp_path / "page.html").as_uri())
    browser.wait("document.readyState === 'complete'")
    assert browser.evaluate("document.title") == "A & B"
    assert browser.evaluate("document.querySelectorAll('script').length") == 1
    assert choose(browser, "tag", NASTY) == 2
    assert browser.errors == []


@pytest.mark.browser
@pytest.mark.skipif(browser_lib.executable() is None, reason=browser_lib.MISSING)
def test_the_policy_stops_a_script_that_is_not_the_pages_own(browser, tmp_path):
    text = write(examples.three_models(tmp_path / "x")).replace(
        "</h1>", "</h1><script>document.title = 'gone'</script>"
    )
    (tmp_path / "page.html").write_text(text, encoding="utf-8")
    browser.errors.clear()
    browser.open((tmp_path / "page.html").as_uri())
    browser.wait("document.readyState === 'complete'")
    assert browser.evaluate("document.title") == "A & B"
    assert any("Content Security Policy" in error for error in browser.errors)


@pytest.mark.browser
@pytest.mark.skipif(browser_lib.executable() is None, reason=browser_lib.MISSING)
@pytest.mark.parametrize("width", [1200, 390])
def test_nothing_is_wider_than_the_window(browser, tmp_path, width):
    (tmp_path / "page.html").write_text(write(nasty_models(tmp_path / "x"), tables=[nasty_table()]), encoding="utf-8")
    browser.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
    browser.open((tmp_path / "page.html").as_uri())
    browser.wait("document.readyState === 'complete'")
    assert browser.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
