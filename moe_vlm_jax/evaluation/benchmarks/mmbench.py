"""MMBench: options in every rotation, right only if all rotations are, and the sheet that its server takes."""

import csv
import pathlib
import re
import typing
from collections.abc import Sequence
from typing import Any

from moe_vlm_jax.data import bad_samples
from moe_vlm_jax.evaluation import settings
from moe_vlm_jax.evaluation.benchmarks import benchmark, choices, files
from moe_vlm_jax.evaluation.benchmarks import spreadsheet as spreadsheet_lib
from moe_vlm_jax.evaluation.rules import choices as choices_rules
from moe_vlm_jax.evaluation.rules import option_matching, prompts
from moe_vlm_jax.evaluation.rules import rule as rule_lib

ROTATION = 1_000_000  # index of a rotated copy = index of the question + k * ROTATION
NAMES = {
    ("en", "dev"): ("mmbench_dev_20230712.tsv", "mmbench_dev_en_20231003.tsv", "MMBench_DEV_EN.tsv"),
    ("en", "test"): ("mmbench_test_20230712.tsv", "mmbench_test_en_20231003.tsv", "MMBench_TEST_EN.tsv"),
    ("cn", "dev"): ("mmbench_dev_cn_20231003.tsv", "MMBench_DEV_CN.tsv"),
    ("cn", "test"): ("mmbench_test_cn_20231003.tsv", "MMBench_TEST_CN.tsv"),
}
_NOT_SENT = ("hint", "category", "source", "image", "comment", "l2-category")
_PREDICTION_AT = 6  # column of the prediction in the server's sheet


def load_en(path: pathlib.Path, config: settings.MmbenchConfig, bad: bad_samples.BadSamples):
    """Returns the questions of the English set: one TSV, images in base64."""
    del bad
    return _load(path, config, "en")


def load_cn(path: pathlib.Path, config: settings.MmbenchConfig, bad: bad_samples.BadSamples):
    """Returns the questions of the Chinese set: one TSV, images in base64."""
    del bad
    return _load(path, config, "cn")


def score(rows: Sequence[benchmark.Row], config: settings.MmbenchConfig) -> benchmark.Scored:
    """Returns circular accuracy, overall and by category; a judge's letter counts where the rules find none."""
    metric = "circular accuracy"
    if unscored := benchmark.without_answers(rows, metric):
        return unscored
    rule = benchmark.rule_of(config)
    matched = [match(row, config) for row in rows]
    letters = [
        found or row.get("verdict") or _last_resort(row, config) for found, row in zip(matched, rows, strict=True)
    ]
    fields = [
        {"score": float(letter == row["answers"][0]), "matched": letter}
        for letter, row in zip(letters, rows, strict=True)
    ]
    replies = [
        choices_rules.MmbenchReply(
            index=row["index"],
            # A judge's letter stands for the reply: the rules read a lone letter as itself.
            prediction=row["prediction"] if found or not row.get("verdict") else row["verdict"],
            options=row["options"],
            answer=row["answers"][0],
            category=row["group"].get("category", ""),
            l2_category=row["group"].get("l2_category", ""),
        )
        for found, row in zip(matched, rows, strict=True)
    ]
    found = choices_rules.circular_scores(replies, rule=rule)
    scores: dict[str, Any] = {metric: 100 * found.overall}
    first = [reply for reply in replies if reply.index < ROTATION]
    if rule == "vlmevalkit":
        scores["accuracy of the first rotations"] = 100 * choices_rules.vanilla_scores(first, rule=rule).overall
    scores["rows in which no option was found"] = found.unmatched
    scores["by category"] = {name: 100 * value for name, value in found.per_category.items()}
    scores["by l2 category"] = {name: 100 * value for name, value in found.per_l2_category.items()}
    rotated = len(rows) > len({row["unit"] for row in rows})
    return benchmark.Scored(
        metric=metric if rotated else "accuracy (the file has no rotations, so NOT circular)",
        score=100 * found.overall,
        scores=scores,
        fields=fields,
        note=f"{rows[0]['file']}, {config.prompt} prompt",
        comparable=rotated,
    )


def match(row: benchmark.Row, config: settings.MmbenchConfig) -> str | None:
    """Returns the letter that the rules find in the answer (Z: a refusal), or None."""
    return choices_rules.match_option(row["prediction"], row["options"], rule=benchmark.rule_of(config))


def _last_resort(row: benchmark.Row, config: settings.MmbenchConfig) -> str | None:
    """Returns the letter of lmms-eval's greedy reader; VLMEvalKit has none."""
    return (
        option_matching.extract_static(row["prediction"], sorted(row["options"]))
        if config.rule == "lmms_eval"
        else None
    )


