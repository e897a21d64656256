"""GPUs that are not there: their description, and what to install."""

import importlib.util

import jax
import pytest
from jax.experimental import topologies

from moe_vlm_jax import config as config_lib
from moe_vlm_jax.planning import gpus, targets
from tests import cuda


def test_a_card_is_described_as_the_text_of_xlas_proto():
    text = gpus.target_config(gpus.GPUS["rtx4090"])
    assert text.count("{") == text.count("}") == 3
    for field in (
        "core_count: 128 ",
        "device_memory_size: 25249710080 ",
        "cuda_compute_capability { major: 8 minor: 9 feature_extension: NONE }",
        'device_description_str: "NVIDIA GeForce RTX 4090"',
    ):
        assert field in text
    assert "major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES" in gpus.target_config(gpus.GPUS["h100"])


@pytest.mark.parametrize(
    ("version", "plug_in", "said"), [((0, 10, 2), object(), "is installed"), ((0, 12, 0), None, "is not installed")]
)
def test_without_what_compiles_for_it_a_card_says_what_to_install(monkeypatch, version, plug_in, said):
    monkeypatch.setattr(jax, "__version_info__", version)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: plug_in)
    with pytest.raises(ValueError, match=rf"{said}; run pip install .* plan for 'gpu:24'") as caught:
        targets.find("rtx4090", config_lib.MeshConfig())
    assert "'rtx4090' is compiled by jax 0.12 or newer" in str(caught.value)


def test_a_plug_in_that_jax_left_out_says_how_to_have_it(monkeypatch):
    def left_out(**_):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr(jax, "__version_info__", gpus.FIRST_JAX)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(topologies, "get_topology_desc", left_out)
    with pytest.raises(ValueError, match=r"'h100' is compiled by .* set JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 before"):
        gpus.describe("h100", 1)


@pytest.mark.parametrize("name", ["h100:x", "h100:0"])
def test_a_number_of_cards_is_a_number(name):
    with pytest.raises(ValueError, match="must give the number of cards, like h100:8"):
        targets.find(name, config_lib.MeshConfig())


def test_cards_of_a_mesh_are_described(monkeypatch):
    asked = []
    monkeypatch.setattr(gpus, "describe", lambda name, count: asked.append((name, count)) or ["card"] * count)
    one = targets.find("h100", config_lib.MeshConfig())
    eight = targets.find("h100:8", config_lib.MeshConfig(fsdp=2))
    two = targets.find("rtx4090", config_lib.MeshConfig(expert=2))
    assert asked == [("h100", 1), ("h100", 8), ("rtx4090", 2)]
    assert [len(t.devices) for t in (one, eight, two)] == [1, 8, 2]
    assert two.memory == gpus.GPUS["rtx4090"].memory and "indicative" in two.remark


@pytest.mark.slow
@cuda.needs_plug_in
@pytest.mark.parametrize("name", gpus.GPUS)
def test_the_plug_in_knows_every_card(name):
    first = gpus.describe(name, 2)[0]
    assert (first.device_kind, first.platform) == (gpus.GPUS[name].name, "gpu")
