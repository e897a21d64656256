"""Pairs of answers of which one is preferred, and their file: JSON lines.

    {"id": "q7", "images": ["images/7.png"], "prompt": "<image>\\nWhich is largest?", "chosen": "red",
     "rejected": "It is red.", "source": "automatic", "answers": ["red"], "answer_type": "image-span"}

Images are relative to the file's folder, or absolute. prompt is a text or a list of messages; a prompt without marks
gets one for each image, in front. Also read: "image" for "images", "question" for "prompt", messages for "chosen" and
"rejected", and both as whole conversations, with or without a prompt beside them (TRL's "implicit prompt").
"""

import dataclasses
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from moe_vlm_jax.data import bad_samples, image_files, json_lines, messages, records, templates

KEYS = frozenset(
    ("id", "images", "image", "prompt", "question", "chosen", "rejected", "source", "answers", "answer_type")
)


@dataclasses.dataclass(frozen=True)
class Pair:
    """One prompt with two answers, of which the first is preferred.

    Raises SampleError unless turns alternate and end with a question, there is an '<image>' mark for each image, and
    the answers hold text, no marks, and differ by more than white space around them.

    Attributes:
      id: unique within the file.
      images: a path, or the bytes of an encoded file, for each '<image>' mark of the turns.
      turns: the prompt; the last one is human.
      chosen, rejected: the answers.
      source: who said so: 'automatic', annotators' names, or the name of a data set.
      answers: accepted answers, where they are known.
      answer_type: as a record's.
    """

    id: str
    images: tuple[str | bytes, ...]
    turns: tuple[records.Turn, ...]
    chosen: str
    rejected: str
    source: str
    answers: tuple[str, ...] = ()
    answer_type: str = ""

    def __post_init__(self):
        check_prompt(self.id, self.images, self.turns)
        for key, answer in (("chosen", self.chosen), ("rejected", self.rejected)):
            if not answer.strip():
                raise _error(self.id, "empty_answer", f"{key}={answer!r}; an answer needs text; write it or drop it.")
            if templates.IMAGE_MARK in answer:
                raise _error(
                    self.id, "image_marks", f"{key}={answer!r:.80} has an {templates.IMAGE_MARK} mark; remove it."
                )
        if self.chosen.strip() == self.rejected.strip():
            raise _error(
                self.id,
                "equal_answers",
                f"chosen and rejected are both {self.chosen!r:.80}; a preference needs two answers; drop the pair.",
            )

    def record(self, answer: str) -> records.Record:
        """Returns the prompt with this answer as its last turn; its id ends in :chosen, :rejected or :answer."""
        suffix = {self.chosen: "chosen", self.rejected: "rejected"}.get(answer, "answer")
        return records.Record(
            id=f"{self.id}:{suffix}",
            images=self.images,
            turns=(*self.turns, records.Turn("gpt", answer)),
            answers=self.answers,
            answer_type=self.answer_type,
        )


def read_pairs(path: str | os.PathLike, bad: bad_samples.BadSamples) -> list[Pair]:
    """Returns the pairs of a file, in order.

    Args:
      path: JSON lines as above.
      bad: takes the lines that cannot be used.

    Raises:
      ValueError: there is no such file.
    """
    path = pathlib.Path(path)
    found: dict[str, Pair] = {}
    for name, row in json_lines.read(path):
        try:
            if isinstance(row, bad_samples.SampleError):
                raise row
            check_keys(row, KEYS, name)
            pair = from_row(row, name, path.parent, default_source=path.stem)
            check_new(pair.id, found)
            found[pair.id] = pair
        except bad_samples.SampleError as error:
            bad.handle(error)
    return list(found.values())


def write_pairs(path: str | os.PathLike, pairs: Iterable[Pair]) -> int:
    """Writes a file that `read_pairs` reads as the same pairs, and returns how many; whole or absent.

    Images that are bytes are written beside it, as images/<sha1 of the bytes>.<format>; others are named, not copied.

    Raises:
      ValueError: two pairs have one id, or bytes are no image.
    """
    return json_lines.write(path, _rows(pathlib.Path(path), pairs))


def from_row(row: Mapping[str, Any], name: str, folder: str | os.PathLike, *, default_source: str) -> Pair:
    """Returns the pair of a row with any of KEYS; SampleError says what is wrong with it.

    Args:
      row: parsed JSON, or a row of a parquet file; nulls count as absent.
      name: stands for the id where the row has none.
      folder: what image paths are relative to.
      default_source: where the row has none.
    """
    row = {key: value for key, value in row.items() if value is not None}
    name = identity(row, name)
    for key, other in (("images", "image"), ("prompt", "question")):
        if key in row and other in row:
            raise _malformed(name, f"the row has both {key!r} and {other!r}, which mean the same; remove one.")
    images = image_files.refs(row.get("images", row.get("image", [])), folder, name)
    turns, chosen, rejected = _prompt_and_answers(row, name)
    return Pair(
        id=name,
        images=images,
        turns=with_marks(turns, len(images)),
        chosen=chosen,
        rejected=rejected,
        source=_text(row, "source", name, default_source),
        answers=texts(row.get("answers", []), "answers", name),
        answer_type=_text(row, "answer_type", name, ""),
    )


