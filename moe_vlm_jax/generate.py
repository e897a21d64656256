"""Asks one question about one image (or several, or none), or all questions of a file.

    python -m moe_vlm_jax.generate --workdir runs/sft --image chart.png --question "which item is largest ?"
    python -m moe_vlm_jax.generate --checkpoint FOLDER --image photo.jpg --question "What is this?" --temperature 0.7
    python -m moe_vlm_jax.generate --workdir runs/sft --questions questions.jsonl --out answers.jsonl

--workdir takes a run of this project with its newest checkpoint; --checkpoint takes a folder in HF layout (MoE-LLaVA,
LLaVA). The answer goes to standard output, everything else to standard error. The form of the files, and how the same
command goes on after a stop, stands in serving/questions.py.
"""

import argparse
import sys
from collections.abc import Sequence

import numpy as np
import tqdm

from moe_vlm_jax import arguments, command_line, ready
from moe_vlm_jax import config as config_lib
from moe_vlm_jax.data import bad_samples
from moe_vlm_jax.decoding import engine as engine_lib
from moe_vlm_jax.decoding import prompts as decoding_prompts
from moe_vlm_jax.serving import engines
from moe_vlm_jax.serving import prompts as prompts_lib
from moe_vlm_jax.serving import questions as questions_lib

_STEPS_STREAMED, _STEPS = 4, 32  # of each row between two looks at its text
_SHOWN_FAULTS = 20


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    args = _parser().parse_args(argv)
    try:
        _check(args)
        source = arguments.source_of(args)
        generation = arguments.generation_of(args, source.config.generation)
        command_line.use_compilation_cache()
        if args.questions:
            return _answer_file(source, args, generation)
        return _answer_one(source, args, generation)
    except bad_samples.SampleError as error:
        print(f"error: {error.fault}", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped" + ("; the same command goes on" if args.questions else ""), file=sys.stderr)
        return 130


def _answer_one(source: ready.Source, args: argparse.Namespace, generation: config_lib.GenerationConfig) -> int:
    """Prints one answer; everything the user may get wrong is found before the weights are read."""
    model = source.config.model
    prompts = prompts_lib.Prompts(source.config, source.tokenizer, source.transform)
    tokens = prompts.encode([prompts_lib.question_turn(args.question, len(args.image))], args.image)
    decoding_prompts.check_length(prompts.length(tokens), generation.max_new_tokens, model)
    longest = engines.cache_length_for(prompts.slots(tokens) + generation.max_new_tokens)
    steps = _STEPS_STREAMED if args.stream else _STEPS
    engine = engines.start(source, num_rows=1, cache_length=longest, steps_per_call=steps)
    request = engine_lib.Request(prompt=prompts.with_pixels(tokens, args.image), generation=generation)
    said, finish = "", None
    for delta in engines.answer(engine, source.tokenizer, request):
        said, finish = said + delta.text, delta.finish
        if args.stream:
            print(delta.text, end="", flush=True)
    print("" if args.stream else said)
    if finish == "length":
        print(f"(cut off after {generation.max_new_tokens} tokens; raise --max-new-tokens)", file=sys.stderr)
    return 0


def _answer_file(source: ready.Source, args: argparse.Namespace, generation: config_lib.GenerationConfig) -> int:
    """Writes the answers to a file of questions; status 1 when some rows could not be asked."""
    model = source.config.model
    prompts = prompts_lib.Prompts(source.config, source.tokenizer, source.transform)

    def check(tokens: np.ndarray) -> None:
        decoding_prompts.check_length(prompts.length(tokens), generation.max_new_tokens, model)

    questions, faults = questions_lib.read(args.questions, prompts, check)
    for fault in faults[:_SHOWN_FAULTS]:
        print(f"not asked: {fault}", file=sys.stderr)
    if len(faults) > _SHOWN_FAULTS:
        print(f"not asked: {len(faults) - _SHOWN_FAULTS} more rows", file=sys.stderr)
    if not questions:
        raise ValueError(f"{args.questions!r} has no row that can be asked.")
    settings = questions_lib.settings_of(args.workdir or args.checkpoint, generation)
    with questions_lib.Answers(args.out, questions, settings) as answers:
        left = [question for question in questions if question.id not in answers.done]
        if left:
            longest = max(prompts.slots(question.tokens) for question in left) + generation.max_new_tokens
            engine = engines.start(
                source,
                num_rows=min(args.num_rows, len(left)),
                cache_length=engines.cache_length_for(longest),
                steps_per_call=_STEPS,
            )
            done, total = len(answers.done), len(questions)
            with tqdm.tqdm(initial=done, total=total, unit="question", dynamic_ncols=True, disable=None) as bar:
                asked = questions_lib.ask(left, engine, prompts, generation, num_waiting=args.num_rows)
                for question, text, finish in asked:
                    answers.add(question, text, finish)
                    bar.update()
        print(
            f"{args.out} has {len(answers.done)} answers, {len(left)} of them new; {len(faults)} rows were not asked",
            file=sys.stderr,
        )
    return int(bool(faults))


def _check(args: argparse.Namespace) -> None:
    """Raises ValueError for arguments that have no effect together."""
    if args.question is not None and args.out:
        raise ValueError("--out has no effect with --question, whose answer is printed; leave it out.")
    if args.questions:
        if not args.out:
            raise ValueError("--questions needs --out, the file of the answers.")
        if args.image or args.stream:
            raise ValueError("--image and --stream have no effect with --questions; leave them out.")
    if args.num_rows < 1:
        raise ValueError(f"--num-rows {args.num_rows} must be at least 1.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m moe_vlm_jax.generate", description=(__doc__ or "").split("\n")[0])
    arguments.add_source(parser)
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--question", help="text of the question")
    asked.add_argument("--questions", help="file of questions, one JSON object a line")
    parser.add_argument("--image", action="append", default=[], help="path of an image; may be given several times")
    parser.add_argument("--out", help="file of the answers to --questions; one that is there is continued")
    parser.add_argument("--stream", action="store_true", help="print the answer while it is decoded")
    parser.add_argument("--num-rows", "--num_rows", type=int, default=8, help="questions decoded at one time")
    arguments.add_sampling(parser, new_tokens="most tokens of an answer (default: the run's, else 32)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
