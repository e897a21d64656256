"""Collectives of compiled programs against counts by hand, on eight fake devices and in stored texts."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from moe_vlm_jax import collectives, hlo
from tests import xla

ROOT = pathlib.Path(__file__).parents[1]
MESH = {"data": 2, "expert": 4}
ROWS, WIDTH = 8, 12  # of one device
BYTES = 4 * ROWS * WIDTH


def programs() -> dict[str, str]:
    """Returns compiled programs by name; for a process with eight devices."""
    import jax
    import jax.numpy as jnp
    from jax import lax
    from jax.sharding import PartitionSpec

    mesh = jax.make_mesh(tuple(MESH.values()), tuple(MESH), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    everywhere = PartitionSpec(("data", "expert"))

    def exchange(x, axis):
        return lax.all_to_all(x, axis, 0, 0, tiled=True)

    def scanned(x):
        def outer(y, _):
            return lax.fori_loop(0, 3, lambda _, z: exchange(jnp.tanh(z), "expert"), lax.psum(y, "data")), None

        return lax.scan(outer, x, None, length=5)[0]

    def branches(x):
        return lax.cond(x[0, 0] > 0, lambda: exchange(x, "expert"), lambda: x + lax.psum(x[:1], "expert"))

    def rare_branches(x):
        with jax.named_scope(hlo.RARELY):
            return branches(x)

    bodies = {
        "all-to-all": lambda x: exchange(x, "expert"),
        "two axes": lambda x: lax.all_gather(x, ("data", "expert"), axis=0, tiled=True).sum(0, keepdims=True) + x,
        "reduce-scatter": lambda x: lax.psum_scatter(x, "data", scatter_dimension=0, tiled=True),
        "tuple": lambda x: lax.psum(x, "data") + lax.psum(jnp.sin(x[:2]), "data").sum(),
        "permute": lambda x: lax.ppermute(x, "data", [(0, 1), (1, 0)]),
        "loops": scanned,
        "branches": branches,
        "rare branches": rare_branches,
        "none": jnp.tanh,
    }
    x = jax.ShapeDtypeStruct((8 * ROWS, WIDTH), jnp.float32, sharding=jax.sharding.NamedSharding(mesh, everywhere))
    texts = {}
    for name, body in bodies.items():
        spread = jax.shard_map(body, mesh=mesh, in_specs=everywhere, out_specs=everywhere, check_vma=False)
        texts[name] = jax.jit(spread).lower(x).compile().as_text()
    return texts


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    # The number of fake devices is fixed when JAX starts, so they need a process of their own.
    script = "import json; from tests import collectives_test; print(json.dumps(collectives_test.programs()))"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla.flags(num_devices=8)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def summary(text: str) -> list[tuple]:
    """Returns (kind, axes, count, payload, bytes sent) of every collective."""
    found = collectives.collectives(text)
    return sorted((c.kind, collectives.axes_of(c, MESH), c.count, c.bytes, c.sent_bytes) for c in found)


BY_HAND = {
    "all-to-all": [("all-to-all", ("expert",), 1, BYTES, BYTES * 3 / 4)],
    "two axes": [("all-gather", ("data", "expert"), 1, 8 * BYTES, 7 * BYTES)],
    "reduce-scatter": [("reduce-scatter", ("data",), 1, BYTES, BYTES / 2)],
    "permute": [("collective-permute", ("data",), 1, BYTES, BYTES)],
    "loops": [("all-reduce", ("data",), 5, BYTES, BYTES), ("all-to-all", ("expert",), 15, BYTES, BYTES * 3 / 4)],
    "branches": [("all-to-all", ("expert",), 1, BYTES, BYTES * 3 / 4)],  # the other one sends 1 row in 8
    "rare branches": [("all-reduce", ("expert",), 1, BYTES / 8, 2 * BYTES / 8 * 3 / 4)],
    "none": [],
}


@pytest.mark.parametrize("name", BY_HAND)
def test_collectives_of_a_program_equal_those_written_down(texts, name):
    assert summary(texts[name]) == BY_HAND[name]


def test_several_arrays_in_one_collective_are_added_up(texts):
    found = collectives.collectives(texts["tuple"])
    assert {(c.kind, collectives.axes_of(c, MESH)) for c in found} == {("all-reduce", ("data",))}
    assert sum(c.total_bytes for c in found) == BYTES + BYTES / ROWS * 2
    assert sum(c.total_sent_bytes for c in found) == sum(c.total_bytes for c in found)  # 2 x (2 - 1) / 2


GROUPS = {
    "data": ((0, 4), (1, 5), (2, 6), (3, 7)),
    "expert": ((0, 1, 2, 3), (4, 5, 6, 7)),
    "data expert": ((0, 1, 2, 3, 4, 5, 6, 7),),
}
PRINTED = {
    "data": (
        "{{0,4},{1,5},{2,6},{3,7}}",
        "[4,2]<=[2,4]T(1,0)",
        "mesh['data'=2,'expert'=4] {'data'}",
        "mesh[axis_0=2,axis_1=2,axis_2=2] {axis_0}",
        "mesh['x'=8] {'x':(1)2}",
        "mesh['b'=4,'a'=2], device_ids=(0,4,1,5,2,6,3,7) {'a'}",
        "mesh['b'=4,'a'=2], device_ids=([2,4]T(1,0)) {'a'}",
    ),
    "expert": (
        "{{0,1,2,3},{4,5,6,7}}",
        "[2,4]<=[8]",
        "mesh['data'=2,'expert'=4] {'expert'}",
        "mesh['axis_0'=2,'axis_1'=2,'axis_2'=2] {'axis_1','axis_2'}",
        "mesh['x'=8] {'x':(2)4}",
    ),
    "data expert": ("{{0,1,2,3,4,5,6,7}}", "[1,8]<=[8]", "mesh['data'=2,'expert'=4] {'data','expert'}", "{}"),
}


@pytest.mark.parametrize(("axes", "form"), [(axes, form) for axes, forms in PRINTED.items() for form in forms])
def test_every_printed_form_of_groups_is_read(axes, form):
    assert collectives.read_groups(f"{form}, dimensions={{0}}, channel_id=3") == (() if form == "{}" else GROUPS[axes])
    size = len(GROUPS[axes][0])
    sent = 2 * 64 * (size - 1) / size
    assert summary(TEXT.replace("REPLICA_GROUPS", form)) == [("all-reduce", tuple(axes.split()), 1, 64, sent)]


TEXT = """HloModule jit_f, is_scheduled=true, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

