"""The `full` synthetic infographics: pages of up to 1,000 px in free layouts, for a real vision tower.

Written in InfographicVQA's own format, with the text boxes as its OCR files:

    images/train-000000.png   ...
    ocr/train-000000.json     {"PAGE": [...], "LINE": [...], "WORD": [...]}
    infographicsVQA_train_v1.0.json        {"dataset_name": "synthetic infographics", ..., "data": [...]}

The splits share no table, and not even a source file: several tables of one file show the same numbers.
"""

import json
import pathlib
import random

from moe_vlm_jax.data.infographics import canvas, charts, layouts, questions
from moe_vlm_jax.data.infographics import tables as tables_lib

VERSION = 1  # raise it whenever a pixel or a word changes: cached sets of another version are not reused
DATASET_NAME = "synthetic infographics"
QUESTIONS_PER_IMAGE = 6
COMPOSED_SHARE = 1 / 3

# Each source file belongs to one split; files about the same thing (three on temperatures) to the same one.
DATASETS = {
    "train": ("barley", "burtin", "cars", "seattle-temps", "seattle-weather", "sf-temps", "us-employment"),
    "val": ("crimea", "driving", "iowa-electricity", "wheat"),
    "test": ("airports", "iris", "ohlc", "stocks"),
}


def tables_of(split: str) -> tuple[tables_lib.Table, ...]:
    """The tables that a split draws from."""
    if split not in DATASETS:
        raise ValueError(f"split={split!r} does not exist; use one of {sorted(DATASETS)}.")
    return tuple(table for table in tables_lib.load_tables() if table.dataset in DATASETS[split])


def draw_page(split: str, seed: int, index: int) -> tuple[layouts.Drawn, tuple[questions.Question, ...]]:
    """Page `index` of a split and its questions; the same for the same arguments, whatever else is drawn."""
    rng = random.Random(f"{seed}/{split}/{index}")
    while True:
        kind = layouts.COMPOSED if rng.random() < COMPOSED_SHARE else rng.choice(charts.KINDS)
        drawn = layouts.draw(tables_of(split), kind, rng)
        asked = questions.generate(drawn.facts, rng, count=QUESTIONS_PER_IMAGE)
        if len(asked) == QUESTIONS_PER_IMAGE:
            return drawn, asked


def render_split(folder: pathlib.Path, *, seed: int, count: int, split: str) -> None:
    """Writes `count` pages of a split (train, val or test) into the folder.

    A smaller count gives the first pages of a larger one.
    """
    tables_of(split)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "ocr").mkdir(exist_ok=True)
    rows = []
    for index in range(count):
        drawn, asked = draw_page(split, seed, index)
        name = f"{split}-{index:06d}"
        drawn.page.image().save(folder / "images" / f"{name}.png", compress_level=4)
        (folder / "ocr" / f"{name}.json").write_text(json.dumps(ocr(drawn.page)), encoding="utf-8")
        rows += [_row(len(rows) + i, question, name, split) for i, question in enumerate(asked)]
    content = {"dataset_name": DATASET_NAME, "dataset_version": "1.0", "dataset_split": split, "data": rows}
    path = folder / f"infographicsVQA_{split}_v1.0{'' if split == 'train' else '_withQT'}.json"
    path.write_text(json.dumps(content), encoding="utf-8")


def ocr(page: canvas.Page) -> dict:
    """The texts of a page as Amazon Textract reports them, boxes in fractions of the page."""
    blocks: dict[str, list[dict]] = {"PAGE": [], "LINE": [], "WORD": []}

    def add(block_type: str, text: str | None, box: canvas.Box) -> None:
        left, top, right, bottom = box
        bounds = {
            "Width": (right - left) / page.width,
            "Height": (bottom - top) / page.height,
            "Left": left / page.width,
            "Top": top / page.height,
        }
        block: dict = {"BlockType": block_type, "Geometry": {"BoundingBox": bounds}}
        if text is not None:
            block |= {"Confidence": 100.0, "Text": text}
        blocks[block_type].append(block)

    add("PAGE", None, (0, 0, page.width, page.height))
    for line in sorted(page.texts, key=lambda line: (line.box[1], line.box[0])):
        add("LINE", line.text, line.box)
        for word, box in line.words():
            add("WORD", word, box)
    return blocks


def _row(number: int, question: questions.Question, name: str, split: str) -> dict:
    return {
        "questionId": number,
        "question": question.text,
        "image_local_name": f"{name}.png",
        "ocr_output_file": f"{name}.json",
        "answers": list(question.answers),
        "data_split": split,
        "answer_type": [question.answer_type],
        "evidence": [question.evidence],
        "operation/reasoning": list(question.operation),
        "template": question.template,
    }
