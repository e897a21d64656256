"""A chain from a base over SFT to DPO: what a run takes from the one before, and that it goes on where it stopped."""

import dataclasses
import json
import pathlib
import re

import numpy as np
import pytest

from moe_vlm_jax import chain, train
from moe_vlm_jax import config as config_lib
from moe_vlm_jax.data import bad_samples, pairs
from moe_vlm_jax.models import adapters
from moe_vlm_jax.preferences import candidates as candidates_lib
from moe_vlm_jax.preferences import prefer
from moe_vlm_jax.training import loop, stages
from tests.training import examples

NUM_PAIRS = 12


@dataclasses.dataclass(kw_only=True)
class Preferences(config_lib.Chain):
    base: config_lib.RunConfig
    sft: config_lib.RunConfig
    dpo: config_lib.RunConfig


def runs(cache: pathlib.Path) -> Preferences:
    """Returns a base of one layer of experts, adapters on it in NF4, and DPO on what these say."""

    def run(stage: stages.Stage, **training) -> config_lib.RunConfig:
        settings = {"batch_size": 2, "accumulation": 1, "max_steps": 3, "loss_chunk": 0, "log_every": 1}
        config = examples.run_config(cache, **stage._asdict(), **{**settings, **training})
        config.model.decoder.num_layers, config.model.moe.placement = 1, "dense"
        config.model.decoder.rotary_dim = config.model.decoder.head_dim  # Qwen2's, which has a checkpoint layout
        config.evaluation = config_lib.EvaluationConfig(max_questions=4, batch_size=4, controls=False, page_samples=2)
        return config

    def adapted(stage: stages.Stage, **training) -> config_lib.RunConfig:
        config = run(stage, base="@base", **training)
        config.model.quant = config_lib.QuantConfig(kind="nf4", block=8)
        config.model.lora = config_lib.LoraConfig(rank=3, targets=(*adapters.ALL_LINEAR, r"projector/linears/\d+"))
        config.optimizer.weight_decay = 0.0
        return config

    dpo = adapted(stages.LORA_OF_DECODER, adapter="@sft", max_steps=4, checkpoint_every=2)
    dpo.preference = config_lib.PreferenceConfig(
        loss="sigmoid", pairs="@sft", num_pairs=NUM_PAIRS, held_out=0.3, precomputed="reference.json"
    )
    base = run(stages.EVERYTHING)
    base.data.eval_split, base.evaluation = "", config_lib.EvaluationConfig()
    base.generation = config_lib.GenerationConfig()
    return Preferences(base=base, sft=adapted(stages.LORA), dpo=dpo)


def shorter(candidates, *, metric: str) -> prefer.Preferred:
    """Prefers the response of fewer words: the answers of a model of three steps are all wrong."""
    counts = prefer.collections.Counter()
    texts = [c for c in candidates if all(r.strip() for r in c.responses)]
    lengths = [[len(r.split()) for r in c.responses] for c in texts]
    made = [c.pair(int(np.argmin(n)), prefer.SOURCE) for c, n in zip(texts, lengths, strict=True) if len(set(n)) == 2]
    return prefer.Preferred(made, counts, counts)


def lines(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_dpo_trains_on_what_sft_says_from_where_sft_ends(tmp_path, monkeypatch, capsys):
    config, workdir = runs(tmp_path / "cache"), tmp_path / "run"
    chain.validate(config)
    monkeypatch.setattr(prefer, "prefer", shorter)
    fit = loop.fit

    def stopped(run, state, **kwargs):
        """Stops the DPO run after its first two steps."""
        if run.workdir.name == "dpo":
            fit(dataclasses.replace(run, num_steps=2), state, **kwargs)
            raise KeyboardInterrupt
        return fit(run, state, **kwargs)

    monkeypatch.setattr(loop, "fit", stopped)
    with pytest.raises(KeyboardInterrupt):
        train.train_chain(config, workdir)
    sampled = (workdir / "dpo" / "candidates.jsonl").read_bytes()
    monkeypatch.setattr(loop, "fit", fit)
    train.train_chain(config, workdir)

    found = pairs.read_pairs(workdir / "dpo" / "pairs.jsonl", bad_samples.BadSamples("error"))
    assert len(found) == NUM_PAIRS and {pair.source for pair in found} == {"automatic"}
    assert all(len(pair.chosen.split()) < len(pair.rejected.split()) for pair in found)
    assert (workdir / "dpo" / "candidates.jsonl").read_bytes() == sampled
    assert len(candidates_lib.read_candidates(workdir / "dpo" / "candidates.jsonl", bad_samples.BadSamples("error")))

    # DPO begins where SFT ends: with its answers, and at chance among the held-out pairs.
    assert (workdir / "dpo" / "predictions_before.jsonl").read_bytes() == (
        workdir / "sft" / "predictions.jsonl"
    ).read_bytes()
    # At the end the evaluated runs stand side by side.
    page = (workdir / "comparison.html").read_text()
    assert re.findall(r'<th scope="row">(.*?)</th>', page)[:3] == ["before sft", "sft", "dpo"]
    assert capsys.readouterr().out.endswith(f"comparison: {workdir / 'comparison.html'}\n")

    held_out = json.loads((workdir / "dpo" / "pairs.json").read_text())
    assert held_out["before"]["reward_accuracy"] == 0.5 and abs(held_out["before"]["reward_margin"]) < 1e-6
    assert held_out["after"]["reward_margin"] != 0.0
    steps = lines(workdir / "dpo" / "metrics.jsonl")
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert steps[0]["train/preference_loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert steps[0]["rewards/margin"] == pytest.approx(0.0, abs=1e-5)
    assert steps[-1]["rewards/margin"] > 0
    trained = json.loads((workdir / "dpo" / "reference.json").read_text())
    ours = {pair.id for pair in found}
    assert set(trained["log_probs"]) < ours and len(trained["log_probs"]) < NUM_PAIRS

    # Another reference under the same name is refused, with the part that differs.
    trained["made_from"]["quantiser"] = "other"
    (tmp_path / "reference.json").write_text(json.dumps(trained))
    again = chain.placed(config.dpo, workdir, "dpo")
    again.preference = dataclasses.replace(again.preference, precomputed=str(tmp_path / "reference.json"))
    capsys.readouterr()
    with pytest.raises(SystemExit):
        train.train(again, tmp_path / "again")
    said = capsys.readouterr().err
    assert "were made from something else" in said and "quantiser: other in the file" in said
    assert "adapters:" not in said and "pairs:" not in said

    # So is an adapter of another shape.
    other = chain.placed(runs(tmp_path / "cache").dpo, workdir, "dpo")
    other.model.lora.rank = 4
    with pytest.raises(SystemExit):
        train.train(other, tmp_path / "other")
    assert "is a run with LoraConfig(rank=3" in capsys.readouterr().err

    # And one whose experts were trained for other tokens.
    other = chain.placed(runs(tmp_path / "cache").dpo, workdir, "dpo")
    other.model.moe = dataclasses.replace(other.model.moe, router="modality", text_experts=(0, 1), image_experts=(2, 3))
    with pytest.raises(SystemExit):
        train.train(other, tmp_path / "other")
    said = capsys.readouterr().err
    assert "is a run with {'router': 'topk'" in said and "but here it is {'router': 'modality'" in said
