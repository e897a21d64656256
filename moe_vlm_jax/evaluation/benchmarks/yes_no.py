"""POPE and MME: questions whose answer is yes or no."""

import pathlib
from collections.abc import Sequence
from typing import Any

from moe_vlm_jax.data import bad_samples
from moe_vlm_jax.evaluation import settings
from moe_vlm_jax.evaluation.benchmarks import benchmark, files
from moe_vlm_jax.evaluation.rules import prompts, yes_no

POPE_SPLITS = ("random", "popular", "adversarial")
MME_PERCEPTION = (
    *("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR"),
)
MME_COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
_IMAGE_ENDINGS = (".jpg", ".png", ".jpeg")


def load_pope(
    path: pathlib.Path, config: settings.BenchmarkConfig, bad: bad_samples.BadSamples
) -> list[benchmark.Question]:
    """Returns the questions of all three splits: coco/coco_pope_{random,popular,adversarial}.json, val2014/."""
    del bad
    images = files.find_folder(path, ("val2014", "images/val2014", "images"), what="POPE")
    found = []
    for split in POPE_SPLITS:
        name = f"coco_pope_{split}.json"
        file = files.find(path, [name, f"coco/{name}", f"output/coco/{name}"], what="POPE")
        for where, row in files.read_lines(file):
            asked, label = files.get(row, "text", str, where), files.get(row, "label", str, where)
            if label not in ("yes", "no"):
                raise ValueError(f"{where}: label={label!r} must be 'yes' or 'no'; mend the row.")
            found.append(
                benchmark.Question(
                    id=f"{split}-{files.get(row, 'question_id', (int, str), where)}",
                    images=(str(images / files.get(row, "image", str, where)),),
                    prompt=prompts.short_answer(asked, benchmark="pope", rule=benchmark.rule_of(config)),
                    asked=asked,
                    answers=(label,),
                    group={"split": split},
                )
            )
    return found


def score_pope(rows: Sequence[benchmark.Row], config: settings.BenchmarkConfig) -> benchmark.Scored:
    """Returns F1; accuracy, precision, recall and the share of yes beside it, also by split."""
    rule = benchmark.rule_of(config)
    fields = [
        {
            "score": float(yes_no.pope_correct(row["prediction"], row["answers"][0], rule=rule)),
            "parsed": yes_no.parse_pope(row["prediction"], rule=rule),
        }
        for row in rows
    ]
    replies = [
        yes_no.PopeReply(split=row["group"]["split"], prediction=row["prediction"], label=row["answers"][0])
        for row in rows
    ]
    found = yes_no.pope_scores(replies, rule=rule)
    scores: dict[str, Any] = _percent(found.overall)
    scores |= {split: _percent(of_split) for split, of_split in found.per_split.items()}
    metric = "mean F1 of the three splits" if rule == "llava" else "F1 of all three splits together"
    note = "no judge" if rule == "vlmevalkit" else ""
    return benchmark.Scored(metric=metric, score=100 * found.overall.f1, scores=scores, fields=fields, note=note)


def load_mme(
    path: pathlib.Path, config: settings.BenchmarkConfig, bad: bad_samples.BadSamples
) -> list[benchmark.Question]:
    """Returns two questions for each image, of every category folder.

    <category>/<image>.jpg + <image>.txt                      (existence, count, ..., code_reasoning)
    <category>/images/<image>.jpg + questions_answers_YN/<image>.txt     (posters, celebrity, scene, ...)
    """
    del bad
    root = path / "MME_Benchmark_release_version"
    root = root if root.is_dir() else path
    found = []
    for category in (*MME_PERCEPTION, *MME_COGNITION):
        what = f"MME {category}"
        folder = files.find_folder(root, (category, category.lower()), what=what)
        split = folder / "questions_answers_YN"
        texts, images = (split, folder / "images") if split.is_dir() else (folder, folder)
        names = sorted(texts.glob("*.txt"))
        if not names:
            raise ValueError(f"{what}: {texts} has no .txt files of questions; fetch the set again.")
        pictures = {file.stem: file for file in images.iterdir() if file.suffix.lower() in _IMAGE_ENDINGS}
        for file in names:
            image = str(pictures.get(file.stem, images / f"{file.stem}.jpg"))
            for number, (asked, label) in enumerate(_pair(file)):
                found.append(
                    benchmark.Question(
                        id=f"{category}/{file.stem}-{number}",
                        images=(image,),
                        prompt=prompts.short_answer(asked, benchmark="mme", rule=benchmark.rule_of(config)),
                        asked=asked,
                        answers=(label,),
                        group={"category": category},
                        unit=f"{category}/{file.stem}",
                    )
                )
    return found


def score_mme(rows: Sequence[benchmark.Row], config: settings.BenchmarkConfig) -> benchmark.Scored:
    """Returns the sum of perception (at most 2,000 points); cognition and every category beside it."""
    rule = benchmark.rule_of(config)
    fields = [
        {
            "score": float(yes_no.mme_correct(row["prediction"], row["answers"][0], rule=rule)),
            "parsed": yes_no.parse_mme(row["prediction"], rule=rule),
        }
        for row in rows
    ]
    replies = [
        yes_no.MmeReply(
            category=row["group"]["category"], image=row["unit"], prediction=row["prediction"], label=row["answers"][0]
        )
        for row in rows
    ]
    found = yes_no.mme_scores(replies, rule=rule)
    scores = {
        "perception": found.perception,
        "cognition": found.cognition,
        "by category": dict(found.per_category),
        "accuracy by category": {name: 100 * value for name, value in found.accuracy.items()},
        "accuracy+ by category": {name: 100 * value for name, value in found.accuracy_plus.items()},
    }
    note = "points of 2000" + (", no judge" if rule == "vlmevalkit" else "")
    return benchmark.Scored(metric="perception", score=found.perception, scores=scores, fields=fields, note=note)


def _pair(file: pathlib.Path) -> list[tuple[str, str]]:
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    cells = [line.rsplit("\t", 1) for line in lines]
    if len(cells) != 2 or any(len(pair) != 2 or pair[1].strip() not in ("Yes", "No") for pair in cells):
        raise ValueError(
            f"{file}: must be two lines 'question<TAB>Yes' or No, has {lines!r:.120}; fetch the set again."
        )
    return [(asked.strip(), label.strip()) for asked, label in cells]


def _percent(found: yes_no.YesNoScores) -> dict[str, float]:
    names = {"accuracy": "accuracy", "precision": "precision", "recall": "recall", "F1": "f1", "yes ratio": "yes_ratio"}
    return {name: 100 * getattr(found, field) for name, field in names.items()}
