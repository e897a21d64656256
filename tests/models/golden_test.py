"""The whole model against values made by running the reference (goldens/models), case by case."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_vlm_jax import config as config_lib
from moe_vlm_jax import tree
from moe_vlm_jax.hf import configs, load, plans
from moe_vlm_jax.hf import pieces as pieces_lib
from moe_vlm_jax.losses import language_modeling
from moe_vlm_jax.models import vlm
from moe_vlm_jax.moe import dispatch
from tests import conftest
from tests.models import golden_batches

FOLDER = conftest.goldens_folder() / "models"
MODELS = sorted(path.name for path in FOLDER.iterdir() if (path / "checkpoint").is_dir())
CASES = [
    (model, path.stem)
    for model in MODELS
    for path in sorted((FOLDER / model).glob("*.npz"))
    if path.stem.startswith(("train_", "eval_")) and path.stem != "train_6steps"
]
FAST = {("phi2", "eval_cf2.0"), ("phi2", "train_drop_cf0.5")}

pytestmark = pytest.mark.goldens


@functools.cache
def checkpoint(model: str) -> tuple[config_lib.ModelConfig, nnx.State]:
    """Returns a golden checkpoint's config, set to float32 and to the reference's treatment of padding, and weights."""
    folder = FOLDER / model / "checkpoint"
    config = configs.read(folder, vision=tower(model)).config
    moe = dataclasses.replace(config.moe, dispatch="capacity", padding_takes_capacity=True)
    config = dataclasses.replace(config, moe=moe, compute_dtype="float32", param_dtype="float32", remat="none")
    abstract = nnx.eval_shape(lambda: vlm.VLM(config, rngs=nnx.Rngs(0)))
    return config, load.load_into(nnx.state(abstract), folder, config, vision=tower(model)).state


def tower(model: str) -> pathlib.Path:
    """Returns the folder of the vision tower that the checkpoint names; the reference loads the tower from there."""
    name = json.loads((FOLDER / model / "checkpoint" / "config.json").read_text())["mm_image_tower"]
    return FOLDER.parent / "vision_tower" / name


def settings(case, config: config_lib.ModelConfig) -> config_lib.ModelConfig:
    """Returns the config with the case's own capacity settings."""
    names = ("capacity_factor", "eval_capacity_factor", "min_capacity")
    found = {name: case[f"cfg_{name}"].item() for name in names if f"cfg_{name}" in case}
    found["min_capacity"] = int(found["min_capacity"])
    gumbel = any(key.startswith("gumbel.") for key in case)
    moe = dataclasses.replace(config.moe, **found, gumbel_second_choice=gumbel)
    return dataclasses.replace(config, moe=moe)


def lm_loss(model: vlm.VLM, hidden: jax.Array, labels: jax.Array) -> jax.Array:
    loss = language_modeling.next_token_loss(hidden, labels, model.logits, chunk=0)
    return loss.sum / loss.count


def combine_weights(routed, capacity: int) -> np.ndarray:
    """Returns the reference's [S, E, C] tensor."""
    ones = jnp.ones(routed.index.shape[0], bool)
    plan = dispatch.plan_slots(routed.index, routed.probs, ones, capacity=capacity, renormalize=True)
    slots = jax.nn.one_hot(jnp.where(plan.kept, plan.slot, -1), capacity)
    chosen = jax.nn.one_hot(routed.index, routed.probs.shape[-1])
    return np.asarray(jnp.einsum("Sk,SkE,SkC->SEC", plan.weight, chosen, slots))


