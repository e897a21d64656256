"""Token gradients against vmap(grad): one token at a time through the experts, and what their sum must be."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_vlm_jax import config as config_lib
from moe_vlm_jax import tree
from moe_vlm_jax.losses import stgc
from moe_vlm_jax.models import adapters
from moe_vlm_jax.moe import dispatch, layer, layouts, router, token_gradients
from moe_vlm_jax.quant import state as quant

B, T, D, F, E = 2, 13, 8, 16, 4
M = B * T
THRESHOLD = 0.3  # some of so few tokens are below it
WAYS = [
    {"dispatch": "dense"},
    {"dispatch": "dropless", "grouped_matmul": "blocks"},
    {"dispatch": "dropless", "grouped_matmul": "ragged"},
    {"dispatch": "dropless", "grouped_matmul": "slots"},
    {"dispatch": "capacity", "capacity_factor": 0.8},
]


class Case:
    """A layer with its inputs, and the token gradients of a random projection of its output."""

    def __init__(self, *, base: str = "float", gated: bool = True, **moe):
        config = config_lib.MoEConfig(**{"block_rows": 8, "top_k": 2, **moe})
        made = layer.MoELayer(E, D, F, config, gated=gated, act="silu", bias=True, dtype=jnp.float32, rngs=nnx.Rngs(3))
        if base != "float":
            adapters.attach(made, config_lib.LoraConfig(rank=3, targets=("experts/.*",)), rngs=nnx.Rngs(4))
        for path, leaf in tree.leaves(nnx.state(made)).items():  # B of an adapter and biases start at zero
            if path.endswith(("bias", "lora_b")):
                leaf[...] = 0.3 * jax.random.normal(jax.random.key(len(path)), leaf[...].shape)
        self.graphdef, params = nnx.split(made)
        if base == "nf4":
            chosen = config_lib.QuantConfig(kind="nf4", block=4, targets=("experts/.*/kernel",))
            params = quant.quantize_chosen(params, chosen)
        pattern = "experts/.*" if base == "float" else "experts/.*lora_[ab]"
        parts = tree.partition(params, {"a": (pattern,), "b": (rf"(?!{pattern}$).*",)})
        self.trained, self.rest = parts["a"], parts["b"]
        self.x = jax.random.normal(jax.random.key(0), (B, T, D))
        self.cotangent = jax.random.normal(jax.random.key(1), (B, T, D))
        self.valid = jnp.arange(T)[None, :] < jnp.array([[T], [T - 4]])
        ones = jnp.ones((B, T), jnp.int32)
        self.context = router.RouteContext(ones, self.valid, ones, ones, jnp.zeros((), jnp.int32), True)

    def found(self) -> tuple[jax.Array, dict, router.RouterOutput]:
        """Returns [M, k, 3], the experts' gradients, the routing."""

        def loss(trained, tap):
            names = token_gradients.names_below(frozenset(tree.leaves(trained)), "experts/")
            watch = token_gradients.LayerWatch(names, tap, None, None)
            y, routed = nnx.merge(self.graphdef, trained, self.rest)(self.x, self.context, watch=watch)
            return jnp.sum(y * self.cotangent), routed

        tap = jnp.zeros((M, self._config().top_k, 3))
        (sums, figures), routed = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(self.trained, tap)
        return figures, {path: v[...] for path, v in tree.leaves(sums).items()}, routed

    def one_by_one(self, routed: router.RouterOutput) -> np.ndarray:
        """Returns float[M, k, E * n]: every pair's own gradient, flat, from a dense layer that sees one pair."""
        model = nnx.merge(self.graphdef, self.trained, self.rest)
        model.config = dataclasses.replace(model.config, dispatch="dense")
        graphdef = nnx.graphdef(model)
        kept = self._kept(routed)

        def loss(trained, token, cotangent, weights):
            experts = nnx.merge(graphdef, trained, self.rest).experts
            return jnp.sum(jnp.einsum("E,EMD->MD", weights, experts(token[None], layouts.EveryExpert())) * cotangent)

        def pair(token, cotangent, index, weight):
            gradient = jax.grad(loss)(self.trained, token, cotangent, weight * jax.nn.one_hot(index, E))
            leaves = [v[...].reshape(E, -1) for v in tree.leaves(gradient).values()]
            return jnp.concatenate(leaves, axis=1).reshape(-1)

        over_choices = jax.vmap(pair, in_axes=(None, None, 0, 0))
        flat, cotangents = (a.reshape(M, D) for a in (self.x, self.cotangent))
        return np.asarray(jax.jit(jax.vmap(over_choices))(flat, cotangents, routed.index, kept), np.float64)

    def _config(self) -> config_lib.MoEConfig:
        return nnx.merge(self.graphdef, self.trained, self.rest).config

    def _kept(self, routed: router.RouterOutput) -> jax.Array:
        """Returns float32[M, k]: the weights with which choices enter the output, 0 for a dropped one."""
        config = self._config()
        if config.dispatch != "capacity":
            return routed.weight
        slots = dispatch.capacity_of(M, E, config.top_k, factor=config.capacity_factor, minimum=0)
        plan = dispatch.plan_slots(
            routed.index, routed.probs, self.valid.reshape(-1), capacity=slots, renormalize=config.renormalize
        )
        return plan.weight