ENTRY %main (x: f32[16]) -> f32[16] {
  %x = f32[16]{0} parameter(0)
  ROOT %ar = f32[16]{0} all-reduce(%x), channel_id=1, replica_groups=REPLICA_GROUPS, to_apply=%add
}
"""


def test_a_part_of_an_axis_names_the_axis_and_has_a_smaller_group():
    (found,) = collectives.collectives(TEXT.replace("REPLICA_GROUPS", "{{0,1},{2,3},{4,5},{6,7}}"))
    assert (collectives.axes_of(found, MESH), found.group_size) == (("expert",), 2)


def test_an_unknown_form_of_groups_is_an_error():
    with pytest.raises(ValueError, match=r"cannot read the device groups 'all_of_them, to_apply"):
        collectives.collectives(TEXT.replace("REPLICA_GROUPS", "all_of_them"))


def test_collectives_whose_number_depends_on_data_are_an_error():
    text = TEXT.replace("ENTRY %main", "%body").replace("REPLICA_GROUPS", "[1,8]<=[8]") + (
        "%test (y: f32[16]) -> pred[] {\n  %y = f32[16]{0} parameter(0)\n"
        '  ROOT %go = pred[] custom-call(%y), custom_call_target="go"\n}\n'
        "ENTRY %main (z: f32[16]) -> f32[16] {\n  %z = f32[16]{0} parameter(0)\n"
        "  ROOT %w = f32[16]{0} while(%z), condition=%test, body=%body\n}\n"
    )
    with pytest.raises(ValueError, match="trip count of loop 'w'"):
        collectives.collectives(text)


# As XLA:TPU, XLA:GPU and this test write them; collectives_tpu.hlo is shortened from a compiled step for v5e:4x4.
ASYNCHRONOUS = pathlib.Path(__file__).with_name("collectives_async.hlo").read_text()


def test_asynchronous_collectives_count_once():
    size = 2 * 16 * 8
    assert summary(ASYNCHRONOUS) == [
        ("all-gather", ("expert",), 1, 4 * size, 3 * size),
        ("collective-permute", ("expert",), 1, size, size),
        ("ragged-all-to-all", ("expert",), 1, size, size * 3 / 4),
        ("reduce-scatter", ("expert",), 1, size, size * 3 / 4),
    ]


def test_a_collective_that_is_waited_for_at_once_is_not_asynchronous():
    hidden = {c.kind for c in collectives.collectives(ASYNCHRONOUS) if c.asynchronous}
    assert hidden == {"all-gather", "reduce-scatter"}  # nothing stands between the permute's start and end


def test_collectives_that_a_tpu_fuses_are_told_from_their_fusions():
    text = pathlib.Path(__file__).with_name("collectives_tpu.hlo").read_text()
    gathered, reduced = 2 * 256 * 256, 4 * 128 * 256
    assert summary(text) == [
        ("all-gather", ("expert",), 1, gathered, gathered * 3 / 4),
        ("reduce-scatter", ("data",), 1, reduced, reduced / 2),
    ]
    assert {c.kind: c.asynchronous for c in collectives.collectives(text)} == {
        "all-gather": True,
        "reduce-scatter": False,
    }


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("f32[3,5]{1,0}", 60),
        ("bf16[16,8]{1,0:T(8,128)(2,1)S(1)}", 256),
        ("(f32[2]{0}, s8[3]{0}, /*index=2*/u4[6]{0}, pred[7], token[])", 8 + 3 + 3 + 7),
        ("f8e4m3fn[10]", 10),
        ("c64[]", 8),
    ],
)
def test_bytes_of_a_printed_shape(shape, expected):
    assert hlo.num_bytes(shape) == expected
