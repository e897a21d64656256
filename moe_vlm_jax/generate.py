"""Asks one question about one image (or several, or none).

    python -m moe_vlm_jax.generate --workdir runs/sft --image chart.png --question "which item is largest ?"
    python -m moe_vlm_jax.generate --checkpoint FOLDER --image photo.jpg --question "What is this?" --temperature 0.7

--workdir takes a run of this project with its newest checkpoint; --checkpoint takes a folder in HF layout (MoE-LLaVA,
LLaVA). The answer goes to standard output, everything else to standard error.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence

from moe_vlm_jax import config as config_lib
from moe_vlm_jax import ready
from moe_vlm_jax.data import bad_samples, tokenize
from moe_vlm_jax.data import records as records_lib
from moe_vlm_jax.decoding import generate as generate_lib
from moe_vlm_jax.decoding import prompts as prompts_lib
from moe_vlm_jax.decoding import sampling
from moe_vlm_jax.evaluation import runner


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    args = _parser().parse_args(argv)
    try:
        useless = [name for name in ("tokenizer", "template", "vision", "dtype") if getattr(args, name) is not None]
        if args.workdir and useless:
            raise ValueError(f"--{useless[0]} has no effect with --workdir, whose config says it; leave it out.")
        source = ready.from_workdir(args.workdir) if args.workdir else _checkpoint(args)
        generation = _generation(args, source.config.generation)
        text, stopped = ask(source, args.question, args.image, generation)
    except bad_samples.SampleError as error:
        print(f"error: {error.fault}", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(text)
    if not stopped:
        print(f"(cut off after {generation.max_new_tokens} tokens; raise --max-new-tokens)", file=sys.stderr)
    return 0


def ask(
    source: ready.Source, question: str, images: Sequence[str], generation: config_lib.GenerationConfig
) -> tuple[str, bool]:
    """Returns (answer, whether it ended by itself); everything the user may get wrong is found before the weights.

    Args:
      source: what to ask.
      question: text, without image marks.
      images: paths; they stand in front of the question, in this order.
      generation: how to decode.
    """
    if not question.strip():
        raise ValueError("the question is empty; give one with --question.")
    marks = "<image>\n" * len(images)
    record = records_lib.Record(
        id="question", images=tuple(images), turns=(records_lib.Turn("human", marks + question),)
    )
    data, tokenizer = source.config.data, source.tokenizer
    prompt = tokenize.encode_prompt(record, tokenizer, data.template, answer_prompt=data.answer_prompt)
    unknown = tokenizer.unk_token_id
    if unknown is not None and unknown in prompt:
        words = [word for word in question.split() if unknown in tokenizer(word).input_ids]
        what = ", ".join(map(repr, words)) or f"words of the template {data.template!r}"
        raise ValueError(f"the tokenizer does not know {what}; use words (or a template) that it was made for.")
    model = source.config.model
    length = prompts_lib.expanded_length(prompt, model.vision.num_tokens)
    prompts_lib.check_length(length, generation.max_new_tokens, model)
    for image in images:
        source.transform.check(image)
    graphdef, params = source.load()
    evaluation = dataclasses.replace(source.config.evaluation, batch_size=1)
    config = dataclasses.replace(source.config, generation=generation, evaluation=evaluation)
    graphdef = generate_lib.dropless_graphdef(graphdef, params)
    return runner.answer_prompts(graphdef, params, config, [tuple(images)], [prompt], tokenizer, source.transform)[0]


def _checkpoint(args: argparse.Namespace) -> ready.Source:
    names = ("tokenizer", "template", "vision", "dtype")
    return ready.from_checkpoint(args.checkpoint, **{name: getattr(args, name) for name in names})


def _generation(args: argparse.Namespace, default: config_lib.GenerationConfig) -> config_lib.GenerationConfig:
    """Returns the run's settings with those of the command line, checked."""
    given = {name: getattr(args, name) for name in ("temperature", "top_p", "seed", "max_new_tokens")}
    result = dataclasses.replace(default, **{name: value for name, value in given.items() if value is not None})
    sampling.check(result)
    return result


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m moe_vlm_jax.generate", description=(__doc__ or "").split("\n")[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--workdir", help="folder of a run, e.g. runs/sft")
    source.add_argument("--checkpoint", help="folder of a checkpoint in HF layout")
    parser.add_argument("--question", required=True, help="text of the question")
    parser.add_argument("--image", action="append", default=[], help="path of an image; may be given several times")
    parser.add_argument("--max-new-tokens", "--max_new_tokens", type=int, help="default: the run's, else 32")
    parser.add_argument("--temperature", type=float, help="0 is greedy (default: the run's, else 0)")
    parser.add_argument("--top-p", "--top_p", type=float, help="sample from the most probable tokens of this mass")
    parser.add_argument("--seed", type=int, help="of the sampling")
    only = parser.add_argument_group("with --checkpoint only")
    only.add_argument("--tokenizer", help="folder with tokenizer.json (default: the checkpoint)")
    only.add_argument("--template", help="conversation template (default: by the checkpoint's family)")
    only.add_argument("--vision", help="folder of the vision tower, if not the checkpoint's own")
    only.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on CPU, else bfloat16")
    return parser


if __name__ == "__main__":
    sys.exit(main())
