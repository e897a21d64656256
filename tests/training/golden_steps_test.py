"""Six optimizer steps of the reference: losses, gradient norms, learning rates and final weights.

The goldens were made by torch AdamW, clip_grad_norm_ and HF's cosine schedule around the reference's model
(tests/goldens/README.md). Whatever fails here was changed in the step, the optimizer or the schedule, unless the
golden tests of the model fail too.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_vlm_jax import batch as batch_lib
from moe_vlm_jax import config as config_lib
from moe_vlm_jax import tree
from moe_vlm_jax.hf import configs as hf_configs
from moe_vlm_jax.hf import load as hf_load
from moe_vlm_jax.hf import pieces as hf_pieces
from moe_vlm_jax.hf import plans as hf_plans
from moe_vlm_jax.hf import readers
from moe_vlm_jax.models import placement, vlm
from moe_vlm_jax.training import optimizer as optimizer_lib
from moe_vlm_jax.training import stages, steps
from moe_vlm_jax.training import state as state_lib
from tests.conftest import goldens_folder

pytestmark = pytest.mark.goldens

CASES = sorted(goldens_folder().glob("models/*/train_6steps.npz"))


@pytest.mark.slow
@pytest.mark.parametrize("path", CASES, ids=[case.parent.name for case in CASES])
def test_six_training_steps_are_those_of_the_reference(path: pathlib.Path, goldens: pathlib.Path):
    golden = np.load(path)
    num_steps = len(golden["total_loss"])
    info = hf_configs.read(path.parent / "checkpoint", vision=_tower(goldens))
    config = _run_config(info.config, golden)
    graphdef, params = nnx.split(nnx.eval_shape(lambda: vlm.VLM(config.model, rngs=nnx.Rngs(0))))
    params = hf_load.load_into(params, path.parent / "checkpoint", config.model, vision=_tower(goldens)).state
    parts = tree.partition(params, {"trainable": stages.FFN_ALL.trainable, "frozen": stages.FFN_ALL.frozen})
    pieces = _pieces_by_tensor(info, config.model, params)
    trainable_names = json.loads((path.parent / "params.json").read_text())["trainable"]
    assert {p.path for name in trainable_names for p in pieces[name]} == set(tree.leaves(parts["trainable"]))

    optimizer = optimizer_lib.make_optimizer(config.optimizer, num_steps)
    state = state_lib.new_state(parts["trainable"], optimizer.transform, seed=0)
    train_step = steps.make_train_step(graphdef, optimizer, config)
    batches = [_batch(golden, f"batch{i}", config.model.vision.num_tokens) for i in range(2)]
    for i in range(num_steps):
        state, metrics = train_step(state, parts["frozen"], batches[i % 2])
        np.testing.assert_allclose(metrics["train/loss"], golden["total_loss"][i], atol=1e-4)
        aux = config.model.moe.balance_coef * metrics["router/balance_loss"]
        np.testing.assert_allclose(aux, golden["aux_loss_scaled"][i], atol=1e-4)
        np.testing.assert_allclose(metrics["train/grad_norm"], golden["grad_norm"][i], rtol=1e-3)
        np.testing.assert_allclose(metrics["train/learning_rate"], golden["lr"][i], atol=1e-9)

    finals = [key for key in golden if key.startswith("final/")]
    assert finals
    trained = tree.leaves(state.trainable)
    for key in finals:
        for piece in pieces[key.removeprefix("final/")]:
            wanted = golden[key] if piece.rows is None else golden[key][slice(*piece.rows)]
            wanted = hf_pieces.forward(wanted, piece.transform)
            np.testing.assert_allclose(trained[piece.path][...][piece.index], wanted, atol=2e-5, err_msg=key)


def test_every_model_with_recorded_steps_is_found():
    assert len(CASES) >= 3


def _run_config(model: config_lib.ModelConfig, golden) -> config_lib.RunConfig:
    model.compute_dtype, model.remat = "float32", "full"
    model.moe.dispatch, model.moe.padding_takes_capacity = "capacity", True
    model.moe.capacity_factor = 1.0
    return config_lib.RunConfig(
        model=model,
        optimizer=config_lib.OptimizerConfig(learning_rate=float(golden["lr"].max()), warmup_ratio=1 / 6),
        training=config_lib.TrainingConfig(loss_chunk=16),
    )


def _tower(goldens: pathlib.Path) -> pathlib.Path:
    return next((goldens / "vision_tower").rglob("config.json")).parent


def _pieces_by_tensor(info, config: config_lib.ModelConfig, params: nnx.State) -> dict[str, list[hf_pieces.Piece]]:
    entries = hf_plans.best_entries(readers.open_checkpoint(info.folder), info.layout, info.family, config.projector)
    shapes = {name: variable.shape for name, variable in tree.leaves(params).items()}
    by_tensor: dict[str, list[hf_pieces.Piece]] = {}
    for piece in hf_pieces.build(entries, shapes, placement.group_layers(config.layer_experts)):
        by_tensor.setdefault(piece.tensor, []).append(piece)
    return by_tensor


def _batch(golden, name: str, num_patches: int) -> batch_lib.Batch:
    """Expands each image mark into its patches, as the reference splices them, with a leading axis of one."""
    rows, images = [], 0
    for ids, labels, mask in zip(
        *(golden[f"{name}.{k}"] for k in ("input_ids", "labels", "attention_mask")), strict=True
    ):
        tokens, targets, slots = [], [], []
        for token, label in zip(ids[mask], labels[mask], strict=True):
            if token == batch_lib.IMAGE_TOKEN_INDEX:
                tokens += [0] * num_patches
                targets += [batch_lib.IGNORE_INDEX] * num_patches
                slots += range(images * num_patches, (images + 1) * num_patches)
                images += 1
            else:
                tokens.append(token), targets.append(label), slots.append(-1)
        rows.append((tokens, [*targets[1:], batch_lib.IGNORE_INDEX], slots))
    length = max(len(tokens) for tokens, _, _ in rows)

    def padded(values, fill):
        return jnp.asarray([[*row, *[fill] * (length - len(row))] for row in values], jnp.int32)

    valid = padded([[1] * len(tokens) for tokens, _, _ in rows], 0)
    batch = batch_lib.Batch(
        tokens=padded([row[0] for row in rows], 0),
        image_slot=padded([row[2] for row in rows], -1),
        images=jnp.asarray(golden[f"{name}.images"]).transpose(0, 2, 3, 1),
        labels=padded([row[1] for row in rows], batch_lib.IGNORE_INDEX),
        position=jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), valid.shape),
        # The reference lets padding attend to its row, and its routing takes part in capacity and balance.
        tree=jnp.ones_like(valid),
        branch=jnp.ones_like(valid),
        valid=valid.astype(bool),
    )
    return jax.tree.map(lambda x: x[None], batch)
