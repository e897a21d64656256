"""Tiny folders laid out as the official files of each benchmark: a few questions each, in the published field names."""

import base64
import csv
import io
import json
import pathlib

import numpy as np
from PIL import Image


def picture(seed: int) -> bytes:
    """Returns a JPEG file of noise."""
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (12 + seed, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(out, "JPEG")
    return out.getvalue()


def write(path: pathlib.Path, content: bytes | str | list | dict) -> pathlib.Path:
    """Writes bytes, text, a JSON document, or (a list into .jsonl) JSON lines; makes folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def ten(*answers: str) -> list[dict]:
    """Returns ten people's answers: the given ones, the last as often as needed."""
    full = [*answers, *[answers[-1]] * (10 - len(answers))]
    return [{"answer": text, "answer_confidence": "yes", "answer_id": i + 1} for i, text in enumerate(full)]


def infovqa(root: pathlib.Path) -> pathlib.Path:
    rows = [
        {"questionId": 98313, "question": "Which platform?", "image_local_name": "1.jpeg", "answers": ["pinterest"],
         "answer_type": ["single span"], "evidence": ["text"], "operation/reasoning": []},
        {"questionId": 98314, "question": "How many?", "image_local_name": "1.jpeg", "answers": ["42", "forty two"],
         "answer_type": ["non span"], "evidence": [], "operation/reasoning": ["counting"]},
    ]  # fmt: skip
    head = {"dataset_name": "infographicsVQA", "dataset_version": "1.0", "dataset_split": "val"}
    write(root / "qas" / "infographicsVQA_val_v1.0_withQT.json", head | {"data": rows})
    hidden = [
        {key: value for key, value in row.items() if key in ("questionId", "question", "image_local_name")}
        for row in rows
    ]
    write(root / "qas" / "infographicsVQA_test_v1.0.json", head | {"data": hidden})
    write(root / "images" / "1.jpeg", picture(1))
    return root


def docvqa(root: pathlib.Path) -> pathlib.Path:
    rows = [
        {"questionId": 49153, "question": "What is the value?", "question_types": ["figure/diagram"],
         "image": "documents/pybv0228_81.png", "docId": 1, "ucsf_document_id": "pybv0228", "answers": ["0.28"]},
        {"questionId": 24580, "question": "Whose name?", "question_types": ["handwritten", "form"],
         "image": "documents/xnbl0037_1.png", "docId": 2, "ucsf_document_id": "xnbl0037", "answers": ["Paul", "P."]},
    ]  # fmt: skip
    write(root / "spdocvqa_qas" / "val_v1.0_withQT.json", {"dataset_name": "SP-DocVQA", "data": rows})
    for name in ("pybv0228_81.png", "xnbl0037_1.png"):
        write(root / "spdocvqa_images" / name, picture(2))
    return root


def textvqa(root: pathlib.Path) -> pathlib.Path:
    answers = ["nokia"] * 9 + ["nokla"]
    row = {"image_id": "003a8ae2ef43b901", "question_id": 34602, "question": "What is the brand?", "answers": answers}
    write(root / "TextVQA_0.5.1_val.json", {"data": [row]})
    tokens = {"image_id": "003a8ae2ef43b901", "ocr_tokens": ["NOKIA", "3310"]}
    write(root / "TextVQA_Rosetta_OCR_v0.2_val.json", {"data": [tokens]})
    write(root / "train_images" / "003a8ae2ef43b901.jpg", picture(3))
    return root


def vqav2(root: pathlib.Path) -> pathlib.Path:
    asked = [
        {"question_id": 262148000, "image_id": 262148, "question": "Where is he looking?"},
        {"question_id": 262148001, "image_id": 262148, "question": "Is it sunny?"},
    ]
    marks = [
        {"question_id": 262148001, "image_id": 262148, "question_type": "is it", "answer_type": "yes/no",
         "multiple_choice_answer": "yes", "answers": ten("no", "yes")},
        {"question_id": 262148000, "image_id": 262148, "question_type": "where is", "answer_type": "other",
         "multiple_choice_answer": "down", "answers": ten("up", "up", "down")},
    ]  # fmt: skip
    write(root / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": asked})
    write(root / "v2_mscoco_val2014_annotations.json", {"annotations": marks})
    write(root / "val2014" / "COCO_val2014_000000262148.jpg", picture(4))
    test = [{"question_id": 1000, "image_id": 1, "question": "What is it?"}]
    write(root / "v2_OpenEnded_mscoco_test-dev2015_questions.json", {"questions": test})
    everything = [*test, {"question_id": 2000, "image_id": 2, "question": "Why?"}]
    write(root / "v2_OpenEnded_mscoco_test2015_questions.json", {"questions": everything})
    write(root / "test2015" / "COCO_test2015_000000000001.jpg", picture(5))
    return root


def vizwiz(root: pathlib.Path) -> pathlib.Path:
    rows = [
        {"image": "VizWiz_val_00000000.jpg", "question": "What is this?", "answerable": 1, "answer_type": "other",
         "answers": ten("basil leaves")},
        {"image": "VizWiz_val_00000001.jpg", "question": "Can you read it?", "answerable": 0,
         "answer_type": "unanswerable", "answers": ten("unanswerable")},
    ]  # fmt: skip
    write(root / "Annotations" / "val.json", rows)
    for row in rows:
        write(root / "val" / row["image"], picture(6))
    return root


def gqa(root: pathlib.Path) -> pathlib.Path:
    rows = {
        "201307251": {"imageId": "n161313", "question": "Is it overcast?", "answer": "no", "isBalanced": True,
                      "types": {"structural": "verify", "semantic": "global", "detailed": "weatherVerify"},
                      "groups": {"global": None, "local": "13-weather_overcast"}},
        "201640614": {"imageId": "n161313", "question": "Who is wearing it?", "answer": "man", "isBalanced": True,
                      "types": {"structural": "query", "semantic": "rel", "detailed": "relS"},
                      "groups": {"global": "person", "local": "14-wear_it"}},
    }  # fmt: skip
    write(root / "testdev_balanced_questions.json", rows)
    write(root / "images" / "n161313.jpg", picture(7))
    return root


def scienceqa(root: pathlib.Path) -> pathlib.Path:
    problems = {
        "4": {"question": "Which is a solid?", "choices": ["water", "rock"], "answer": 1, "hint": "",
              "image": "image.png", "subject": "natural science", "grade": "grade3", "lecture": "", "solution": ""},
        "5": {"question": "Which word?", "choices": ["a", "b", "c"], "answer": 0, "hint": "Think.", "image": None,
              "subject": "language science", "grade": "grade4", "lecture": "", "solution": ""},
        "6": {"question": "Unasked?", "choices": ["a"], "answer": 0, "hint": "", "image": None},
    }  # fmt: skip
    write(root / "problems.json", problems)
    write(root / "pid_splits.json", {"test": ["4", "5"], "train": ["6"]})
    write(root / "images" / "test" / "4" / "image.png", picture(8))
    stored = [
        {"id": "4", "image": "4/image.png", "conversations": [
            {"from": "human", "value": "<image>\nContext: N/A\nWhich is a solid?\nA. water\nB. rock"},
            {"from": "gpt", "value": "The answer is B."}]},
        {"id": "5", "conversations": [{"from": "human", "value": "Context: Think.\nWhich word?\nA. a\nB. b\nC. c"}]},
    ]  # fmt: skip
    write(root / "llava_test_CQM-A.json", stored)
    return root


def pope(root: pathlib.Path) -> pathlib.Path:
    for split in ("random", "popular", "adversarial"):
        rows = [
            {"question_id": 1, "image": "COCO_val2014_000000310196.jpg", "text": "Is there a dog in the image?",
             "label": "yes"},
            {"question_id": 2, "image": "COCO_val2014_000000310196.jpg",
             "text": f"Is there a {split} car in the image?", "label": "no"},
        ]  # fmt: skip
        lines = "".join(json.dumps(row) + "\n" for row in rows)  # JSON lines, whatever the ending says
        write(root / "coco" / f"coco_pope_{split}.json", lines)
    write(root / "val2014" / "COCO_val2014_000000310196.jpg", picture(9))
    return root


MME_SPLIT_FOLDERS = ("posters", "celebrity", "scene", "landmark", "artwork")
MME = (
    *("existence", "count", "position", "color", *MME_SPLIT_FOLDERS, "OCR", "commonsense_reasoning"),
    *("numerical_calculation", "text_translation", "code_reasoning"),
)


def mme(root: pathlib.Path) -> pathlib.Path:
    for number, category in enumerate(MME):
        folder = root / "MME_Benchmark_release_version" / category
        apart = category in MME_SPLIT_FOLDERS
        pair = f"Is it a {category}? Please answer yes or no.\tYes\nIs it a car? Please answer yes or no.\tNo\n"
        write((folder / "questions_answers_YN" if apart else folder) / "0006.txt", pair)
        write((folder / "images" if apart else folder) / f"0006.{'png' if number % 2 else 'jpg'}", picture(10))
    return root


MMBENCH_HEAD = (
    *("index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source", "l2-category"),
    *("comment", "split"),
)


def mmbench(root: pathlib.Path, name: str = "mmbench_dev_20230712.tsv", *, answers: bool = True) -> pathlib.Path:
    """Two questions, the first in two rotations; the second rotation names the row that has its image."""
    image = base64.b64encode(picture(11)).decode()
    rest = ("identity_reasoning", "attribute_reasoning")
    rows = [
        ("241", "Which is\tit?", "", "cat", "dog", "", "", "B", rest[0], image, "x", rest[1], "", "dev"),
        ("252", 'The "best"?', "Look,\nagain.", "1", "2", "3", "4", "D", "ocr", image, "x", "perception", "", "dev"),
        ("1000241", "Which is\tit?", "", "dog", "cat", "", "", "A", rest[0], "241", "x", rest[1], "", "dev"),
    ]
    if not answers:
        rows = [(*row[:7], "", *row[8:]) for row in rows]
    out = io.StringIO()
    csv.writer(out, delimiter="\t", lineterminator="\n").writerows([MMBENCH_HEAD, *rows])
    write(root / name, out.getvalue())
    return root


def ai2d(root: pathlib.Path) -> pathlib.Path:
    image = base64.b64encode(picture(12)).decode()
    rows = [
        ("0", image, "Which eats grass?", "fox", "rabbit", "owl", "snake", "B", "x"),
        ("1", image, "Which one flies?", "fox", "rabbit", "owl", "snake", "C", "x"),
    ]
    out = io.StringIO()
    head = ("index", "image", "question", "A", "B", "C", "D", "answer", "category")
    csv.writer(out, delimiter="\t", lineterminator="\n").writerows([head, *rows])
    write(root / "AI2D_TEST.tsv", out.getvalue())
    return root


def chartqa(root: pathlib.Path) -> pathlib.Path:
    folder = root / "ChartQA Dataset" / "test"
    write(folder / "test_human.json", [{"imgname": "1.png", "query": "How much?", "label": "14"}])
    write(folder / "test_augmented.json", [{"imgname": "1.png", "query": "Which year?", "label": "2012"}])
    write(folder / "png" / "1.png", picture(13))
    return root


def mmvet(root: pathlib.Path) -> pathlib.Path:
    rows = {
        "v1_0": {"imagename": "v1_0.png", "question": "What is x?", "answer": "-1<AND>-5",
                 "capability": ["ocr", "math"], "imagesource": "x"},
        "v1_1": {"imagename": "v1_0.png", "question": "Which?", "answer": "two<OR>2", "capability": ["rec"],
                 "imagesource": "x"},
    }  # fmt: skip
    write(root / "mm-vet.json", rows)
    write(root / "images" / "v1_0.png", picture(14))
    return root


def llavabench(root: pathlib.Path) -> pathlib.Path:
    kinds = ("conv", "detail")
    asked = [{"question_id": i, "image": "001.jpg", "text": f"Question {i}?", "category": kinds[i]} for i in (0, 1)]
    write(root / "questions.jsonl", asked)
    write(root / "context.jsonl", [{"id": "001", "image": "001.jpg", "caption": "A stunning view of Diamond Head."}])
    said = [{"question_id": i, "text": f"It is answer {i}.", "answer_id": "a", "model_id": "gpt-4"} for i in (0, 1)]
    write(root / "answers_gpt4.jsonl", said)
    write(root / "images" / "001.jpg", picture(15))
    return root


# Name of a benchmark -> (folder below data_root, what fills it).
ALL = {
    "infovqa": ("infographicvqa", infovqa),
    "docvqa": ("docvqa", docvqa),
    "textvqa": ("textvqa", textvqa),
    "vqav2": ("vqav2", vqav2),
    "vizwiz": ("vizwiz", vizwiz),
    "gqa": ("gqa", gqa),
    "scienceqa": ("scienceqa", scienceqa),
    "pope": ("pope", pope),
    "mme": ("mme", mme),
    "mmbench": ("mmbench", mmbench),
    "ai2d": ("ai2d", ai2d),
    "chartqa": ("chartqa", chartqa),
    "mmvet": ("mm-vet", mmvet),
    "llavabench": ("llava-bench-in-the-wild", llavabench),
}
