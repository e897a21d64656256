"""Every setting of `python -m moe_vlm_jax.evaluate`, as dataclasses with their rules.

configs/evaluate.py returns an `EvaluateConfig`; the command line overrides fields of it. Field comments name the trap,
not the type.
"""

import dataclasses
import difflib
import functools
from collections.abc import Iterator

from moe_vlm_jax import config as config_lib
from moe_vlm_jax import validation

JUDGES = ("", "none", "offline", "endpoint")
_OCR = ("rule", "yes", "no")


@dataclasses.dataclass(kw_only=True)
class BenchmarkConfig:
    """One benchmark: where its files are, and whose rule asks and scores it."""

    path: str = ""  # folder of the official files (or the one file); empty: <data_root>/<the set's own name>
    split: str
    rule: (
        str  # llava | vlmevalkit | lmms_eval | official: whose prompt and whose scoring; the default is the primary one
    )
    max_new_tokens: (
        int  # an answer that is cut off is counted as truncated; 0: the run's own (generation.max_new_tokens)
    )


@dataclasses.dataclass(kw_only=True)
class EmbeddedConfig(BenchmarkConfig):
    """The embedded synthetic infographics; path is the cache of rendered images (empty: the user's)."""

    difficulty: str = "mini"  # mini | full


@dataclasses.dataclass(kw_only=True)
class TextVqaConfig(BenchmarkConfig):
    """TextVQA."""

    # OCR tokens in the prompt: rule (LLaVA's has them, the others' do not) | yes | no. They move scores by much.
    ocr_tokens: str = "rule"


@dataclasses.dataclass(kw_only=True)
class MmbenchConfig(BenchmarkConfig):
    """MMBench in one language."""

    # Whose prompt: llava (VLMEvalKit asks LLaVA models so, too) | vlmevalkit (its generic one) | lmms_eval.
    prompt: str = "llava"


@dataclasses.dataclass(kw_only=True)
class ScienceQaConfig(BenchmarkConfig):
    """ScienceQA; questions with an image are what 'ScienceQA-IMG' counts."""

    text_questions: bool = False  # also ask those without an image; the main score stays that of image questions
    # MoE-LLaVA's script of this set hands images to the tower without padding them to a square, although training pads:
    # True does so too (the centre is cut out of a longer image). For reproducing its published figure only.
    unpadded_images: bool = False


@dataclasses.dataclass(kw_only=True)
class JudgedConfig(BenchmarkConfig):
    """A set of open answers that a judge grades."""

    # The official text for the judge, as a file (docs/evaluation.md); empty: this project's own words, which the label
    # says: grades then do not compare with published ones.
    judge_prompt: str = ""
    unpadded_images: bool = False  # see ScienceQaConfig; MoE-LLaVA's script of this set does the same


@dataclasses.dataclass(kw_only=True)
class EndpointConfig:
    """An OpenAI-compatible chat endpoint that judges answers."""

    url: str = ""  # up to and without /chat/completions, e.g. https://api.openai.com/v1 or http://localhost:8000/v1
    model: str = ""  # a dated one: what an undated name means changes, and scores with it
    key_variable: str = "OPENAI_API_KEY"  # environment variable that holds the key; empty: the endpoint wants none
    attempts: int = 5  # calls for one verdict: after failures, and after replies that hold no verdict
    timeout: float = 60.0  # seconds of one call
    wait: float = 2.0  # seconds before the second attempt after a failure, doubled each time


