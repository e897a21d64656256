"""Shows what the routers of a model do: a routing log, figures of it as JSON and PNG, and one HTML page.

    python -m moe_vlm_jax.analyze --workdir runs/sft
    python -m moe_vlm_jax.analyze --checkpoint FOLDER --data scienceqa:data/benchmarks/scienceqa --target runs/routing
    python -m moe_vlm_jax.analyze --workdir runs/stgc --dense FOLDER --compare runs/sft/analysis

--workdir takes a run of this project with its newest checkpoint and, by default, its held-out questions; --checkpoint a
folder in HF layout. --data names a source, or a benchmark, and where its files lie. docs/analysis.md explains figures.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
from collections.abc import Sequence

import numpy as np
from flax import nnx

from moe_vlm_jax import command_line, ready
from moe_vlm_jax import config as config_lib
from moe_vlm_jax.analysis import drawing, page, summary
from moe_vlm_jax.analysis import log as log_lib
from moe_vlm_jax.data import bad_samples, records, sources
from moe_vlm_jax.decoding import generate as generate_lib
from moe_vlm_jax.evaluation import outputs, settings
from moe_vlm_jax.evaluation.benchmarks import catalogue
from moe_vlm_jax.hf import configs
from moe_vlm_jax.hf import load as hf_load
from moe_vlm_jax.models import vlm

LOG, SUMMARY = "routing.npz", "routing.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    args = _parser().parse_args(argv)
    command_line.show_messages()
    try:
        print(f"page: {analyze(args)}")
    except bad_samples.SampleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def analyze(args: argparse.Namespace) -> pathlib.Path:
    """Writes everything to the target and returns the page's path; faults are found before weights are read."""
    drawing.require()
    useless = [name for name in ("tokenizer", "template", "vision", "dtype") if getattr(args, name) is not None]
    if args.workdir and useless:
        raise ValueError(f"--{useless[0]} has no effect with --workdir, whose config says it; leave it out.")
    if not args.workdir and not (args.data and args.target):
        raise ValueError("--checkpoint alone says neither what to ask nor where to write; give --data and --target.")
    if args.image_folder and not (args.data or "").startswith("llava:"):
        raise ValueError("--image-folder has no effect without --data llava:FILE; leave it out.")
    for name, least in (("num_samples", 0), ("batch_size", 1)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name.replace('_', '-')}={getattr(args, name)} must be at least {least}; raise it.")
    source = ready.from_workdir(args.workdir) if args.workdir else _checkpoint(args)
    other = _read_summary(args.compare) if args.compare else None
    dense = configs.read(args.dense).config if args.dense else None
    config, found, where = _records(args, source.config)
    found = _spread(found, args.num_samples)
    graphdef, params = source.load()
    name = args.name or pathlib.Path(args.workdir or args.checkpoint).name
    log = log_lib.collect(
        generate_lib.dropless_graphdef(graphdef, params),
        params,
        config,
        found,
        source.tokenizer,
        source.transform,
        batch_size=args.batch_size,
        about={"name": name, "model": args.workdir or args.checkpoint, "data": where},
    )
    target = pathlib.Path(args.target or pathlib.Path(args.workdir) / "analysis")
    target.mkdir(parents=True, exist_ok=True)
    log_lib.save(target / LOG, log)
    result = summary.summarize(log)
    result["weights"] = summary.weights_of(params, config.model, _dense(args.dense, dense))
    result["gradient_consistency"] = summary.gradient_consistency(args.workdir) if args.workdir else {}
    outputs.write_atomically(target / SUMMARY, json.dumps(result, allow_nan=False) + "\n")
    images = page.draw(result, counting=args.count, other=other)
    return page.write(target, result, images, counting=args.count, other=other)


def _checkpoint(args: argparse.Namespace) -> ready.Source:
    names = ("tokenizer", "template", "vision", "dtype")
    return ready.from_checkpoint(args.checkpoint, **{name: getattr(args, name) for name in names})


def _dense(
    folder: str | None, config: config_lib.ModelConfig | None
) -> tuple[nnx.State, config_lib.ModelConfig] | None:
    """Returns the dense parent's parameters."""
    if folder is None or config is None:
        return None
    _, abstract = nnx.split(nnx.eval_shape(lambda: vlm.VLM(config, rngs=nnx.Rngs(0))))
    decoder = nnx.State({"decoder": abstract["decoder"]})  # its tower may lie elsewhere, and nobody asks it
    return hf_load.load_into(decoder, folder, config).state, config


