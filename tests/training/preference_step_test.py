"""The preference step: what it starts at, what it moves and what it must not, and that sharing changes nothing."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_vlm_jax import batch as batch_lib
from moe_vlm_jax import config as config_lib
from moe_vlm_jax import tree
from moe_vlm_jax.data import trees
from moe_vlm_jax.data.records import Example
from moe_vlm_jax.models import adapters
from moe_vlm_jax.quant import state as quant
from moe_vlm_jax.training import optimizer as optimizer_lib
from moe_vlm_jax.training import preference_step, stages, steps
from moe_vlm_jax.training import reference as reference_lib
from moe_vlm_jax.training import state as state_lib
from tests.training import examples

NUM_PAIRS, LENGTH = 5, 56


def run_config(kind: str = "nf4", stage: stages.Stage = stages.LORA, **preference) -> config_lib.RunConfig:
    """Returns a run of one layer of experts whose frozen kernels are quantised, adapters everywhere."""
    config = examples.without_balance(examples.run_config(**stage._asdict(), loss_chunk=8))
    config.model.decoder.num_layers, config.model.moe.placement, config.model.remat = 1, "dense", "full"
    config.model.quant = config_lib.QuantConfig(kind=kind, block=8) if kind != "none" else config_lib.QuantConfig()
    config.model.lora = config_lib.LoraConfig(rank=3, alpha=7.0, targets=adapters.ALL_LINEAR)
    config.optimizer = dataclasses.replace(config.optimizer, weight_decay=0.0, learning_rate=1e-3, schedule="constant")
    config.optimizer.final_ratio = 0.0
    config.preference = config_lib.PreferenceConfig(**{"loss": "sigmoid", "pairs": "pairs.jsonl", **preference})
    return config


def random_pairs(config: config_lib.RunConfig) -> list[tuple[Example, Example]]:
    """Returns pairs about images, of questions and answers of unequal lengths."""
    rng = np.random.default_rng(7)
    words = functools.partial(rng.integers, 3, config.model.decoder.vocab_size)
    pairs = []
    for i in range(NUM_PAIRS):
        prompt = np.concatenate([words(size=1), [batch_lib.IMAGE_TOKEN_INDEX], words(size=2 + i)])
        pair = []
        for side, length in (("chosen", 1 + i % 3), ("rejected", 4 - i % 2)):
            answer = words(size=length)
            labels = np.concatenate([np.full(len(prompt), batch_lib.IGNORE_INDEX), answer])
            pair.append(Example(f"{i}:{side}", np.concatenate([prompt, answer]), labels, (f"image {i}",)))
        pairs.append(tuple(pair))
    return pairs


def pair_batch(config: config_lib.RunConfig, *, share_prefix: bool = True, rows=((0, 3), (2, 1, 4))) -> batch_lib.Batch:
    """Returns a Batch [1, rows, LENGTH] of the pairs with these numbers; separate sequences have longer rows."""
    patches = config.model.vision.num_tokens
    pairs = random_pairs(config)

    def image(name: str) -> np.ndarray:
        return np.random.default_rng(int(name.split()[1])).normal(size=(64, 64, 3)).astype(np.float32)

    def tree_of(i: int) -> trees.Tree:
        return trees.join([trees.expand(e, patches) for e in pairs[i]], patches, share_prefix=share_prefix)

    batch = trees.collate(
        [[tree_of(i) for i in row] for row in rows],
        row_length=LENGTH if share_prefix else 2 * LENGTH,
        images_per_row=3,
        num_patches=patches,
        image_size=64,
        load_image=image,
    )
    return jax.tree.map(lambda x: jnp.asarray(x)[None], batch)


@functools.cache
def parts(config: config_lib.RunConfig):
    """Returns (graphdef, trainable, frozen) of random parameters, adapters with a B that is not zero among them."""
    graphdef, params = examples.random_model(config.model, seed=1)
    params = quant.quantize_chosen(params, config.model.quant)
    groups = tree.partition(params, {"t": config.training.trainable, "f": config.training.frozen})
    return graphdef, groups["t"], groups["f"]


@functools.cache
def train_step(config: config_lib.RunConfig):
    optimizer = optimizer_lib.make_optimizer(config.optimizer, 10)
    return optimizer, steps.make_train_step(parts(config)[0], optimizer, config, objective=preference_step.PREFERENCE)


def first_state(config: config_lib.RunConfig) -> state_lib.TrainState:
    trainable = jax.tree.map(jnp.copy, parts(config)[1])
    return state_lib.new_state(trainable, train_step(config)[0].transform, seed=0)


@functools.partial(jax.jit, static_argnums=(0, 3))
def log_probs(graphdef, params, batch, config):
    return preference_step.log_probs(graphdef, params, batch, config)


def bits(state: nnx.State) -> dict[str, bytes]:
    return {jax.tree_util.keystr(p): np.asarray(x).tobytes() for p, x in jax.tree_util.tree_leaves_with_path(state)}


@pytest.mark.slow
@pytest.mark.parametrize("beta", [0.1, 2.5])
def test_the_loss_starts_at_ln_2(beta):
    config = run_config(beta=beta)
    _, trainable, frozen = parts(config)
    reference = reference_lib.make(trainable, frozen, config)
    _, metrics = train_step(config)[1](first_state(config), frozen, pair_batch(config), reference)
    assert abs(float(metrics["train/loss"]) - math.log(2)) < 1e-6
    assert float(metrics["rewards/accuracy"]) == 0.5
    assert float(metrics["rewards/margin"]) == 0.0
    for name in ("router/load_text/0", "router/load_image/0"):  # routing is logged as in supervised training
        assert metrics[name].shape == (4,)
        assert float(metrics[name].sum()) == pytest.approx(1.0)
    assert float(metrics["answers/chosen_tokens"]) == pytest.approx(np.mean([1, 2, 3, 1, 2]))
    assert float(metrics["answers/rejected_tokens"]) == pytest.approx(np.mean([4, 3, 4, 3, 4]))


@pytest.mark.slow
def test_steps_move_the_policy_towards_the_chosen_answers_and_nothing_else():
    config = run_config()
    graphdef, trainable, frozen = parts(config)
    reference, batch = reference_lib.make(trainable, frozen, config), pair_batch(config)
    fixed = {"frozen": bits(frozen), "reference": bits(reference)}
    of_reference = log_probs(graphdef, nnx.merge_state(reference, frozen), batch, config)
    state = first_state(config)
    state, _ = train_step(config)[1](state, frozen, batch, reference)
    after = log_probs(graphdef, nnx.merge_state(state.trainable, frozen), batch, config)
    gain = np.asarray(after - of_reference)[0].reshape(-1, 2)
    gain = gain[np.abs(gain).sum(axis=1) > 0]
    assert len(gain) == NUM_PAIRS
    assert gain[:, 0].mean() > 0 > gain[:, 1].mean()
    for _ in range(3):
        state, metrics = train_step(config)[1](state, frozen, batch, reference)
    assert float(metrics["train/preference_loss"]) < math.log(2) - 0.002
    assert float(metrics["rewards/accuracy"]) > 0.5
    assert {"frozen": bits(frozen), "reference": bits(reference)} == fixed
    again = log_probs(graphdef, nnx.merge_state(reference, frozen), batch, config)
    np.testing.assert_array_equal(again, of_reference)
    np.testing.assert_array_equal(log_probs(graphdef, nnx.merge_state(trainable, frozen), batch, config), of_reference)


def gradient(config: config_lib.RunConfig, batch: batch_lib.Batch, reference: nnx.State | None):
    """Returns (loss, gradient) of one micro-batch."""
    graphdef, trainable, frozen = parts(config)
    whole = steps.Whole(1, jnp.float32(1), preference_step.count(batch))

    def loss(t, f, b, r):
        settings = {"whole": whole, "step": jnp.int32(0), "key": jax.random.key(0)}
        found = preference_step.preference_loss(t, f, b, r, graphdef=graphdef, config=config, **settings)
        return found[0]

    micro_batch = jax.tree.map(lambda x: x[0], batch)
    return jax.jit(jax.value_and_grad(loss))(trainable, frozen, micro_batch, reference)


def other_reference(config: config_lib.RunConfig) -> nnx.State:
    """Returns a reference that is not the policy."""
    moved = jax.tree.map(lambda x: x + 0.02 * jnp.sin(jnp.arange(x.size).reshape(x.shape)), parts(config)[1])
    return reference_lib._own(moved)


@pytest.mark.slow
def test_the_gradient_is_that_of_the_papers_equation():
    """Rafailov et al. 2023, after eq. 7: -beta sigma(r_l - r_w) (grad log pi(y_w) - grad log pi(y_l)), a mean here."""
    config = run_config(beta=0.4)
    graphdef, trainable, frozen = parts(config)
    batch, reference = pair_batch(config), other_reference(config)

    def policy(t):
        return preference_step.log_probs(graphdef, nnx.merge_state(t, frozen), batch, config).reshape(-1, 2)

    theirs = log_probs(graphdef, nnx.merge_state(reference, frozen), batch, config).reshape(-1, 2)

    @jax.jit
    def closed_form(t):
        mine, pullback = jax.vjp(policy, t)
        rewards = config.preference.beta * (mine - theirs)
        weight = -config.preference.beta * jax.nn.sigmoid(rewards[:, 1] - rewards[:, 0]) / NUM_PAIRS
        weight = jnp.where(mine.sum(axis=1) != 0, weight, 0.0)
        return pullback(jnp.stack([weight, -weight], axis=1))[0]

    expected = closed_form(trainable)
    _, found = gradient(config, batch, reference)
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected)) > 1e-2
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["sigmoid", "orpo"])
def test_a_shared_prompt_gives_the_loss_and_the_gradient_of_separate_sequences(loss):
    config = run_config(loss=loss)
    reference = None if loss == "orpo" else other_reference(config)
    shared, separate = (gradient(config, pair_batch(config, share_prefix=share), reference) for share in (True, False))
    np.testing.assert_allclose(shared[0], separate[0], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(shared[1]), jax.tree.leaves(separate[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_log_probs_that_were_computed_beforehand_train_alike():
    config = run_config(sft_coef=0.3)
    graphdef, _, frozen = parts(config)
    batch, reference = pair_batch(config), other_reference(config)
    known = log_probs(graphdef, nnx.merge_state(reference, frozen), batch, config)
    at_once = gradient(config, batch, reference)
    before = gradient(config, batch._replace(reference_log_probs=known), None)
    np.testing.assert_allclose(at_once[0], before[0], rtol=1e-6)
    for a, b in zip(jax.tree.leaves(at_once[1]), jax.tree.leaves(before[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("loss", "told", "added"), [("sigmoid", 0.3, 0.3), ("orpo", 0.0, 1.0)])
def test_the_cross_entropy_of_chosen_answers_is_added(loss, told, added):
    config = run_config(loss=loss, sft_coef=told)
    graphdef, trainable, frozen = parts(config)
    batch = pair_batch(config)
    reference = None if loss == "orpo" else other_reference(config)
    chosen = log_probs(graphdef, nnx.merge_state(trainable, frozen), batch, config)[..., 0]
    entropy = -float(chosen.sum()) / sum([1, 2, 3, 1, 2])
    _, metrics = train_step(config)[1](first_state(config), frozen, batch, reference)
    assert float(metrics["train/loss"]) == pytest.approx(
        float(metrics["train/preference_loss"]) + added * entropy, rel=1e-5
    )


@pytest.mark.slow
def test_micro_batches_give_the_step_of_one_batch():
    config = run_config(sft_coef=0.3)
    _, _, frozen = parts(config)
    reference = other_reference(config)
    whole = pair_batch(config)
    halves = [pair_batch(config, rows=(row,)) for row in ((0, 3), (2, 1, 4))]
    step = train_step(config)[1]
    _, one_metrics = step(first_state(config), frozen, whole, reference)
    _, two_metrics = step(first_state(config), frozen, examples.stacked(*halves), reference)
    for name in ("train/loss", "rewards/margin", "answers/chosen_tokens", "kl/reference_policy", "train/grad_norm"):
        np.testing.assert_allclose(one_metrics[name], two_metrics[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_an_adapter_that_is_off_is_the_base():
    config = run_config(reference="base")
    graphdef, trainable, frozen = parts(config)
    off = reference_lib.make(trainable, frozen, config)
    batch = pair_batch(config)
    found = log_probs(graphdef, nnx.merge_state(off, frozen), batch, config)
    bare = dataclasses.replace(config.model, lora=config_lib.LoraConfig())
    bare_config = dataclasses.replace(config, model=bare)
    expected = log_probs(examples.random_model(bare, seed=1)[0], frozen, batch, bare_config)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"is the base with adapters off, but .*router/kernel"):
        both = run_config(stage=stages.LORA_AND_ROUTERS, reference="base")
        reference_lib.make(parts(both)[1], parts(both)[2], both)
