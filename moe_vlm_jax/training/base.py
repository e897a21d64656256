"""The parameters that a run starts from: a checkpoint in HF layout, its dense parent, or a base quantised before.

HF layout        read tensor by tensor; kernels that the config quantises are quantised as they are read
dense parent     the same, then its MLPs are copied into experts
quantised base   a folder of `save`: what the devices hold, restored as it is, on any mesh

<folder>/base.json     the model's config, where it came from, the fingerprint of its bits
<folder>/params/       parameters, quantised ones as their codes and scales (Orbax)
"""

import dataclasses
import json
import pathlib
import re
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from flax import nnx

from moe_vlm_jax import config as config_lib
from moe_vlm_jax import distributed, sharding, tree, validation
from moe_vlm_jax.hf import adapter_readers
from moe_vlm_jax.hf import adapters as hf_adapters
from moe_vlm_jax.hf import configs as hf_configs
from moe_vlm_jax.hf import load as hf_load
from moe_vlm_jax.models import adapters, upcycling, vlm
from moe_vlm_jax.moe import question_clusters
from moe_vlm_jax.quant import state as quant
from moe_vlm_jax.training import checkpoint

_FILE = "base.json"
# Fields of a ModelConfig that decide which parameters exist and what they are; the others decide how they are used.
_IDENTITY = re.compile(r"(vision|decoder|quant)\..*|projector|moe\.(placement|layers|num_experts|use_residual)")
_NOT_IDENTITY = re.compile(r".*(_init_std|_dropout|\.max_positions)")


def load(
    abstract: nnx.State, config: config_lib.ModelConfig, training: config_lib.TrainingConfig, mesh: jax.sharding.Mesh
) -> nnx.State:
    """Returns the parameters that `training` names, on the devices and in the form of `abstract`.

    Adapters are those of training.adapter, or new.

    Args:
      abstract: all parameters of the model, jax.ShapeDtypeStructs with shardings in the place of arrays.
      config: of the model.
      training: base, base_vision, base_projector, adapter and seed.
      mesh: of the shardings.

    Raises:
      ValueError: the checkpoint is unreadable or does not fit the model.
    """
    bare, fresh = adapters.split(abstract)
    if training.upcycling_noise and is_saved(training.base):
        raise ValueError(_noise_without_upcycling(training))
    if config.routes_by_question and (is_saved(training.base) or _has_experts(training)):
        raise ValueError(
            f"training.base={training.base!r} brings routers over hidden states, but model.moe.router='cluster' has a "
            "table of clusters; start from the dense checkpoint that the clusters were made for."
        )
    params = _restore(bare, config, training) if is_saved(training.base) else _from_hf(bare, config, training, mesh)

    def init(key: jax.Array) -> nnx.State:
        return adapters.split(nnx.state(vlm.VLM(config, rngs=nnx.Rngs(key))))[1]

    fresh = jax.jit(init, out_shardings=shardings(fresh))(jax.random.key(training.seed))
    complete = nnx.merge_state(params, fresh)
    return with_adapter(complete, config, training) if training.adapter else complete


def with_adapter(params: nnx.State, config: config_lib.ModelConfig, training: config_lib.TrainingConfig) -> nnx.State:
    """Returns the parameters with the factors of training.adapter, and what it holds whole, in the place of their own.

    Raises:
      ValueError: the adapter is unreadable, or was made for another model or another base.
    """
    if checkpoint.is_workdir(training.adapter):
        return _as_trained(params, config, training.adapter)
    info = None if is_saved(training.base) else hf_configs.read(training.base, vision=training.base_vision or None)
    file = pathlib.Path(training.adapter) / hf_adapters.BASE_FILE
    layout = json.loads(file.read_text(encoding="utf-8"))["layout"] if file.is_file() else "moe_llava"
    found = adapter_readers.load_adapter(
        training.adapter,
        config,
        layout=layout,
        base=info,
        base_fingerprint=checkpoint.fingerprint(adapters.split(params)[0]),
    )
    for note in found.notes:
        logging.info("%s: %s", training.adapter, note)
    return adapter_readers.placed(params, found.leaves)


def _as_trained(params: nnx.State, config: config_lib.ModelConfig, workdir: str) -> nnx.State:
    """Returns the parameters with those that the run in a workdir trained, of its newest checkpoint."""
    run = checkpoint.read_config(workdir)
    if dataclasses.replace(run.model.lora, dropout=0.0) != dataclasses.replace(config.lora, dropout=0.0):
        raise ValueError(
            f"training.adapter={workdir!r} is a run with {run.model.lora}, but model.lora is {config.lora}; make them "
            "equal (dropout apart)."
        )
    theirs, mine = _routing(run.model), _routing(config)
    if theirs != mine:
        raise ValueError(
            f"training.adapter={workdir!r} is a run with {theirs}, but here it is {mine}: its experts were trained for "
            "other tokens; make model.moe equal."
        )
    if run.training.adapter:
        params = with_adapter(params, config, run.training)
    groups = {"trained": run.training.trainable, "frozen": run.training.frozen}
    parts = tree.partition(params, groups)
    wanted = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, run.model.param_dtype, sharding=x.sharding), parts["trained"]
    )
    frozen = checkpoint.fingerprint(narrow(parts["frozen"], run.model.compute_dtype))
    trained = checkpoint.newest(workdir, wanted, frozen)
    return nnx.merge_state(params, _as(trained, parts["trained"]))


