"""The benchmark's bookkeeping, and that both of its sides do the same work."""

import pathlib
import subprocess
import sys

import pytest

from benchmarks import data, expert_parallel, gpu, pairing, run, workload
from moe_vlm_jax.moe import dispatch as dispatch_lib

ROOT = pathlib.Path(__file__).parents[1]


def test_the_ratio_is_of_pairs_not_of_sums():
    # One slow moment of the machine hits both sides of one pair.
    middle, low, high = pairing.ratio([1.0, 10.0, 1.0, 1.0], [2.0, 20.0, 2.0, 2.0])
    assert (low, middle, high) == (0.5, 0.5, 0.5)


def test_figures_become_a_table():
    figure = {"group": "sft", "name": "x", "value": None, "unit": "ratio", "against": "y", "device": "", "commit": ""}
    assert run.table([figure]).splitlines()[-1] == "| sft | x |  | ratio | y |"


def test_an_unknown_group_is_refused_with_the_known_ones():
    command = [sys.executable, "benchmarks/run.py", "no_such_group"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 2
    assert "no_such_group" in ended.stderr and "sft" in ended.stderr


def test_every_text_token_but_the_first_of_a_row_is_learned():
    batch = workload.make_batch(workload.Shape(embed_dim=64, num_rows=2, stage="full").config())
    assert int((batch.labels != -100).sum()) == 2 * (workload.ROW_LENGTH - workload.IMAGE_TOKENS - 1)
    assert batch.images.shape[0] == 2 and int((batch.image_slot >= 0).sum()) == 2 * workload.IMAGE_TOKENS


def test_the_data_benchmark_starts_from_random_weights():
    """A config with a base of its own would have to train that first."""
    assert data._config(batch_size=2).training.base == ""


def test_what_a_gpu_times_is_timed_here_too(monkeypatch):
    monkeypatch.setattr(gpu, "ROUNDS", 2)
    monkeypatch.setattr(gpu, "CALLS", 1)
    found = {f["name"]: f["value"] for f in [*gpu.timed_products(64, 32, (1, 5)), *gpu.timed_experts(64, 128, 64)]}
    for rows in (1, 5):
        assert found[f"product_time_ratio_bf16_{rows}"] > 0 and found[f"product_time_ratio_dequantised_{rows}"] > 0
        assert found[f"product_bandwidth_share_{rows}"] is None  # of a card that is not known
    assert found["experts_time_ratio_blocks"] > 0


@pytest.mark.slow
def test_torch_and_jax_have_the_same_losses_before_and_after_an_update(tmp_path):
    pytest.importorskip("torch")
    stage = "experts"  # trains a part of the model: the update must move the same part on both sides
    shape = workload.Shape(embed_dim=64, num_rows=1, stage=stage)
    weights = tmp_path / "weights.npz"
    workload.write_weights(shape.config().model, weights)
    arguments = (str(weights), "64", "1", stage)
    with pairing.Worker("benchmarks.jax_step", *arguments, core=None) as worker:
        ours = [worker.ask("step")["loss"] for _ in range(2)]
    for dispatch in ("index", "sorted", "grouped", "einsum_without_drops"):
        with pairing.Worker("benchmarks.peers.torch_step", *arguments, dispatch, core=None) as worker:
            losses = [worker.ask("step")["loss"] for _ in range(2)]
        assert losses == pytest.approx(ours, abs=1e-3), dispatch


@pytest.mark.parametrize("expert", [4, 8])
def test_the_expert_parallel_load_has_as_many_slots_as_choices(expert):
    moe = expert_parallel.run_config(expert=expert).model.moe
    slots = dispatch_lib.capacity_of(
        workload.ROW_LENGTH, expert, moe.top_k, factor=moe.capacity_factor, minimum=moe.min_capacity
    )
    assert slots * expert == workload.ROW_LENGTH * moe.top_k
    assert moe.num_experts == (expert,) and moe.capacity_group == "row"


@pytest.mark.slow
def test_experts_exchange_little_more_than_they_must():
    found = expert_parallel.measure(8, {"data": 2, "expert": 4})
    assert 1.0 <= found["ratio"] <= 1.2
    assert (found["all_to_alls"], found["weight_gathers"]) == (4, 0)
