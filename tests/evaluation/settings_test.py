"""The settings of an evaluation: every mistake is named before anything is read."""

import dataclasses

import pytest

from moe_vlm_jax.evaluation import settings
from moe_vlm_jax.evaluation.benchmarks import catalogue
from moe_vlm_jax.evaluation.rules import prompts


def config(**values) -> settings.EvaluateConfig:
    return settings.EvaluateConfig(**{"workdir": "runs/sft"} | values)


def test_the_defaults_are_valid_once_a_model_is_named():
    settings.validate(config())
    settings.validate(config(workdir="", checkpoint="folder", dtype="bfloat16", template="phi"))


MISTAKES = {
    "no model": ({"workdir": ""}, r"workdir='' and checkpoint='': give one of them"),
    "two models": ({"checkpoint": "x"}, "give one of them"),
    "useless": ({"template": "phi"}, "template='phi' has no effect with workdir"),
    "dtype": ({"workdir": "", "checkpoint": "x", "dtype": "float16"}, "dtype='float16' is unknown"),
    "benchmark": ({"benchmarks": "pope,mmbnech"}, "'mmbnech' is unknown; .*did you mean 'mmbench'"),
    "twice": ({"benchmarks": "pope, pope"}, "'pope' is named 2 times"),
    "none": ({"benchmarks": " ,"}, "names none"),
    "judge": ({"judge": "gpt-4"}, "judge='gpt-4' is unknown"),
    "endpoint": ({"judge": "endpoint"}, r"needs endpoint\.url .* and endpoint\.model"),
    "useless endpoint": ({"endpoint": settings.EndpointConfig(url="http://x")}, r"endpoint\.\* has no effect"),
    "url": (
        {"judge": "endpoint", "endpoint": settings.EndpointConfig(url="x/v1", model="m")},
        r"endpoint\.url='x/v1' must start with http",
    ),
    "chunk": ({"chunk": 0}, "chunk=0 is out of range"),
    "policy": ({"on_bad_sample": "skip"}, "on_bad_sample='skip' is unknown"),
    "type": ({"batch_size": "many"}, "batch_size='many' must be of type int"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_named_with_its_value(case):
    values, message = MISTAKES[case]
    with pytest.raises(ValueError, match=message):
        settings.validate(config(**values))


def test_all_mistakes_come_at_once():
    with pytest.raises(ValueError, match=r"benchmarks.*\nchunk=0"):
        settings.validate(config(benchmarks="x", chunk=0))


def test_every_benchmark_of_the_config_is_in_the_catalogue_with_its_primary_rule():
    usual = settings.EvaluateConfig()
    assert set(settings.NAMES) == set(catalogue.BENCHMARKS)
    assert len(settings.NAMES) == 16
    for name, known in catalogue.BENCHMARKS.items():
        mine = settings.benchmark(usual, name)
        assert mine.rule == known.rules[0], name
        assert mine.split == known.splits[0], name
        assert set(known.closed) < set(known.splits), name


@pytest.mark.parametrize(
    ("section", "changed", "message"),
    [
        ("pope", {"rule": "official"}, r"pope\.rule='official' is unknown; POPE has llava, vlmevalkit, lmms_eval"),
        ("infovqa", {"split": "dev"}, r"infovqa\.split='dev' is unknown; InfographicVQA has val, test, train"),
    ],
)
def test_a_rule_or_split_that_a_set_does_not_have_is_named(section, changed, message):
    made = config(benchmarks=section)
    setattr(made, section, dataclasses.replace(getattr(made, section), **changed))
    with pytest.raises(ValueError, match=message):
        catalogue.check(made)


def test_a_set_that_needs_a_judge_says_which_ways_there_are():
    with pytest.raises(ValueError, match=r"mmvet is graded.*judge=endpoint.*judge=offline.*judge=none"):
        catalogue.check(config(benchmarks="mmvet"))
    for judge in ("none", "offline"):
        catalogue.check(config(benchmarks="mmvet,llavabench", judge=judge))
    catalogue.check(config(benchmarks="mmbench"))  # its rules decide without one
    with pytest.raises(ValueError, match=r"judge='offline' has no effect: none of pope, mme has a judge"):
        catalogue.check(config(benchmarks="pope,mme", judge="offline"))


def test_every_rule_of_every_set_has_a_prompt():
    for benchmark in ("pope", "gqa", "vqav2"):
        for rule in catalogue.BENCHMARKS[benchmark].rules:
            assert prompts.short_answer("?", benchmark=benchmark, rule=rule)
    for name, of_rules in (("docvqa", "docvqa"), ("infovqa", "infographicvqa"), ("chartqa", "chartqa"), ("mme", "mme")):
        for rule in catalogue.BENCHMARKS[name].rules:
            assert prompts.short_answer("?", benchmark=of_rules, rule=rule)
