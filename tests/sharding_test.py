"""The mesh and the table of shardings; eight fake devices compute what one computes."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from moe_vlm_jax import config as config_lib
from moe_vlm_jax import sharding, tree
from moe_vlm_jax.models import adapters, vlm
from moe_vlm_jax.training import checkpoint, setup, stages, steps
from moe_vlm_jax.training import optimizer as optimizer_lib
from tests import xla
from tests.training import examples

VARIANTS = {
    "residual": {"use_residual": True},
    "dense": {"placement": "none"},
}


def _abstract(config: config_lib.ModelConfig) -> nnx.State:
    return nnx.state(nnx.eval_shape(lambda: vlm.VLM(config, rngs=nnx.Rngs(0))))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_of_every_kind_of_model_has_a_rule(variant):
    decoder = config_lib.DecoderConfig(
        num_layers=2, embed_dim=16, mlp_dim=24, vocab_size=32, num_heads=2, num_kv_heads=2, head_dim=8, rotary_dim=4
    )
    for bias in (True, False):
        decoder.lm_head_bias = decoder.mlp_bias = decoder.qkv_bias = decoder.output_bias = bias
        decoder.parallel_block = decoder.gated_mlp = bias
        decoder.norm = "layernorm" if bias else "rmsnorm"
        config = config_lib.ModelConfig(
            vision=config_lib.VisionConfig(
                num_layers=1, class_token=bias, pre_norm=bias, patch_bias=bias, skip_tokens=0
            ),
            decoder=decoder,
            moe=config_lib.MoEConfig(**VARIANTS[variant]),
            lora=config_lib.LoraConfig(
                rank=2, targets=(r"(decoder|projector)/.*(q|k|v|o|up|gate|down|\d|lm_head)", r"vision/.*")
            ),
        )
        for path, variable in tree.leaves(_abstract(config)).items():
            spec = sharding.spec_for(path, len(variable.shape))
            assert len(spec) == len(variable.shape), path


def test_experts_lie_on_the_expert_axis():
    path = "decoder/groups/0/blocks/0/moe/experts/down/kernel"
    assert sharding.spec_for(path, 4) == PartitionSpec(None, "expert", "tensor", "fsdp")
    assert sharding.spec_for(path.replace("experts", "residual"), 3) == PartitionSpec(None, "tensor", "fsdp")


def test_a_parameter_without_a_rule_is_an_error():
    with pytest.raises(
        ValueError, match=r"'decoder/extra/kernel' is named by no rule of sharding.RULES; add a pattern"
    ):
        sharding.spec_for("decoder/extra/kernel", 2)


def test_a_mesh_that_does_not_fit_the_devices_is_an_error():
    with pytest.raises(ValueError, match=r"data=1, fsdp=2, expert=3, tensor=1 needs 6 devices but there are 1;"):
        sharding.make_mesh(config_lib.MeshConfig(fsdp=2, expert=3), jax.devices()[:1])


def two_steps(mesh: dict[str, int], folder: str, adapted: bool) -> tuple[list[float], list[int]]:
    """Returns losses and gradient norms of two steps on a mesh, and the shape of one device's experts.

    In between, the state goes into a checkpoint without a mesh, and comes out of it with one.

    Args:
      mesh: devices by axis.
      folder: of the checkpoint.
      adapted: whether the base is quantised and only adapters train; the shape is then that of the codes.
    """
    config = dataclasses.replace(examples.run_config(batch_size=4, loss_chunk=0), mesh=config_lib.MeshConfig(**mesh))
    config.model.decoder.num_layers, config.model.moe.placement = 1, "dense"
    if adapted:
        config.training.trainable, config.training.frozen = stages.LORA
        config.model.quant = config_lib.QuantConfig(kind="nf4", block=8)
        config.model.lora = config_lib.LoraConfig(rank=3, targets=adapters.ALL_LINEAR)
    model = setup.make_model(config)
    trainable, frozen = setup.initial_params(model, config)
    optimizer = optimizer_lib.make_optimizer(config.optimizer, 10)
    state, abstract = setup.make_state(model, trainable, optimizer, seed=0)
    batch = jax.device_get(examples.random_batch(config, rows=4, length=24, seed=0))
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    train_step = steps.make_train_step(model.graphdef, optimizer, config, out_shardings=shardings)
    figures = []
    for step in range(2):
        if step == 1:
            checkpoints = checkpoint.Checkpoints(folder, keep=1, scored=False, base="", fingerprint="")
            if mesh:
                state = checkpoints.restore(abstract).state
            else:
                checkpoints.save(state, {})
            checkpoints.close()
        state, metrics = train_step(state, frozen, setup.to_devices(batch, model.mesh))
        figures += [float(metrics["train/loss"]), float(metrics["train/grad_norm"])]
    holder = frozen if adapted else state.trainable
    kernel = holder["decoder"]["groups"][0]["blocks"][0]["moe"]["experts"]["up"]["kernel"].get_value()
    return figures, list((kernel.codes if adapted else kernel).addressable_shards[0].data.shape)


@pytest.mark.slow
@pytest.mark.parametrize("adapted", [False, True])
def test_eight_devices_compute_what_one_computes_and_take_over_its_checkpoint(adapted, tmp_path):
    figures, whole = two_steps({}, str(tmp_path), adapted)
    mesh = {"fsdp": 2, "expert": 2, "tensor": 2}
    # The number of fake devices is fixed when JAX starts, so they need a process of their own.
    call = f"sharding_test.two_steps({mesh}, {str(tmp_path)!r}, {adapted})"
    script = f"import json; from tests import sharding_test; print(json.dumps({call}))"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla.flags(num_devices=8)}
    root = pathlib.Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, cwd=root)
    assert done.returncode == 0, done.stderr[-3000:]
    spread, part = json.loads(done.stdout.splitlines()[-1])
    # Sums over rows in another order; measured 1e-6.
    assert spread == pytest.approx(figures, rel=1e-5)
    # Codes hold two inputs a byte.
    assert (whole, part) == (([1, 4, 8, 24], [1, 2, 4, 12]) if adapted else ([1, 4, 16, 24], [1, 2, 8, 12]))