def _conflicts(figures: jax.Array, routed: router.RouterOutput, *, threshold: float) -> stgc.Conflicts:
    inner, squared, unit = (figures[..., i] for i in range(3))
    return stgc.conflicts(inner, squared, unit, routed.index, num_experts=E, threshold=threshold)


@functools.cache
def _case(options: tuple) -> Case:
    return Case(**dict(options))


CASES = [
    *({"base": "float", "top_k": 2, **way} for way in WAYS),
    *({"base": "nf4", "top_k": 2, **way} for way in (WAYS[1], *WAYS[3:])),
    {"base": "lora", "top_k": 2, "dispatch": "dropless", "gated": False},
    {"base": "float", "top_k": 1, "dispatch": "dropless", "gated": False},
]


@pytest.mark.parametrize("options", CASES, ids=lambda o: "-".join(map(str, o.values())))
def test_token_gradients_equal_one_token_at_a_time(options):
    case = _case(tuple(options.items()))
    figures, sums, routed = case.found()
    own = case.one_by_one(routed)  # [M, k, E * n]
    total = own.sum(axis=(0, 1))
    autodiff = np.concatenate([np.asarray(v).reshape(E, -1) for v in sums.values()], axis=1).reshape(-1)
    np.testing.assert_allclose(total, autodiff, atol=1e-5 * np.abs(total).max())
    inner, squared = (own * total).sum(-1), (own**2).sum(-1)
    np.testing.assert_allclose(figures[..., 0], inner, atol=1e-5 * np.abs(inner).max())
    np.testing.assert_allclose(figures[..., 1], squared, rtol=1e-4, atol=1e-5 * squared.max())

    index = np.asarray(routed.index)
    found = _conflicts(figures, routed, threshold=THRESHOLD)
    counted = squared > 0
    np.testing.assert_array_equal(found.counted, counted)
    assert not counted.reshape(B, T, -1)[1, T - 4 :].any()  # padding
    consistencies, conflicting = [], np.zeros(index.shape, bool)
    for e in range(E):
        mine = counted & (index == e)
        unit = own[mine] / np.sqrt(squared[mine])[:, None]
        mean = own[mine].mean(axis=0)
        cosine = unit @ mean / np.linalg.norm(mean)
        np.testing.assert_allclose(np.asarray(found.cosine)[mine], cosine, atol=1e-5)
        consistencies.append((unit @ unit.T).mean())
        conflicting[mine] = cosine < THRESHOLD
    np.testing.assert_allclose(found.consistency, np.mean(consistencies), atol=1e-5)
    np.testing.assert_array_equal(found.conflicting, conflicting)
    assert 0 < conflicting.sum() < counted.sum()


@pytest.mark.slow
def test_watching_changes_no_gradient():
    case = _case(tuple(CASES[1].items()))

    def loss(trained, x, watch):
        return jnp.sum(nnx.merge(case.graphdef, trained, case.rest)(x, case.context, watch=watch)[0] * case.cotangent)

    names = token_gradients.names_below(frozenset(tree.leaves(case.trained)), "experts/")
    watch = token_gradients.LayerWatch(names, jnp.zeros((M, 2, 3)), None, None)
    plain, watched = (jax.grad(loss, argnums=(0, 1))(case.trained, case.x, w) for w in (None, watch))
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(watched), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-5)


def test_a_planted_opposite_token_is_the_only_one_flagged():
    """All tokens but one are alike; that one is asked for the opposite, once per choice."""
    case = Case(base="float", dispatch="dropless")
    case.x = jnp.broadcast_to(case.x[0, 0], case.x.shape)
    case.cotangent = jnp.broadcast_to(case.cotangent[0, 0], case.x.shape).at[0, 5].multiply(-1.0)
    figures, _, routed = case.found()
    found = _conflicts(figures, routed, threshold=0.0)
    np.testing.assert_array_equal(np.flatnonzero(found.conflicting.any(axis=-1)), [5])
    assert found.conflicting[5].all()
    np.testing.assert_allclose(found.cosine[5], -1.0, atol=1e-5)
