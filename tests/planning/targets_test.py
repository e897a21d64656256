"""Names of targets, and which of a topology's devices a mesh takes."""

import importlib.util
from types import SimpleNamespace

import jax
import pytest

from moe_vlm_jax import config as config_lib
from moe_vlm_jax.planning import targets


def mesh(**axes: int) -> config_lib.MeshConfig:
    return config_lib.MeshConfig(**axes)


def described(monkeypatch, coords: list[tuple[int, ...]]) -> list[str]:
    """Puts a topology with devices at these coordinates in the place of libtpu's; returns the names asked for."""
    from jax.experimental import topologies

    asked = []

    def describe(*, platform: str, topology_name: str):
        asked.append(topology_name)
        assert platform == "tpu"
        return SimpleNamespace(devices=[SimpleNamespace(coords=c, device_kind="TPU of a test") for c in coords])

    monkeypatch.setattr(topologies, "get_topology_desc", describe)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    return asked


def test_the_local_target_is_what_jax_finds():
    target = targets.find("local", mesh())
    assert list(target.devices) == jax.devices()
    assert target.kind == jax.devices()[0].device_kind
    assert target.memory is not None and target.memory > 2**30


def test_a_chip_named_alone_is_one_device_of_the_smallest_topology(monkeypatch):
    asked = described(monkeypatch, [(0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0)])
    target = targets.find("v5e", mesh())
    assert (len(target.devices), target.memory, target.kind) == (1, 16 * 2**30, "TPU of a test")
    assert len(targets.find("v5e", mesh(expert=2)).devices) == 4  # data=0 takes what is left
    assert asked == ["v5e:2x2"] * 2


@pytest.mark.parametrize(
    ("axes", "taken"), [({}, 8), ({"data": 1}, 1), ({"data": 2, "tensor": 2}, 4), ({"fsdp": 3}, 6)]
)
def test_a_mesh_takes_the_first_devices_of_a_topology(monkeypatch, axes, taken):
    asked = described(monkeypatch, [(i, 0, 0) for i in range(8)])
    target = targets.find("v6e:2x4", mesh(**axes))
    assert [device.coords[0] for device in target.devices] == list(range(taken))
    assert asked == ["v6e:2x4"]


def test_two_cores_of_a_chip_share_its_memory(monkeypatch):
    described(monkeypatch, [(0, 0, 0), (0, 0, 0), (1, 0, 0), (1, 0, 0)])
    target = targets.find("v4:2x1x1", mesh())
    assert target.memory == 16 * 2**30
    assert target.remark == "a chip holds 2 devices, each with its share of the memory"


def test_a_gpu_is_a_size_beside_the_program_of_this_machine():
    target = targets.find("gpu:24", mesh())
    assert (target.memory, list(target.devices)) == (24 * 2**30, jax.devices())
    assert target.remark == "compiled for cpu, not for a GPU: its temporaries are a rough guide"


@pytest.mark.parametrize("name", ["v7", "tpu", "gpu24", "V5E", ""])
def test_an_unknown_name_is_answered_with_the_known_ones(name):
    with pytest.raises(
        ValueError, match=f"target '{name}' is unknown; use one of local, v3, v4, v5e, .* v5e:16x16, .* h100, .* gpu:80"
    ):
        targets.find(name, mesh())


@pytest.mark.parametrize("name", ["gpu:", "gpu:24GB", "gpu:0"])
def test_a_gpu_needs_a_size(name):
    with pytest.raises(ValueError, match="must give the memory in GB, like gpu:24"):
        targets.find(name, mesh())


def test_a_tpu_without_libtpu_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"'v5e' is compiled by libtpu, which is not installed; install the extra 'pl"):
        targets.find("v5e", mesh())


def test_too_few_devices_are_an_error(monkeypatch):
    described(monkeypatch, [(i, 0, 0) for i in range(4)])
    with pytest.raises(ValueError, match="the mesh needs 6 devices but 'v5e:2x2' has 4; name a larger target"):
        targets.find("v5e:2x2", mesh(fsdp=3, tensor=2))


@pytest.mark.slow
def test_libtpu_describes_the_chips_of_the_table():
    pytest.importorskip("libtpu", reason="libtpu, the optional extra 'plan', is not installed")
    found = {name: targets.find(name, mesh()) for name in targets.TPUS}
    assert {name: len(target.devices) for name, target in found.items()} == dict.fromkeys(targets.TPUS, 1)
    assert {target.devices[0].platform for target in found.values()} == {"tpu"}
    assert {name for name, target in found.items() if target.remark} == {"v3", "v4"}
    sizes = {name: len(targets.find(name, mesh()).devices) for _, known in targets.TPUS.values() for name in known}
    assert (sizes["v5e:4x4"], sizes["v6e:16x16"], sizes["v5p:4x4x4"], sizes["v4:4x4x4"]) == (16, 256, 64, 128)
    with pytest.raises(ValueError, match="libtpu knows no topology 'v5e:3x5'"):
        targets.find("v5e:3x5", mesh())
