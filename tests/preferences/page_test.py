"""The annotation page in a real browser: keys reach the file, texts are texts, images are seen."""

import json
import os
import signal
import time

import pytest

from moe_vlm_jax.data import bad_samples
from moe_vlm_jax.preferences import annotate, candidates, marks
from tests import browser as browser_lib
from tests.preferences import examples
from tests.preferences.server_test import Process

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(browser_lib.executable() is None, reason=browser_lib.MISSING),
]

KEYS = {"ArrowLeft": 37, "ArrowRight": 39, "1": 49, "2": 50, "t": 84, "s": 83, "u": 85}
TEXT = "document.querySelector('{}').textContent"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with browser_lib.Browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture
def page(browser, tmp_path):
    """Starts the command on six items, the third with answers that look like HTML, and opens its page."""
    path = examples.write_candidates(tmp_path, 2)
    (tmp_path / "wide.jpg").write_bytes(examples.encoded("JPEG", (900, 300)))
    (tmp_path / "rare.tif").write_bytes(examples.encoded("TIFF", (200, 100)))
    images = (str(tmp_path / "wide.jpg"), str(tmp_path / "rare.tif"))
    with candidates.CandidateWriter(path) as writer:
        writer.append(examples.candidate("q2", examples.NASTY, "&amp; <i>plain</i>", images=images))
        for i in range(3, 6):
            writer.append(examples.candidate(f"q{i}", f"first {i}", f"second {i}"))
    started = []

    def leave():
        """Leaves the page before its server dies; what it complains about then is no fault."""
        browser.open("about:blank")
        browser.wait("document.images.length === 0")
        browser.errors.clear()

    def start(annotator="ana"):
        leave()
        started.append(Process(tmp_path, annotator))
        browser.open(f"http://127.0.0.1:{started[-1].client.port}/")
        browser.wait("typeof view !== 'undefined' && view !== null && !busy")
        return started[-1]

    yield start
    leave()
    for process in started:
        if process.process.poll() is None:
            process.end(signal.SIGKILL)


def press(browser, key, **kwargs):
    browser.press(key, KEYS[key], **kwargs)
    browser.wait("!busy")


def sides(browser):
    return [browser.evaluate(TEXT.format(f"#{side} span")) for side in ("left", "right")]


def held(tmp_path, annotator="ana"):
    return {name: mark.mark for name, mark in marks.read_marks(tmp_path / "m.jsonl").held(annotator).items()}


def test_keys_reach_the_file_and_undo_takes_them_back(browser, page, tmp_path):
    page()
    expected = {}
    for i, key in enumerate(["ArrowLeft", "ArrowRight"]):
        assert browser.evaluate(TEXT.format("#turns")) == f"What is q{i}?"
        assert browser.evaluate(TEXT.format("#count")) == f"{i} of 6"
        expected[f"q{i}"] = sides(browser)[i].split()[0]
        press(browser, key)
        assert held(tmp_path) == expected
    press(browser, "t")
    press(browser, "s")
    assert held(tmp_path) == {**expected, "q2": "tie", "q3": "skip"}
    before = sides(browser)
    press(browser, "1")
    assert held(tmp_path)["q4"] == before[0].split()[0]
    press(browser, "u")
    assert sides(browser) == before
    assert "q4" not in held(tmp_path)
    press(browser, "2")
    assert held(tmp_path)["q4"] == before[1].split()[0]
    press(browser, "t")
    assert "All items are marked" in browser.evaluate(TEXT.format("#report"))
    assert not browser.evaluate("document.querySelector('#left').checkVisibility()")
    press(browser, "u")
    assert browser.evaluate(TEXT.format("#turns")) == "What is q5?"
    assert browser.evaluate("document.querySelector('#left').checkVisibility()")
    rows = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert [row["mark"] for row in rows].count("undo") == 2
    assert all(0 <= row["seconds"] < 60 for row in rows)
    assert browser.errors == []


def test_buttons_do_what_keys_do(browser, page, tmp_path):
    page()
    left = sides(browser)[0]
    assert browser.evaluate("document.querySelector('#undo').disabled")
    for button, done in (("left", 1), ("skip", 2), ("undo", 1), ("tie", 2)):
        browser.evaluate(f"document.querySelector('#{button}').click()")
        browser.wait(f"!busy && view.done === {done}")
    assert held(tmp_path) == {"q0": left.split()[0], "q1": "tie"}


