"""A side channel out of the backward pass: what each token contributes to the gradient of its experts' parameters.

With a matrix's inputs h_n and output cotangents d_n, token n's part of the kernel's gradient is g_n = h_n d_n^T; the
sum over an expert's tokens is the gradient G that autodiff computes anyway. So <g_n, G> = h_n^T G d_n and |g_n| =
|h_n| |d_n|, and no g_n is ever made. An expert's gradient is that of all its trained parameters together: kernels
(up, gate, down), biases (h = 1) and the factors of its adapters (A: inputs h and cotangents of A's output; B
likewise); what is frozen or quantised has no part.

The figures of a row are the "gradient" of a probe of zeros, float[*rows, 3], that goes to the experts beside the rows:

    INNER    <g_n, G>
    SQUARED  |g_n|^2
    UNIT     |sum of g_m / |g_m| over the tokens of the row's expert|^2

Probes start as [M, k, 3] for the tokens' choices and are moved as the rows are (moe/dispatch.py), so their cotangents
find the way back. This works in scans, rematerialised bodies and shard_maps, and nothing larger leaves the layer.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moe_vlm_jax import tree

INNER, SQUARED, UNIT = range(3)
NUM_CHANNELS = 3

# (figures float32[M, k, 3], router logits float32[M, E], index int32[M, k]) -> (a gradient for the logits, float32[n]).
Judge = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


class Watch(NamedTuple):
    """What a forward pass is told in order to hear about token gradients in its backward pass.

    Attributes:
      trained: paths of all parameters that train, whose gradients count.
      taps: zeros, one array a MoE layer in order; what their "gradient" is depends on judge.
      judge: None: a tap is the layer's probe float32[M, k, 3] itself. Else a tap is float32[n], its gradient are the
        figures that judge returns, and the gradient that judge returns for the logits flows into the router's kernel
        (not into the hidden states: these carry the token gradients of the layers below).
      weights: float32 per MoE layer, times judge's gradient for the logits; None without a judge.
    """

    trained: frozenset[str]
    taps: tuple[jax.Array, ...]
    judge: Judge | None = None
    weights: tuple[jax.Array, ...] | None = None


class LayerWatch(NamedTuple):
    """The part of a Watch that belongs to one layer.

    Attributes:
      names: trained parameters of the experts, such as 'up/kernel'.
      tap, judge, weight: as in Watch.
    """

    names: frozenset[str]
    tap: jax.Array
    judge: Judge | None
    weight: jax.Array | None

    def probe(self, logits: jax.Array, index: jax.Array) -> jax.Array:
        """Returns zeros float32[M, k, 3].

        Args:
          logits: float32[M, E] through which the router's kernel hears of the judgement.
          index: int32[M, k] the experts.
        """
        if self.judge is None:
            return self.tap
        return _judged(self.judge, logits, index, self.weight, self.tap)


def names_below(trained: frozenset[str], prefix: str) -> frozenset[str]:
    """Returns the paths that begin with prefix, without it."""
    return frozenset(path.removeprefix(prefix) for path in trained if path.startswith(prefix))


def bind(
    experts: nnx.Module, *, key: jax.Array | None, names: frozenset[str] | None, axes: tuple[str, ...] = ()
) -> Callable[..., jax.Array]:
    """Returns (rows, layout[, probe]) -> rows.

    Args:
      experts: moe.experts.Experts.
      key: for the adapters' dropout, or None.
      names: trained parameters; None: no probe is given.
      axes: of a mesh, over which further rows of the same experts lie (inside a shard_map).
    """
    if names is None:
        return functools.partial(experts, key=key)  # type: ignore[arg-type]
    graphdef, floats, rest = nnx.split(experts, _is_float, ...)

    def run(rows: jax.Array, layout: Any, probe: jax.Array) -> jax.Array:
        return _observed(_Static(graphdef, names, axes), rows, floats, rest, layout, key, probe)

    return run


class _Static(NamedTuple):
    graphdef: nnx.GraphDef
    names: frozenset[str]
    axes: tuple[str, ...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _judged(judge: Judge, logits, index, weight, tap) -> jax.Array:
    return jnp.zeros((*index.shape, NUM_CHANNELS), jnp.float32)


def _judged_fwd(judge, logits, index, weight, tap):
    return _judged(judge, logits, index, weight, tap), (logits, index, weight)


def _judged_bwd(judge, residuals, figures):
    logits, index, weight = residuals
    gradient, told = judge(figures, logits, index)
    return weight * gradient, None, jnp.zeros_like(weight), told


_judged.defvjp(_judged_fwd, _judged_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _observed(static: _Static, rows, floats, rest, layout, key, probe) -> jax.Array:
    return nnx.merge(static.graphdef, floats, rest)(rows, layout, key=key)


def _observed_fwd(static, rows, floats, rest, layout, key, probe):
    def run(rows, floats, taps):
        heard = {}

        def listen(name: str, inputs: jax.Array | None, outputs: jax.Array) -> jax.Array:
            if name not in static.names:
                return outputs
            heard[name] = (inputs, outputs)
            return outputs + taps[name] if taps else outputs

        y = nnx.merge(static.graphdef, floats, rest)(rows, layout, key=key, listen=listen)
        return y, heard

    _, shapes = jax.eval_shape(lambda rows, floats: run(rows, floats, {}), rows, floats)
    missed = sorted(static.names - set(shapes))
    if missed:
        raise ValueError(f"the experts' parameters {missed} train, but their layers do not report to `listen`.")
    taps = {name: jnp.zeros(out.shape, out.dtype) for name, (_, out) in shapes.items()}

    def observed(rows, floats, taps):
        y, heard = run(rows, floats, taps)
        return y, {name: inputs for name, (inputs, _) in heard.items()}

    y, pull, inputs = jax.vjp(observed, rows, floats, taps, has_aux=True)
    return y, (pull, inputs, layout)


def _observed_bwd(static, residuals, cotangent):
    pull, inputs, layout = residuals
    d_rows, d_floats, deltas = pull(cotangent)
    sums = {path: variable.get_value() for path, variable in tree.leaves(d_floats).items() if path in static.names}
    if static.axes:
        sums = jax.lax.psum(sums, static.axes)
    return d_rows, d_floats, None, None, None, _figures(inputs, deltas, sums, layout, static.axes)


_observed.defvjp(_observed_fwd, _observed_bwd)


def _figures(inputs: dict, deltas: dict, sums: dict, layout: Any, axes: tuple[str, ...]) -> jax.Array:
    """Returns float32[*rows, 3].

    Args:
      inputs: {name: float[*rows, in]} of each trained matrix; None for a bias.
      deltas: {name: float[*rows, out]} cotangents of its output.
      sums: {name: float[E, in, out]} or [E, out] gradients, over all tokens of the expert.
      layout: of the rows.
      axes: see `bind`.
    """
    inner = squared = jnp.zeros((), jnp.float32)
    for name, delta in deltas.items():
        along = _product(layout, inputs[name], sums[name].astype(delta.dtype), delta)
        inner += jnp.sum(along.astype(jnp.float32) * delta.astype(jnp.float32), axis=-1)
        squared += _squares(delta) * (1.0 if inputs[name] is None else _squares(inputs[name]))
    inverse = jnp.where(squared > 0, jax.lax.rsqrt(jnp.where(squared > 0, squared, 1.0)), 0.0)[..., None]
    unit = jnp.zeros((), jnp.float32)
    for name, delta in deltas.items():
        product = functools.partial(_product, layout, inputs[name], like=delta)
        scaled = (delta.astype(jnp.float32) * inverse).astype(delta.dtype)
        # The product is linear; its value is dead code.
        (total,) = jax.vjp(product, sums[name].astype(delta.dtype))[1](scaled)
        total = jax.lax.psum(total, axes) if axes else total
        unit += jnp.sum(jnp.square(total.astype(jnp.float32)), axis=tuple(range(1, total.ndim)))
    of_row = layout.add_bias(jnp.zeros((*inner.shape, 1), jnp.float32), unit[:, None])[..., 0]
    return jnp.stack([inner, squared, of_row], axis=-1)


def _product(layout: Any, inputs: jax.Array | None, stack: jax.Array, like: jax.Array) -> jax.Array:
    """Returns each row's inputs times its expert's matrix, or its expert's bias."""
    if inputs is None:
        return layout.add_bias(jnp.zeros_like(like), stack)
    return layout.matmul(inputs, stack)


def _squares(x: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1)


def _is_float(path: Any, variable: Any) -> bool:
    """Returns whether a parameter can be differentiated; a quantised one holds codes."""
    del path
    return all(jnp.issubdtype(a.dtype, jnp.floating) for a in jax.tree.leaves(variable.get_value()))