def _records(
    args: argparse.Namespace, config: config_lib.RunConfig
) -> tuple[config_lib.RunConfig, Sequence[records.Record], str]:
    """Returns the config with its data as --data says, the records, and a text that says which they are."""
    data = dataclasses.replace(config.data, on_bad_sample=args.on_bad_sample)
    name, _, path = (args.data or "").partition(":")
    if args.data and name in catalogue.BENCHMARKS and name not in sources.SOURCES:
        found = _benchmark(name, path, args)
        config = dataclasses.replace(config, data=dataclasses.replace(data, answer_prompt=""))
        return config, found, catalogue.BENCHMARKS[name].title
    if args.data:
        if name not in sources.SOURCES:
            known = ", ".join(dict.fromkeys((*sources.SOURCES, *catalogue.BENCHMARKS)))
            raise ValueError(f"--data={args.data!r} names no source; use NAME or NAME:PATH with one of {known}.")
        if bool(path) != (name in ("llava", "infographicvqa")):
            rule = "needs its files: write NAME:PATH" if not path else "reads no files: leave the path out"
            raise ValueError(f"--data={args.data!r} {rule}.")
        data = dataclasses.replace(data, source=name, path=path, image_folder=args.image_folder or "")
    split = args.split or data.eval_split or data.split
    return dataclasses.replace(config, data=data), sources.load_records(data, split), f"{data.source}, split {split}"


def _benchmark(name: str, path: str, args: argparse.Namespace) -> list[records.Record]:
    """Returns a benchmark's questions that have public answers, as the model is asked them."""
    if not path:
        raise ValueError(f"--data={name} needs the folder of its files; write --data {name}:FOLDER.")
    mine = settings.benchmark(settings.EvaluateConfig(), name)
    if args.split:
        mine = dataclasses.replace(mine, split=args.split)
    bad = bad_samples.BadSamples(args.on_bad_sample, "--on-bad-sample")
    questions = catalogue.BENCHMARKS[name].load(pathlib.Path(path), mine, bad)
    answered = [question for question in questions if question.answers]
    if not answered:
        raise ValueError(f"{name} has no public answers in split {mine.split!r}; choose another with --split.")
    return [
        records.Record(
            id=question.id,
            images=question.images,
            turns=(
                records.Turn("human", "<image>\n" * len(question.images) + question.prompt),
                records.Turn("gpt", question.answers[0]),
            ),
            answers=question.answers,
        )
        for question in answered
    ]


def _spread(found: Sequence[records.Record], number: int) -> Sequence[records.Record]:
    """Returns so many records, evenly spaced over all; 0: all."""
    if not number or len(found) <= number:
        return found
    return [found[i] for i in np.linspace(0, len(found) - 1, number).round().astype(int)]


def _read_summary(folder: str) -> dict:
    path = pathlib.Path(folder) / SUMMARY
    if not path.is_file():
        raise ValueError(
            f"--compare={folder!r} has no {SUMMARY}; it takes the target of another analysis; make it first."
        )
    return json.loads(path.read_text(encoding="utf-8"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m moe_vlm_jax.analyze", description=(__doc__ or "").split("\n")[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--workdir", help="folder of a run, e.g. runs/sft")
    source.add_argument("--checkpoint", help="folder of a checkpoint in HF layout")
    parser.add_argument("--data", help="NAME or NAME:PATH of a source or benchmark (default: the run's own)")
    parser.add_argument("--split", help="default: the run's held-out split, or the benchmark's own")
    parser.add_argument("--image-folder", "--image_folder", help="with --data llava:FILE, what images are relative to")
    parser.add_argument("--on-bad-sample", "--on_bad_sample", choices=bad_samples.POLICIES, default="error")
    parser.add_argument("--num-samples", "--num_samples", type=int, default=200, help="evenly spaced; 0: all")
    parser.add_argument("--batch-size", "--batch_size", type=int, default=8)
    parser.add_argument("--count", choices=summary.COUNTINGS, default="top-1", help="choices that the images show")
    parser.add_argument("--dense", help="folder of the dense checkpoint that the experts were copied from")
    parser.add_argument("--compare", help="target folder of another analysis, drawn beside this one")
    parser.add_argument("--name", help="of the model on the page (default: its folder's)")
    parser.add_argument("--target", help="folder of the results (default: <workdir>/analysis)")
    only = parser.add_argument_group("with --checkpoint only")
    only.add_argument("--tokenizer", help="folder with tokenizer.json (default: the checkpoint)")
    only.add_argument("--template", help="conversation template (default: by the checkpoint's family)")
    only.add_argument("--vision", help="folder of the vision tower, if not the checkpoint's own")
    only.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on CPU, else bfloat16")
    return parser


if __name__ == "__main__":
    sys.exit(main())
