"""ScienceQA and AI2D: one letter of several options. MMBench has a module of its own."""

import base64
import binascii
import pathlib
from collections.abc import Sequence
from typing import Any

from moe_vlm_jax.data import bad_samples
from moe_vlm_jax.evaluation import settings
from moe_vlm_jax.evaluation.benchmarks import benchmark, files
from moe_vlm_jax.evaluation.rules import choices, prompts

LETTERS = "ABCDEFGHIJ"
_STORED = "llava_test_CQM-A.json"  # LLaVA's prompts of the test split


def load_scienceqa(
    path: pathlib.Path, config: settings.ScienceQaConfig, bad: bad_samples.BadSamples
) -> list[benchmark.Question]:
    """Returns the questions of a split that have an image, and the others where text_questions is set.

    problems.json    pid_splits.json    images/test/<id>/image.png, or test/<id>/image.png
    llava_test_CQM-A.json: rule llava asks its prompts, which no other file holds (split test only)
    """
    del bad
    what = f"ScienceQA {config.split}"
    stored = _stored(path, config.split) if config.rule == "llava" else {}
    file = files.find(path, ["problems.json", "data/scienceqa/problems.json"], what=what)
    problems = files.read_json(file, dict)
    splits = files.find(file.parent, ["pid_splits.json"], what=what)
    numbers = files.get(files.read_json(splits, dict), config.split, list, str(splits))
    part = config.split.removeprefix("mini")  # of minival and minitest, which are parts of val and test
    images = next((p for p in (path / "images" / part, path / part, path / "images") if p.is_dir()), None)
    found = []
    for number in map(str, numbers):
        where = f"{file}: {number!r}"
        row = files.get(problems, number, dict, str(file))
        if not row.get("image") and not config.text_questions:
            continue
        if row.get("image") and images is None:
            images = files.find_folder(path, (f"images/{part}", part), what=what)
        options = files.texts(row, "choices", where)
        answer = files.get(row, "answer", int, where)
        if not 0 <= answer < len(options):
            raise ValueError(f"{where}: answer={answer} is no index of its {len(options)} choices; mend the row.")
        asked = files.get(row, "question", str, where)
        if config.rule == "llava" and number not in stored:
            raise ValueError(f"{where} has no prompt in {_STORED}; fetch both files again.")
        prompt = stored.get(number) or prompts.scienceqa(
            asked, hint=row.get("hint") or "", choices=options, rule=benchmark.rule_of(config)
        )
        found.append(
            benchmark.Question(
                id=number,
                images=(str(images / number / row["image"]),) if row.get("image") and images is not None else (),
                prompt=prompt,
                asked=asked,
                answers=(LETTERS[answer],),
                group={key: row[key] for key in ("subject", "topic", "category", "grade") if row.get(key)},
                fields={"options": dict(zip(LETTERS, options, strict=False))},
            )
        )
    return found


def score_scienceqa(rows: Sequence[benchmark.Row], config: settings.ScienceQaConfig) -> benchmark.Scored:
    """Returns the accuracy of image questions, that of all beside it, and accuracy by subject."""
    rule = benchmark.rule_of(config)
    replies = [
        choices.ScienceReply(
            prediction=row["prediction"],
            answer_index=LETTERS.index(row["answers"][0]),
            num_choices=len(row["options"]),
            has_image=bool(row["images"]),
        )
        for row in rows
    ]
    fields = [
        {
            "score": float(
                choices.science_correct(
                    row["prediction"], answer_index=reply.answer_index, num_choices=reply.num_choices, rule=rule
                )
            ),
            "parsed": choices.parse_science(row["prediction"], rule=rule),
        }
        for row, reply in zip(rows, replies, strict=True)
    ]
    found = choices.science_scores(replies, rule=rule)
    main = None if found.image_accuracy is None else 100 * found.image_accuracy
    scores: dict[str, Any] = {} if main is None else {"IMG accuracy": main}
    if config.text_questions:
        scores["accuracy of all"] = 100 * found.accuracy
    if any("subject" in row["group"] for row in rows):
        scores["by subject"] = benchmark.by_group(rows, fields, "subject")
    return benchmark.Scored(metric="IMG accuracy", score=main, scores=scores, fields=fields)


