"""A trained run with adapters, opened again: what is the base's, what is its own, and that as a folder for PEFT."""

import dataclasses
import pathlib
from typing import Any, NamedTuple

import jax
from flax import nnx

from moe_vlm_jax import config as config_lib
from moe_vlm_jax import tree
from moe_vlm_jax.hf import adapter_readers, configs
from moe_vlm_jax.hf import adapters as hf_adapters
from moe_vlm_jax.models import adapters
from moe_vlm_jax.training import base as base_lib
from moe_vlm_jax.training import checkpoint, setup


class Run(NamedTuple):
    """A trained run.

    Attributes:
      config: with the mesh of this machine.
      model: its structure.
      base: all parameters of the base, with new adapters.
      trained: what trained, of the newest checkpoint.
      frozen: beside it; the base's, but for what an adapter that the run started from held whole.
      info: the base checkpoint in HF layout, if there is one.
      layout: how the base is written.
    """

    config: config_lib.RunConfig
    model: setup.Model
    base: nnx.State
    trained: nnx.State
    frozen: nnx.State
    info: configs.Checkpoint | None
    layout: str


def open_run(workdir: str, layout: str | None) -> Run:
    """Returns the run in a workdir with its newest checkpoint.

    Args:
      workdir: of the run.
      layout: how to write the base; None is the way in which it was read, or moe_llava.
    """
    config = dataclasses.replace(checkpoint.read_config(workdir), mesh=config_lib.MeshConfig())
    if config.model.lora.rank == 0:
        raise ValueError(f"the run in {workdir!r} has model.lora.rank=0, so no adapters to merge; give a LoRA run.")
    training, info = config.training, None
    if training.base and not base_lib.is_saved(training.base):
        info = configs.read(training.base, vision=training.base_vision or None)
    if layout is None:
        experts = any(config.model.layer_experts)
        layout = info.layout if info is not None and info.layout == "llava" and not experts else "moe_llava"
    model = setup.make_model(config)
    bare = dataclasses.replace(config, training=dataclasses.replace(training, adapter=""))
    initial, frozen = setup.initial_params(model, bare)
    base = nnx.merge_state(initial, frozen)
    if training.adapter:
        frozen = setup.initial_params(model, config)[1]
    trained = checkpoint.newest(workdir, model.trainable, checkpoint.fingerprint(frozen))
    return Run(config, model, base, trained, frozen, info, layout)


def write_adapter(run: Run, target: pathlib.Path) -> list[str]:
    """Writes what is not the base's as an adapter folder, reads it back, and returns what to tell the user."""
    fingerprint = checkpoint.fingerprint(adapters.split(run.base)[0])
    bare = tree.leaves(run.base)
    held = [(path, v) for path, v in nnx.to_flat_state(run.frozen) if not _equal(v, bare["/".join(map(str, path))])]
    params = nnx.merge_state(run.trained, nnx.from_flat_state(held)) if held else run.trained
    source = run.config.training.base or f"random weights of seed {run.config.training.seed}"
    where = {"layout": run.layout, "base": run.info}
    model = run.config.model
    written = hf_adapters.write_adapter(target, params, model, source=source, fingerprint=fingerprint, **where)
    again = adapter_readers.load_adapter(target, model, base_fingerprint=fingerprint, **where)
    if not _equal(adapter_readers.placed(params, again.leaves), params):
        raise ValueError(f"the adapter in {target} differs from the run's when it is read again; check the disk.")
    return [f"{len(written.tensors)} tensors, {written.bytes / 2**20:.1f} MiB, equal when read again"]


def _equal(first: Any, second: Any) -> bool:
    return jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), first, second))
