"""Models that are ready to be asked: a run of this project by its workdir, or a checkpoint in HF layout."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx

from moe_vlm_jax import config as config_lib
from moe_vlm_jax.data import images as images_lib
from moe_vlm_jax.data import tokenize
from moe_vlm_jax.hf import configs
from moe_vlm_jax.hf import load as hf_load
from moe_vlm_jax.models import vlm
from moe_vlm_jax.training import checkpoint, setup

# What each family of checkpoints was trained with in the reference; HF's LLaVA-1.5 is a llama.
TEMPLATES = {"phi": "phi", "stablelm": "stablelm", "qwen": "qwen", "qwen1_5": "qwen", "llama": "v1", "mistral": "v1"}


class Source(NamedTuple):
    """A model that can be asked.

    Attributes:
      config: of the run, or made from the checkpoint.
      tokenizer, transform: for its text and its images.
      load: returns (graphdef, params); the expensive part, so it comes last.
    """

    config: config_lib.RunConfig
    tokenizer: Any
    transform: images_lib.ImageTransform
    load: Callable[[], tuple[nnx.GraphDef, nnx.State]]


def from_workdir(workdir: str, *, mesh: config_lib.MeshConfig | None = None) -> Source:
    """Returns a run of this project, with its newest checkpoint.

    Args:
      workdir: of the run.
      mesh: to compute on; None: rows are spread over the devices, and the mesh of the training need not exist here.
    """
    config = dataclasses.replace(checkpoint.read_config(workdir), mesh=mesh or config_lib.MeshConfig())

    def load() -> tuple[nnx.GraphDef, nnx.State]:
        model = setup.make_model(config)
        # Parameters that never trained are not in a checkpoint; they are made again as the run made them.
        frozen = setup.initial_params(model, config)[1] if jax.tree.leaves(model.frozen) else model.frozen
        trainable = checkpoint.newest(workdir, model.trainable, checkpoint.fingerprint(frozen))
        return model.graphdef, nnx.merge_state(trainable, frozen)

    return Source(
        config=config,
        tokenizer=tokenize.load_tokenizer(config.data.tokenizer),
        transform=images_lib.transform_for(config.model.vision, config.data),
        load=load,
    )


def from_checkpoint(
    folder: str,
    *,
    tokenizer: str | None = None,
    template: str | None = None,
    vision: str | None = None,
    dtype: str | None = None,
    mesh: config_lib.MeshConfig | None = None,
) -> Source:
    """Returns a checkpoint in HF layout.

    Args:
      folder: of the checkpoint.
      tokenizer: its folder; None: it lies beside the checkpoint.
      template: of conversations; None: by the checkpoint's family.
      vision: folder of the tower, if not the checkpoint's own.
      dtype: of parameters and computation; None: float32 on a CPU, else bfloat16.
      mesh: to compute on; None: one device.

    Raises:
      ValueError: the checkpoint is unreadable, or its template is not known.
    """
    info = configs.read(folder, vision=vision)
    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    config = dataclasses.replace(info.config, compute_dtype=dtype, param_dtype=dtype)
    template = template or TEMPLATES.get((info.family and info.family.llava) or "")
    if template is None:
        raise ValueError(f"the conversation template of {folder!r} is not known; name it with --template.")
    data = config_lib.DataConfig(
        tokenizer=tokenizer or folder,
        template=template,
        image_aspect="square" if info.raw.get("image_aspect_ratio") == "square" else "pad",
    )
    folders = [pathlib.Path(name) for name in (vision, folder, info.vision_folder) if name]
    described = [path for path in folders if (path / "preprocessor_config.json").is_file()]
    if described:
        transform = images_lib.transform_from_hf(described[0], aspect=data.image_aspect, max_pixels=data.max_pixels)
    else:
        transform = images_lib.transform_for(config.vision, data)

    def load() -> tuple[nnx.GraphDef, nnx.State]:
        if mesh is None:
            graphdef, abstract = nnx.split(nnx.eval_shape(lambda: vlm.VLM(config, rngs=nnx.Rngs(0))))
        else:
            training = config_lib.TrainingConfig(trainable=(), frozen=(".*",))
            model = setup.make_model(config_lib.RunConfig(model=config, mesh=mesh, training=training))
            graphdef, abstract = model.graphdef, nnx.merge_state(model.trainable, model.frozen)
        return graphdef, hf_load.load_into(abstract, folder, config, vision=vision).state

    loaded = tokenize.load_tokenizer(data.tokenizer)
    return Source(config_lib.RunConfig(model=config, data=data), loaded, transform, load)
