"""InfographicVQA and DocVQA (RRC challenge 17): question files, ANLS, and the list that its server takes."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from moe_vlm_jax.data import bad_samples, infographicvqa
from moe_vlm_jax.evaluation import blind, outputs, scorers, settings
from moe_vlm_jax.evaluation.benchmarks import benchmark, files
from moe_vlm_jax.evaluation.rules import answers, prompts

DOCVQA_LAYOUT = ("spdocvqa_images", ".", "{split}", "images")


def load_infovqa(
    path: pathlib.Path, config: settings.BenchmarkConfig, bad: bad_samples.BadSamples
) -> list[benchmark.Question]:
    """Returns the questions of a split; layouts as in data/infographicvqa.py."""
    try:
        found = infographicvqa.load_records(str(path), config.split, bad)
    except bad_samples.SampleError:
        raise
    except ValueError as error:
        raise ValueError(str(error).replace("data.path", "infovqa.path")) from error
    return [
        _question(
            record.id, blind.question_of(record), record.images, record.answers, record.answer_type, "infographicvqa",
            config,
        )
        for record in found
    ]  # fmt: skip


def load_docvqa(
    path: pathlib.Path, config: settings.BenchmarkConfig, bad: bad_samples.BadSamples
) -> list[benchmark.Question]:
    """Returns the questions of a split.

    spdocvqa_qas/val_v1.0_withQT.json, test_v1.0.json    spdocvqa_images/xnbl0037_1.png
    val/val_v1.0.json                                    val/documents/xnbl0037_1.png
    """
    del bad
    split = config.split
    names = [f"{split}_v1.0_withQT.json", f"{split}_v1.0.json"]
    folders = ("", "spdocvqa_qas/", "qas/", f"{split}/")
    file = files.find(path, [folder + name for folder in folders for name in names], what=f"DocVQA {split}")
    content = files.read_json(file, dict)
    images = [path / folder.format(split=split) for folder in DOCVQA_LAYOUT]
    found = []
    for i, row in enumerate(files.get(content, "data", list, str(file))):
        where = f"{file}: data[{i}]"
        image = files.get(row, "image", str, where)
        kinds = "+".join(files.texts(row, "question_types", where))
        found.append(
            _question(
                str(files.get(row, "questionId", (int, str), where)),
                files.get(row, "question", str, where),
                (_document(images, image),),
                files.texts(row, "answers", where),
                kinds,
                "docvqa",
                config,
            )
        )
    return found


def score(rows: Sequence[benchmark.Row], config: settings.BenchmarkConfig) -> benchmark.Scored:
    """Returns mean ANLS, exact match beside it, and ANLS by type of question."""
    if unscored := benchmark.without_answers(rows, "ANLS"):
        return unscored
    fields: list[dict[str, Any]] = []
    for row in rows:
        value = answers.anls(row["prediction"], row["answers"], rule=benchmark.rule_of(config))
        exact = scorers.exact_match(row["prediction"], row["answers"])
        fields.append({"score": value, "anls": value, "exact_match": exact})
    main = benchmark.mean(field["score"] for field in fields)
    scores: dict[str, Any] = {"ANLS": main, "exact match": benchmark.mean(field["exact_match"] for field in fields)}
    if any(row["group"].get("answer_type") for row in rows):
        scores["by answer type"] = benchmark.by_group(rows, fields, "answer_type")
    return benchmark.Scored(metric="ANLS", score=main, scores=scores, fields=fields)


def write_submission(
    folder: pathlib.Path, rows: Sequence[benchmark.Row], config: settings.BenchmarkConfig, path: pathlib.Path
) -> str:
    """Writes [{"questionId", "answer"}], as the RRC server takes it."""
    del config, path
    content = [{"questionId": _number(row["id"]), "answer": row["prediction"]} for row in rows]
    outputs.write_atomically(folder / "submission.json", json.dumps(content, ensure_ascii=False, indent=1) + "\n")
    return "submission.json"


def _question(name, asked, images, accepted, kind, which, config) -> benchmark.Question:
    return benchmark.Question(
        id=name,
        images=images,
        prompt=prompts.short_answer(asked, benchmark=which, rule=benchmark.rule_of(config)),
        asked=asked,
        answers=tuple(accepted),
        group={"answer_type": kind.split("+")} if kind else {},
    )


def _document(folders: Sequence[pathlib.Path], image: str) -> str:
    """Returns the first path at which the image is, else the one at which it should be."""
    names = dict.fromkeys((image, pathlib.PurePosixPath(image).name))
    paths = [folder / name for folder in folders for name in names]
    return str(next((path for path in paths if path.is_file()), paths[0]))


def _number(name: str) -> int | str:
    return int(name) if name.isdecimal() else name