def _routing(config: config_lib.ModelConfig) -> dict[str, Any]:
    """Returns what decides which router a model has, and over what."""
    moe = config.moe
    if not any(config.layer_experts):
        return {}
    clusters = question_clusters.read(moe.clusters).digest if config.routes_by_question else None
    sets = {"text_experts": tuple(moe.text_experts), "image_experts": tuple(moe.image_experts)}
    return {"router": moe.router, **sets, "clusters": clusters}


def is_saved(folder: str) -> bool:
    """Whether a folder holds a base that `save` wrote."""
    return (pathlib.Path(folder) / _FILE).is_file()


def save(folder: str | pathlib.Path, params: nnx.State, config: config_lib.ModelConfig, *, source: str) -> None:
    """Writes parameters, without adapters, so that `load` restores them as they are.

    Args:
      folder: must not exist.
      params: on the devices; adapters are left out.
      config: of the model.
      source: where the parameters came from, for the record.
    """
    folder = pathlib.Path(folder).absolute()
    if folder.exists():
        raise ValueError(f"{folder} already exists; give a folder that does not.")
    bare, _ = adapters.split(params)
    partial = folder.with_name(folder.name + ".partial")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(partial / "params", bare, force=True)
    record = {"model": _identity(config), "source": source, "fingerprint": checkpoint.fingerprint(bare)}
    if jax.process_index() == 0:
        (partial / _FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        partial.rename(folder)


def quantise(
    source: str | pathlib.Path,
    folder: str | pathlib.Path,
    settings: config_lib.QuantConfig,
    *,
    vision: str | None = None,
    compute_dtype: str = "bfloat16",
) -> config_lib.ModelConfig:
    """Quantises a checkpoint in HF layout into a folder for training.base; returns the model's config.

    Args:
      source: folder of the checkpoint.
      folder: to write; must not exist.
      settings: which kernels, and how.
      vision: folder of the vision tower, if not the checkpoint's own.
      compute_dtype: of the parameters that stay float.
    """
    config = hf_configs.read(source, vision=vision).config
    config = dataclasses.replace(config, quant=settings, compute_dtype=compute_dtype)
    abstract = nnx.state(nnx.eval_shape(lambda: vlm.VLM(config, rngs=nnx.Rngs(0))))
    abstract = narrow(quant.quantize_chosen(abstract, settings), compute_dtype)
    params = hf_load.load_into(abstract, source, config, vision=vision).state
    save(folder, params, config, source=str(source))
    return config


def narrow(params: nnx.State, dtype: str) -> nnx.State:
    """Returns frozen parameters in the dtype they are computed in: nothing accumulates in them.

    Routers compute in float32 and stay so: rounded, they would send tokens to other experts. Quantised leaves stay.
    """

    def cast(variable: nnx.Variable, path: str) -> nnx.Variable:
        value = variable.get_value()
        if quant.is_quantized(value) or "/router/" in path:
            return variable
        abstract = isinstance(value, jax.ShapeDtypeStruct)
        return variable.replace(jax.ShapeDtypeStruct(value.shape, dtype) if abstract else value.astype(dtype))

    pairs = [(path, cast(variable, "/".join(map(str, path)))) for path, variable in nnx.to_flat_state(params)]
    return nnx.from_flat_state(pairs)


def check_words(config: config_lib.ModelConfig, frozen: nnx.State) -> None:
    """Raises ValueError if clusters of questions were made of other word embeddings than these."""
    if not config.routes_by_question:
        return
    clusters = question_clusters.read(config.moe.clusters)
    embedding: Any = tree.leaves(frozen)["decoder/embed/embedding"].get_value()
    ids, words = np.array(list(clusters.words), np.int32), np.array(list(clusters.words.values()))
    known = clusters.centroids.shape[1] == embedding.shape[1]
    if known and len(ids):
        # An id beyond the vocabulary gets the last word's embedding, which is no other's.
        found = distributed.to_host(jax.jit(lambda table: table[ids])(embedding)).astype(np.float32)
        known = np.allclose(found, words, rtol=2.0**-8, atol=1e-30)  # either may be in bfloat16
    if not known:
        raise ValueError(
            f"model.moe.clusters={config.moe.clusters!r} were made of other word embeddings than the run starts from: "
            "their centroids mean nothing there; make them again with python -m moe_vlm_jax.cluster_questions."
        )


def shardings(state: Any) -> Any:
    """Returns the sharding of every array, or of every ShapeDtypeStruct that has one."""
    return jax.tree.map(lambda x: x.sharding, state)


def _from_hf(bare: nnx.State, config, training: config_lib.TrainingConfig, mesh) -> nnx.State:
    fresh_projector = training.base_projector == "random"
    sources = {
        "vision": training.base_vision or None,
        "projector": None if fresh_projector else training.base_projector or None,
        "random_projector_seed": training.seed if fresh_projector else None,
    }
    held = hf_configs.read(training.base, vision=sources["vision"]).config
    if not any(config.layer_experts) or any(held.layer_experts):
        if training.upcycling_noise:
            raise ValueError(_noise_without_upcycling(training))
        return hf_load.load_into(bare, training.base, config, **sources).state
    logging.info("%s is dense: its MLPs become experts %s", training.base, config.layer_experts)
    parent_config = dataclasses.replace(config, moe=held.moe, lora=config_lib.LoraConfig())
    layers = {"dense_experts": parent_config.layer_experts, "moe_experts": config.layer_experts}
    parent = hf_load.load_into(
        _abstract_parent(bare, parent_config, layers, mesh, noisy=training.upcycling_noise > 0),
        training.base,
        parent_config,
        **sources,
    )

    def grow(parent: nnx.State, key: jax.Array) -> nnx.State:
        initial = adapters.split(nnx.state(vlm.VLM(config, rngs=nnx.Rngs(key))))[0]
        noise = {"noise": training.upcycling_noise, "key": jax.random.fold_in(key, 1)}
        return _as(quant.quantize_chosen(upcycling.upcycle(parent, initial, **layers, **noise), config.quant), bare)

    return jax.jit(grow, out_shardings=shardings(bare))(parent.state, jax.random.key(training.seed))


def _noise_without_upcycling(training: config_lib.TrainingConfig) -> str:
    return (
        f"training.upcycling_noise={training.upcycling_noise!r} has no effect: the base {training.base!r} is not "
        "dense, so none of its MLPs is copied into experts; leave it at 0.0."
    )


def _abstract_parent(bare: nnx.State, config, layers, mesh, *, noisy: bool) -> nnx.State:
    """Returns the dense parent's parameters: quantised where every copy of a leaf will be, so that no float model is
    ever in memory; what is also needed in float, or gets noise first, is quantised after growing."""
    params = nnx.state(nnx.eval_shape(lambda: vlm.VLM(config, rngs=nnx.Rngs(0))))
    quantised = quant.quantized_leaves(bare)
    copies = upcycling.sources(bare, **layers)
    early = frozenset(
        path
        for path, targets in copies.items()
        if all(target in quantised and not (noisy and "/moe/experts/" in target) for target in targets)
    )
    params = quant.quantize_state(params, early, quant.format_of(config.quant))
    return jax.tree.map(
        lambda spec, place: jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=place),
        params,
        sharding.state_shardings(params, mesh),
    )