def check_prompt(name: str, images: Sequence[str | bytes], turns: Sequence[records.Turn]) -> None:
    """Raises SampleError unless turns alternate from human to human and hold one mark for each image."""
    roles = [turn.role for turn in turns]
    if not roles or roles != [("human", "gpt")[i % 2] for i in range(len(roles))] or roles[-1] != "human":
        raise _error(
            name, "turns", f"the prompt's turns are {roles}; human and gpt must alternate, human first and last; mend."
        )
    if not turns[-1].text.strip():
        raise _error(name, "turns", "the question is empty; a prompt needs text or an image; write it.")
    marks = sum(turn.text.count(templates.IMAGE_MARK) for turn in turns)
    if marks != len(images):
        raise _error(
            name,
            "image_marks",
            f"the prompt has {marks} {templates.IMAGE_MARK} marks and {len(images)} images; each image needs one mark "
            "where it stands; add or remove marks or images.",
        )


def check_keys(row: Mapping, known: Iterable[str], name: str) -> None:
    """Raises SampleError for keys that nobody would read."""
    if unknown := sorted(set(row) - set(known)):
        raise _error(
            identity(row, name), "unknown_keys", f"keys {unknown} are unknown; known are {sorted(known)}; rename them."
        )


def check_new(name: str, seen: Iterable[str]) -> None:
    """Raises SampleError for an id that was there before."""
    if name in seen:
        raise _error(name, "repeated_id", "its id occurs twice; ids must differ; change one.")


def identity(row: Mapping, name: str) -> str:
    """Returns the row's id, a text or a number, or the given name where it has none."""
    value = row.get("id")
    if value is None:
        return name
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise _malformed(name, f"id={value!r:.80}; it must be a text or a number, or be absent; mend it.")
    return str(value)


def with_marks(turns: Sequence[records.Turn], num_images: int) -> tuple[records.Turn, ...]:
    """Returns the turns; a prompt that says nowhere where its images stand gets them in front of the first one."""
    if not num_images or any(templates.IMAGE_MARK in turn.text for turn in turns):
        return tuple(turns)
    first = records.Turn(turns[0].role, f"{templates.IMAGE_MARK}\n" * num_images + turns[0].text)
    return (first, *turns[1:])


def texts(value: Any, key: str, name: str) -> tuple[str, ...]:
    """Returns a list of texts as a tuple."""
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        raise _malformed(name, f"{key}={value!r:.80}; it must be a list of texts; mend it.")
    return tuple(value)


def _rows(path: pathlib.Path, pairs: Iterable[Pair]) -> Iterator[dict]:
    seen: set[str] = set()
    for pair in pairs:
        check_new(pair.id, seen)
        seen.add(pair.id)
        yield {
            "id": pair.id,
            "images": [image_files.name_in(path.parent, ref, pair.id) for ref in pair.images],
            "prompt": messages.from_turns(pair.turns),
            "chosen": pair.chosen,
            "rejected": pair.rejected,
            "source": pair.source,
            "answers": list(pair.answers),
            "answer_type": pair.answer_type,
        }


def _prompt_and_answers(row: Mapping, name: str) -> tuple[Sequence[records.Turn], str, str]:
    """Returns (prompt, chosen, rejected), wherever the row holds the prompt."""
    key = "question" if "question" in row else "prompt"
    prompt = list(messages.to_turns(row[key], name, key)) if key in row else []
    asked, answers = [], []
    for side in ("chosen", "rejected"):
        if side not in row:
            raise _malformed(name, f"the row has no {side!r}; a pair needs both answers; add it or drop the row.")
        value = row[side]
        *before, last = [records.Turn("gpt", value)] if isinstance(value, str) else messages.to_turns(value, name, side)
        if last.role != "gpt":
            raise _malformed(name, f"{side} ends with a message of the user; it must end with the answer; mend it.")
        asked.append(before or prompt)  # an answer alone is to the row's prompt
        answers.append(last.text)
    if not any(asked):
        raise _malformed(name, "the row has no prompt or question, and its answers are no conversations; add one.")
    if not asked[0] == asked[1] == (prompt or asked[0]):
        texts_asked = [repr(" / ".join(turn.text for turn in turns))[:80] for turns in (*asked, prompt) if turns]
        raise _error(
            name,
            "different_prompts",
            f"chosen, rejected and prompt say {', '.join(dict.fromkeys(texts_asked))} was asked; both answers must be "
            "to one prompt, which stands in 'prompt' or in front of each; mend or drop the pair.",
        )
    return prompt or asked[0], *answers


def _text(row: Mapping, key: str, name: str, default: str) -> str:
    value = row.get(key, default)
    if not isinstance(value, str):
        raise _malformed(name, f"{key}={value!r:.80}; it must be a text; mend it.")
    return value


def _malformed(name: str, fault: str) -> bad_samples.SampleError:
    return _error(name, "malformed_row", fault)


def _error(name: str, kind: str, fault: str) -> bad_samples.SampleError:
    return bad_samples.SampleError(name, kind, fault)
