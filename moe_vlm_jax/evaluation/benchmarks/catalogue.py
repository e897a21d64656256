"""All benchmarks by name, and what is wrong with the settings of one."""

import pathlib

from moe_vlm_jax.evaluation import settings
from moe_vlm_jax.evaluation.benchmarks import benchmark, choices, documents, judged, mmbench, short_answers, vqa, yes_no

_VQA = ("llava", "vlmevalkit", "lmms_eval")
_KITS = ("vlmevalkit", "lmms_eval")

BENCHMARKS: dict[str, benchmark.Benchmark] = {
    "embedded": benchmark.Benchmark(
        title="embedded set",
        folder="",
        rules=("vlmevalkit",),
        splits=("val", "test", "train"),
        load=short_answers.load_embedded,
        score=short_answers.score_embedded,
    ),
    "infovqa": benchmark.Benchmark(
        title="InfographicVQA",
        folder="infographicvqa",
        rules=_KITS,
        splits=("val", "test", "train"),
        closed=("test",),
        load=documents.load_infovqa,
        score=documents.score,
        write_submission=documents.write_submission,
    ),
    "docvqa": benchmark.Benchmark(
        title="DocVQA",
        folder="docvqa",
        rules=_KITS,
        splits=("val", "test", "train"),
        closed=("test",),
        load=documents.load_docvqa,
        score=documents.score,
        write_submission=documents.write_submission,
    ),
    "textvqa": benchmark.Benchmark(
        title="TextVQA",
        folder="textvqa",
        rules=_VQA,
        splits=("val", "train"),
        load=vqa.load_textvqa,
        score=vqa.score_textvqa,
    ),
    "vqav2": benchmark.Benchmark(
        title="VQAv2",
        folder="vqav2",
        rules=_VQA,
        splits=("val2014", "train2014", *vqa.VQAV2_CLOSED),
        closed=vqa.VQAV2_CLOSED,
        load=vqa.load_vqav2,
        score=vqa.score_vqav2,
        write_submission=vqa.write_vqav2,
    ),
    "vizwiz": benchmark.Benchmark(
        title="VizWiz",
        folder="vizwiz",
        rules=_VQA,
        splits=("val", "train", "test"),
        closed=("test",),
        load=vqa.load_vizwiz,
        score=vqa.score_vizwiz,
        write_submission=vqa.write_vizwiz,
    ),
    "gqa": benchmark.Benchmark(
        title="GQA",
        folder="gqa",
        rules=_VQA,
        splits=("testdev_balanced", "val_balanced", "testdev_all", "test_balanced", "submission_all"),
        closed=("test_balanced", "submission_all"),
        load=short_answers.load_gqa,
        score=short_answers.score_gqa,
        write_submission=short_answers.write_gqa,
    ),
    "scienceqa": benchmark.Benchmark(
        title="ScienceQA",
        folder="scienceqa",
        rules=("llava", "lmms_eval"),
        splits=("test", "val", "minitest", "minival"),
        load=choices.load_scienceqa,
        score=choices.score_scienceqa,
    ),
    "pope": benchmark.Benchmark(
        title="POPE",
        folder="pope",
        rules=_VQA,
        splits=("test",),
        load=yes_no.load_pope,
        score=yes_no.score_pope,
    ),
    "mme": benchmark.Benchmark(
        title="MME",
        folder="mme",
        rules=("official", "vlmevalkit", "lmms_eval"),
        splits=("test",),
        load=yes_no.load_mme,
        score=yes_no.score_mme,
    ),
    **{
        name: benchmark.Benchmark(
            title=title,
            folder="mmbench",
            rules=rules,
            splits=("dev", "test"),
            closed=("test",),
            load=load,
            score=mmbench.score,
            write_submission=mmbench.write_submission,
            judge=mmbench.JUDGE,
        )
        for name, title, rules, load in (
            ("mmbench", "MMBench", _KITS, mmbench.load_en),
            ("mmbench_cn", "MMBench-CN", ("vlmevalkit",), mmbench.load_cn),
        )
    },
    "ai2d": benchmark.Benchmark(
        title="AI2D",
        folder="ai2d",
        rules=("lmms_eval", "vlmevalkit"),
        splits=("test",),
        load=choices.load_ai2d,
        score=choices.score_ai2d,
    ),
    "chartqa": benchmark.Benchmark(
        title="ChartQA",
        folder="chartqa",
        rules=("lmms_eval", "vlmevalkit"),
        splits=("test", "val", "train"),
        load=short_answers.load_chartqa,
        score=short_answers.score_chartqa,
    ),
    "mmvet": benchmark.Benchmark(
        title="MM-Vet",
        folder="mm-vet",
        rules=_VQA,
        splits=("test",),
        load=judged.load_mmvet,
        score=judged.score_mmvet,
        write_submission=judged.write_mmvet,
        judge=judged.MMVET,
    ),
    "llavabench": benchmark.Benchmark(
        title="LLaVA-Bench",
        folder="llava-bench-in-the-wild",
        rules=_VQA,
        splits=("test",),
        load=judged.load_llavabench,
        score=judged.score_llavabench,
        write_submission=judged.write_llavabench,
        judge=judged.LLAVABENCH,
    ),
}


def check(config: settings.EvaluateConfig) -> None:
    """Checks rule, split and judge of every chosen benchmark.

    Raises:
      ValueError: all mistakes, one line each.
    """
    mistakes = []
    chosen = settings.chosen(config)
    for name in chosen:
        known, mine = BENCHMARKS[name], settings.benchmark(config, name)
        if mine.rule not in known.rules:
            mistakes.append(
                f"{name}.rule={mine.rule!r} is unknown; {known.title} has {', '.join(known.rules)}; use one."
            )
        if mine.split not in known.splits:
            mistakes.append(
                f"{name}.split={mine.split!r} is unknown; {known.title} has {', '.join(known.splits)}; use one."
            )
        if known.judge is not None and known.judge.required and not config.judge:
            mistakes.append(
                f"{name} is graded by a judge, and judge='' names none; use --config.judge=endpoint (with "
                "endpoint.url and endpoint.model), --config.judge=offline (a rule, labelled as such; its figures do "
                "not compare with published ones) or --config.judge=none (answers are written, not graded)."
            )
    judged_sets = [name for name in chosen if BENCHMARKS[name].judge is not None]
    if config.judge and not judged_sets:
        mistakes.append(f"judge={config.judge!r} has no effect: none of {', '.join(chosen)} has a judge; leave it out.")
    if mistakes:
        raise ValueError("\n".join(mistakes))


def data_path(config: settings.EvaluateConfig, name: str) -> pathlib.Path:
    """Returns where the files of a benchmark are; '.' for the embedded set without a path."""
    mine = settings.benchmark(config, name)
    if mine.path:
        return pathlib.Path(mine.path).expanduser()
    return (
        pathlib.Path() if name == "embedded" else pathlib.Path(config.data_root).expanduser() / BENCHMARKS[name].folder
    )
