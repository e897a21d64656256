"""A conversation with a model in the terminal, with images.

    python -m moe_vlm_jax.chat --workdir runs/sft
    > /image chart.png
    > which item is largest ?

/image PATH shows an image with the next message, /reset forgets the conversation, /quit (or the end of the input) ends;
Ctrl-C stops an answer. Lines may also come from a file or a pipe; then only answers go to standard output, and the exit
status is 1 when a line could not be answered.
"""

import argparse
import contextlib
import functools
import sys
from collections.abc import Iterator, Sequence

from moe_vlm_jax import arguments, command_line
from moe_vlm_jax.serving import engines, terminal
from moe_vlm_jax.serving import prompts as prompts_lib

_STEPS = 4  # tokens between two pieces of an answer
_MAX_NEW_TOKENS = 1024


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    args = _parser().parse_args(argv)
    try:
        source = arguments.source_of(args)
        args.max_new_tokens = _MAX_NEW_TOKENS if args.max_new_tokens is None else args.max_new_tokens
        generation = arguments.generation_of(args, source.config.generation)
        command_line.use_compilation_cache()
        length = arguments.cache_length_of(args.cache_length, source.config.model)

        @functools.cache
        def engine():
            return engines.start(source, num_rows=1, cache_length=length, steps_per_call=_STEPS)

        interactive = sys.stdin.isatty()
        if interactive:
            engine()
            print(terminal.HELP, file=sys.stderr)
        prompts = prompts_lib.Prompts(source.config, source.tokenizer, source.transform)
        chat = terminal.Chat(engine, prompts, generation, cache_length=length, out=sys.stdout, notes=sys.stderr)
        failed = chat.run(_typed() if interactive else sys.stdin)
        return 0 if interactive else int(bool(failed))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130


def _typed() -> Iterator[str]:
    """Yields lines from the keyboard, which may be edited."""
    with contextlib.suppress(ImportError):  # not every Python has it
        import readline  # noqa: F401  makes what input() reads editable
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m moe_vlm_jax.chat", description=(__doc__ or "").split("\n")[0])
    arguments.add_source(parser)
    arguments.add_cache_length(parser, "the whole conversation")
    arguments.add_sampling(parser, new_tokens=f"most tokens of an answer (default: {_MAX_NEW_TOKENS}, or what fits)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
