"""Chains: what is wrong between runs is one message, found from the config alone."""

import copy
import dataclasses
import pathlib

import pytest

from moe_vlm_jax import chain
from moe_vlm_jax import config as config_lib
from tests.training import examples


@dataclasses.dataclass(kw_only=True)
class Three(config_lib.Chain):
    first: config_lib.RunConfig
    second: config_lib.RunConfig
    third: config_lib.RunConfig


def three() -> Three:
    """Dense from nothing, dense on it, experts on that."""
    runs = [examples.run_config() for _ in range(3)]
    for run in runs[:2]:
        run.model.moe = config_lib.MoEConfig(placement="none")
    runs[1].training.base, runs[2].training.base = "@first", "@second"
    return Three(first=runs[0], second=runs[1], third=runs[2])


def refusal(config) -> str:
    with pytest.raises(ValueError) as error:
        chain.validate(config)
    return str(error.value)


def test_a_chain_is_its_runs_in_order_each_with_the_folder_of_its_base():
    made = three()
    chain.validate(made)
    assert list(chain.runs(made)) == ["first", "second", "third"]
    workdir = pathlib.Path("runs", "x")
    placed = chain.placed(made.third, workdir, "third")
    assert placed.training.base == str(chain.model_folder(workdir, "second")) == "runs/x/second/model"
    assert made.third.training.base == "@second"
    assert chain.placed(made.first, workdir, "first") == made.first


def change(run: config_lib.RunConfig, path: str, value) -> None:
    *sections, leaf = path.split(".")
    for section in sections:
        run = getattr(run, section)
    setattr(run, leaf, value)


MISTAKES = {
    "a run's own rule": (
        [("second", "training.batch_size", 0), ("third", "model.moe.top_k", 9)],
        "second.training.batch_size=0 is out of range; it must be at least 1.\n"
        "third.model.moe.top_k=9 is more than num_experts=4",
    ),
    "unknown name": (
        [("third", "training.base", "@stage2")],
        "third.training.base='@stage2' names no run of this chain; only what an earlier run leaves can be taken; use "
        "@first or @second.",
    ),
    "later run": ([("second", "training.base", "@third")], "second.training.base='@third' names a later run; "),
    "itself": ([("third", "training.base", "@third")], "third.training.base='@third' names itself; "),
    "nothing before it": ([("first", "training.base", "@second")], "names a later run; .*; give a path."),
    "cycle": (
        [("first", "training.base", "@second"), ("second", "training.base", "@first")],
        "first.training.base='@second' names a later run",
    ),
    "another width": (
        [("third", "model.decoder.mlp_dim", 32)],
        "third.model.decoder.mlp_dim=32, but its base second.model.decoder.mlp_dim=24; they must be equal; change one.",
    ),
    "another tower": ([("second", "model.vision.norm_eps", 1e-3)], "but its base first.model.vision.norm_eps=1e-05"),
    "another projector": ([("third", "model.projector", "mlp2x_gelu")], "but its base second.model.projector='linear'"),
    "longer rows": (
        [("third", "model.decoder.max_positions", 999)],
        "third.model.decoder.max_positions=999 exceeds the 160 of its base second; lower it",
    ),
    "noise in a dense model": (
        [("second", "training.upcycling_noise", 0.1)],
        "second.training.upcycling_noise=0.1 has no effect in a model without experts; leave it at 0.0.",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_what_is_wrong_between_runs_is_named_with_its_remedy(case):
    changes, message = MISTAKES[case]
    made = three()
    for name, path, value in changes:
        change(getattr(made, name), path, value)
    said = refusal(made)
    for part in message.split(".*"):
        assert part in said


def test_experts_are_not_given_twice_and_adapters_are_no_base():
    made = three()
    made.second.model.moe = copy.deepcopy(made.third.model.moe)
    chain.validate(made)
    made.third.model.moe.num_experts = (8,)
    assert "third has experts by layer (0, 8), but its base second has (0, 4); only a dense base can" in refusal(made)
    made.third.model.moe.num_experts = (4,)
    made.second.model.lora.rank = 4
    assert "third.training.base='@second' has adapters or a quantised base" in refusal(made)
    assert "python -m moe_vlm_jax.merge" in refusal(made)


def test_a_name_means_nothing_outside_a_chain():
    assert "training.base='@second' names a run of a chain, but this run is none" in refusal(three().third)


def test_fields_that_are_no_runs_are_refused():
    @dataclasses.dataclass
    class Odd(config_lib.Chain):
        first: int = 3

    assert refusal(Odd()) == "fields first of the chain hold no RunConfig; give each one."
    assert refusal(config_lib.Chain()) == "the chain has no runs; give its class fields that are RunConfigs."
