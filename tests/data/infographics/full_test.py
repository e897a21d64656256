import collections
import hashlib
import itertools
import json
import os
import pathlib
import random
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from moe_vlm_jax import config as config_lib
from moe_vlm_jax.data import bad_samples, infographicvqa
from moe_vlm_jax.data.infographics import canvas, charts, embedded, full, layouts, questions, tables
from tests.data.infographics import recomputed

SEED = 11


@pytest.fixture(scope="module")
def pages() -> list[tuple[str, layouts.Drawn, tuple[questions.Question, ...]]]:
    return [(split, *full.draw_page(split, SEED, i)) for split in full.DATASETS for i in range(16)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("full")
    full.render_split(folder, seed=SEED, count=4, split="train")
    return folder


def digests(folder: pathlib.Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_six_images_render_within_ten_seconds(tmp_path):
    start = time.perf_counter()
    full.render_split(tmp_path, seed=SEED + 1, count=6, split="val")
    assert time.perf_counter() - start < 10  # measured: 0.8 s
    assert len(list((tmp_path / "images").iterdir())) == 6


def test_the_same_seed_gives_the_same_bytes_in_another_process(folder, tmp_path):
    code = (
        "import pathlib, sys; from moe_vlm_jax.data.infographics import full; "
        f"full.render_split(pathlib.Path(sys.argv[1]), seed={SEED}, count=4, split='train')"
    )
    hashing = {**os.environ, "PYTHONHASHSEED": "77"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=hashing)
    assert digests(tmp_path) == digests(folder)


def test_seed_and_split_change_the_pages_and_a_smaller_count_is_a_prefix(folder, tmp_path):
    full.render_split(tmp_path / "two", seed=SEED, count=2, split="train")
    full.render_split(tmp_path / "other", seed=SEED + 1, count=2, split="train")
    small, large, other = (digests(path) for path in (tmp_path / "two", folder, tmp_path / "other"))
    images = [name for name in small if name.startswith(("images", "ocr"))]
    assert len(images) == 4
    assert all(small[name] == large[name] and small[name] != other[name] for name in images)


def test_splits_share_no_table_and_no_source_file():
    loaded = tables.load_tables()
    assert sorted(itertools.chain(*full.DATASETS.values())) == sorted({table.dataset for table in loaded})
    names = {split: {table.name for table in full.tables_of(split)} for split in full.DATASETS}
    assert all(len(names[split]) >= 20 for split in names)
    for a, b in itertools.combinations(names, 2):
        assert not names[a] & names[b]
    titles = {split: {table.title for table in full.tables_of(split)} for split in full.DATASETS}
    assert not titles["train"] & (titles["val"] | titles["test"])
    with pytest.raises(ValueError, match="split='dev' does not exist; use one of"):
        full.tables_of("dev")


def test_a_page_shows_only_tables_of_its_split(pages):
    for split, drawn, _ in pages:
        allowed = {table.name: table for table in full.tables_of(split)}
        assert all(chart.table in allowed for chart in drawn.facts.charts)
        for figure in drawn.facts.figures:
            assert any(figure.caption.startswith(table.title) for table in allowed.values()), figure


def test_printed_numbers_are_the_tables_own(pages):
    by_name = {table.name: table for table in tables.load_tables()}
    shares = 0
    for chart in (chart for _, drawn, _ in pages for chart in drawn.facts.charts):
        table = by_name[chart.table]
        for name, row in zip(chart.series, chart.printed, strict=True):
            real = [table.series[name][table.labels.index(label)] for label in chart.labels]
            printed = [float(recomputed.number(text)) for text in row]
            if chart.unit == "%":
                shares += 1
                np.testing.assert_allclose(printed, 100 * np.array(real) / sum(real), atol=0.0501)
            else:
                assert printed == real, chart
    assert shares > 0


def test_every_kind_of_chart_and_every_answer_type_occurs_in_every_split(pages):
    """Pages are drawn in turn for each kind; questions come with the pages."""
    for split in full.DATASETS:
        kinds = collections.Counter(len(drawn.facts.charts) > 1 for name, drawn, _ in pages if name == split)
        assert kinds[True] >= 1 and kinds[False] >= 5
        types = {question.answer_type for name, _, asked in pages if name == split for question in asked}
        assert types == set(questions.ANSWER_TYPES)
    shown = {chart.kind for _, drawn, _ in pages for chart in drawn.facts.charts}
    assert shown == set(charts.KINDS)


@pytest.mark.parametrize("split", list(full.DATASETS))
def test_every_split_has_tables_for_every_kind(split):
    for kind in (*charts.KINDS, layouts.COMPOSED):
        drawn = layouts.draw(full.tables_of(split), kind, random.Random(3))
        assert kind == layouts.COMPOSED or drawn.facts.charts[0].kind == kind


def test_every_answer_is_what_the_page_says(pages):
    for _, drawn, asked in pages:
        assert len(asked) == full.QUESTIONS_PER_IMAGE
        for question in asked:
            assert recomputed.accepts(question, drawn.facts), question


def test_everything_that_can_be_asked_is_printed(pages):
    for _, drawn, _ in pages:
        texts = " ".join(line.text for line in drawn.page.texts)
        for chart in drawn.facts.charts:
            for name in (*chart.labels, *(text for row in chart.printed for text in row)):
                assert all(word in texts for word in name.split()), name
            if len(chart.series) > 1:
                assert all(word in texts for name in chart.series for word in name.split())
        for name in (drawn.facts.title, drawn.facts.source, *(figure.caption for figure in drawn.facts.figures)):
            assert all(word in texts for word in name.split()), name


def test_no_text_leaves_the_page_or_meets_another(pages):
    for _, drawn, _ in pages:
        page = drawn.page
        assert max(page.width, page.height) <= 1000 and min(page.width, page.height) >= 350
        boxes = [line.box for line in page.texts]
        for left, top, right, bottom in boxes:
            assert 0 < left < right < page.width and 0 < top < bottom < page.height
        for a, b in itertools.combinations(boxes, 2):
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1], (a, b, page.texts)


def test_ink_stays_in_its_box_and_stands_out_from_the_ground(pages):
    """Letters are found by comparing the page with itself without texts; 60 of 255 levels is legible in gray."""
    for _, drawn, _ in pages[::5]:
        with_text = np.asarray(drawn.page.image().convert("L"), np.int32)
        texts, drawn.page.texts = drawn.page.texts, []
        without = np.asarray(drawn.page.image().convert("L"), np.int32)
        drawn.page.texts = texts
        changed = with_text != without
        for line in texts:
            left, top, right, bottom = map(int, line.box)
            inside = np.abs(with_text - without)[top:bottom, left:right]
            assert inside.max() >= 60, line
            changed[top - 3 : bottom + 3, left - 3 : right + 3] = False  # a halo is two pixels wide
        assert not changed.any()


def test_the_font_has_every_letter_that_is_printed():
    missing = canvas.font(20).getmask("\ue000")  # private use: the font's box for unknown letters
    letters = {letter for table in tables.load_tables() for letter in "".join([table.title, table.source, table.unit])}
    for letter in sorted(letters - {" "}):
        mask = canvas.font(20).getmask(letter)
        assert (mask.size, bytes(mask)) != (missing.size, bytes(missing)), letter


def test_a_text_without_room_is_refused():
    page = canvas.Page(200, 100, (255, 255, 255))
    page.text((20, 20), "first", 16, (0, 0, 0))
    with pytest.raises(canvas.CrowdedError, match="no room for 'second'"):
        page.text((30, 24), "second", 16, (0, 0, 0))
    with pytest.raises(canvas.CrowdedError, match="no room for 'outside'"):
        page.text((180, 60), "outside", 16, (0, 0, 0))
    with pytest.raises(canvas.CrowdedError, match="is wider than 60 px"):
        canvas.wrap("an incomprehensibilities", 16, 60)


def test_the_infographicvqa_loader_reads_the_files(folder):
    content = json.loads((folder / "infographicsVQA_train_v1.0.json").read_text())
    assert content["dataset_name"] == "synthetic infographics" and content["dataset_split"] == "train"
    assert len({row["questionId"] for row in content["data"]}) == len(content["data"]) == 24
    bad = bad_samples.BadSamples("error")
    loaded = infographicvqa.load_records(str(folder), "train", bad)
    assert len(loaded) == 24
    for row, record in zip(content["data"], loaded, strict=True):
        assert record.answers == tuple(row["answers"]) and record.turns[-1].text == row["answers"][0]
        assert record.answer_type in questions.ANSWER_TYPES
        assert Image.open(record.images[0]).mode == "RGB"
        assert isinstance(row["operation/reasoning"], list) and isinstance(row["evidence"], list)


def test_the_embedded_source_serves_the_full_set(tmp_path):
    data = config_lib.DataConfig(source="embedded", difficulty="full", cache=str(tmp_path), num_images=2)
    loaded = embedded.load_records(data, "train")
    assert len(loaded) == 2 * full.QUESTIONS_PER_IMAGE
    assert len({record.images for record in loaded}) == 2
    assert all(pathlib.Path(record.images[0]).is_file() and record.answers for record in loaded)


def test_ocr_boxes_lie_where_the_words_are_printed(folder):
    row = json.loads((folder / "infographicsVQA_train_v1.0.json").read_text())["data"][0]
    blocks = json.loads((folder / "ocr" / row["ocr_output_file"]).read_text())
    image = np.asarray(Image.open(folder / "images" / row["image_local_name"]).convert("L"), np.int32)
    assert len(blocks["PAGE"]) == 1 and len(blocks["LINE"]) > 5
    assert [word["Text"] for word in blocks["WORD"]] == " ".join(line["Text"] for line in blocks["LINE"]).split(" ")
    for a, b in itertools.combinations(blocks["WORD"], 2):
        a, b = (block["Geometry"]["BoundingBox"] for block in (a, b))
        beside = a["Left"] + a["Width"] <= b["Left"] or b["Left"] + b["Width"] <= a["Left"]
        below = a["Top"] + a["Height"] <= b["Top"] or b["Top"] + b["Height"] <= a["Top"]
        assert beside or below, (a, b)
    for block in blocks["LINE"] + blocks["WORD"]:
        box = block["Geometry"]["BoundingBox"]
        left, top = round(box["Left"] * image.shape[1]), round(box["Top"] * image.shape[0])
        right, bottom = left + round(box["Width"] * image.shape[1]), top + round(box["Height"] * image.shape[0])
        assert np.ptp(image[top:bottom, left:right]) >= 60, block  # letters differ from their ground
