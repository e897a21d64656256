"""Pairs of answers: sampled, marked by rule or by people, and exchanged with other tools.

    python -m moe_vlm_jax.preferences generate  --workdir runs/sft --num 1000 --target C.jsonl
    python -m moe_vlm_jax.preferences prefer    --candidates C.jsonl --target pairs.jsonl
    python -m moe_vlm_jax.preferences annotate  --candidates C.jsonl --marks marks.jsonl --annotator ana
    python -m moe_vlm_jax.preferences collect   --candidates C.jsonl --marks marks.jsonl --target pairs.jsonl
    python -m moe_vlm_jax.preferences agreement --marks marks.jsonl
    python -m moe_vlm_jax.preferences export    --pairs pairs.jsonl --format trl --target trl.jsonl
    python -m moe_vlm_jax.preferences import    --source FILE --format rlaif-v --target pairs.jsonl

See docs/preferences.md for the files and formats.
"""

import argparse
import collections
import dataclasses
import os
import pathlib
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from moe_vlm_jax import origins, ready
from moe_vlm_jax.data import bad_samples, pairs, sources
from moe_vlm_jax.preferences import agreement as agreement_lib
from moe_vlm_jax.preferences import annotate as annotate_lib
from moe_vlm_jax.preferences import candidates as candidates_lib
from moe_vlm_jax.preferences import collect as collect_lib
from moe_vlm_jax.preferences import formats, sampling, server, terminal
from moe_vlm_jax.preferences import prefer as prefer_lib


def generate(args: argparse.Namespace) -> None:
    """Samples two different responses to each of many questions."""
    source = ready.from_workdir(args.workdir) if args.workdir else ready.from_checkpoint(args.checkpoint)
    data = source.config.data
    if args.questions:
        data = dataclasses.replace(
            data, source="llava", path=args.questions, image_folder=args.image_folder, answer_types=()
        )
    elif args.checkpoint:
        raise ValueError("--checkpoint says nothing of questions; give a file with --questions.")
    questions = sources.load_records(data, args.split or data.split)
    for image in dict.fromkeys(image for record in questions for image in record.images):
        source.transform.check(image)
    graphdef, params = source.load()
    found = sampling.sample(
        graphdef,
        params,
        source.config,
        questions,
        source.tokenizer,
        source.transform,
        pathlib.Path(args.target),
        settings=sampling.Settings(
            temperature=args.temperature,
            top_p=args.top_p,
            seed=args.seed,
            attempts=args.attempts,
            max_new_tokens=args.max_new_tokens or source.config.generation.max_new_tokens,
        ),
        enough=lambda candidates: len(candidates) >= args.num,
    )
    print(f"{found.asked} questions asked, {found.equal} of them gave one response at {args.attempts} attempts")
    print(f"{args.target} holds {len(found.candidates)} candidates")
    if len(found.candidates) < args.num:
        raise ValueError(f"these are all, fewer than --num {args.num}; ask more questions or raise --temperature.")


def prefer(args: argparse.Namespace) -> None:
    """Makes pairs by the automatic rule."""
    _check_target(args.target)
    made = prefer_lib.prefer(_read_candidates(args), metric=args.metric)
    print(made.report())
    _write(args.target, made.pairs)


def annotate(args: argparse.Namespace) -> None:
    """Lets a person mark candidates, on a page or in the terminal."""
    session = annotate_lib.Session(_read_candidates(args), args.marks, args.annotator)
    try:
        if args.terminal:
            terminal.run(session, sys.stdin, sys.stdout)
        else:
            _serve(session, args.host, args.port)
    finally:
        session.close()


def collect(args: argparse.Namespace) -> None:
    """Makes pairs of marks, by majority."""
    _check_target(args.target)
    made = collect_lib.collect(_read_candidates(args), collect_lib.read_all(args.marks))
    print(made.report())
    _write(args.target, made.pairs)


def agreement(args: argparse.Namespace) -> None:
    """Says how far annotators agree."""
    held = collect_lib.read_all(args.marks)
    found = agreement_lib.agreement(collect_lib.judgements(held))
    if found is None:
        counts = ", ".join(f"{name} {len(items)}" for name, items in held.items()) or "nobody"
        raise ValueError(f"no item was marked by two annotators (marks: {counts}); agreement needs items in common.")
    print(found.report())


def export(args: argparse.Namespace) -> None:
    """Writes pairs in another format."""
    _check_target(args.target)
    bad = bad_samples.BadSamples(args.on_bad_sample)
    found = pairs.read_pairs(args.pairs, bad)
    count = formats.WRITERS[args.format](args.target, found, bad)
    _finish(args.target, count, bad, args.pairs)


def import_(args: argparse.Namespace) -> None:
    """Reads pairs in another format."""
    _check_target(args.target)
    bad, ignored = bad_samples.BadSamples(args.on_bad_sample), collections.Counter()
    found = formats.import_pairs(args.source, args.format, bad, image_folder=args.image_folder, ignored=ignored)
    count = pairs.write_pairs(args.target, found)
    for column, rows in sorted(ignored.items()):
        print(f"not read: column {column!r} ({rows} rows)")
    _finish(args.target, count, bad, " ".join(args.source))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        cause = error.__cause__
        if isinstance(error, bad_samples.SampleError) and isinstance(cause, bad_samples.SampleError):
            error = f"{cause} (--on-bad-sample drop leaves such samples out and counts them.)"  # else names a config
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _serve(session: annotate_lib.Session, host: str, port: int) -> None:
    """Serves the page until SIGINT or SIGTERM, then says what was marked."""
    with server.Server(session, host, port) as served:
        if not served.guard.is_loopback():
            print(
                f"warning: --host {host} lets everybody who reaches this machine see and mark the items",
                file=sys.stderr,
            )
        print(f"{served.url} shows the items; stop with Ctrl-C, go on with the same command", flush=True)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            served.serve_forever()
        except KeyboardInterrupt:
            print("\n" + session.report())


