"""GQA, ChartQA and the embedded synthetic infographics: one short answer, right or wrong."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from moe_vlm_jax import config as config_lib
from moe_vlm_jax.data import bad_samples, sources
from moe_vlm_jax.evaluation import blind, outputs, scorers, settings
from moe_vlm_jax.evaluation.benchmarks import benchmark, files
from moe_vlm_jax.evaluation.rules import charts, gqa, prompts

CHARTQA_KINDS = ("human", "augmented")


def load_gqa(
    path: pathlib.Path, config: settings.BenchmarkConfig, bad: bad_samples.BadSamples
) -> list[benchmark.Question]:
    """Returns the questions of a split: <split>_questions.json, images/<imageId>.jpg."""
    del bad
    what, name = f"GQA {config.split}", f"{config.split}_questions.json"
    file = files.find(path, [name, f"questions1.2/{name}", f"questions/{name}", f"data/{name}"], what=what)
    images = files.find_folder(path, ("images", "data/images"), what=what)
    found = []
    for number, row in files.read_json(file, dict).items():
        where = f"{file}: {number!r}"
        asked = files.get(row, "question", str, where)
        kinds = row.get("types") or {}
        found.append(
            benchmark.Question(
                id=number,
                images=(str(images / f"{files.get(row, 'imageId', str, where)}.jpg"),),
                prompt=prompts.short_answer(asked, benchmark="gqa", rule=benchmark.rule_of(config)),
                asked=asked,
                answers=(row["answer"],) if isinstance(row.get("answer"), str) else (),
                group={key: kinds[key] for key in ("structural", "semantic") if isinstance(kinds.get(key), str)},
                fields={
                    "balanced": bool(row.get("isBalanced", True)),
                    "distribution_group": (row.get("groups") or {}).get("global"),
                },
            )
        )
    return found


def score_gqa(rows: Sequence[benchmark.Row], config: settings.BenchmarkConfig) -> benchmark.Scored:
    """Returns accuracy, and that of binary and open questions where the rule has them."""
    if unscored := benchmark.without_answers(rows, "accuracy"):
        return unscored
    rule = benchmark.rule_of(config)
    fields = [
        {
            "score": float(gqa.gqa_correct(row["prediction"], row["answers"][0], rule=rule)),
            "parsed": gqa.parse_gqa(row["prediction"], rule=rule),
        }
        for row in rows
    ]
    replies = [
        gqa.GqaReply(
            prediction=row["prediction"],
            answer=row["answers"][0],
            balanced=row["balanced"],
            structural=row["group"].get("structural", ""),
            group=row["distribution_group"],
        )
        for row in rows
    ]
    found = gqa.gqa_scores(replies, rule=rule)
    scores: dict[str, Any] = {"accuracy": 100 * found.accuracy}
    scores |= {k: 100 * v for k, v in (("binary", found.binary), ("open", found.open)) if v is not None}
    scores |= (
        {} if found.distribution is None else {"distribution (chi-square / 100, lower is better)": found.distribution}
    )
    if any("structural" in row["group"] for row in rows):
        scores["by structural type"] = benchmark.by_group(rows, fields, "structural")
    return benchmark.Scored(metric="accuracy", score=100 * found.accuracy, scores=scores, fields=fields)


def write_gqa(
    folder: pathlib.Path, rows: Sequence[benchmark.Row], config: settings.BenchmarkConfig, path: pathlib.Path
) -> str:
    """Writes [{"questionId", "prediction"}]."""
    del path
    rule = benchmark.rule_of(config)
    content = [{"questionId": row["id"], "prediction": gqa.parse_gqa(row["prediction"], rule=rule)} for row in rows]
    outputs.write_atomically(folder / "submission.json", json.dumps(content, ensure_ascii=False) + "\n")
    return "submission.json"


def load_chartqa(
    path: pathlib.Path, config: settings.BenchmarkConfig, bad: bad_samples.BadSamples
) -> list[benchmark.Question]:
    """Returns the questions of a split: test/test_human.json and test_augmented.json, test/png/<imgname>."""
    del bad
    split, what = config.split, f"ChartQA {config.split}"
    images = files.find_folder(path, (f"{split}/png", f"ChartQA Dataset/{split}/png"), what=what)
    found = []
    for kind in CHARTQA_KINDS:
        file = files.find(images.parent, [f"{split}_{kind}.json"], what=what)
        for i, row in enumerate(files.read_json(file, list)):
            where = f"{file}[{i}]"
            asked = files.get(row, "query", str, where)
            found.append(
                benchmark.Question(
                    id=f"{kind}-{i}",
                    images=(str(images / files.get(row, "imgname", str, where)),),
                    prompt=prompts.short_answer(asked, benchmark="chartqa", rule=benchmark.rule_of(config)),
                    asked=asked,
                    answers=(str(files.get(row, "label", (str, int, float), where)),),
                    group={"type": kind},
                )
            )
    return found


def score_chartqa(rows: Sequence[benchmark.Row], config: settings.BenchmarkConfig) -> benchmark.Scored:
    """Returns relaxed accuracy (5 %), also of people's and of generated questions."""
    rule = benchmark.rule_of(config)
    fields: list[dict[str, Any]] = [
        {"score": charts.relaxed_accuracy(row["prediction"], row["answers"], rule=rule)} for row in rows
    ]
    main = benchmark.mean(field["score"] for field in fields)
    scores = {"relaxed accuracy": main, "by type": benchmark.by_group(rows, fields, "type")}
    return benchmark.Scored(metric="relaxed accuracy", score=main, scores=scores, fields=fields)


def load_embedded(
    path: pathlib.Path, config: settings.EmbeddedConfig, bad: bad_samples.BadSamples
) -> list[benchmark.Question]:
    """Returns the questions of a split of the embedded synthetic set, rendered into `path` if need be."""
    del bad
    cache = "" if path == pathlib.Path() else str(path)
    data = config_lib.DataConfig(source="embedded", difficulty=config.difficulty, cache=cache)
    return [
        benchmark.Question(
            id=record.id,
            images=record.images,
            prompt=blind.question_of(record),
            asked=blind.question_of(record),
            answers=record.answers,
            group={"answer_type": record.answer_type},
        )
        for record in sources.load_records(data, config.split)
        if record.answer_type != "caption"
    ]


def score_embedded(rows: Sequence[benchmark.Row], config: settings.EmbeddedConfig) -> benchmark.Scored:
    """Returns exact match and ANLS, overall and by type of answer."""
    fields: list[dict[str, Any]] = []
    for row in rows:
        exact = scorers.exact_match(row["prediction"], row["answers"])
        fields.append({"score": exact, "exact_match": exact, "anls": scorers.anls(row["prediction"], row["answers"])})
    main = benchmark.mean(field["score"] for field in fields)
    scores = {
        "exact match": main,
        "ANLS": benchmark.mean(field["anls"] for field in fields),
        "by answer type": benchmark.by_group(rows, fields, "answer_type"),
    }
    note = f"synthetic infographics ({config.difficulty}), not InfographicVQA"
    return benchmark.Scored(metric="exact match", score=main, scores=scores, fields=fields, note=note)