@dataclasses.dataclass(kw_only=True)
class EvaluateConfig:
    """Which model answers which benchmarks."""

    benchmarks: str = "embedded"  # comma separated
    workdir: str = ""  # of a run, whose newest checkpoint answers; this or checkpoint
    checkpoint: str = ""  # folder in HF layout
    tokenizer: str = ""  # with checkpoint only, as the three below; empty: the checkpoint's own folder
    template: str = ""  # empty: by the checkpoint's family
    vision: str = ""  # folder of the tower; empty: the checkpoint's own
    dtype: str = ""  # float32 | bfloat16; empty: float32 on a CPU, else bfloat16
    target: str = ""  # folder of the results; empty: <workdir>/evaluation or <checkpoint>/evaluation
    data_root: str = "data/benchmarks"
    max_questions: int = 0  # a draw (by seed 0) of about so many; the label says so. 0: all
    report: bool = True  # also write the page of the results, into <target>/report
    on_bad_sample: str = "error"  # error | drop (counted; the label says so)
    batch_size: int = 32
    chunk: int = 512  # questions that are answered before their answers are written down: what a crash may cost
    # '' (an error where a set needs one) | none (answers are written, not graded) | offline (a rule) | endpoint
    judge: str = ""
    endpoint: EndpointConfig = dataclasses.field(default_factory=EndpointConfig)
    mesh: config_lib.MeshConfig = dataclasses.field(default_factory=config_lib.MeshConfig)

    embedded: EmbeddedConfig = dataclasses.field(
        default_factory=functools.partial(EmbeddedConfig, split="val", rule="vlmevalkit", max_new_tokens=0)
    )
    infovqa: BenchmarkConfig = dataclasses.field(
        default_factory=functools.partial(BenchmarkConfig, split="val", rule="vlmevalkit", max_new_tokens=128)
    )
    docvqa: BenchmarkConfig = dataclasses.field(
        default_factory=functools.partial(BenchmarkConfig, split="val", rule="vlmevalkit", max_new_tokens=128)
    )
    textvqa: TextVqaConfig = dataclasses.field(
        default_factory=functools.partial(TextVqaConfig, split="val", rule="llava", max_new_tokens=128)
    )
    vqav2: BenchmarkConfig = dataclasses.field(
        default_factory=functools.partial(BenchmarkConfig, split="val2014", rule="llava", max_new_tokens=128)
    )
    vizwiz: BenchmarkConfig = dataclasses.field(
        default_factory=functools.partial(BenchmarkConfig, split="val", rule="llava", max_new_tokens=128)
    )
    gqa: BenchmarkConfig = dataclasses.field(
        default_factory=functools.partial(BenchmarkConfig, split="testdev_balanced", rule="llava", max_new_tokens=128)
    )
    scienceqa: ScienceQaConfig = dataclasses.field(
        default_factory=functools.partial(ScienceQaConfig, split="test", rule="llava", max_new_tokens=128)
    )
    pope: BenchmarkConfig = dataclasses.field(
        default_factory=functools.partial(BenchmarkConfig, split="test", rule="llava", max_new_tokens=128)
    )
    mme: BenchmarkConfig = dataclasses.field(
        default_factory=functools.partial(BenchmarkConfig, split="test", rule="official", max_new_tokens=128)
    )
    mmbench: MmbenchConfig = dataclasses.field(
        default_factory=functools.partial(MmbenchConfig, split="dev", rule="vlmevalkit", max_new_tokens=128)
    )
    mmbench_cn: MmbenchConfig = dataclasses.field(
        default_factory=functools.partial(MmbenchConfig, split="dev", rule="vlmevalkit", max_new_tokens=128)
    )
    ai2d: BenchmarkConfig = dataclasses.field(
        default_factory=functools.partial(BenchmarkConfig, split="test", rule="lmms_eval", max_new_tokens=128)
    )
    chartqa: BenchmarkConfig = dataclasses.field(
        default_factory=functools.partial(BenchmarkConfig, split="test", rule="lmms_eval", max_new_tokens=128)
    )
    mmvet: JudgedConfig = dataclasses.field(
        default_factory=functools.partial(JudgedConfig, split="test", rule="llava", max_new_tokens=1024)
    )
    llavabench: JudgedConfig = dataclasses.field(
        default_factory=functools.partial(JudgedConfig, split="test", rule="llava", max_new_tokens=1024)
    )


NAMES = tuple(
    field.name
    for field in dataclasses.fields(EvaluateConfig)
    if isinstance(field.type, type) and issubclass(field.type, BenchmarkConfig)
)


def chosen(config: EvaluateConfig) -> tuple[str, ...]:
    """Returns the names of config.benchmarks, in their order."""
    return tuple(name.strip() for name in config.benchmarks.split(",") if name.strip())


