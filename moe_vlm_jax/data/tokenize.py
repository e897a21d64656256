"""Records to token ids: for training with labels on the answers, for generation with the answer's turn left open.

What a record must keep to is checked here, and every fault is a `SampleError` that names the record.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from moe_vlm_jax.batch import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from moe_vlm_jax.data import bad_samples, fast_tokenizers, label_masks, records, templates


def load_tokenizer(spec: str) -> Any:
    """Returns a transformers fast tokenizer.

    Args:
      spec: 'closed' (the embedded mini set's words), 'easy_vqa' (that set's words), or a folder with tokenizer.json.
    """
    if spec == "closed":
        from moe_vlm_jax.data.infographics import vocabulary

        return vocabulary.closed_tokenizer()
    if spec == "easy_vqa":
        from moe_vlm_jax.data import easyvqa

        return easyvqa.tokenizer()
    folder = pathlib.Path(spec)
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(
            f"data.tokenizer={spec!r} has no tokenizer.json; it must be 'closed', 'easy_vqa' or a folder with a fast "
            "tokenizer; write one with transformers: AutoTokenizer.from_pretrained(...).save_pretrained(folder)."
        )
    return fast_tokenizers.from_folder(folder)


def encode(
    record: records.Record,
    tokenizer: Any,
    template: str | templates.Template,
    *,
    max_text_tokens: int,
    answer_prompt: str = "",
) -> records.Example:
    """Returns the record as ids and labels; nothing is cut off yet (see `truncate`).

    Args:
      record: turns human, gpt, human, gpt, ...; a gpt turn before the first human one is skipped.
      tokenizer: see `load_tokenizer`.
      template: a template, or its name.
      max_text_tokens: the length at which the example will be cut off; some label must stand before it.
      answer_prompt: written behind the text of every human turn.

    Raises:
      SampleError: the turns, marks or answers break a rule, or no label is left.
    """
    template = _template(template, tokenizer)
    turns = _checked_turns(record, template)
    if turns[-1].role == "human":
        raise _error(record, "empty_answer", "the last question has no answer; training needs one; add a gpt turn.")
    for i, turn in enumerate(turns):
        if turn.role == "gpt" and not turn.text.strip():
            raise _error(
                record, "empty_answer", f"turn {i} is an empty answer; an answer needs text; write or drop it."
            )
    found = label_masks.tokenize_turns(_prompted(turns, answer_prompt), tokenizer, template, max_length=max_text_tokens)
    _check_marks(record, found.tokens)
    if found.mismatch:
        raise _error(
            record,
            "tokenization_mismatch",
            f"data.template={template.name!r} counts {found.mismatch[0]} tokens where the tokenizer gives "
            f"{found.mismatch[1]}, so the answers cannot be found; use the template that the tokenizer was made for.",
        )
    unknown = tokenizer.unk_token_id
    if unknown is not None and unknown in found.tokens and tokenizer.unk_token not in _joined(turns):
        raise _error(
            record,
            "unknown_word",
            f"its text {_joined(turns)!r} has words outside the tokenizer's vocabulary; use a tokenizer that has them.",
        )
    example = records.Example(id=record.id, tokens=found.tokens, labels=found.labels, images=record.images)
    if not has_labels(truncate(example, max_text_tokens)):
        first = int(np.argmax(found.labels != IGNORE_INDEX))
        raise _error(
            record,
            "no_labels",
            f"its first answer begins at text token {first}, data.max_text_tokens={max_text_tokens} cuts it off whole "
            "(an image counts as one token here); raise data.max_text_tokens or shorten the question.",
        )
    return example


def encode_prompt(
    record: records.Record,
    tokenizer: Any,
    template: str | templates.Template,
    *,
    answer_prompt: str = "",
) -> np.ndarray:
    """Returns int32[T] ids of the record up to its last question, the answer's turn left open.

    A last gpt turn is left out, so a record with its answer can be asked as it is.
    """
    template = _template(template, tokenizer)
    turns = _checked_turns(record, template)
    if turns[-1].role == "gpt":
        turns = turns[:-1]
    turns = _prompted(label_masks.tag_images(turns, template), answer_prompt)
    if template.style == "segments":
        tokens, _ = label_masks.join_pieces(tokenizer, templates.segments(template, turns))
    else:
        tokens = label_masks.ids_with_images(tokenizer, templates.render(template, turns))
    result = np.asarray(tokens, np.int32)
    _check_marks(record, result)
    return result


def end_tokens(tokenizer: Any, template: str | templates.Template) -> tuple[int, ...]:
    """Returns the ids that end an answer: the end-of-sequence token, and the template's end mark where it is one id."""
    template = _template(template, tokenizer)
    ends = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    mark = tokenizer.convert_tokens_to_ids(template.sep2) if template.sep2 else None
    if mark is not None and mark != tokenizer.unk_token_id:
        ends.append(mark)
    return tuple(dict.fromkeys(ends))


def has_labels(example: records.Example) -> bool:
    """Whether anything is learned from the example; the first position predicts nothing."""
    return bool((example.labels[1:] != IGNORE_INDEX).any())


def truncate(example: records.Example, max_text_tokens: int) -> records.Example:
    """Returns the first max_text_tokens tokens, as the reference's collator keeps them.

    A mark counts as one token: the patches of its image are never part of a text length. Images whose mark is cut
    off go with it.
    """
    tokens = example.tokens[:max_text_tokens]
    kept = int((tokens == IMAGE_TOKEN_INDEX).sum())
    return records.Example(
        id=example.id, tokens=tokens, labels=example.labels[:max_text_tokens], images=example.images[:kept]
    )


def _template(template: str | templates.Template, tokenizer: Any) -> templates.Template:
    chosen = templates.choose(template) if isinstance(template, str) else template
    return chosen.with_eos(tokenizer.eos_token)


def _prompted(turns: Sequence[records.Turn], answer_prompt: str) -> Sequence[records.Turn]:
    return [records.Turn(t.role, t.text + answer_prompt) if t.role == "human" else t for t in turns]


def _checked_turns(record: records.Record, template: templates.Template) -> Sequence[records.Turn]:
    """Returns the turns that count; SampleError when they do not alternate or ask nothing."""
    turns = record.turns if template.style in ("plain", "single") else label_masks.without_first_answer(record.turns)
    roles = [turn.role for turn in turns]
    if "human" not in roles:
        raise _error(record, "turns", f"its turns are {roles}; one must be human; add a question.")
    expected = [("human", "gpt")[(i + (roles[0] == "gpt")) % 2] for i in range(len(roles))]
    if roles != expected:
        raise _error(
            record, "turns", f"its turns are {roles}; human and gpt must alternate; merge or remove the turns between."
        )
    if template.style == "plain" and (len(turns) > 2 or not record.images):
        raise _error(
            record,
            "turns",
            f"it has {len(turns)} turns and {len(record.images)} images; data.template='plain' takes one caption of "
            "one image; choose another template.",
        )
    return turns


def _check_marks(record: records.Record, tokens: np.ndarray) -> None:
    marks = int((tokens == IMAGE_TOKEN_INDEX).sum())
    if marks != len(record.images):
        raise _error(
            record,
            "image_marks",
            f"its text has {marks} <image> marks and it has {len(record.images)} images; each image needs one mark "
            "where it stands; add or remove marks or images.",
        )


def _joined(turns: Sequence[records.Turn]) -> str:
    return " / ".join(turn.text for turn in turns)


def _error(record: records.Record, kind: str, fault: str) -> bad_samples.SampleError:
    return bad_samples.SampleError(record.id, kind, fault)
