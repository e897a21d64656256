"""Which tokens of a conversation are learned: the reference's (MoE-LLaVA's) label rules, to the token.

The reference finds the answers by counting the tokens of each round again. Where the counts do not add up (a template
that does not fit the tokenizer, an empty answer) it hides the whole sample from the loss and prints a warning; here
the result says so. A tiny example, template phi with one token for each word ('.' is IGNORE_INDEX):

    text    {system} USER: <image> What? ASSISTANT:  red <|endoftext|>
    tokens  7 7 7    8 9   -200    4     5 6         11  0
    labels  . . .    . .   .       .     . .         11  0
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from moe_vlm_jax.batch import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from moe_vlm_jax.data import records, templates


@dataclasses.dataclass(frozen=True)
class Tokenized:
    """A conversation as ids.

    Attributes:
      tokens: int32[T], IMAGE_TOKEN_INDEX where an image goes.
      labels: int32[T] unshifted, IGNORE_INDEX where nothing is learned.
      mismatch: (tokens counted over the rounds, tokens there are) where they differ, else None.
    """

    tokens: np.ndarray
    labels: np.ndarray
    mismatch: tuple[int, int] | None = None


def tokenize_turns(
    turns: Sequence[records.Turn],
    tokenizer: Any,
    template: templates.Template,
    *,
    max_length: int,
) -> Tokenized:
    """Returns the turns as the reference's `preprocess` gives them, unchecked; ValueError where it asserts.

    Nothing is cut off: the reference cuts text-only samples here and the others in its collator, at one length.

    Args:
      turns: of one conversation.
      tokenizer: see `tokenize.load_tokenizer`.
      template: with its end mark in place (`Template.with_eos`).
      max_length: the reference hides a miscounted sample only below this length.
    """
    turns = tag_images(turns, template)
    if template.style == "segments":
        return _segments(turns, tokenizer, template)
    if template.style == "plain":
        return _plain(turns, tokenizer, template)
    if template.style == "single":
        return _single(turns, tokenizer, template)
    turns = without_first_answer(turns)
    for i, turn in enumerate(turns):
        if turn.role != ("human", "gpt")[i % 2]:
            raise ValueError(f"turn {i} is {turn.role!r}; human and gpt must alternate; mend the conversation.")
    text = templates.render(template, turns)
    ids = ids_with_images(tokenizer, text)
    if template.style == "mpt":
        return _counted(ids, _mpt_rounds(text, tokenizer, template), max_length, start=0)
    return _counted(ids, _rounds(text, tokenizer, template), max_length, start=_mask(template).start)


def ids_with_images(tokenizer: Any, text: str) -> list[int]:
    """Returns the ids of the text, one IMAGE_TOKEN_INDEX for each mark; a BOS stands only once, in front.

    >>> ids_with_images(llama, "a<image>b")  # each piece alone would give [1, 67] and [1, 68]
    [1, 67, -200, 68]
    """
    chunks = [_ids(tokenizer, chunk) for chunk in text.split(templates.IMAGE_MARK)]
    bos = tokenizer.bos_token_id
    skipped = int(bos is not None and chunks[0][:1] == (bos,))
    ids = list(chunks[0])
    for chunk in chunks[1:]:
        ids.append(IMAGE_TOKEN_INDEX)
        ids += chunk[skipped:]
    return ids


def _counted(ids: list[int], rounds: list[tuple[int, int]], max_length: int, *, start: int) -> Tokenized:
    """Returns ids with labels behind the prompt of each round, hidden when the rounds do not add up.

    Args:
      ids: the whole conversation.
      rounds: (tokens of the prompt, tokens of the round) in order.
      max_length: see `tokenize_turns`.
      start: tokens before the first round.
    """
    tokens = np.asarray(ids, np.int32)
    labels = tokens.copy()
    labels[:start] = IGNORE_INDEX
    cursor = start
    for prompt, length in rounds:
        labels[cursor : cursor + prompt] = IGNORE_INDEX
        cursor += length
    labels[cursor:] = IGNORE_INDEX
    mismatch = (cursor, len(ids)) if cursor != len(ids) else None
    if mismatch and cursor < max_length:
        labels[:] = IGNORE_INDEX
    return Tokenized(tokens, labels, mismatch)


def _rounds(text: str, tokenizer: Any, template: templates.Template) -> list[tuple[int, int]]:
    """Counts the rounds of 'two' and 'llama_2' texts; stops at the first that is not a question with an answer."""
    mask = _mask(template)
    before_answer = "[/INST] " if template.style == "llama_2" else f"{template.sep}{template.gpt}: "
    rounds = []
    for part in text.split(template.sep2):
        pieces = part.split(before_answer)
        if len(pieces) != 2:
            break
        prompt = len(ids_with_images(tokenizer, pieces[0] + before_answer)) - mask.back
        rounds.append((prompt, len(ids_with_images(tokenizer, part)) + mask.closing))
    return rounds


def _mpt_rounds(text: str, tokenizer: Any, template: templates.Template) -> list[tuple[int, int]]:
    parts = text.split(template.sep)
    # System text, first question and first answer are one round, then two parts each.
    joined = [template.sep.join(parts[:3])]
    joined += [template.sep.join(parts[i : i + 2]) for i in range(3, len(parts), 2)]
    before_answer = template.sep + template.gpt
    closing = len(ids_with_images(tokenizer, template.sep))
    rounds = []
    for part in joined:
        pieces = part.split(before_answer)
        if len(pieces) != 2:
            break
        prompt = len(ids_with_images(tokenizer, pieces[0] + before_answer))
        rounds.append((prompt, len(ids_with_images(tokenizer, part)) + closing))
    return rounds


def _plain(turns: Sequence[records.Turn], tokenizer: Any, template: templates.Template) -> Tokenized:
    """Caption training: the human text is replaced by one mark."""
    if len(turns) != 2 or templates.IMAGE_MARK not in turns[0].text:
        raise ValueError(
            f"template 'plain' got {len(turns)} turns; it takes one question with an <image> mark and one caption; "
            "choose another template."
        )
    ids = ids_with_images(tokenizer, templates.IMAGE_MARK + turns[1].text + template.sep)
    labels = np.asarray(ids, np.int32)
    labels[: len(ids_with_images(tokenizer, templates.IMAGE_MARK))] = IGNORE_INDEX
    return Tokenized(np.asarray(ids, np.int32), labels)


def _single(turns: Sequence[records.Turn], tokenizer: Any, template: templates.Template) -> Tokenized:
    """Everything but the human turns is learned, each turn counted with a BOS of its own (the reference's drift)."""
    header, lines, tail = templates.speaker_lines(template, turns)
    tokens = np.asarray(ids_with_images(tokenizer, header + "".join(lines) + tail), np.int32)
    labels = tokens.copy()
    cursor = len(ids_with_images(tokenizer, header))
    labels[:cursor] = IGNORE_INDEX
    for turn, line in zip(turns, lines, strict=True):
        length = len(ids_with_images(tokenizer, line))
        if turn.role == "human":
            labels[cursor + 2 : cursor + length] = IGNORE_INDEX  # '### ' stays learned
        cursor += length
    return Tokenized(tokens, labels)


def _segments(turns: Sequence[records.Turn], tokenizer: Any, template: templates.Template) -> Tokenized:
    tokens, trained = join_pieces(tokenizer, templates.segments(template, without_first_answer(turns)))
    ids = np.asarray(tokens, np.int32)
    return Tokenized(ids, np.where(np.asarray(trained, bool), ids, np.int32(IGNORE_INDEX)))


def join_pieces(tokenizer: Any, pieces: Sequence[tuple[str, bool]]) -> tuple[list[int], list[bool]]:
    """Tokenises piece by piece, so a prompt has the same ids in training and when it is asked."""
    tokens, trained = [], []
    for i, (text, learn) in enumerate(pieces):
        ids = ids_with_images(tokenizer, text)
        if i and tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]:
            ids = ids[1:]
        tokens += ids
        trained += [learn] * len(ids)
    return tokens, trained


@functools.lru_cache(maxsize=1 << 14)  # questions repeat; a system text stands in every prompt
def _ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, verbose=False).input_ids)


def _mask(template: templates.Template) -> templates.RoundMask:
    assert template.mask is not None, f"template {template.name} has no round mask"
    return template.mask


def without_first_answer(turns: Sequence[records.Turn]) -> Sequence[records.Turn]:
    """Returns the turns from the first human one on: an opening answer has no question."""
    return turns[1:] if turns and turns[0].role == "gpt" else turns


def tag_images(turns: Sequence[records.Turn], template: templates.Template) -> Sequence[records.Turn]:
    """Returns the turns with their marks wrapped in tags, where the template asks for it."""
    if not template.wraps_image:
        return turns
    mark = templates.IMAGE_MARK
    return [
        records.Turn(turn.role, turn.text.replace(mark, f"<Image>{mark}</Image>"))
        if turn.text.startswith(mark)
        else turn
        for turn in turns
    ]
