"""Pieces of pages: what is escaped, what is left out."""

from PIL import Image

from moe_vlm_jax.evaluation import markup
from tests.evaluation.page_test import NASTY, Reader


def test_attributes_of_a_question_are_escaped():
    text = markup.question(NASTY, NASTY, [(NASTY, markup.marked(NASTY, NASTY, "right", [NASTY]))], data={"tag": NASTY})
    reader = Reader(text)
    assert NASTY not in text
    assert reader.all("li") == [{"data-tag": NASTY}]
    assert not reader.all("script")


def test_questions_without_a_picture_have_no_room_for_one():
    assert not Reader(markup.card_of([], ["<li></li>"])).all("figure")
    assert len(Reader(markup.card_of([markup.picture("data:,")], ["<li></li>"])).all("figure")) == 1


def test_a_page_without_a_script_lets_none_run():
    text = markup.document(title="t", note="n", style="", body="")
    assert "script" not in text
    assert "script-src 'sha256-" in markup.document(title="t", note="n", style="", body="", script="1;")


def test_a_thumbnail_keeps_the_ratio_and_small_pictures_their_pixels():
    small = markup.thumbnail(Image.effect_noise((20, 10), 90), side=100)
    large = markup.thumbnail(Image.effect_noise((400, 200), 90), side=100)
    assert small.startswith("data:image/")
    assert large.startswith("data:image/jpeg;base64,")
