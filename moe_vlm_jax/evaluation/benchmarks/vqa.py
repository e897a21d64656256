"""VQAv2, VizWiz and TextVQA: ten people's answers, soft accuracy after the VQA normaliser, and EvalAI's files."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any, Literal

from absl import logging

from moe_vlm_jax.data import bad_samples
from moe_vlm_jax.evaluation import outputs, settings
from moe_vlm_jax.evaluation.benchmarks import benchmark, files
from moe_vlm_jax.evaluation.rules import answers, prompts

VQAV2_CLOSED = ("test-dev2015", "test2015")


def load_vqav2(
    path: pathlib.Path, config: settings.BenchmarkConfig, bad: bad_samples.BadSamples
) -> list[benchmark.Question]:
    """Returns the questions of a split.

    v2_OpenEnded_mscoco_val2014_questions.json    v2_mscoco_val2014_annotations.json
    val2014/COCO_val2014_000000262148.jpg         test2015/COCO_test2015_...jpg (also for test-dev2015)
    """
    del bad
    split, what = config.split, f"VQAv2 {config.split}"
    file = files.find(path, _under(f"v2_OpenEnded_mscoco_{split}_questions.json"), what=what)
    known = {}
    if split not in VQAV2_CLOSED:
        marked = files.find(path, _under(f"v2_mscoco_{split}_annotations.json"), what=what)
        for i, row in enumerate(files.get(files.read_json(marked, dict), "annotations", list, str(marked))):
            known[files.get(row, "question_id", int, f"{marked}: annotations[{i}]")] = row
    year = "test2015" if split in VQAV2_CLOSED else split
    images = files.find_folder(path, (year, f"images/{year}"), what=what)
    found = []
    for i, row in enumerate(files.get(files.read_json(file, dict), "questions", list, str(file))):
        where = f"{file}: questions[{i}]"
        number, asked = files.get(row, "question_id", int, where), files.get(row, "question", str, where)
        name = f"COCO_{year}_{files.get(row, 'image_id', int, where):012d}.jpg"
        marks = known.get(number, {})
        if known and not marks:
            raise ValueError(f"{where}: question_id={number} has no annotation in the other file; fetch both again.")
        found.append(
            benchmark.Question(
                id=str(number),
                images=(str(images / name),),
                prompt=prompts.short_answer(asked, benchmark="vqav2", rule=benchmark.rule_of(config)),
                asked=asked,
                answers=_checked(_texts(marks, where), config, where),
                group={key: marks[key] for key in ("answer_type", "question_type") if key in marks},
            )
        )
    return found


def load_vizwiz(
    path: pathlib.Path, config: settings.BenchmarkConfig, bad: bad_samples.BadSamples
) -> list[benchmark.Question]:
    """Returns the questions of a split: val.json or Annotations/val.json, images in val/."""
    del bad
    split, what = config.split, f"VizWiz {config.split}"
    file = files.find(path, _under(f"{split}.json"), what=what)
    images = files.find_folder(path, (split, f"images/{split}", "images"), what=what)
    found = []
    for i, row in enumerate(files.read_json(file, list)):
        where = f"{file}[{i}]"
        name, asked = files.get(row, "image", str, where), files.get(row, "question", str, where)
        found.append(
            benchmark.Question(
                id=name,
                images=(str(images / name),),
                prompt=prompts.vizwiz(asked, rule=benchmark.rule_of(config)),
                asked=asked,
                answers=_checked(_texts(row, where), config, where),
                group={"answer_type": row["answer_type"]} if "answer_type" in row else {},
            )
        )
    return found


def load_textvqa(
    path: pathlib.Path, config: settings.TextVqaConfig, bad: bad_samples.BadSamples
) -> list[benchmark.Question]:
    """Returns the questions of a split.

    TextVQA_0.5.1_val.json    train_images/003a8ae2ef43b901.jpg
    TextVQA_Rosetta_OCR_v0.2_val.json (OCR tokens), or LLaVA's llava_textvqa_val_v051_ocr.jsonl (whole prompts)
    """
    del bad
    split, what = config.split, f"TextVQA {config.split}"
    file = files.find(path, _under(f"TextVQA_0.5.1_{split}.json"), what=what)
    stored, tokens = _ocr(path, config, what) if _wants_ocr(config) else ({}, {})
    images = files.find_folder(path, ("train_images", "images"), what=what)
    found = []
    for i, row in enumerate(files.get(files.read_json(file, dict), "data", list, str(file))):
        where = f"{file}: data[{i}]"
        image, asked = files.get(row, "image_id", str, where), files.get(row, "question", str, where)
        prompt = stored.get((image, asked.lower()))
        if prompt is None:
            if stored or (_wants_ocr(config) and image not in tokens):
                raise ValueError(f"{where}: question {asked!r} of image {image!r} has no OCR; fetch that file again.")
            prompt = prompts.textvqa(asked, ocr_tokens=tokens.get(image), rule=benchmark.rule_of(config))
        found.append(
            benchmark.Question(
                id=str(files.get(row, "question_id", (int, str), where)),
                images=(str(images / f"{image}.jpg"),),
                prompt=prompt,
                asked=asked,
                answers=_checked(files.texts(row, "answers", where), config, where),
            )
        )
    return found


def score_vqav2(rows: Sequence[benchmark.Row], config: settings.BenchmarkConfig) -> benchmark.Scored:
    """Returns soft accuracy, also by type of answer."""
    return _score(rows, config, "vqav2")


def score_vizwiz(rows: Sequence[benchmark.Row], config: settings.BenchmarkConfig) -> benchmark.Scored:
    """Returns soft accuracy, also by type of answer."""
    return _score(rows, config, "vizwiz")


def score_textvqa(rows: Sequence[benchmark.Row], config: settings.TextVqaConfig) -> benchmark.Scored:
    """Returns soft accuracy; the label says whether prompts had OCR tokens."""
    note = f"{'with' if _wants_ocr(config) else 'without'} OCR tokens in the prompt"
    scored = _score(rows, config, "textvqa", note)
    return dataclasses.replace(scored, comparable=_wants_ocr(config) == (config.rule == "llava"))


def write_vqav2(
    folder: pathlib.Path, rows: Sequence[benchmark.Row], config: settings.BenchmarkConfig, path: pathlib.Path
) -> str:
    """Writes [{"question_id", "answer"}], answers normalised.

    EvalAI's test-dev wants a line for every question of test2015: those not asked get '' where that file is there.
    """
    said = {int(row["id"]): _normalized(row, "vqav2") for row in rows}
    file = files.find_any(path, _under("v2_OpenEnded_mscoco_test2015_questions.json"))
    if config.split == "test-dev2015" and file is not None:
        names = [row["question_id"] for row in files.read_json(file, dict)["questions"]]
        said = {name: said.get(name, "") for name in names} | said
    elif config.split == "test-dev2015":
        logging.warning("vqav2: no test2015 question file in %s, so the submission has test-dev's questions only", path)
    return _write(folder, [{"question_id": name, "answer": text} for name, text in said.items()])


def write_vizwiz(
    folder: pathlib.Path, rows: Sequence[benchmark.Row], config: settings.BenchmarkConfig, path: pathlib.Path
) -> str:
    """Writes [{"image", "answer"}], answers normalised."""
    del config, path
    return _write(folder, [{"image": row["id"], "answer": _normalized(row, "vizwiz")} for row in rows])


def _score(rows, config, which: Literal["vqav2", "vizwiz", "textvqa"], note: str = "") -> benchmark.Scored:
    if unscored := benchmark.without_answers(rows, "VQA accuracy"):
        return unscored
    fields: list[dict[str, Any]] = []
    for row in rows:
        value = answers.vqa_accuracy(row["prediction"], row["answers"], rule=benchmark.rule_of(config), benchmark=which)
        fields.append({"score": value, "vqa_accuracy": value})
    main = benchmark.mean(field["score"] for field in fields)
    scores: dict[str, Any] = {"VQA accuracy": main}
    if any("answer_type" in row["group"] for row in rows):
        scores["by answer type"] = benchmark.by_group(rows, fields, "answer_type")
    return benchmark.Scored(metric="VQA accuracy", score=main, scores=scores, fields=fields, note=note)


def _wants_ocr(config: settings.TextVqaConfig) -> bool:
    return config.ocr_tokens == "yes" or (config.ocr_tokens == "rule" and config.rule == "llava")


def _ocr(
    path: pathlib.Path, config: settings.TextVqaConfig, what: str
) -> tuple[dict[tuple[str, str], str], dict[str, list[str]]]:
    """Returns LLaVA's stored prompts by (image, question), or OCR tokens by image."""
    whole = f"llava_textvqa_{config.split}_v051_ocr.jsonl"
    names = [f"TextVQA_Rosetta_OCR_v0.2_{config.split}.json", f"TextVQA_Rosetta_OCR_v0.2r_{config.split}.json"]
    if config.rule == "llava" and (file := files.find_any(path, [whole])):
        stored = {}
        for where, row in files.read_lines(file):
            prompt = files.get(row, "text", str, where)
            image = str(files.get(row, "question_id", (int, str), where))
            stored[image, prompts.textvqa_key(prompt)] = prompt
        logging.info("textvqa: prompts as they are stored in %s", file)
        return stored, {}
    try:
        file = files.find(path, [*names, *([whole] if config.rule == "llava" else [])], what=what)
    except ValueError as error:
        raise ValueError(f"{error} Without OCR tokens: --config.textvqa.ocr_tokens=no (another score).") from error
    tokens = {}
    for i, row in enumerate(files.get(files.read_json(file, dict), "data", list, str(file))):
        where = f"{file}: data[{i}]"
        tokens[files.get(row, "image_id", str, where)] = list(files.texts(row, "ocr_tokens", where))
    return {}, tokens


def _under(name: str) -> list[str]:
    return [name, f"Annotations/{name}", f"annotations/{name}", f"questions/{name}"]


def _checked(found: tuple[str, ...], config: settings.BenchmarkConfig, where: str) -> tuple[str, ...]:
    """Returns the answers, which LLaVA's formula takes ten of; none where they are not public."""
    if config.rule == "llava" and len(found) not in (0, answers.NUM_ANSWERS):
        raise ValueError(
            f"{where}: {len(found)} answers, but rule 'llava' takes {answers.NUM_ANSWERS}; mend the row, or use "
            "another rule."
        )
    return found


def _texts(row: dict, where: str) -> tuple[str, ...]:
    marks = row.get("answers", [])
    return tuple(files.get(mark, "answer", str, f"{where}: answers[{i}]") for i, mark in enumerate(marks))


def _normalized(row: benchmark.Row, which: Literal["vqav2", "vizwiz"]) -> str:
    return answers.normalize_vqa(row["prediction"], rule="llava", benchmark=which)


def _write(folder: pathlib.Path, content: list[dict]) -> str:
    outputs.write_atomically(folder / "submission.json", json.dumps(content, ensure_ascii=False) + "\n")
    return "submission.json"