def _read_candidates(args: argparse.Namespace) -> list[candidates_lib.Candidate]:
    bad = bad_samples.BadSamples(args.on_bad_sample)
    found = candidates_lib.read_candidates(args.candidates, bad)
    bad.report(kept=len(found), what=args.candidates)
    return found


def _check_target(target: str) -> None:
    if os.path.exists(target):
        raise ValueError(f"{target!r} exists already; give a name that does not.")


def _write(target: str, found: list[pairs.Pair]) -> None:
    if not found:
        raise ValueError(f"there are 0 pairs, so {target!r} was not written; see the counts above.")
    print(f"wrote {pairs.write_pairs(target, found)} pairs to {target}")


def _finish(target: str, count: int, bad: bad_samples.BadSamples, what: str) -> None:
    """Reports what was left out and written; an empty target is removed, and an error."""
    if not count:
        os.remove(target)
    bad.report(kept=count, what=what)
    if not count:
        raise ValueError(f"{what}: there are no pairs; give files that have some.")
    print(f"wrote {count} pairs to {target}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m moe_vlm_jax.preferences", description=(__doc__ or "").split("\n")[0]
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    # In the order in which they are used.
    command = _command(commands, "generate", generate)
    model = command.add_mutually_exclusive_group(required=True)
    model.add_argument("--workdir", help="folder of a run, e.g. runs/sft")
    model.add_argument("--checkpoint", help="folder of a checkpoint in HF layout, with its tokenizer")
    command.add_argument("--num", type=int, required=True, help="candidates to make")
    command.add_argument("--target", required=True, help="file of candidates; one that is there is continued")
    command.add_argument("--questions", help="JSON of LLaVA's kind (default: the run's own data)")
    command.add_argument("--image-folder", default="", help="images of --questions are relative to it")
    command.add_argument("--split", help="of the run's data (default: the one that it trained on)")
    usual = sampling.Settings()
    command.add_argument("--temperature", type=float, default=usual.temperature, help="(default: %(default)s)")
    command.add_argument("--top-p", type=float, default=usual.top_p, help="(default: %(default)s)")
    command.add_argument("--seed", type=int, default=usual.seed, help="of questions and draws (default: %(default)s)")
    command.add_argument("--attempts", type=int, default=usual.attempts, help="at two responses that differ")
    command.add_argument("--max-new-tokens", type=int, help="of a response (default: the run's)")

    command = _command(commands, "prefer", prefer)
    _candidates(command)
    command.add_argument("--target", required=True, help="file of pairs to write")
    command.add_argument(
        "--metric", choices=sorted(prefer_lib.METRICS), default="exact_match", help="(default: %(default)s)"
    )

    command = _command(commands, "annotate", annotate)
    _candidates(command)
    command.add_argument("--marks", required=True, help="file of marks to add to; made if there is none")
    command.add_argument("--annotator", required=True, help="your name: letters, digits and _ . @ -")
    command.add_argument("--terminal", action="store_true", help="no page: print items, read keys and Enter")
    command.add_argument("--host", default=origins.LOOPBACK, help="address to listen on (default: this machine only)")
    command.add_argument("--port", type=int, default=8765, help="0 takes a free one (default: %(default)s)")

    command = _command(commands, "collect", collect)
    _candidates(command)
    command.add_argument("--marks", required=True, nargs="+", help="files of marks")
    command.add_argument("--target", required=True, help="file of pairs to write")

    command = _command(commands, "agreement", agreement)
    command.add_argument("--marks", required=True, nargs="+", help="files of marks")

    command = _command(commands, "export", export)
    command.add_argument("--pairs", required=True, help="file of pairs")
    command.add_argument("--format", required=True, choices=sorted(formats.WRITERS))
    command.add_argument("--target", required=True, help="file to write; .parquet where the format has it")
    _on_bad_sample(command)

    command = _command(commands, "import", import_)
    command.add_argument("--source", required=True, nargs="+", help=".jsonl, .json or .parquet files, or their folder")
    command.add_argument("--format", required=True, choices=sorted(formats.READERS))
    command.add_argument("--image-folder", help="what image paths are relative to (default: the folder of each file)")
    command.add_argument("--target", required=True, help="file of pairs to write; images inside parquet go beside it")
    _on_bad_sample(command)
    return parser


def _command(commands: Any, name: str, run: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
    what = (run.__doc__ or "").strip()
    command = commands.add_parser(name, help=what, description=what)
    command.set_defaults(run=run)
    return command


def _candidates(command: argparse.ArgumentParser) -> None:
    command.add_argument("--candidates", required=True, help="file of candidates")
    _on_bad_sample(command)


def _on_bad_sample(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--on-bad-sample", choices=bad_samples.POLICIES, default="error", help="stop, or leave out and count"
    )


if __name__ == "__main__":
    sys.exit(main())