@pytest.mark.slow
def test_the_order_is_random_but_remembered(browser, page, tmp_path):
    seen = {}
    for annotator in ("ana", "ben", "ana"):
        running = page(annotator)
        shown = []
        for _ in range(6):
            shown.append(sides(browser))
            press(browser, "t")
        for _ in range(6):
            press(browser, "u")
        running.end(signal.SIGKILL)
        assert seen.setdefault(annotator, shown) == shown
    assert seen["ana"] != seen["ben"]
    assert [sorted(pair) for pair in seen["ana"]] == [sorted(pair) for pair in seen["ben"]]
    found = candidates.read_candidates(tmp_path / "c.jsonl", bad_samples.BadSamples("error"))
    for annotator, shown in seen.items():
        swapped = [pair[0] == candidate.responses[1] for pair, candidate in zip(shown, found, strict=True)]
        assert swapped == [annotate.second_is_left(candidate.id, annotator) for candidate in found]
        assert len(set(swapped)) == 2


def test_images_are_seen_and_html_in_answers_is_text(browser, page, tmp_path):
    page()
    size = "(i => i.complete && i.naturalWidth > 0 && [i.naturalWidth, i.naturalHeight, i.width])"
    assert browser.wait(f"{size}(document.images[0])")[:2] == [64, 48]
    browser.wait("document.images[0].width > 300")  # tiny ones are enlarged
    press(browser, "t")
    press(browser, "t")
    assert browser.evaluate("document.images.length") == 2
    wide = browser.wait(f"{size}(document.images[0])")
    assert wide[:2] == [900, 300]
    assert 0 < wide[2] <= 900
    assert browser.wait(f"{size}(document.images[1])")[:2] == [200, 100]  # a TIFF, which browsers do not show
    assert sorted(sides(browser)) == sorted([examples.NASTY, "&amp; <i>plain</i>"])
    assert browser.evaluate("document.title") == "Which answer is better?"
    assert browser.evaluate("document.querySelectorAll('.answers i, .answers b, .answers script').length") == 0
    assert browser.errors == []


def test_a_held_key_or_a_shortcut_marks_nothing_more(browser, page, tmp_path):
    page()
    press(browser, "t", held=True)
    browser.wait("!busy")
    assert held(tmp_path) == {"q0": "tie"}
    for modifier in (1, 2, 4):  # Alt, Ctrl, Meta: Alt + left arrow goes back in a browser
        press(browser, "s", modifiers=modifier)
    browser.press("x", 88)
    assert held(tmp_path) == {"q0": "tie"}


def test_two_keys_at_once_mark_one_item(browser, page, tmp_path):
    page()
    keys = "for (const key of ['t', 's', '1']) document.dispatchEvent(new KeyboardEvent('keydown', { key }))"
    browser.evaluate(keys)
    browser.wait("!busy")
    time.sleep(0.3)  # a second request would have been answered by now
    assert browser.evaluate("performance.getEntriesByName(location.origin + '/mark').length") == 1
    assert browser.evaluate(TEXT.format("#message")) == ""
    assert held(tmp_path) == {"q0": "tie"}


def test_a_server_that_died_is_said_and_nothing_counts_as_marked(browser, page, tmp_path):
    running = page()
    press(browser, "t")
    running.end(signal.SIGKILL)
    press(browser, "s")
    assert "Nothing was saved" in browser.evaluate(TEXT.format("#message"))
    assert browser.evaluate(TEXT.format("#turns")) == "What is q1?"
    assert held(tmp_path) == {"q0": "tie"}
    page()
    assert browser.evaluate(TEXT.format("#turns")) == "What is q1?"
    press(browser, "s")
    assert held(tmp_path) == {"q0": "tie", "q1": "skip"}


def test_a_second_window_that_is_behind_says_so_and_catches_up(browser, page, tmp_path):
    running = page()
    assert running.client.post("/mark", {"item": "q0", "choice": "skip", "seconds": 1})[0] == 200
    press(browser, "t")
    assert "was marked before" in browser.evaluate(TEXT.format("#message"))
    assert browser.evaluate(TEXT.format("#turns")) == "What is q1?"
    assert held(tmp_path) == {"q0": "skip"}


def test_an_image_that_is_gone_is_said(browser, page, tmp_path):
    os.truncate(tmp_path / "0.png", 0)
    (tmp_path / "1.png").unlink()
    (tmp_path / "1.png").write_text("gone")
    page()
    for key in ("t", "u"):
        browser.wait("document.querySelector('#images').textContent.includes('cannot be shown')")
        assert browser.evaluate(TEXT.format("#message")) == ""
        press(browser, key)
