"""What trains in each stage, by the names that the reference gives its tensors.

params.json of the goldens lists what had requires_grad in the reference's third stage, and every saved tensor. What it
trains before is a rule over these names (scripts/v1): the projector, then all but the tower.
"""

import json
import re

import pytest
from flax import nnx

from moe_vlm_jax import config as config_lib
from moe_vlm_jax import tree
from moe_vlm_jax.hf import configs, pieces, plans, readers
from moe_vlm_jax.models import placement, vlm
from moe_vlm_jax.training import stages
from tests.conftest import goldens_folder

pytestmark = pytest.mark.goldens

CASES = sorted(goldens_folder().glob("models/*/params.json"))
# In the reference's model with experts, these tensors are an MoE layer's.
MOE_LAYER = re.compile(r".*\.mlp\.(deepspeed_moe|mlp|coefficient)\..*")


def trained(stage: stages.Stage, folder, *, dense: bool) -> set[str]:
    """Returns the reference's names of the tensors that train in a stage of the model in a checkpoint's folder."""
    towers = folder.parents[2] / "vision_tower" / "openai" / "tiny-clip-vit-patch14-56"
    info = configs.read(folder, vision=towers)
    config = info.config
    if dense:
        config.moe = config_lib.MoEConfig(placement="none")
    params = nnx.state(nnx.eval_shape(lambda: vlm.VLM(config, rngs=nnx.Rngs(0))))
    parts = tree.partition(params, {"trainable": stage.trainable, "frozen": stage.frozen})
    shapes = {path: variable.get_value().shape for path, variable in tree.leaves(params).items()}
    tensors = readers.open_checkpoint(folder)
    entries = plans.best_entries(tensors, info.layout, info.family, config.projector)
    found = pieces.build(entries, shapes, placement.group_layers(config.layer_experts))
    names = {leaf: {piece.tensor for piece in found if piece.path == leaf} for leaf in tree.leaves(parts["trainable"])}
    frozen = {piece.tensor for piece in found if piece.path not in names}
    together = set().union(*names.values())
    assert not together & frozen
    return together


def dense_names(saved: list[str]) -> set[str]:
    """Returns the names of the dense model that a model with experts was made from."""
    kept = (re.sub(r"\.mlp\.deepspeed_moe\.experts\.deepspeed_experts\.0\.", ".mlp.", name) for name in saved)
    return {name for name in kept if not MOE_LAYER.fullmatch(name)}


@pytest.mark.parametrize("path", CASES, ids=[case.parent.name for case in CASES])
def test_the_trainable_sets_are_the_references(path):
    golden, folder = json.loads(path.read_text()), path.parent / "checkpoint"
    saved, last = list(golden["saved_state_dict"]), set(golden["trainable"])
    before = dense_names(saved)
    assert trained(stages.PRETRAIN, folder, dense=True) == {name for name in before if "mm_projector" in name}
    tuned = {name for name in before if "image_tower" not in name}
    assert trained(stages.FINETUNE, folder, dense=True) == tuned
    kept = {name for name in tuned if "mm_projector" not in name}
    assert trained(stages.FINETUNE_FROZEN_PROJECTOR, folder, dense=True) == kept
    assert trained(stages.FFN_ALL, folder, dense=False) == last
    # The text trains less than the script: of the script's tensors, those of the MoE layers.
    assert trained(stages.MOE_ONLY, folder, dense=False) == {name for name in last if MOE_LAYER.fullmatch(name)}
    # The dense sibling trains what was copied into the experts, and what trains beside them.
    assert trained(stages.FFN_ALL, folder, dense=True) == dense_names(list(last))
