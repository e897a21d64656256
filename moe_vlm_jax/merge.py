"""Merges the adapters of a run into its base, or writes them as a folder that PEFT reads.

    python -m moe_vlm_jax.merge --workdir runs/x --target FOLDER [--dtype bfloat16]   a checkpoint in HF layout
    python -m moe_vlm_jax.merge --workdir runs/x --target FOLDER --requantize         a quantised training.base
    python -m moe_vlm_jax.merge --workdir runs/x --target FOLDER --adapter-only       adapter_config.json and tensors

A merge is checked before it is there: base, base + adapter and what was written, loaded again, are asked prompts of the
run's own data, and the logits are compared (evaluation/agreement.py has the rules). Where they differ by more than the
storing explains, the exit status is 1 and nothing is at the target. Needs memory for the merged model in float32.
"""

import argparse
import dataclasses
import pathlib
import shutil
import sys
from collections.abc import Sequence

import numpy as np
from flax import nnx

from moe_vlm_jax import batch as batch_lib
from moe_vlm_jax import config as config_lib
from moe_vlm_jax.data import images as images_lib
from moe_vlm_jax.data import sources, tokenize
from moe_vlm_jax.evaluation import agreement, runner
from moe_vlm_jax.hf import load, names, readers, writers
from moe_vlm_jax.models import adapters as adapters_lib
from moe_vlm_jax.models import merging, vlm
from moe_vlm_jax.training import adapted, setup
from moe_vlm_jax.training import base as base_lib


def merge(run: adapted.Run, target: pathlib.Path, dtype: str | None, batches: list[batch_lib.Batch]) -> agreement.Merge:
    """Writes the merged model and returns how far it is from base + adapter.

    Args:
      run: with adapters.
      target: folder to write.
      dtype: of the tensors; None stores kernels as the run held them: quantised again.
      batches: prompts to compare on.
    """
    lora = run.config.model.lora
    adapted = nnx.merge_state(run.trained, run.frozen)

    def logits(params: nnx.State, *, with_lora: bool = False) -> np.ndarray:
        return agreement.logits(_graphdef(run, with_lora=with_lora), params, batches)

    before = logits(run.base, with_lora=True)
    after = logits(adapted, with_lora=True)
    quantiser = None
    if run.config.model.quant.kind != "none":
        quantiser = agreement.compare(logits(_float_base(run)), before)
    merged = merging.merged(adapted, lora, dtype="float32")
    exact = logits(merged)
    stored = logits(merging.merged(adapted, lora, dtype=None) if dtype is None else base_lib.narrow(merged, dtype))
    del merged
    if dtype is None:
        params = merging.merged(adapted, lora, dtype=None)
        base_lib.save(target, params, _bare(run).model, source=f"a merge onto {run.config.training.base}")
    else:
        params, layout = merging.lazily_merged(adapted, lora), run.layout
        writers.write(target, params, _bare(run).model, layout=layout, base=run.info, dtype=dtype)
        folders = [] if run.info is None else [run.info.folder]
        writers.copy_companions([f for f in (*folders, pathlib.Path(run.config.data.tokenizer)) if f.is_dir()], target)
    return agreement.Merge(
        size=float(np.sqrt(np.mean(after.astype(np.float64) ** 2))),
        tune=agreement.compare(before, after),
        quantiser=quantiser,
        exact=agreement.compare(after, exact),
        stored=agreement.compare(exact, stored),
        written=agreement.compare(after, logits(_loaded(run, target, dtype))),
    )


def prompts(run: adapted.Run, file: str | None, image_folder: str, count: int) -> list[batch_lib.Batch]:
    """Returns prompts of the run's own data (held out if it has any), or of a file of LLaVA's JSON."""
    data = run.config.data
    split = data.eval_split or data.split
    if file is not None:
        data, split = dataclasses.replace(data, source="llava", path=file, image_folder=image_folder), "train"
    records = sources.load_records(data, split)
    chosen = runner.select_questions(records, limit=count, seed=run.config.generation.seed) or list(records)[:count]
    tokenizer = tokenize.load_tokenizer(data.tokenizer)
    transform = images_lib.transform_for(run.config.model.vision, data)
    return agreement.prompt_batches(chosen, run.config, tokenizer, transform)


def _bare(run: adapted.Run, **changes) -> config_lib.RunConfig:
    """Returns the run's config without adapters, everything frozen."""
    model = dataclasses.replace(run.config.model, lora=config_lib.LoraConfig(), **changes)
    training = dataclasses.replace(run.config.training, adapter="", trainable=(), frozen=(".*",))
    return dataclasses.replace(run.config, model=model, training=training)