def write_submission(
    folder: pathlib.Path, rows: Sequence[benchmark.Row], config: settings.MmbenchConfig, path: pathlib.Path
) -> str:
    """Writes submission.xlsx (what the server takes) and submission.tsv (the same for people).

    It is the TSV without what the server has itself, and with the prediction as its seventh column.
    """
    file = _file(path, config, rows[0]["language"])
    said = {row["id"]: row["prediction"] for row in rows}
    table: list[list[str]] = []
    for _, cells in files.read_table(file):
        if not table:
            table.append(_inserted([name for name in cells if name not in _NOT_SENT], "prediction"))
        if cells["index"] in said:
            kept = [text for name, text in cells.items() if name not in _NOT_SENT]
            table.append(_inserted(kept, said[cells["index"]]))
    with (folder / "submission.tsv").open("w", encoding="utf-8", newline="") as out:
        csv.writer(out, delimiter="\t", lineterminator="\n").writerows(table)
    spreadsheet_lib.write(folder / "submission.xlsx", table, numbers="index")
    return "submission.xlsx"


def _load(path: pathlib.Path, config: settings.MmbenchConfig, language) -> list[benchmark.Question]:
    file = _file(path, config, language)
    table = list(files.read_table(file))
    # A rotated copy may name the row that has its image instead of repeating it.
    images = {row.get("index", ""): row.get("image", "") for _, row in table}
    decoded: dict[str, bytes] = {}
    prompt_rule = typing.cast(rule_lib.Rule, config.prompt)
    found = []
    for where, row in table:
        name, asked = files.get(row, "index", str, where), files.get(row, "question", str, where)
        if not name.isdecimal():
            raise ValueError(f"{where}: index={name!r} must be a number; mend the row.")
        number = int(name)
        if str(number % ROTATION) not in images:
            raise ValueError(f"{where}: the file has no row {number % ROTATION}, of which this is a rotation; add it.")
        cell: str = files.get(row, "image", str, where)
        cell = images.get(cell) or cell
        if cell not in decoded:
            decoded[cell] = choices.decoded_image(cell, where)
        letters = {letter: row[letter] or None for letter in "ABCDE" if letter in row}  # an empty cell is a missing one
        options = prompts.present_options(letters, rule=benchmark.rule_of(config))
        shown = prompts.present_options(letters, rule=prompt_rule)
        answer = row.get("answer", "")
        if answer and answer not in options:
            raise ValueError(f"{where}: answer={answer!r} is none of its options {''.join(options)}; mend the row.")
        found.append(
            benchmark.Question(
                id=name,
                images=(decoded[cell],),
                prompt=prompts.mmbench(
                    asked, hint=row.get("hint") or None, options=shown, language=language, rule=prompt_rule
                ),
                asked=asked,
                answers=(answer,) if answer else (),
                group={
                    key: row[column]
                    for key, column in (("category", "category"), ("l2_category", "l2-category"))
                    if row.get(column)
                },
                unit=str(number % ROTATION),
                fields={"options": options, "index": number, "file": file.name, "language": language},
            )
        )
    return found


def _file(path: pathlib.Path, config: settings.MmbenchConfig, language: str) -> pathlib.Path:
    if path.suffix == ".tsv" and path.is_file():
        return path
    return files.find(path, NAMES[language, config.split], what=f"MMBench {config.split} ({language})")


def _inserted(cells: list[str], value: str) -> list[str]:
    return [*cells[:_PREDICTION_AT], value, *cells[_PREDICTION_AT:]]


def _extraction_prompt(row: benchmark.Row, config: settings.MmbenchConfig) -> str:
    del config
    options = "\n".join(f"{letter}. {text}" for letter, text in row["options"].items())
    return (
        "A model was asked to choose an option, and its reply names it in other words. Which option does it mean?\n\n"
        f"Question: {row['asked']}\nOptions:\n{options}\nReply: {row['prediction']}\n\n"
        f"Write one letter and nothing else: {', '.join(row['options'])}, or Z if it means none of them."
    )


def _letter(reply: str, config: settings.MmbenchConfig) -> str | None:
    del config
    found = re.fullmatch(r"\W*([A-DZ])\W*", reply.strip())
    return found[1] if found else None


JUDGE = benchmark.JudgeTask(
    needed=lambda row, config: bool(row["answers"]) and match(row, config) is None,
    prompt=_extraction_prompt,
    retry_prompt=_extraction_prompt,
    parse=_letter,
    offline=None,
    offline_name="rule matching only (no LLM extraction)",
    required=False,
    label="option chosen by {judge} where the rules find none",
    official_models=(),
    max_tokens=8,
    temperature=0.0,
    temperature_step=0.5,
)
