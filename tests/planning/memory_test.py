"""Parameters and bytes against counts by hand, and against the published models."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import pytest

from moe_vlm_jax import config as config_lib
from moe_vlm_jax.models import adapters, presets
from moe_vlm_jax.planning import memory
from moe_vlm_jax.training import optimizer as optimizer_lib
from moe_vlm_jax.training import setup, stages
from tests import xla
from tests.planning import examples

ROOT = pathlib.Path(__file__).parents[2]


def groups_of(config: config_lib.RunConfig) -> tuple[setup.Model, dict[str, memory.Group]]:
    model = setup.make_model(config)
    optimizer = optimizer_lib.make_optimizer(config.optimizer, 10)
    state = setup.abstract_state(model, optimizer, seed=0)
    return model, memory.groups(model, state, setup.abstract_batch(config, model.mesh))


def paper(decoder: config_lib.DecoderConfig, **training) -> config_lib.RunConfig:
    model = presets.vlm(presets.clip_l_336(), decoder)
    return config_lib.RunConfig(model=model, training=config_lib.TrainingConfig(**training))


def test_bytes_of_a_run_in_full_are_four_a_weight_and_eight_a_moment():
    model, groups = groups_of(examples.run_config(qlora=False))
    weights = memory.parameters(model)["model"].total
    assert groups["trainable others"] == (weights, 4 * weights, 4 * weights)
    assert groups["optimizer moments"] == (0, 8 * weights, 8 * weights)
    for name in ("quantised codes", "quantised scales", "frozen float", "trainable adapters"):
        assert groups[name] == (0, 0, 0)


def test_bytes_of_qlora_are_those_counted_by_hand():
    model, groups = groups_of(examples.run_config(qlora=True))
    weights = examples.linear_weights()
    assert groups["quantised codes"][:2] == (weights, weights // 2)
    # For every matrix: a byte for each 64 weights, a float32 for each 256 of those, and a float32 mean.
    scales = [(examples.copies(name), rows * columns // 64) for name, (rows, columns) in examples.LINEARS.items()]
    assert groups["quantised scales"].bytes == sum(n * (blocks + 4 * -(-blocks // 256) + 4) for n, blocks in scales)
    factors = sum(examples.copies(name) * examples.RANK * sum(shape) for name, shape in examples.LINEARS.items())
    assert groups["trainable adapters"][:2] == (factors, 4 * factors)
    assert groups["optimizer moments"].bytes == 8 * factors
    total = memory.parameters(model)["model"]
    assert (total.trainable, total.total) == (factors, weights + factors + groups["frozen float"].parameters)
    assert groups["frozen float"].bytes == 4 * groups["frozen float"].parameters  # compute_dtype is float32


def test_the_batch_counts_every_array():
    config = examples.run_config(qlora=False)
    _, groups = groups_of(config)
    slots = 2 * 2 * 144  # micro-batches, rows, slots
    images = 2 * 2 * 2 * 64 * 64 * 3  # micro-batches, rows, images of a row, pixels
    assert groups["batch"].bytes == 6 * 4 * slots + slots + 4 * images


def test_lora_on_q_k_v_of_phi_2_trains_3_932_160_parameters():
    config = paper(presets.phi2(), **stages.LORA._asdict())
    config.model.lora = config_lib.LoraConfig(rank=8, targets=adapters.QKV)
    model, groups = groups_of(config)
    assert memory.parameters(model)["model"].trainable == 3_932_160
    assert groups["trainable adapters"] == (3_932_160, 4 * 3_932_160, 4 * 3_932_160)


@pytest.mark.parametrize(
    ("decoder", "total", "activated"),
    [(presets.phi2, 5.61, 3.93), (presets.stablelm_2_1_6b, 3.20, 2.37), (presets.qwen_1_8b, 3.36, 2.55)],
)
def test_totals_with_the_tower_and_the_projector(decoder, total, activated):
    counts = memory.parameters(setup.make_model(paper(decoder(), **stages.FFN_ALL._asdict())))
    billions = [round(n / 1e9, 2) for n in counts["model"]]
    assert billions[:2] == [total, activated]
    assert 0 < counts["model"].trainable < counts["model"].total
    assert counts["vision"].trainable == 0


def test_a_quantised_weight_takes_at_most_0_517_bytes():
    config = paper(presets.phi2(), **stages.LORA._asdict())
    config.model.lora = config_lib.LoraConfig(rank=8)
    config.model.quant = config_lib.QuantConfig(kind="nf4", double=True)
    _, groups = groups_of(config)
    stored = groups["quantised codes"].bytes + groups["quantised scales"].bytes
    assert groups["quantised codes"].parameters > 5e9
    assert stored / groups["quantised codes"].parameters <= 0.517


def shares_of_devices(mesh: dict[str, int]) -> dict[str, tuple[int, int, int]]:
    """Returns the groups on a mesh; for a process that has enough devices."""
    config = dataclasses.replace(examples.run_config(qlora=True), mesh=config_lib.MeshConfig(**mesh))
    config.training.batch_size = 4
    return groups_of(config)[1]


@pytest.mark.slow
def test_a_device_of_eight_holds_its_share():
    # The number of fake devices is fixed when JAX starts, so they need a process of their own.
    call = "memory_test.shares_of_devices({'fsdp': 2, 'expert': 2, 'tensor': 2})"
    script = f"import json; from tests.planning import memory_test; print(json.dumps({call}))"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla.flags(num_devices=8)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    spread = {name: memory.Group(*group) for name, group in json.loads(done.stdout.splitlines()[-1]).items()}
    config = examples.run_config(qlora=True)
    config.training.batch_size = 4
    whole = groups_of(config)[1]
    assert {name: group[:2] for name, group in spread.items()} == {name: group[:2] for name, group in whole.items()}
    size = {name: rows * columns for name, (rows, columns) in examples.LINEARS.items()}
    attention, dense = 2 * sum(size[name] for name in "qkvo"), size["up"] + size["gate"] + size["down"]
    experts = examples.NUM_EXPERTS * dense
    assert spread["quantised codes"].device_bytes == (attention + dense) // 2 // 4 + experts // 2 // 8
    assert spread["batch"].device_bytes < whole["batch"].bytes


def test_planning_a_large_model_allocates_nothing():
    script = (
        "import re\n"
        "from configs import sft\n"
        "from moe_vlm_jax.planning import plan, targets\n"
        "config = sft.get_config('phi2-4e')\n"
        "made = plan.make_plan(config, targets.find('local', config.mesh), compiled=False)\n"
        "needed = sum(group.bytes for group in made.groups.values())\n"
        # Not ru_maxrss: it begins with the size of the process that started this one.
        "peak = re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())\n"
        "print(needed, int(peak[1]) * 1024)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    needed, resident = map(int, done.stdout.split())
    assert needed > 3.5 * 2**30
    # Python, jax and the programs that trace the model: 0.4 GiB.
    assert resident < 2**30
