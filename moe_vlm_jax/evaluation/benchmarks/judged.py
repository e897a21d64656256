"""MM-Vet and LLaVA-Bench (in the wild): open answers that a judge grades.

The official texts for judges are files that a user gives (judge_prompt). Without them, the judge is asked in this
project's own words, and the label says so.
"""

import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from moe_vlm_jax.data import bad_samples
from moe_vlm_jax.evaluation import outputs, scorers, settings
from moe_vlm_jax.evaluation.benchmarks import benchmark, files
from moe_vlm_jax.evaluation.rules import judged, prompts

CAPABILITIES = ("rec", "ocr", "know", "gen", "spat", "math")
_AND, _OR = "<AND>", "<OR>"
# In MM-Vet's place for its own instruction, when no file gives that.
_GRADER = """Grade how right a prediction is, from 0.0 (wrong) to 1.0 (right), in steps of 0.1. Where the ground truth
has parts joined by <AND>, all of them are needed for 1.0, and some of them earn a share; of parts joined by <OR>, one
is enough. Write the missing last cell of the table, one number and nothing else.

Question | Ground truth | Prediction | Correctness
--- | --- | --- | ---
"""
_REVIEWER = """Above are a question about an image that you cannot see, described in the context, and two answers.
Grade each from 1 to 10 for how helpful, relevant, accurate and detailed it is; their order must not matter. Write the
two grades on the first line, the first answer's first, with one space between them and nothing else. Then explain."""


def load_mmvet(
    path: pathlib.Path, config: settings.JudgedConfig, bad: bad_samples.BadSamples
) -> list[benchmark.Question]:
    """Returns the questions: mm-vet.json, images/<imagename>."""
    del bad
    file = files.find(path, ["mm-vet.json", "mm-vet/mm-vet.json"], what="MM-Vet")
    images = files.find_folder(file.parent, ("images",), what="MM-Vet")
    found = []
    for name, row in files.read_json(file, dict).items():
        where = f"{file}: {name!r}"
        asked = files.get(row, "question", str, where)
        capability = files.texts(row, "capability", where)
        if not capability or not set(capability) <= set(CAPABILITIES):
            raise ValueError(
                f"{where}: capability={list(capability)} must be some of {', '.join(CAPABILITIES)}; mend it."
            )
        found.append(
            benchmark.Question(
                id=name,
                images=(str(images / files.get(row, "imagename", str, where)),),
                prompt=prompts.open_ended(asked, benchmark="mmvet", rule=benchmark.rule_of(config)),
                asked=asked,
                answers=(files.get(row, "answer", str, where),),
                group={"capability": list(capability)},
            )
        )
    return found


def score_mmvet(rows: Sequence[benchmark.Row], config: settings.JudgedConfig) -> benchmark.Scored:
    """Returns the total, and scores by capability and by set of capabilities; None unless every answer is graded."""
    grades = [row.get("verdict") for row in rows]
    fields = [{"score": grade} for grade in grades]
    if None in grades:
        return benchmark.Scored(metric="MM-Vet score", score=None, scores={}, fields=fields)
    found = judged.mmvet_scores(
        [
            judged.MmvetGrade(capability=row["group"]["capability"], score=float(grade or 0))
            for row, grade in zip(rows, grades, strict=True)
        ],
        rule=benchmark.rule_of(config),
    )
    scores: dict[str, Any] = {"total": found.total, "by capability": dict(found.per_capability)}
    if found.per_capability_set:
        scores["by set of capabilities"] = dict(found.per_capability_set)
    return benchmark.Scored(metric="MM-Vet score", score=found.total, scores=scores, fields=fields)


def write_mmvet(
    folder: pathlib.Path, rows: Sequence[benchmark.Row], config: settings.JudgedConfig, path: pathlib.Path
) -> str:
    """Writes {"v1_0": answer, ...}, as MM-Vet's online evaluator takes it."""
    del config, path
    content = {row["id"]: row["prediction"] for row in rows}
    outputs.write_atomically(folder / "submission.json", json.dumps(content, ensure_ascii=False, indent=1) + "\n")
    return "submission.json"


