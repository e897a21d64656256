"""Conversation templates: how turns become the text that a model reads.

Two families. The reference's templates render one string and find the trained parts in it again (`tokenize.py`).
`segments` templates are made of pieces that are either trained or not, so that nothing must be found again:

    phi, trained:  {system} USER: <image>\\nWhat? ASSISTANT: A dog.<|endoftext|>
    phi, asked:    {system} USER: <image>\\nWhat? ASSISTANT:
    plain_qa:      [<image>what is largest ?] [ japan{eos}]        the second piece is trained
    chatml:        [{system}<|im_start|>user\\nWhat?<|im_end|>\\n<|im_start|>assistant\\n] [A dog.<|im_end|>]
"""

import dataclasses
from collections.abc import Sequence

from moe_vlm_jax.data import records

IMAGE_MARK = "<image>"


@dataclasses.dataclass(frozen=True)
class RoundMask:
    """How the reference finds the prompt part of a round by counting tokens.

    Attributes:
      start: tokens before the first round (1: a BOS).
      back: subtracted from the length of 'prompt + space': the space merges into the answer's first token, and
        with a BOS that token is not in the sequence a second time.
      closing: tokens that end a round beside its own (1: the end mark; 0: the round's own BOS stands for it).
    """

    start: int
    back: int
    closing: int


EOS_ROUNDS = RoundMask(start=0, back=1, closing=1)  # tokenizers without BOS: phi, qwen, stablelm
BOS_ROUNDS = RoundMask(start=1, back=2, closing=0)  # tokenizers with BOS: v1, openchat, mistral, llama_2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Template:
    """One way to write a conversation.

    Attributes:
      name: as chosen in the config.
      style: two | single | mpt | llama_2 | plain (the reference's) | segments (ours).
      system: text before the first turn.
      human: what introduces a question.
      gpt: what introduces an answer; in 'segments' a trained lead of the answer.
      sep: ends a human turn ('single', 'mpt': every turn); in 'segments' all between question and answer.
      sep2: ends an answer; None where the style has none.
      gap: 'segments' only: untrained text between an answer and the next question.
      mask: 'two' and 'llama_2' only: how rounds are counted.
      wraps_image: every mark of a turn that starts with one is written <Image><image></Image>.
      ends_with_eos: sep2 is the tokenizer's end-of-sequence token (see `with_eos`).
      system_marks: what stands before and after the text of a system turn, inside of `system`; None: the template has
        no place for such a text.
    """

    name: str
    style: str
    system: str = ""
    human: str = ""
    gpt: str = ""
    sep: str = ""
    sep2: str | None = None
    gap: str = ""
    mask: RoundMask | None = None
    wraps_image: bool = False
    ends_with_eos: bool = False
    system_marks: tuple[str, str] | None = ("", "")

    def with_system(self, text: str) -> "Template":
        """Returns the template with another text of the system than the one that it was made with."""
        if self.system_marks is None:
            raise ValueError(f"data.template={self.name!r} has no place for a system text; leave that out.")
        return dataclasses.replace(self, system=self.system_marks[0] + text + self.system_marks[1])

    def with_eos(self, eos_token: str | None) -> "Template":
        """Returns the template with the tokenizer's end-of-sequence token in place, where it asks for one."""
        if not self.ends_with_eos:
            return self
        if not eos_token:
            raise ValueError(
                f"data.template={self.name!r} ends answers with the tokenizer's end-of-sequence token, and the "
                "tokenizer has none; set eos_token in its tokenizer_config.json or choose another template."
            )
        return dataclasses.replace(self, sep2=eos_token)


def names() -> tuple[str, ...]:
    """Returns the names that `choose` knows."""
    return tuple(_TEMPLATES)


def choose(name: str) -> Template:
    """Returns the template of that name."""
    if name not in _TEMPLATES:
        raise ValueError(f"data.template={name!r} is not a known template; use one of {', '.join(sorted(_TEMPLATES))}.")
    return _TEMPLATES[name]


def render(template: Template, turns: Sequence[records.Turn]) -> str:
    """Returns the whole text of the turns; when the last one is human, the answer's turn is left open.

    An empty turn is written as an open one, as the reference does.
    """
    return _STYLES[template.style](template, turns)


def segments(template: Template, turns: Sequence[records.Turn]) -> list[tuple[str, bool]]:
    """Returns the pieces (text, trained) of a 'segments' template, in order; their texts joined are `render`."""
    pieces = []
    lead = template.system
    for turn in turns:
        if turn.role == "human":
            pieces.append((lead + template.human + turn.text + template.sep, False))
        else:
            pieces.append((template.gpt + turn.text + (template.sep2 or ""), True))
            lead = template.gap
    return pieces


def speaker_lines(template: Template, turns: Sequence[records.Turn]) -> tuple[str, list[str], str]:
    """Returns (header, one line for each turn, tail) as the reference trains 'single' templates.

    That text differs from the prompt that the same template asks with: '### Human: q\\n' against '###Human: q###'.
    """
    names = {"human": template.human, "gpt": template.gpt}
    lines = [f"### {names[turn.role]}: {turn.text}\n" for turn in turns]
    return f"{template.system}\n\n", lines, "### "


def _two(template: Template, turns: Sequence[records.Turn]) -> str:
    text = template.system + template.sep
    for turn in turns:
        role, end = (template.human, template.sep) if turn.role == "human" else (template.gpt, template.sep2)
        text += f"{role}: {turn.text}{end}" if turn.text else f"{role}:"
    return text + (f"{template.gpt}:" if turns[-1].role == "human" else "")