def _has_experts(training: config_lib.TrainingConfig) -> bool:
    return any(hf_configs.read(training.base, vision=training.base_vision or None).config.layer_experts)


def _as(params: nnx.State, like: nnx.State) -> nnx.State:
    """Returns the parameters in the dtypes of `like`."""
    return jax.tree.map(lambda x, spec: x.astype(spec.dtype), params, like)


def _restore(bare: nnx.State, config: config_lib.ModelConfig, training: config_lib.TrainingConfig) -> nnx.State:
    folder = pathlib.Path(training.base).absolute()
    record = json.loads((folder / _FILE).read_text(encoding="utf-8"))
    mine, theirs = _identity(config), record["model"]
    wrong = [
        f"  model.{name}: {theirs.get(name)!r} there, {mine.get(name)!r} here"
        for name in sorted({*mine, *theirs})
        if mine.get(name) != theirs.get(name)
    ]
    if wrong:
        raise ValueError(
            f"the base {training.base!r} holds another model; set these fields as there, or make it anew from "
            f"{record['source']!r}:\n" + "\n".join(wrong)
        )
    for name in ("base_vision", "base_projector"):
        if getattr(training, name):
            raise ValueError(
                f"training.{name}={getattr(training, name)!r} has no effect with a saved base; leave it empty."
            )
    with ocp.StandardCheckpointer() as checkpointer:
        params = checkpointer.restore(folder / "params", bare)
    return params


def _identity(config: config_lib.ModelConfig) -> dict[str, Any]:
    fields = validation.flatten(config)
    kept = {k: v for k, v in fields.items() if _IDENTITY.fullmatch(k) and not _NOT_IDENTITY.fullmatch(k)}
    return json.loads(json.dumps(kept))