def load_llavabench(
    path: pathlib.Path, config: settings.JudgedConfig, bad: bad_samples.BadSamples
) -> list[benchmark.Question]:
    """Returns the questions: questions.jsonl, context.jsonl, answers_gpt4.jsonl, images/."""
    del bad
    what = "LLaVA-Bench"
    file = files.find(path, ["questions.jsonl"], what=what)
    context = _captions(files.find(path, ["context.jsonl"], what=what))
    references = list(files.read_lines(files.find(path, ["answers_gpt4.jsonl"], what=what)))
    images = files.find_folder(path, ("images",), what=what)
    asked_rows = list(files.read_lines(file))
    if len(references) != len(asked_rows):
        raise ValueError(
            f"{file}: {len(asked_rows)} questions, but answers_gpt4.jsonl has {len(references)}; they go together line "
            "by line; fetch both again."
        )
    found = []
    for (where, row), (other, reference) in zip(asked_rows, references, strict=True):
        name = str(files.get(row, "question_id", (int, str), where))
        if str(reference.get("question_id")) != name:
            raise ValueError(f"{other}: question_id={reference.get('question_id')!r}, but {where} has {name!r}; sort.")
        image, asked = files.get(row, "image", str, where), files.get(row, "text", str, where)
        if image not in context:
            raise ValueError(f"{where}: image {image!r} has no caption in context.jsonl; fetch both again.")
        found.append(
            benchmark.Question(
                id=name,
                images=(str(images / image),),
                prompt=prompts.open_ended(asked, benchmark="llava_bench", rule=benchmark.rule_of(config)),
                asked=asked,
                answers=(files.get(reference, "text", str, other),),
                group={"category": files.get(row, "category", str, where)},
                fields={"context": context[image]},
            )
        )
    return found


def score_llavabench(rows: Sequence[benchmark.Row], config: settings.JudgedConfig) -> benchmark.Scored:
    """Returns the relative score, overall and by category; None unless every answer is graded."""
    pairs = [row.get("verdict") for row in rows]
    fields = [{"score": None if pair is None else pair[1] / 10} for pair in pairs]
    if None in pairs:
        return benchmark.Scored(metric="relative score", score=None, scores={}, fields=fields)
    found = judged.relative_scores(
        [
            judged.Review(category=row["group"]["category"], reference=pair[0], model=pair[1])
            for row, pair in zip(rows, pairs, strict=True)
            if pair is not None
        ],
        rule=benchmark.rule_of(config),
    )
    scores: dict[str, Any] = {
        name: {"relative": part.relative, "reference": part.reference, "model": part.model}
        for name, part in found.items()
    }
    return benchmark.Scored(metric="relative score", score=found["all"].relative, scores=scores, fields=fields)


def write_llavabench(
    folder: pathlib.Path, rows: Sequence[benchmark.Row], config: settings.JudgedConfig, path: pathlib.Path
) -> str:
    """Writes LLaVA's answer file, one {"question_id", "prompt", "text", "metadata"} a line."""
    del config, path
    lines = [
        {"question_id": _number(row["id"]), "prompt": row["question"], "text": row["prediction"], "metadata": {}}
        for row in rows
    ]
    outputs.write_predictions(folder / "submission.jsonl", lines)
    return "submission.jsonl"


def _mmvet_prompt(row: benchmark.Row, config: settings.JudgedConfig) -> str:
    instruction = _text(config.judge_prompt) if config.judge_prompt else _GRADER
    return judged.mmvet_prompt(
        row["asked"], row["answers"][0], row["prediction"], instruction=instruction, rule=benchmark.rule_of(config)
    )


def _mmvet_retry(row: benchmark.Row, config: settings.JudgedConfig) -> str:
    return judged.mmvet_retry_prompt(_mmvet_prompt(row, config))


def _mmvet_parse(reply: str, config: settings.JudgedConfig) -> float | None:
    return judged.parse_mmvet_grade(reply, rule=benchmark.rule_of(config))