def load_ai2d(
    path: pathlib.Path, config: settings.BenchmarkConfig, bad: bad_samples.BadSamples
) -> list[benchmark.Question]:
    """Returns the questions of the test split: AI2D_TEST.tsv, or the parquet files of the HF mirror."""
    del bad
    what = f"AI2D {config.split}"
    parquet = sorted(path.glob("test-*.parquet")) or sorted((path / "data").glob("test-*.parquet"))
    rows = _parquet(parquet) if parquet else _tsv(files.find(path, ["AI2D_TEST.tsv"], what=what))
    return [
        benchmark.Question(
            id=name,
            images=(image,),
            prompt=prompts.ai2d(asked, options=options, rule=benchmark.rule_of(config)),
            asked=asked,
            answers=(answer,),
            fields={"options": dict(zip(LETTERS, options, strict=False))},
        )
        for name, asked, options, answer, image in rows
    ]


def score_ai2d(rows: Sequence[benchmark.Row], config: settings.BenchmarkConfig) -> benchmark.Scored:
    """Returns accuracy."""
    rule = benchmark.rule_of(config)
    fields = [
        {
            "score": float(choices.ai2d_correct(row["prediction"], row["options"], row["answers"][0], rule=rule)),
            "parsed": choices.parse_ai2d(row["prediction"], row["options"], rule=rule),
        }
        for row in rows
    ]
    main = benchmark.mean(field["score"] for field in fields)
    return benchmark.Scored(metric="accuracy", score=main, scores={"accuracy": main}, fields=fields)


def decoded_image(cell: str, where: str) -> bytes:
    """Returns the encoded file that a table's cell holds in base64."""
    try:
        return base64.b64decode(cell, validate=True)
    except binascii.Error as error:
        raise ValueError(f"{where}: image {cell[:20]!r}... is not base64 ({error}); fetch the file again.") from error


def _stored(path: pathlib.Path, split: str) -> dict[str, str]:
    """Returns LLaVA's prompts by id."""
    remedy = "--config.scienceqa.rule=lmms_eval needs no such file (another prompt, another rule)"
    if split != "test":
        raise ValueError(f"scienceqa.split={split!r}: LLaVA's prompts are those of split 'test'; {remedy}.")
    try:
        file = files.find(path, [_STORED], what="ScienceQA, rule llava")
    except ValueError as error:
        raise ValueError(f"{error} {remedy}.") from error
    found = {}
    for i, row in enumerate(files.read_json(file, list)):
        turns = files.get(row, "conversations", list, f"{file}[{i}]")
        text = files.get(turns[0] if turns else {}, "value", str, f"{file}[{i}]")
        found[str(row.get("id"))] = prompts.scienceqa_stored(text)
    return found


def _tsv(file: pathlib.Path):
    cells: dict[str, str] = {}
    for where, row in files.read_table(file):
        name = files.get(row, "index", str, where)
        options = [row[letter] for letter in LETTERS[:4] if row.get(letter)]
        answer, cell = files.get(row, "answer", str, where), files.get(row, "image", str, where)
        if answer not in LETTERS[: len(options)]:
            raise ValueError(f"{where}: answer={answer!r} is none of its {len(options)} options; mend the row.")
        image: str = cells.get(cell) or cell  # a row may name an earlier one that has its image
        cells[name] = image
        yield name, files.get(row, "question", str, where), options, answer, decoded_image(image, where)


def _parquet(parts: Sequence[pathlib.Path]):
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError(
            f"{parts[0].name} is a parquet file, which needs pyarrow; install it (pip install moe_vlm_jax[parquet])."
        ) from error
    number = 0
    for part in parts:
        for batch in parquet.ParquetFile(part).iter_batches(batch_size=64):
            for row in batch.to_pylist():
                where, number = f"{part}[{number}]", number + 1
                options = files.texts(row, "options", where)
                answer, image = str(row.get("answer")), (row.get("image") or {}).get("bytes")
                if not answer.isdecimal() or int(answer) >= len(options) or image is None:
                    raise ValueError(
                        f"{where}: answer={answer!r} of {len(options)} options, image {'there' if image else 'missing'}"
                        "; a row needs an index and image bytes; fetch the file again."
                    )
                yield str(number - 1), files.get(row, "question", str, where), options, LETTERS[int(answer)], image
