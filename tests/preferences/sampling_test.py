"""Sampling candidates: the same settings give the same file, however often it was interrupted."""

import pathlib

import numpy as np
import pytest

from moe_vlm_jax.data import bad_samples, records, tokenize
from moe_vlm_jax.data import images as images_lib
from moe_vlm_jax.evaluation import runner
from moe_vlm_jax.preferences import candidates, sampling
from tests.training import examples

QUESTIONS = [
    records.Record(f"q{i}", (), (records.Turn("human", "what"), records.Turn("gpt", f"answer {i}")), (f"answer {i}",))
    for i in range(10)
]


class Asked:
    """Stands for the model: answers a prompt by its question, seed and row, and some questions always alike."""

    def __init__(self):
        self.count = 0

    def __call__(self, graphdef, params, config, images, prompts, tokenizer, transform):
        self.count += 1
        found = []
        for row, prompt in enumerate(prompts):
            number = int(prompt[-1])
            rng = np.random.default_rng((config.generation.seed, row))
            found.append(("same" if number % 5 == 0 else f"{number} {rng.integers(3)}", True))
        return found


@pytest.fixture
def asked(monkeypatch) -> Asked:
    model = Asked()
    monkeypatch.setattr(runner, "answer_prompts", model)
    monkeypatch.setattr(sampling, "CHUNK", 4)
    monkeypatch.setattr(sampling.generate_lib, "dropless_graphdef", lambda graphdef, params: graphdef)
    monkeypatch.setattr(tokenize, "encode_prompt", lambda record, *_, **__: np.array([int(record.id[1:])]))
    return model


def sample(path: pathlib.Path, *, num: int = 99, **settings) -> sampling.Sampled:
    config = examples.run_config()
    return sampling.sample(
        None,  # type: ignore[arg-type]
        None,  # type: ignore[arg-type]
        config,
        QUESTIONS,
        None,
        images_lib.transform_for(config.model.vision, config.data),
        path,
        settings=sampling.Settings(**{"seed": 3} | settings),
        enough=lambda found: len(found) >= num,
    )


def test_every_question_gives_two_different_responses_or_is_counted(tmp_path, asked):
    found = sample(tmp_path / "c.jsonl")
    assert (found.asked, found.equal, found.left) == (10, 2, False)
    assert {c.id for c in found.candidates} == {f"q{i}" for i in range(10) if i % 5}
    for c in found.candidates:
        assert c.responses[0] != c.responses[1]
        assert [t.role for t in c.turns] == ["human"] and c.answers == (f"answer {c.id[1:]}",)
        assert c.sampling["seed"] == 3 and c.sampling["temperature"] == 1.0
    assert candidates.read_candidates(tmp_path / "c.jsonl", bad_samples.BadSamples("error")) == found.candidates


def test_it_stops_when_there_are_enough_and_more_only_make_the_file_longer(tmp_path, asked):
    few = sample(tmp_path / "few.jsonl", num=2)
    assert few.left and few.asked == 4
    longer = sample(tmp_path / "few.jsonl")
    assert longer.candidates[: len(few.candidates)] == few.candidates
    whole = sample(tmp_path / "whole.jsonl")
    assert (tmp_path / "few.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert longer == whole
    calls = asked.count
    assert sample(tmp_path / "whole.jsonl", num=3).candidates == whole.candidates
    assert asked.count == calls  # there were enough: nobody was asked


@pytest.mark.parametrize("kept", range(9))
def test_after_a_kill_the_same_command_ends_with_the_same_file(tmp_path, asked, kept):
    sample(tmp_path / "whole.jsonl")
    lines = (tmp_path / "whole.jsonl").read_bytes().splitlines(keepends=True)
    half = lines[kept][:20] if kept < len(lines) else b""
    (tmp_path / "cut.jsonl").write_bytes(b"".join(lines[:kept]) + half)
    sample(tmp_path / "cut.jsonl")
    assert (tmp_path / "cut.jsonl").read_bytes() == b"".join(lines)


def test_another_seed_gives_other_responses(tmp_path, asked):
    first, second = sample(tmp_path / "1.jsonl"), sample(tmp_path / "2.jsonl", seed=4)
    assert [c.id for c in first.candidates] != [c.id for c in second.candidates]


def test_what_cannot_be_continued_is_refused(tmp_path, asked):
    sample(tmp_path / "c.jsonl", num=1)
    with pytest.raises(ValueError, match=r"was sampled with .*'seed': 3.*, not with .*'seed': 4"):
        sample(tmp_path / "c.jsonl", seed=4)
    with pytest.raises(ValueError, match="temperature=0 gives the same response twice"):
        sample(tmp_path / "d.jsonl", temperature=0)