@pytest.mark.parametrize(
    ("model_name", "case_name"),
    [pytest.param(*c, marks=[] if c in FAST else [pytest.mark.slow]) for c in CASES],
)
def test_model_equals_the_reference(model_name, case_name):
    case = dict(np.load(FOLDER / model_name / f"{case_name}.npz"))
    config, params = checkpoint(model_name)
    config = settings(case, config)
    train = bool(case["cfg_train"])
    left = "left" in case_name
    batch = golden_batches.splice(case, num_patches=config.vision.num_tokens, side="left" if left else "right")
    np.testing.assert_array_equal(batch.valid, case["spliced_attention_mask"])
    # The reference leaves label 0 of a row in place although nothing predicts it.
    np.testing.assert_array_equal(
        np.where(batch.valid, batch.labels, -100)[:, :-1],
        np.where(batch.valid[:, :-1], case["spliced_labels"][:, 1:], -100),
    )
    layers = [i for i, experts in enumerate(config.layer_experts) if experts]
    noise = tuple(case[f"gumbel.{i}"] for i in layers) if config.moe.gumbel_second_choice else None
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: vlm.VLM(config, rngs=nnx.Rngs(0))))

    def run(params, batch):
        model = nnx.merge(graphdef, params)
        out = model(batch, train=train, noise=noise, collect_blocks=True)
        ce = lm_loss(model, out.hidden, batch.labels)
        balance = sum(routed.balance_loss for routed in out.router)
        found = {
            "image_tower_features": model.vision(batch.images, dtype=jnp.float32),
            "projected_image_features": model.encode_images(batch.images),
            "hidden_states.0": model.embed(batch),
            **{f"hidden_states.{i + 1}": x for i, x in enumerate(out.blocks[:-1])},
            f"hidden_states.{len(out.blocks)}": out.hidden,
            "logits": model.logits(out.hidden),
            "logits_every8": model.logits(out.hidden)[..., ::8],
        }
        losses = {"lm_loss": ce, "aux_loss_sum": balance, "total_loss": ce + config.moe.balance_coef * balance}
        return losses["total_loss"], (found, losses, out.router)

    has_gradients = "grad_norm_all_trainable" in case
    step = jax.grad(run, has_aux=True) if has_gradients else lambda p, b: (None, run(p, b)[1])
    gradient, (found, losses, router) = jax.jit(step)(params, batch)

    real = batch.valid if left else np.ones_like(batch.valid)
    for name, value in found.items():
        if name not in case:
            continue
        if name.startswith(("hidden_states", "logits")):
            np.testing.assert_allclose(value[real], case[name][real], atol=5e-5, rtol=0, err_msg=name)
        else:
            np.testing.assert_allclose(value, case[name], atol=1e-5, rtol=0, err_msg=name)
    np.testing.assert_allclose(losses["lm_loss"], case["lm_loss"], atol=5e-6, rtol=0)
    if has_gradients:
        check_gradients(gradient, case, model_name, config)
    routed_rows = real.reshape(-1)
    for i, routed in zip(layers, router, strict=True):
        for name, value in (("router_logits", routed.logits), ("router_probs", routed.probs)):
            want = case[f"{name}.{i}"][routed_rows]
            np.testing.assert_allclose(value[routed_rows], want, atol=5e-5, rtol=0, err_msg=f"{name}.{i}")
    if left:  # padding rows see nothing but padding, in a way of each backbone's own; they enter aux and counts
        return
    np.testing.assert_allclose(losses["aux_loss_sum"], case["aux_loss_sum"], atol=4e-6, rtol=0)
    np.testing.assert_allclose(losses["total_loss"], case["total_loss"], atol=5e-6, rtol=0)
    for n, (i, routed) in enumerate(zip(layers, router, strict=True)):
        np.testing.assert_array_equal(routed.counts, case[f"exp_counts.{i}"])
        np.testing.assert_allclose(routed.balance_loss, case[f"l_aux.{i}"], atol=2e-6, rtol=0)
        combined = combine_weights(routed, case[f"combine_weights.{i}"].shape[-1])
        np.testing.assert_array_equal(combined > 0, case[f"combine_weights.{i}"] > 0)
        np.testing.assert_allclose(combined, case[f"combine_weights.{i}"], atol=5e-5, rtol=0)
        kept = case["dropped_assignments"][n]
        assert kept[0] == i
        assert int(routed.dropped) == kept[1]


def check_gradients(gradient: nnx.State, case, model_name: str, config: config_lib.ModelConfig) -> None:
    """Compares every stored gradient, and the norm over the parameters that the reference's stage III trains."""
    ours = tree.leaves(gradient)
    specs = {path: jax.ShapeDtypeStruct(leaf[...].shape, leaf[...].dtype) for path, leaf in ours.items()}
    folder = FOLDER / model_name / "checkpoint"
    plan = plans.make(specs, folder, config, vision=tower(model_name))
    tensors = {
        piece.tensor: pieces_lib.inverse(np.asarray(ours[path][...][piece.index]), piece.transform)
        for path, pieces in plan.pieces.items()
        for piece, _ in pieces
        if piece.rows is None
    }
    for key in (key for key in case if key.startswith("grad/")):
        np.testing.assert_allclose(tensors[key.removeprefix("grad/")], case[key], atol=1e-5, rtol=1e-3, err_msg=key)
    trainable = json.loads((FOLDER / model_name / "params.json").read_text())["trainable"]
    norm = np.sqrt(sum(np.sum(np.square(tensors[name].astype(np.float64))) for name in trainable))
    np.testing.assert_allclose(norm, case["grad_norm_all_trainable"], rtol=1e-3)
