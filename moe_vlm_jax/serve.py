"""Serves a model to OpenAI's clients and to a page in the browser, on this machine.

    python -m moe_vlm_jax.serve --workdir runs/sft
    python -m moe_vlm_jax.serve --checkpoint FOLDER --port 8001 --num-rows 16

Needs the extra 'serve' (pip install "moe_vlm_jax[serve]"). Ctrl-C or SIGTERM lets running answers end, a second one
does not. See docs/serving.md.
"""

import argparse
import dataclasses
import os
import pathlib
import sys
from collections.abc import Sequence

from moe_vlm_jax import arguments, command_line, origins
from moe_vlm_jax.serving import engines, requests, worker
from moe_vlm_jax.serving import prompts as prompts_lib

_STEPS = 4  # tokens of each row between two pieces of a stream, and between two looks at what came in


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    args = _parser().parse_args(argv)
    try:
        return _serve(args)
    except (ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before the server's own handling of signals
        return 130


def _serve(args: argparse.Namespace) -> int:
    try:
        from moe_vlm_jax.serving import running, service
    except ModuleNotFoundError as error:
        if error.name != "aiohttp":
            raise
        raise ImportError("the server needs aiohttp; install it (pip install moe_vlm_jax[serve]).") from error
    command_line.show_messages()
    source = arguments.source_of(args)
    most = 1024 if args.max_new_tokens is None else args.max_new_tokens
    args.max_new_tokens = None
    defaults = arguments.generation_of(args, source.config.generation)
    length = arguments.cache_length_of(args.cache_length, source.config.model)
    limits = requests.Limits(body_bytes=args.max_body_mb << 20, images=args.max_images, new_tokens=most)
    for name in ("num_rows", "grace", "queue"):
        if getattr(args, name) < (name == "num_rows"):
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)} is too small.")
    transform = source.transform
    if args.max_pixels is not None:
        transform = dataclasses.replace(transform, max_pixels=args.max_pixels)
    command_line.use_compilation_cache()
    listening = running.listen(args.host, args.port)  # before the weights, which take longer
    guard = running.guard_of(listening, args.host, args.allow_host)
    if not guard.is_loopback():
        print(f"warning: --host {args.host} lets everybody who reaches this machine use the model", file=sys.stderr)
    engine = engines.start(source, num_rows=args.num_rows, cache_length=length, steps_per_call=_STEPS)
    engines.warm_up(engine, defaults)
    name = args.model_name or pathlib.Path(os.path.abspath(args.workdir or args.checkpoint)).name
    served = service.Service(
        model=name,
        prompts=prompts_lib.Prompts(source.config, source.tokenizer, transform),
        worker=worker.Worker(lambda: engine, source.tokenizer),
        defaults=defaults,
        limits=limits,
        num_slots=args.num_rows + args.queue,
        cache_length=length,
        guard=guard,
    )

    def started(url: str) -> None:
        print(f"{url} is a page to chat with {name!r}, {url}v1 what OpenAI's clients take", flush=True)

    return running.run(served, listening, grace=args.grace, started=started)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m moe_vlm_jax.serve", description=(__doc__ or "").split("\n")[0])
    arguments.add_source(parser)
    parser.add_argument("--model-name", "--model_name", help="by which requests name it (default: the folder's)")
    parser.add_argument("--host", default=origins.LOOPBACK, help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: 8000)")
    parser.add_argument(
        "--allow-host", "--allow_host", action="append", default=[], help="name by which others reach this machine"
    )
    parser.add_argument("--num-rows", "--num_rows", type=int, default=8, help="answers decoded at one time (8)")
    parser.add_argument("--queue", type=int, default=256, help="further requests that wait; then 429 (256)")
    parser.add_argument("--max-body-mb", "--max_body_mb", type=int, default=20, help="of a request, in MiB (20)")
    parser.add_argument("--max-images", "--max_images", type=int, default=8, help="of a conversation (8)")
    parser.add_argument("--max-pixels", "--max_pixels", type=int, help="of an image (default: the run's)")
    parser.add_argument("--grace", type=float, default=30.0, help="seconds for running answers at a stop (30)")
    arguments.add_cache_length(parser, "a conversation with its answer")
    arguments.add_sampling(parser, new_tokens="most tokens of an answer, and what a request gets that says none (1024)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