def benchmark(config: EvaluateConfig, name: str) -> BenchmarkConfig:
    """Returns the section of a benchmark."""
    return getattr(config, name)


def validate(config: EvaluateConfig) -> None:
    """Checks every rule that needs nothing but the config.

    Raises:
      ValueError: all mistakes, one line each: value, rule, remedy.
    """
    mistakes = list(validation.type_mistakes(config))
    if not mistakes:
        mistakes = [*_model(config), *_names(config), *_values(config), *_judge(config)]
    if mistakes:
        raise ValueError("\n".join(mistakes))


def _model(config: EvaluateConfig) -> Iterator[str]:
    if bool(config.workdir) == bool(config.checkpoint):
        yield (
            f"workdir={config.workdir!r} and checkpoint={config.checkpoint!r}: give one of them, "
            "--config.workdir=runs/sft or --config.checkpoint=FOLDER."
        )
    elif config.workdir:
        for name in ("tokenizer", "template", "vision", "dtype"):
            if getattr(config, name):
                yield f"{name}={getattr(config, name)!r} has no effect with workdir, whose config has it; drop it."
    if config.dtype not in ("", "float32", "bfloat16"):
        yield f"dtype={config.dtype!r} is unknown; use 'float32', 'bfloat16' or ''."


def _names(config: EvaluateConfig) -> Iterator[str]:
    names = chosen(config)
    if not names:
        yield f"benchmarks={config.benchmarks!r} names none; choose of {', '.join(NAMES)}."
    for name in dict.fromkeys(names):
        if name not in NAMES:
            near = difflib.get_close_matches(name, NAMES, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            yield f"benchmarks: {name!r} is unknown; choose of {', '.join(NAMES)}{hint}"
        if names.count(name) > 1:
            yield f"benchmarks: {name!r} is named {names.count(name)} times; name it once."


def _values(config: EvaluateConfig) -> Iterator[str]:
    for name, low in (("max_questions", 0), ("batch_size", 1), ("chunk", 1)):
        if getattr(config, name) < low:
            yield f"{name}={getattr(config, name)} is out of range; it must be at least {low}."
    if config.on_bad_sample not in ("error", "drop"):
        yield f"on_bad_sample={config.on_bad_sample!r} is unknown; use 'error' or 'drop'."
    if config.textvqa.ocr_tokens not in _OCR:
        yield f"textvqa.ocr_tokens={config.textvqa.ocr_tokens!r} is unknown; use one of {', '.join(_OCR)}."
    for name in ("mmbench", "mmbench_cn"):
        known = ("llava", "vlmevalkit", *(["lmms_eval"] if name == "mmbench" else []))
        if getattr(config, name).prompt not in known:
            yield f"{name}.prompt={getattr(config, name).prompt!r} is unknown; use one of {', '.join(known)}."
    for name in NAMES:
        if benchmark(config, name).max_new_tokens < (0 if name == "embedded" else 1):
            yield f"{name}.max_new_tokens={benchmark(config, name).max_new_tokens} is out of range; raise it."


def _judge(config: EvaluateConfig) -> Iterator[str]:
    endpoint = config.endpoint
    if config.judge not in JUDGES:
        yield f"judge={config.judge!r} is unknown; use one of {', '.join(map(repr, JUDGES))}."
    elif config.judge == "endpoint":
        if not endpoint.url or not endpoint.model:
            yield (
                f"judge='endpoint' needs endpoint.url (it is {endpoint.url!r}) and endpoint.model (it is "
                f"{endpoint.model!r}); set --config.endpoint.url=https://HOST/v1 and --config.endpoint.model=NAME."
            )
        elif not endpoint.url.startswith(("http://", "https://")):
            yield f"endpoint.url={endpoint.url!r} must start with http:// or https://; correct it."
    elif endpoint != EndpointConfig():
        yield f"endpoint.* has no effect with judge={config.judge!r}; set --config.judge=endpoint."
    if endpoint.attempts < 1 or endpoint.timeout <= 0 or endpoint.wait < 0:
        yield (
            f"endpoint.attempts={endpoint.attempts}, timeout={endpoint.timeout}, wait={endpoint.wait}: at least 1, "
            "more than 0 and at least 0; raise them."
        )
