"""Optimizers against torch's AdamW, HF's schedule and Muon applied to single matrices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers
from flax import nnx

from moe_vlm_jax import config as config_lib
from moe_vlm_jax import tree
from moe_vlm_jax.training import optimizer as optimizer_lib

SHAPES = {
    "decoder/embed/embedding": (11, 6),
    "decoder/groups/0/blocks/0/attention/q/kernel": (3, 6, 4),
    "decoder/groups/0/blocks/0/attention/q/bias": (3, 4),
    "decoder/groups/0/blocks/0/attention_norm/scale": (3, 6),
    "decoder/groups/0/blocks/0/moe/router/kernel": (3, 6, 2),
    "decoder/groups/0/blocks/0/moe/experts/up/kernel": (3, 2, 6, 8),
    "decoder/lm_head/kernel": (6, 11),
    "projector/linears/0/kernel": (5, 6),
}
DECAYED = {name for name in SHAPES if name.endswith("/kernel")}
MATRICES = {
    "decoder/groups/0/blocks/0/attention/q/kernel",
    "decoder/groups/0/blocks/0/moe/experts/up/kernel",
    "projector/linears/0/kernel",
}


def _params(seed: int) -> nnx.State:
    keys = jax.random.split(jax.random.key(seed), len(SHAPES))
    pairs = [
        (
            tuple(int(part) if part.isdigit() else part for part in name.split("/")),
            nnx.Param(jax.random.normal(k, shape)),
        )
        for (name, shape), k in zip(SHAPES.items(), keys, strict=True)
    ]
    return nnx.from_flat_state(pairs)


def _config(**settings) -> config_lib.OptimizerConfig:
    fields = {"learning_rate": 0.05, "b1": 0.8, "b2": 0.9, "eps": 1e-6, "weight_decay": 0.1, "warmup_ratio": 0.2}
    return config_lib.OptimizerConfig(**{**fields, **settings})


def test_adamw_with_clipping_takes_the_steps_of_torch():
    config, num_steps = _config(max_grad_norm=3.0), 10
    optimizer = optimizer_lib.make_optimizer(config, num_steps)
    params = _params(0)
    state, update = optimizer.transform.init(params), jax.jit(optimizer.transform.update)
    twins = {name: torch.nn.Parameter(torch.tensor(np.asarray(v[...]))) for name, v in tree.leaves(params).items()}
    groups = [
        {"params": [twins[name] for name in SHAPES if name in DECAYED], "weight_decay": 0.1},
        {"params": [twins[name] for name in SHAPES if name not in DECAYED], "weight_decay": 0.0},
    ]
    torch_adamw = torch.optim.AdamW(groups, lr=0.05, betas=(0.8, 0.9), eps=1e-6)
    schedule = transformers.get_cosine_schedule_with_warmup(torch_adamw, 2, num_steps)
    for step in range(num_steps):
        gradients = _params(step + 1)
        updates, state = update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        for name, gradient in tree.leaves(gradients).items():
            twins[name].grad = torch.tensor(np.asarray(gradient[...]))
        torch.nn.utils.clip_grad_norm_(twins.values(), 3.0)
        torch_adamw.step()
        schedule.step()
    for name, variable in tree.leaves(params).items():
        # Ten steps in float32; torch adds 1e-6 to the norm that it divides by.
        np.testing.assert_allclose(variable[...], twins[name].detach().numpy(), atol=2e-6, err_msg=name)


# The third number is HF Trainer's ceil(ratio * steps), rounding errors included: 100 * 0.07 is a little more than 7.
@pytest.mark.parametrize(("num_steps", "ratio", "warmup"), [(6, 1 / 6, 1), (100, 0.07, 8), (7, 0.0, 0), (9, 0.5, 5)])
def test_the_cosine_schedule_is_that_of_hf(num_steps, ratio, warmup):
    twin = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.7)
    theirs = transformers.get_cosine_schedule_with_warmup(twin, warmup, num_steps)
    ours = optimizer_lib.make_schedule(_config(warmup_ratio=ratio), 0.7, num_steps)(jnp.arange(num_steps))
    for step in range(num_steps):
        np.testing.assert_allclose(ours[step], theirs.get_last_lr()[0], atol=1e-6)
        twin.step()
        theirs.step()


def test_the_schedule_ends_at_its_final_ratio_and_may_stay_constant():
    falling = optimizer_lib.make_schedule(_config(final_ratio=0.25), 0.8, 20)
    np.testing.assert_allclose([falling(20), falling(50)], 0.2, rtol=1e-6)
    constant = optimizer_lib.make_schedule(_config(schedule="constant"), 0.8, 20)
    np.testing.assert_allclose([constant(0), constant(2), constant(4), constant(19)], [0, 0.4, 0.8, 0.8], rtol=1e-6)


def test_weight_decay_and_muon_choose_by_path():
    decay = tree.leaves(optimizer_lib.decay_mask(_params(0)))
    assert {name for name, variable in decay.items() if variable.get_value()} == DECAYED
    labels = tree.leaves(optimizer_lib.muon_labels(_params(0)))
    assert {name for name, variable in labels.items() if variable.get_value() == "muon"} == MATRICES


def test_muon_treats_every_layer_and_expert_as_its_own_matrix():
    config = _config(name="muon", muon_learning_rate=0.03, max_grad_norm=1e9, warmup_ratio=0.0)
    optimizer = optimizer_lib.make_optimizer(config, 10)
    params, gradients = _params(0), _params(1)
    found = tree.leaves(_first_updates(optimizer.transform, gradients, params))
    single = optax.contrib.muon(0.03, weight_decay=0.1, consistent_rms=0.2)
    for name in MATRICES:
        value, gradient = tree.leaves(params)[name][...], tree.leaves(gradients)[name][...]
        for index in np.ndindex(value.shape[:-2]):
            alone = _first_updates(single, gradient[index], value[index])
            np.testing.assert_allclose(found[name][...][index], alone, rtol=1e-4, atol=1e-7)


def test_muon_leaves_the_other_parameters_to_adamw():
    params, gradients = _params(0), _params(1)
    settings = {"max_grad_norm": 1e9, "warmup_ratio": 0.0}
    updates = []
    for name in ("muon", "adamw"):
        transform = optimizer_lib.make_optimizer(_config(name=name, **settings), 10).transform
        updates.append(tree.leaves(_first_updates(transform, gradients, params)))
    for name in SHAPES:
        same = bool(jnp.all(updates[0][name][...] == updates[1][name][...]))
        assert same == (name not in MATRICES), name


def test_an_unknown_optimizer_is_an_error():
    with pytest.raises(ValueError, match=r"optimizer.name='sgd' is unknown; use 'adamw' or 'muon'"):
        optimizer_lib.make_optimizer(_config(name="sgd"), 10)


@functools.partial(jax.jit, static_argnums=0)
def _first_updates(transform, gradients, params):
    return transform.update(gradients, transform.init(params), params)[0]


ADAPTERS = {
    "decoder/groups/0/blocks/0/attention/q/lora_a": (3, 6, 2),
    "decoder/groups/0/blocks/0/attention/q/lora_b": (3, 2, 4),
    "decoder/groups/0/blocks/0/moe/router/kernel": (3, 6, 2),
}


def _tree(shapes: dict[str, tuple[int, ...]], fill: float) -> nnx.State:
    pairs = [(tuple(name.split("/")), nnx.Param(jnp.full(shape, fill))) for name, shape in shapes.items()]
    return nnx.from_flat_state(pairs)


def _one_update(config: config_lib.OptimizerConfig) -> dict[str, float]:
    """Returns the change of each parameter, all 2.0 with gradient 1.0, in the first step."""
    transform = optimizer_lib.make_optimizer(config, 10).transform
    params = _tree(ADAPTERS, 2.0)
    updates, _ = transform.update(_tree(ADAPTERS, 1.0), transform.init(params), params)
    return {name.rsplit("/", 1)[-1]: float(v[...].reshape(-1)[0]) for name, v in tree.leaves(updates).items()}


def test_groups_of_parameters_have_their_own_rate_and_decay():
    usual = _one_update(_config(warmup_ratio=0.0))
    # Adam's first step is the rate against the gradient's sign; decay adds rate * 0.1 * 2.
    assert usual == pytest.approx(dict.fromkeys(("lora_a", "lora_b", "kernel"), -0.05 * (1 + 0.2)), rel=1e-3)
    rates = (".*/lora_b=16", ".*/router/kernel=0")
    changed = _one_update(_config(warmup_ratio=0.0, rates=rates, no_decay=(".*/lora_a",)))
    assert changed["lora_b"] == pytest.approx(16 * usual["lora_b"])
    assert changed["kernel"] == 0.0
    assert changed["lora_a"] == pytest.approx(-0.05, rel=1e-3)


def test_the_first_moment_can_be_narrow_and_the_second_never_is():
    state = optimizer_lib.make_optimizer(_config(moments_dtype="bfloat16"), 10).transform.init(_tree(ADAPTERS, 1.0))
    found = state[1][0]
    assert {x.dtype for x in jax.tree.leaves(found.mu)} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves(found.nu)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rates": (".*/lora_c=2",)}, r"optimizer.rates pattern '\.\*/lora_c' names no trainable parameter"),
        ({"no_decay": ("x",)}, "optimizer.no_decay pattern 'x' names no trainable parameter"),
        ({"rates": (".*/lora_b",)}, "entry '.*/lora_b' must be PATTERN=FACTOR with a factor of at least 0"),
        ({"rates": (".*/lora_b=-1",)}, "entry '.*/lora_b=-1' must be PATTERN=FACTOR"),
        ({"rates": (".*/lora_b=2", ".*/lora_.=3")}, r"patterns .* both name '.*/lora_b'; make them disjoint"),
    ],
)
def test_wrong_groups_are_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        optimizer_lib.check_groups(_config(**settings), list(ADAPTERS))
