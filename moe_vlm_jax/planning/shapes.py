"""What a train step takes, as shapes on devices that need not be there, made by the functions that training uses."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from flax import nnx

from moe_vlm_jax import batch as batch_lib
from moe_vlm_jax import config as config_lib
from moe_vlm_jax.training import optimizer as optimizer_lib
from moe_vlm_jax.training import reference as reference_lib
from moe_vlm_jax.training import setup
from moe_vlm_jax.training import state as state_lib


class Shapes(NamedTuple):
    """Everything that the step takes, as shapes and places on the target's devices.

    Attributes:
      config: with settings resolved for the target's platform.
      model: structure and layout.
      optimizer: over the trainable part.
      state: of `setup.abstract_state`.
      batch: of `setup.abstract_batch`.
      reference: what a preference loss compares with, in the form of the trainable parameters; None where nothing is.
    """

    config: config_lib.RunConfig
    model: setup.Model
    optimizer: optimizer_lib.Optimizer
    state: state_lib.TrainState
    batch: batch_lib.Batch
    reference: nnx.State | None

    def lower(self) -> jax.stages.Lowered:
        """Returns the train step, traced for the target; `.compile()` takes minutes for a large model."""
        step = setup.make_step(self.model, self.optimizer, self.config, self.state)
        return step.lower(self.state, self.model.frozen, self.batch, self.reference)


def make_shapes(config: config_lib.RunConfig, devices: Sequence[Any]) -> Shapes:
    """Returns the shapes of a validated config's step on described devices; allocates nothing.

    Raises:
      ValueError: the mesh does not fit the devices or the parameters, or patterns do not fit the parameters.
    """
    model = setup.make_model(config, devices)
    config = dataclasses.replace(config, model=model.config)
    # How many steps there are is a number in the schedule: any will do.
    optimizer = optimizer_lib.make_optimizer(config.optimizer, config.training.max_steps or 1000)
    state = setup.abstract_state(model, optimizer, config.training.seed)
    in_step = reference_lib.is_needed(config) and not config.preference.precomputed
    reference = model.trainable if in_step else None
    return Shapes(config, model, optimizer, state, setup.abstract_batch(config, model.mesh), reference)
