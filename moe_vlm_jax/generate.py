"""Asks one question about one image (or several, or none).

    python -m moe_vlm_jax.generate --workdir runs/sft --image chart.png --question "which item is largest ?"
    python -m moe_vlm_jax.generate --checkpoint FOLDER --image photo.jpg --question "What is this?" --temperature 0.7

--workdir takes a run of this project with its newest checkpoint; --checkpoint takes a folder in HF layout (MoE-LLaVA,
LLaVA). The answer goes to standard output, everything else to standard error.
"""

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from flax import nnx

from moe_vlm_jax import config as config_lib
from moe_vlm_jax.data import bad_samples, tokenize
from moe_vlm_jax.data import images as images_lib
from moe_vlm_jax.data import records as records_lib
from moe_vlm_jax.decoding import generate as generate_lib
from moe_vlm_jax.decoding import sampling
from moe_vlm_jax.evaluation import runner
from moe_vlm_jax.hf import configs
from moe_vlm_jax.hf import load as hf_load
from moe_vlm_jax.models import vlm
from moe_vlm_jax.training import checkpoint, setup

# What each family of checkpoints was trained with in the reference; HF's LLaVA-1.5 is a llama.
TEMPLATES = {"phi": "phi", "stablelm": "stablelm", "qwen": "qwen", "qwen1_5": "qwen", "llama": "v1", "mistral": "v1"}


class Source(NamedTuple):
    """A model that can be asked.

    Attributes:
      config: of the run, or made from the checkpoint.
      tokenizer, transform: for its text and its images.
      load: returns (graphdef, params); the expensive part, so it comes last.
    """

    config: config_lib.RunConfig
    tokenizer: Any
    transform: images_lib.ImageTransform
    load: Callable[[], tuple[nnx.GraphDef, nnx.State]]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    args = _parser().parse_args(argv)
    try:
        useless = [name for name in ("tokenizer", "template", "vision", "dtype") if getattr(args, name) is not None]
        if args.workdir and useless:
            raise ValueError(f"--{useless[0]} has no effect with --workdir, whose config says it; leave it out.")
        source = from_workdir(args.workdir) if args.workdir else from_checkpoint(args)
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
    source: Source, question: str, images: Sequence[str], generation: config_lib.GenerationConfig
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
    length = generate_lib.expanded_length(prompt, model.vision.num_tokens)
    generate_lib.check_length(length, generation.max_new_tokens, model)
    for image in images:
        source.transform.check(image)
    graphdef, params = source.load()
    evaluation = dataclasses.replace(source.config.evaluation, batch_size=1)
    config = dataclasses.replace(source.config, generation=generation, evaluation=evaluation)
    graphdef = generate_lib.dropless_graphdef(graphdef, params)
    return runner.answer_prompts(graphdef, params, config, [tuple(images)], [prompt], tokenizer, source.transform)[0]


def from_workdir(workdir: str) -> Source:
    """Returns a run of this project, with its newest checkpoint."""
    # One answer is computed on one device, or the same on each: the mesh of the training may not exist here.
    config = dataclasses.replace(checkpoint.read_config(workdir), mesh=config_lib.MeshConfig())

    def load() -> tuple[nnx.GraphDef, nnx.State]:
        model = setup.make_model(config)
        # Parameters that never trained are not in a checkpoint; they are made again as the run made them.
        frozen = setup.initial_params(model, config)[1] if jax.tree.leaves(model.frozen) else model.frozen
        trainable = checkpoint.newest(workdir, model.trainable, checkpoint.fingerprint(frozen))
        return model.graphdef, nnx.merge_state(trainable, frozen)

    return Source(
        config=config,
        tokenizer=tokenize.load_tokenizer(config.data.tokenizer),
        transform=images_lib.transform_for(config.model.vision, config.data),
        load=load,
    )


def from_checkpoint(args: argparse.Namespace) -> Source:
    """Returns a checkpoint in HF layout; its tokenizer lies beside it unless --tokenizer says where."""
    info = configs.read(args.checkpoint, vision=args.vision)
    dtype = args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    config = dataclasses.replace(info.config, compute_dtype=dtype, param_dtype=dtype)
    template = args.template or TEMPLATES.get((info.family and info.family.llava) or "")
    if template is None:
        raise ValueError(f"the conversation template of {args.checkpoint!r} is not known; name it with --template.")
    data = config_lib.DataConfig(
        tokenizer=args.tokenizer or args.checkpoint,
        template=template,
        image_aspect="square" if info.raw.get("image_aspect_ratio") == "square" else "pad",
    )
    folders = [pathlib.Path(folder) for folder in (args.vision, args.checkpoint, info.vision_folder) if folder]
    described = [folder for folder in folders if (folder / "preprocessor_config.json").is_file()]
    if described:
        transform = images_lib.transform_from_hf(described[0], aspect=data.image_aspect, max_pixels=data.max_pixels)
    else:
        transform = images_lib.transform_for(config.vision, data)

    def load() -> tuple[nnx.GraphDef, nnx.State]:
        graphdef, abstract = nnx.split(nnx.eval_shape(lambda: vlm.VLM(config, rngs=nnx.Rngs(0))))
        return graphdef, hf_load.load_into(abstract, args.checkpoint, config, vision=args.vision).state

    tokenizer = tokenize.load_tokenizer(data.tokenizer)
    return Source(config_lib.RunConfig(model=config, data=data), tokenizer, transform, load)


def _generation(args: argparse.Namespace, default: config_lib.GenerationConfig) -> config_lib.GenerationConfig:
    """Returns the run's settings with those of the command line, checked."""
    given = {name: getattr(args, name) for name in ("temperature", "top_p", "seed", "max_new_tokens")}
    result = dataclasses.replace(default, **{name: value for name, value in given.items() if value is not None})
    sampling.check_settings(temperature=result.temperature, top_p=result.top_p, max_new_tokens=result.max_new_tokens)
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
