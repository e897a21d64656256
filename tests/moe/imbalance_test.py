"""A third stage whose routers send every token to the same two experts, on an expert-parallel mesh."""

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging
from flax import nnx

from moe_vlm_jax import config as config_lib
from moe_vlm_jax.training import loop, setup, stages
from tests.moe import expert_parallel_test
from tests.training import examples

NUM_EXPERTS, TOP_K, FACTOR = 4, 2, 1.0
STEPS = 3


def run(dispatch: str, folder: str) -> dict[str, Any]:
    """Trains on eight devices and returns the log, the valid tokens of the first rows, and what was compiled."""
    trainable, frozen = stages.MOE_ONLY
    config = examples.run_config(
        pathlib.Path(folder) / "cache",
        trainable=trainable,
        frozen=frozen,
        batch_size=8,
        accumulation=1,
        max_steps=STEPS,
        log_every=1,
        loss_chunk=0,
    )
    config.model.decoder.num_layers = 4
    slots = {"capacity_factor": FACTOR, "capacity_group": "row"} if dispatch == "capacity" else {}
    config.model.moe = config_lib.MoEConfig(
        placement="sparse", num_experts=(NUM_EXPERTS,), top_k=TOP_K, dispatch=dispatch, **slots
    )
    config.mesh = config_lib.MeshConfig(data=2, expert=4)
    compiled = []
    logging.get_absl_logger().addFilter(lambda record: compiled.append(record.getMessage()) or True)
    logging.set_verbosity(logging.INFO)
    made, state = setup.make_run(config, pathlib.Path(folder) / dispatch)
    first = next(made.data.iterator())
    planted = [
        (path, variable.replace(jnp.zeros_like(variable.get_value())) if "router" in path else variable)
        for path, variable in nnx.to_flat_state(state.trainable)
    ]
    loop.fit(made, state._replace(trainable=nnx.from_flat_state(planted)))
    log = (pathlib.Path(folder) / dispatch / "metrics.jsonl").read_text()
    return {
        "log": [json.loads(line) for line in log.splitlines()],
        "valid": np.sum(first.batch.valid[0], axis=-1).tolist(),
        "row_length": first.batch.valid.shape[-1],
        "compiled": sum("compiling the step" in message for message in compiled),
        "devices": jax.device_count(),
    }


@pytest.mark.slow
def test_capacity_counts_what_it_drops_by_layer_and_dropless_drops_nothing(tmp_path):
    calls = (f"run({dispatch!r}, {str(tmp_path)!r})" for dispatch in ("capacity", "dropless"))
    capacity, dropless = expert_parallel_test.on_eight_devices(f"[{', '.join(calls)}]", module="imbalance_test")
    # A router of zeros ties, ties go to the first experts, and each has room for a row's tokens * k / E.
    slots = -(-capacity["row_length"] * TOP_K // NUM_EXPERTS)
    expected = TOP_K * sum(max(0, valid - slots) for valid in capacity["valid"])
    assert expected > 100
    first = capacity["log"][0]
    assert [first[f"router/dropped/{layer}"] for layer in range(2)] == [expected, expected]
    assert first["router/dropped_assignments"] == 2 * expected
    assert "router/dropped/2" not in first  # two of the four layers have experts
    for found in (capacity, dropless):
        assert found["devices"] == 8 and found["compiled"] == 1
        assert [line["step"] for line in found["log"]] == list(range(1, STEPS + 1))
        assert all(np.isfinite(line["train/loss"]) for line in found["log"])
        assert [found["log"][0][f"router/load/1/{expert}"] for expert in range(NUM_EXPERTS)] == [1, 0, 0, 0]
    assert all(line[f"router/dropped/{layer}"] == 0 for line in dropless["log"] for layer in range(2))
    assert all(line[f"router/dropped/{layer}"] > 0 for line in capacity["log"] for layer in range(2))
