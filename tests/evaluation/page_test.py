"""The HTML page: complete, self-contained, escaped."""

import base64
import html.parser
import io

import pytest
from PIL import Image

from moe_vlm_jax.data import records as records_lib
from moe_vlm_jax.evaluation import page, scorers

NASTY = "<script>alert('&')</script> \"{x}\""


class Reader(html.parser.HTMLParser):
    """Collects the elements and texts of a page and checks that they nest."""

    VOID = frozenset({"meta", "img", "br", "link", "input"})

    def __init__(self, text: str):
        super().__init__()
        self.open, self.elements, self.texts = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, tag: str) -> list[dict]:
        return [attrs for name, attrs in self.elements if name == tag]


def record(i: int, image: str, question: str = "What?", answers: tuple = ("4",)) -> records_lib.Record:
    turns = (records_lib.Turn("human", f"<image>\n{question}"), records_lib.Turn("gpt", answers[0]))
    return records_lib.Record(id=f"q{i}", images=(image,), turns=turns, answers=answers, answer_type="image-span")


def prediction(of: records_lib.Record, text: str) -> dict:
    question = of.turns[0].text.removeprefix("<image>\n")
    right = float(text in of.answers)
    return {"id": of.id, "question": question, "prediction": text, "exact_match": right, "anls": right or 0.5}


def load_image(ref: str) -> Image.Image:
    return Image.new("RGBA" if ref == "alpha" else "RGB", (900, 300) if ref == "wide" else (64, 48), (200, 30, 30))


@pytest.fixture
def written(tmp_path):
    records = [
        record(0, "small"),
        record(1, "small", NASTY, (NASTY, "second", "second")),
        record(2, "wide"),
        record(3, "alpha"),
    ]
    texts = ["4", NASTY + "!", "", "5"]
    scores = scorers.Scores(0.25, 0.5, 4, {"image-span": scorers.Scores(0.25, 0.5, 4)})

    def write(num_samples=4, before=True, ids=slice(None)):
        after = [prediction(r, text) for r, text in zip(records, texts, strict=True)][ids]
        page.write_page(
            tmp_path / "page.html",
            title="A & B",
            note=NASTY,
            records=records,
            after=after,
            before=[prediction(r, "zero") for r in records] if before else None,
            results={"before": scores, "after": scores} if before else {"after": scores},
            num_samples=num_samples,
            load_image=load_image,
        )
        assert [p.name for p in tmp_path.iterdir()] == ["page.html"]
        return (tmp_path / "page.html").read_text(encoding="utf-8")

    return write


def test_the_page_shows_questions_gold_and_both_answers_marked_in_words(written):
    text = written()
    reader = Reader(text)
    said = " ".join(" ".join(reader.texts).split())
    assert len(reader.all("article")) == 3
    assert len(reader.all("li")) == 4
    assert "What? image-span gold 4 before zero ✗ wrong (ANLS 0.50) after 4 ✓ right" in said
    assert "after nothing ✗ wrong" in said
    assert said.count("✓ right") == 1
    assert said.count("✗ wrong") == 7
    assert f"gold {NASTY} or second before" in said  # each accepted answer once


def test_every_text_is_escaped_and_nothing_is_loaded_from_elsewhere(written):
    text = written()
    reader = Reader(text)
    assert not reader.all("script") + reader.all("link") + reader.all("iframe")
    assert NASTY not in text
    assert sum(NASTY in t for t in reader.texts) == 4  # note, question, gold, trained
    sources = [attrs["src"] for attrs in reader.all("img")]
    assert len(sources) == 3
    sizes = [Image.open(io.BytesIO(base64.b64decode(s.removeprefix("data:image/png;base64,")))).size for s in sources]
    assert sizes == [(384, 288), (440, 147), (384, 288)]
    assert all(attrs["alt"] for attrs in reader.all("img"))
    assert "://" not in text


def test_samples_are_whole_images_spread_over_the_split(written):
    assert len(Reader(written(num_samples=2)).all("article")) == 2
    assert "Samples (3 of 4 questions)" in written(num_samples=2)
    assert not Reader(written(num_samples=0)).all("article")


def test_only_asked_records_appear_and_the_untrained_answers_may_be_missing(written):
    text = written(before=False, ids=slice(2, 3))
    assert "<dt>before" not in text
    assert len(Reader(text).all("article")) == 1
