"""What the commands that ask a model share on their command lines: which model, and how it chooses tokens."""

import argparse
import dataclasses

from moe_vlm_jax import config as config_lib
from moe_vlm_jax import ready
from moe_vlm_jax.decoding import sampling

_CACHE_LENGTH = 2048
_OF_CHECKPOINTS = ("tokenizer", "template", "vision", "dtype")
_OF_SAMPLING = ("temperature", "top_k", "top_p", "repetition_penalty", "seed", "max_new_tokens", "stop")


def add_source(parser: argparse.ArgumentParser) -> None:
    """Adds --workdir and --checkpoint, of which one must be given, and what belongs to the latter."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--workdir", help="folder of a run, e.g. runs/sft; its newest checkpoint is taken")
    source.add_argument("--checkpoint", help="folder of a checkpoint in HF layout")
    only = parser.add_argument_group("with --checkpoint only")
    only.add_argument("--tokenizer", help="folder with tokenizer.json, or 'closed' (default: the checkpoint)")
    only.add_argument("--template", help="conversation template (default: by the checkpoint's family)")
    only.add_argument("--vision", help="folder of the vision tower, if not the checkpoint's own")
    only.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on CPU, else bfloat16")


def source_of(args: argparse.Namespace) -> ready.Source:
    """Returns the model of `add_source`'s arguments; its weights are not read yet.

    Raises:
      ValueError: it is not there, or an argument has no effect on it.
    """
    given = {name: getattr(args, name) for name in _OF_CHECKPOINTS}
    if not args.workdir:
        return ready.from_checkpoint(args.checkpoint, **given)
    useless = [name for name, value in given.items() if value is not None]
    if useless:
        raise ValueError(f"--{useless[0]} has no effect with --workdir, whose config says it; leave it out.")
    return ready.from_workdir(args.workdir)


def add_cache_length(parser: argparse.ArgumentParser, what: str) -> None:
    """Adds how many tokens `what` may have."""
    parser.add_argument(
        "--cache-length",
        "--cache_length",
        type=int,
        help=f"most tokens of {what}, images included (default: {_CACHE_LENGTH}, or the model's positions if fewer)",
    )


def cache_length_of(given: int | None, model: config_lib.ModelConfig) -> int:
    """Returns the cache length; ValueError for more positions than the model has."""
    most = model.decoder.max_positions
    if given is None:
        return min(_CACHE_LENGTH, most)
    if not 2 <= given <= most:
        raise ValueError(f"--cache-length {given} must lie in 2..{most}, the model's max_positions.")
    return given


def add_sampling(parser: argparse.ArgumentParser, *, new_tokens: str) -> None:
    """Adds how tokens are chosen; new_tokens says what --max-new-tokens is, and its default."""
    group = parser.add_argument_group("answers (default: the run's settings)")
    group.add_argument("--max-new-tokens", "--max_new_tokens", type=int, help=new_tokens)
    group.add_argument("--temperature", type=float, help="0 is greedy")
    group.add_argument("--top-k", "--top_k", type=int, help="sample from the most probable tokens, so many; 0: all")
    group.add_argument("--top-p", "--top_p", type=float, help="sample from the most probable tokens of this mass")
    group.add_argument(
        "--repetition-penalty", "--repetition_penalty", type=float, help="above 1: tokens that came are less probable"
    )
    group.add_argument("--seed", type=int, help="of the sampling")
    group.add_argument("--stop", action="append", help="text that ends an answer; may be given several times")


def generation_of(args: argparse.Namespace, default: config_lib.GenerationConfig) -> config_lib.GenerationConfig:
    """Returns the default settings with those of `add_sampling`'s arguments, checked."""
    given = {name: getattr(args, name) for name in _OF_SAMPLING}
    given["stop"] = None if args.stop is None else tuple(args.stop)
    result = dataclasses.replace(default, **{name: value for name, value in given.items() if value is not None})
    sampling.check(result)
    return result