def _graphdef(run: adapted.Run, *, with_lora: bool) -> nnx.GraphDef:
    """Returns the model's structure, computing in float32."""
    lora = run.model.config.lora if with_lora else config_lib.LoraConfig()
    config = dataclasses.replace(run.model.config, compute_dtype="float32", lora=lora)
    return nnx.split(nnx.eval_shape(lambda: vlm.VLM(config, rngs=nnx.Rngs(0))))[0]


def _float_base(run: adapted.Run) -> nnx.State:
    """Returns the base as it was before it was quantised."""
    config = _bare(run, quant=config_lib.QuantConfig())
    base = config.training.base
    if base and base_lib.is_saved(base):
        source = readers.read_json(pathlib.Path(base) / "base.json")["source"]
        if not pathlib.Path(source).is_dir():
            raise ValueError(
                f"{base!r} was quantised from {source!r}, which is not at hand to measure the quantiser's error; "
                "put it there."
            )
        config = dataclasses.replace(config, training=dataclasses.replace(config.training, base=source))
    return setup.initial_params(setup.make_model(config), config)[1]


def _loaded(run: adapted.Run, target: pathlib.Path, dtype: str | None) -> nnx.State:
    """Returns the written model, read from the folder."""
    if dtype is None:
        config = _bare(run)
        training = dataclasses.replace(config.training, base=str(target), base_vision="", base_projector="")
        config = dataclasses.replace(config, training=training)
        return setup.initial_params(setup.make_model(config), config)[1]
    config = _bare(run, quant=config_lib.QuantConfig(), compute_dtype=dtype)
    model = setup.make_model(config)
    held = {"lm": {"decoder"}}.get(run.layout, {"decoder", "vision", "projector"})
    pairs = nnx.to_flat_state(model.frozen)
    wanted = nnx.from_flat_state([(path, v) for path, v in pairs if path[0] in held])
    loaded = load.load_into(wanted, target, model.config).state
    rest = adapters_lib.split(nnx.merge_state(run.trained, run.frozen))[0]
    others = [(path, v) for path, v in nnx.to_flat_state(rest) if path[0] not in held]
    return nnx.merge_state(loaded, nnx.from_flat_state(others)) if others else loaded


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m moe_vlm_jax.merge", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--workdir", required=True, help="folder of a run with adapters, e.g. runs/sft")
    parser.add_argument("--target", required=True, help="folder to write; must not exist")
    parser.add_argument("--to", choices=sorted(set(names.MODULES) - {"vision"}), help="layout (default: as the base)")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the tensors (default: that of the run)")
    how.add_argument("--requantize", action="store_true", help="quantise again, for training.base of another run")
    how.add_argument("--adapter-only", action="store_true", help="write the adapters in PEFT's layout instead")
    parser.add_argument("--prompts", help="JSON of LLaVA's kind to compare on (default: held-out data of the run)")
    parser.add_argument("--image-folder", default="", help="images of --prompts are relative to it")
    parser.add_argument("--num-prompts", type=int, default=32, help="how many to compare on (default: %(default)s)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    args = _parser().parse_args(argv)
    target = pathlib.Path(args.target)
    partial = target.with_name(target.name + ".unchecked")
    try:
        if target.exists():
            raise ValueError(f"{args.target!r} exists already; give a folder that does not.")
        shutil.rmtree(partial, ignore_errors=True)  # of a merge that was interrupted
        run = adapted.open_run(args.workdir, args.to)
        if args.adapter_only:
            said = adapted.write_adapter(run, partial)
        else:
            if args.requantize and run.config.model.quant.kind == "none":
                raise ValueError("--requantize has no effect on a base that is not quantised; leave it out.")
            batches = prompts(run, args.prompts, args.image_folder, args.num_prompts)
            dtype = None if args.requantize else args.dtype or run.config.model.compute_dtype
            found = merge(run, partial, dtype, batches)
            print(found.table())
            if refusals := found.refusals(requantised=args.requantize):
                raise ValueError("\n".join(refusals))
            said = [f"compared on {sum(len(batch.tokens) for batch in batches)} prompts"]
    except ValueError as error:
        shutil.rmtree(partial, ignore_errors=True)
        print(f"error: {error}", file=sys.stderr)
        return 1
    partial.rename(target)
    print("\n".join([*said, f"wrote {target}"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