def contained(row: benchmark.Row) -> float:
    """Returns the share of the answer's <AND> parts of which the prediction holds one <OR> alternative, as words.

    >>> contained({"answers": ["two<OR>2<AND>red cars"], "prediction": "There are 2 cars."})
    0.5
    """
    said = _words(row["prediction"])
    parts = [[_words(text) for text in part.split(_OR)] for part in row["answers"][0].split(_AND)]
    return sum(any(text in said for text in part) for part in parts) / len(parts)


def _llavabench_prompt(row: benchmark.Row, config: settings.JudgedConfig) -> str:
    role, rubric = "Assistant", _REVIEWER
    if config.judge_prompt:
        role, rubric = _review_rule(config.judge_prompt, row["group"]["category"])
    return judged.review_prompt(
        row["asked"], row["answers"][0], row["prediction"], context=row["context"], role=role, rubric=rubric
    )


def _llavabench_parse(reply: str, config: settings.JudgedConfig) -> list[float] | None:
    pair = judged.parse_review(reply, rule=benchmark.rule_of(config))
    return list(pair) if all(0 <= grade <= 10 for grade in pair) else None


def overlap(row: benchmark.Row) -> list[float]:
    """Returns [10, 10 * F1 of the words]: how far the answer has the reference's words, as a pair of grades.

    >>> overlap({"answers": ["a red car"], "prediction": "The car is red."})
    [10.0, 5.714285714285714]
    """
    reference, said = (_words(text).split() for text in (row["answers"][0], row["prediction"]))
    common = sum(min(reference.count(word), said.count(word)) for word in set(reference))
    return [10.0, 20 * common / (len(reference) + len(said)) if common else 0.0]


def _review_rule(file: str, category: str) -> tuple[str, str]:
    """Returns (role, prompt) of LLaVA's rule.json."""
    content: Mapping = files.read_json(pathlib.Path(file), dict)
    rule = content.get(f"llava_bench_{category}", content.get(category))
    where = f"{file}: 'llava_bench_{category}'"
    return files.get(rule, "role", str, where), files.get(rule, "prompt", str, where)


def _text(file: str) -> str:
    path = pathlib.Path(file)
    if not path.is_file():
        raise ValueError(f"judge_prompt={file!r} is no file; give one, or leave it empty.")
    return path.read_text(encoding="utf-8")


def _captions(file: pathlib.Path) -> dict[str, str]:
    found = {}
    for where, row in files.read_lines(file):
        caption = row.get("caption")
        lines = caption if isinstance(caption, list) else [files.get(row, "caption", str, where)]
        found[files.get(row, "image", str, where)] = "\n".join(map(str, lines))
    return found


def _words(text: str) -> str:
    """Returns the words between blanks, with one at each end, so that only whole words are contained."""
    return " ".join(["", *re.findall(r"[^\W_]+", scorers.normalize(text)), ""])


def _number(name: str) -> int | str:
    return int(name) if name.isdecimal() else name


MMVET = benchmark.JudgeTask(
    needed=lambda row, config: True,
    prompt=_mmvet_prompt,
    retry_prompt=_mmvet_retry,
    parse=_mmvet_parse,
    offline=lambda row, config: contained(row),
    offline_name="share of the answer's parts that the prediction contains",
    required=True,
    label="MM-Vet questions, scorer = {judge}; NOT the GPT-4 MM-Vet score",
    official_models=("gpt-4-0613",),
    max_tokens=3,
    temperature=0.0,
    temperature_step=0.5,
)
LLAVABENCH = benchmark.JudgeTask(
    needed=lambda row, config: True,
    prompt=_llavabench_prompt,
    retry_prompt=_llavabench_prompt,
    parse=_llavabench_parse,
    offline=lambda row, config: overlap(row),
    offline_name="overlap of words with the reference answer",
    required=True,
    label="LLaVA-Bench-W relative score, judge = {judge}; not comparable with GPT-4-judged numbers",
    official_models=("gpt-4-0314",),
    max_tokens=1024,
    temperature=0.2,
    temperature_step=0.0,
)
