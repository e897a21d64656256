"""The search for a mesh: exact arguments, and the choice among those that fit."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import pytest

from moe_vlm_jax.planning import meshes, plan, shapes, targets
from tests import xla
from tests.planning import examples

ROOT = pathlib.Path(__file__).parents[2]


def described(*, batch_size: int = 8) -> shapes.Shapes:
    config = examples.run_config(qlora=False)
    config.training.batch_size = batch_size
    config.mesh.data = 8
    return shapes.make_shapes(config, targets.find("local", config.mesh).devices)


def found() -> dict:
    """Returns candidates, choices and the arguments of a compiled step; for a process that has eight devices."""
    run = described()
    candidates = list(meshes.candidates(run))
    choices = [
        meshes.suggest(run, max(c.needed for c in candidates if c.mesh == mesh) / meshes.ROOM) for mesh in MESHES
    ]
    config = dataclasses.replace(run.config, mesh=dataclasses.replace(run.config.mesh, data=2, fsdp=2, expert=2))
    made = plan.make_plan(config, targets.find("local", config.mesh), compiled=True)
    return {
        "candidates": [(list(c.mesh.values()), c.arguments, c.temporaries, c.sent) for c in candidates],
        "choices": [(list(c.mesh.values()), c.needed, c.sent) for c in choices if c],
        "too_small": meshes.suggest(run, 1e5) is None,
        "indivisible": list(meshes.candidates(described(batch_size=4)._replace(model=run.model))),
        "compiled": (made.program.arguments, [e.kind for e in made.program.exchanges]) if made.program else None,
        "counted": sum(group.device_bytes for group in made.groups.values()),
    }


MESHES = [dict(zip(("data", "fsdp", "expert", "tensor"), sizes, strict=True)) for sizes in ((8, 1, 1, 1), (1, 4, 2, 1))]


@pytest.fixture(scope="module")
def search() -> dict:
    # The number of fake devices is fixed when JAX starts, so they need a process of their own.
    script = "import json; from tests.planning import meshes_test; print(json.dumps(meshes_test.found()))"
    # Nothing runs: machine code need not be good.
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla.flags(num_devices=8)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_every_mesh_that_divides_experts_and_rows_is_a_candidate(search):
    # 4 experts: an expert axis of 8 cannot be; 8 x 1 x 1, 4 x 2, ...
    sizes = {tuple(mesh) for mesh, *_ in search["candidates"]}
    expected = {(8 // (f * e), f, e, 1) for f in (1, 2, 4, 8) for e in (1, 2, 4) if f * e <= 8}
    assert sizes <= expected and {(8, 1, 1, 1), (2, 2, 2, 1), (2, 1, 4, 1), (1, 2, 4, 1)} <= sizes
    assert search["indivisible"] == []


@pytest.mark.slow
def test_arguments_are_those_of_the_step_on_that_mesh(search):
    (arguments,) = (a for mesh, a, *_ in search["candidates"] if mesh == [2, 2, 2, 1])
    assert arguments == search["counted"]
    assert arguments == pytest.approx(search["compiled"][0], rel=1e-3)
    assert "all-gather" in search["compiled"][1]


@pytest.mark.slow
def test_the_mesh_that_fits_and_sends_least_is_taken(search):
    needed = {tuple(mesh): (a + t, sent) for mesh, a, t, sent in search["candidates"]}
    for limit, (chosen, size, sent) in zip(((8, 1, 1, 1), (1, 4, 2, 1)), search["choices"], strict=True):
        fitting = {mesh: s for mesh, (n, s) in needed.items() if n <= needed[limit][0]}
        assert tuple(chosen) in fitting and sent == min(fitting.values())
        assert size <= needed[limit][0]
    assert search["too_small"]


@pytest.mark.slow
def test_cutting_more_needs_less(search):
    needed = {tuple(mesh): a for mesh, a, *_ in search["candidates"]}
    assert needed[8, 1, 1, 1] > needed[4, 2, 1, 1] > needed[2, 2, 2, 1] > needed[1, 2, 4, 1]
