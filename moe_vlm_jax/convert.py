"""Converts checkpoints: any supported source to MoE-LLaVA's layout, or to a plain language model or tower.

    python -m moe_vlm_jax.convert --source FOLDER --target FOLDER [--vision FOLDER] [--dtype bfloat16] [--check]
    python -m moe_vlm_jax.convert --source FOLDER --target FOLDER --to quantised --kind nf4

The layout that the reference and transformers read is also the one that this project exchanges: safetensors and
config.json. `convert` is the same as a call. 'quantised' writes a base for training.base instead (training/base.py).
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from moe_vlm_jax import config as config_lib
from moe_vlm_jax.hf import configs, load, plans, readers, writers
from moe_vlm_jax.models import vlm
from moe_vlm_jax.quant import tensor
from moe_vlm_jax.training import base

LAYOUTS = ("moe_llava", "lm", "vision", "llava")
DTYPES = ("source", "float32", "bfloat16", "float16")


class Conversion(NamedTuple):
    """What `convert` did: what was read, what was written, files copied along, and remarks."""

    report: plans.Report
    written: writers.Written
    copied: tuple[str, ...]
    remarks: tuple[str, ...]


def convert(
    source: str | pathlib.Path,
    target: str | pathlib.Path,
    *,
    to: str = "moe_llava",
    vision: str | pathlib.Path | None = None,
    projector: str | pathlib.Path | None = None,
    random_projector_seed: int | None = None,
    dtype: str = "source",
    accept: Sequence[str] = (),
    max_shard_bytes: int = writers.MAX_SHARD_BYTES,
    check: bool = False,
) -> Conversion:
    """Reads a checkpoint and writes it in another layout.

    Args:
      source: folder of a checkpoint.
      target: folder to write; it must not hold a checkpoint.
      to: moe_llava (dense or with experts, as the source), lm (decoder alone), vision (tower alone) or llava.
      vision: folder of the vision tower, if not the source's own.
      projector: file of a trained projector, if not the source's own.
      random_projector_seed: draws a new projector, in the place of any that the source holds.
      dtype: source keeps every tensor's; else all but the routers are cast.
      accept: fields of config.json that are not known to us and may be ignored.
      max_shard_bytes: largest size of one file of tensors.
      check: load the target again and compare every parameter.

    Raises:
      ValueError: the source is unreadable or incomplete, or `to` cannot express it.
    """
    info = configs.read(source, vision=vision, accept=accept)
    if to == "lm":
        # Without its tower: joining Phi with one would discard the bias of its head.
        info = configs.read(source, accept=accept) if info.layout == "lm" else info
    sections = {"lm": {"decoder"}, "vision": {"vision"}}.get(to, {"decoder", "vision", "projector"})
    state = nnx.state(nnx.eval_shape(lambda: vlm.VLM(info.config, rngs=nnx.Rngs(0))))
    specs = {p: s for p, s in load.state_specs(state).items() if p.split("/")[0] in sections}
    params, report = load.load_params(
        source,
        specs,
        info.config,
        dtype="source" if dtype == "source" else None,
        vision=vision,
        projector=projector,
        random_projector_seed=random_projector_seed,
        accept=accept,
    )
    written = writers.write(
        target,
        params,
        info.config,
        layout=to,
        base=info,
        dtype=None if dtype == "source" else dtype,
        max_shard_bytes=max_shard_bytes,
    )
    copied = writers.copy_companions(filter(None, (info.vision_folder, info.folder)), pathlib.Path(target))
    remarks = list(_remarks(info, pathlib.Path(target), to))
    if check:
        _check(target, params, info, dtype, accept)
        remarks.append("check passed: the target loads again, every parameter equal")
    return Conversion(report, written, copied, tuple(remarks))


def _remarks(info: configs.Checkpoint, target: pathlib.Path, to: str):
    """Yields what the user must know to load the target elsewhere."""
    if to != "moe_llava":
        return
    raw = readers.read_json(target / "config.json")
    needed = ["llava", *(["moe"] if "moe" in raw else [])]
    if lacking := [word for word in needed if word not in target.name.lower()]:
        yield f"for the reference, rename {target.name!r}: it needs {' and '.join(lacking)} in a folder's name"
    yield f"the reference ignores the tower in the checkpoint and loads {raw['mm_image_tower']!r} itself"


def _check(target, params: dict[str, np.ndarray], info: configs.Checkpoint, dtype: str, accept) -> None:
    specs = {path: jax.ShapeDtypeStruct(array.shape, array.dtype) for path, array in params.items()}
    again, _ = load.load_params(target, specs, info.config, accept=accept)
    wrong = []
    for path, array in params.items():
        routers_kept = dtype == "source" or path.endswith("moe/router/kernel")
        expected = array if routers_kept else array.astype(jax.numpy.dtype(dtype)).astype(array.dtype)
        if not np.array_equal(again[path], expected, equal_nan=True):
            wrong.append(path)
    if wrong:
        raise ValueError(f"the target {target} differs from what was written in {plans.shown(wrong)}; check the disk.")


def table(conversion: Conversion) -> str:
    """Returns counts and bytes by top-level module, as text."""
    rows: dict[str, list[int]] = {}
    for name, (shape, dtype) in conversion.written.tensors.items():
        group = next((part for part in ("image_tower", "vision", "projector") if part in name), "language model")
        row = rows.setdefault({"image_tower": "vision", "vision": "vision"}.get(group, group), [0, 0, 0])
        size = int(np.prod(shape))
        for i, value in enumerate((1, size, size * dtype.itemsize)):
            row[i] += value
    rows["total"] = [sum(column) for column in zip(*rows.values(), strict=True)]
    lines = [f"{'':16}{'tensors':>10}{'parameters':>16}{'MiB':>12}"]
    lines += [f"{name:16}{n:>10,}{p:>16,}{b / 2**20:>12,.1f}" for name, (n, p, b) in rows.items()]
    return "\n".join(lines)


_QUANTISATION = {"kind": None, "block": None, "single": False}


def _without_quantisation(options: dict[str, Any]) -> dict[str, Any]:
    """Returns the options of `convert`, which has none about quantisation."""
    given = [name for name, default in _QUANTISATION.items() if options[name] != default]
    if given:
        raise ValueError(f"--{given[0]} has no effect with --to {options['to']}; leave it out, or use --to quantised.")
    return {name: value for name, value in options.items() if name not in _QUANTISATION}


def _quantise(options: dict[str, Any], parser: argparse.ArgumentParser) -> str:
    """Quantises a checkpoint into a base; returns what was done, as text."""
    taken = {"to", "source", "target", "vision", "dtype", *_QUANTISATION}
    given = [name for name in options if name not in taken and options[name] != parser.get_default(name)]
    if given:
        raise ValueError(f"--{given[0].replace('_', '-')} has no effect with --to quantised; leave it out.")
    settings = config_lib.QuantConfig(
        kind=options["kind"] or "nf4",
        block=64 if options["block"] is None else options["block"],
        double=not options["single"],
    )
    dtype = "bfloat16" if options["dtype"] == "source" else options["dtype"]
    config = base.quantise(
        options["source"], options["target"], settings, vision=options["vision"], compute_dtype=dtype
    )
    size = sum(path.stat().st_size for path in pathlib.Path(options["target"]).rglob("*") if path.is_file())
    return f"wrote {options['target']}: {config.quant.kind}, the rest {dtype}, {size / 2**20:,.1f} MiB on disk"


def main(argv: Sequence[str]) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m moe_vlm_jax.convert", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--source", required=True, help="folder of a checkpoint")
    parser.add_argument("--target", required=True, help="folder to write")
    layouts = (*LAYOUTS, "quantised")
    parser.add_argument("--to", choices=layouts, default="moe_llava", help="layout to write (default: %(default)s)")
    parser.add_argument("--vision", help="folder of the vision tower, if not the source's own")
    parser.add_argument("--projector", help="mm_projector.bin or a safetensors file, if not the source's own")
    parser.add_argument("--random-projector-seed", type=int, help="draw a new projector with this seed")
    parser.add_argument("--dtype", choices=DTYPES, default="source", help="of the tensors; routers stay float32")
    parser.add_argument(
        "--accept", action="append", default=[], metavar="FIELD", help="unknown config.json field to ignore"
    )
    parser.add_argument("--max-shard-bytes", type=int, default=writers.MAX_SHARD_BYTES)
    parser.add_argument("--check", action="store_true", help="load the target again and compare")
    quantised = parser.add_argument_group("with --to quantised only")
    quantised.add_argument("--kind", choices=tensor.KINDS, help="how kernels are stored (default: nf4)")
    quantised.add_argument("--block", type=int, help="inputs that share a scale; 0: per channel (default: 64)")
    quantised.add_argument("--single", action="store_true", help="keep scales in float32")
    options = vars(parser.parse_args(argv))
    try:
        if options["to"] == "quantised":
            print(_quantise(options, parser))
            return 0
        conversion = convert(**_without_quantisation(options))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(table(conversion))
    print("\n".join([*conversion.report.lines(), *conversion.remarks]))
    if conversion.copied:
        print(f"copied: {', '.join(conversion.copied)}")
    for path in conversion.written.files:
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