def _single(template: Template, turns: Sequence[records.Turn]) -> str:
    text = template.system + template.sep
    for turn in turns:
        role = template.human if turn.role == "human" else template.gpt
        text += f"{role}: {turn.text}{template.sep}" if turn.text else f"{role}:"
    return text + (f"{template.gpt}:" if turns[-1].role == "human" else "")


def _mpt(template: Template, turns: Sequence[records.Turn]) -> str:
    text = template.system + template.sep
    for turn in turns:
        role = template.human if turn.role == "human" else template.gpt
        text += f"{role}{turn.text}{template.sep}" if turn.text else role
    return text + (template.gpt if turns[-1].role == "human" else "")


def _llama_2(template: Template, turns: Sequence[records.Turn]) -> str:
    text = ""
    for i, turn in enumerate(turns):
        system = f"<<SYS>>\n{template.system}\n<</SYS>>\n\n" if i == 0 else ""
        if turn.role == "human":
            text += f"{template.sep}[INST] {system}{turn.text} [/INST]"
        elif turn.text:
            text += f" {turn.text} {template.sep2}"
    return text.removeprefix(template.sep)  # the tokenizer writes the first BOS itself


def _plain(template: Template, turns: Sequence[records.Turn]) -> str:
    return template.system + "".join(turn.text + template.sep for turn in turns)


def _segments(template: Template, turns: Sequence[records.Turn]) -> str:
    return "".join(text for text, _ in segments(template, turns))


_STYLES = {
    "two": _two,
    "single": _single,
    "mpt": _mpt,
    "llama_2": _llama_2,
    "plain": _plain,
    "segments": _segments,
}

_HUMAN_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
_USER_SYSTEM = _HUMAN_SYSTEM.replace("human", "user")
_TAG_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant is able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
    "The visual content will be provided with the following format: <Image>visual content</Image>."
)
_LLAMA_2_SYSTEM = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering something "
    "not correct. If you don't know the answer to a question, please don't share false information."
)
_LLAVA_LLAMA_2_SYSTEM = (
    "You are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
_MPT_SYSTEM = (
    "<|im_start|>system\nA conversation between a user and an LLM-based AI assistant. "
    "The assistant gives helpful and honest answers."
)


def _two_template(name: str, end: str, mask: RoundMask, system: str = _USER_SYSTEM, wraps_image: bool = False):
    return Template(
        name=name,
        style="two",
        system=system,
        human="USER",
        gpt="ASSISTANT",
        sep=" ",
        sep2=end,
        mask=mask,
        wraps_image=wraps_image,
    )


def _single_template(name: str, system: str = _HUMAN_SYSTEM, wraps_image: bool = False):
    return Template(
        name=name, style="single", system=system, human="Human", gpt="Assistant", sep="###", wraps_image=wraps_image
    )


def _llama_2_template(name: str, system: str):
    return Template(
        name=name,
        style="llama_2",
        system=system,
        human="USER",
        gpt="ASSISTANT",
        sep="<s>",
        sep2="</s>",
        mask=BOS_ROUNDS,
    )


_ALL = (
    _two_template("phi", "<|endoftext|>", EOS_ROUNDS),
    _two_template("qwen", "<|endoftext|>", EOS_ROUNDS),
    _two_template("stablelm", "<|endoftext|>", EOS_ROUNDS),
    _two_template("v1", "</s>", BOS_ROUNDS),
    _two_template("vicuna_v1", "</s>", BOS_ROUNDS),
    _two_template("mistral", "</s>", BOS_ROUNDS),
    _two_template("minicpm", "</s>", BOS_ROUNDS),
    _two_template("openchat", "<|end_of_turn|>", BOS_ROUNDS),
    _two_template("llava_v1", "</s>", BOS_ROUNDS, system=_HUMAN_SYSTEM),
    _two_template("v1_mmtag", "</s>", BOS_ROUNDS, system=_TAG_SYSTEM, wraps_image=True),
    _single_template("default"),
    _single_template("v0"),
    _single_template("llava_v0"),
    _single_template("v0_mmtag", system=_TAG_SYSTEM, wraps_image=True),
    _llama_2_template("llama_2", _LLAMA_2_SYSTEM),
    _llama_2_template("llava_llama_2", _LLAVA_LLAMA_2_SYSTEM),
    _llama_2_template("llama", _LLAVA_LLAMA_2_SYSTEM),
    Template(
        name="mpt",
        style="mpt",
        system=_MPT_SYSTEM,
        human="<|im_start|>user\n",
        gpt="<|im_start|>assistant\n",
        sep="<|im_end|>",
        system_marks=("<|im_start|>system\n", ""),
    ),
    Template(name="plain", style="plain", sep="\n", system_marks=None),
    Template(name="v0_plain", style="plain", sep="\n", system_marks=None),
    # For models trained here from nothing: no system text; a word-level tokenizer ignores the space.
    Template(name="plain_qa", style="segments", gpt=" ", gap=" ", ends_with_eos=True, system_marks=None),
    Template(
        name="chatml",
        style="segments",
        system="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n",
        human="<|im_start|>user\n",
        sep="<|im_end|>\n<|im_start|>assistant\n",
        sep2="<|im_end|>",
        gap="\n",
        system_marks=("<|im_start|>system\n", "<|im_end|>\n"),
    ),
    Template(
        name="llama_3",
        style="segments",
        human="<|start_header_id|>user<|end_header_id|>\n\n",
        sep="<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        sep2="<|eot_id|>",
        system_marks=("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"),
    ),
)
_TEMPLATES = {template.name: template for template in _ALL}
