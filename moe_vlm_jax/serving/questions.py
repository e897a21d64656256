"""A file of questions to a file of answers, both of one JSON object a line.

    {"id": "q7", "image": "charts/7.png", "question": "Which is largest?"}
    {"id": "q8", "images": ["a.png", "b.png"], "question": "What differs?"}
    ->
    {"id": "q7", "images": ["charts/7.png"], "question": "Which is largest?", "answer": "sun", "finish": "stop",
     "settings": {"model": "runs/sft", "max_new_tokens": 32, ...}}

An answer is on the disk before the next is waited for, and the same command goes on behind what is there. Questions
about the same images are asked together, so that the images are read (and encoded) once; answers come in that order.
"""

import collections
import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from moe_vlm_jax import config as config_lib
from moe_vlm_jax.data import bad_samples, image_files, json_lines
from moe_vlm_jax.decoding import engine as engine_lib
from moe_vlm_jax.decoding import prompts as decoding_prompts
from moe_vlm_jax.decoding import text as text_lib
from moe_vlm_jax.serving import prompts as prompts_lib

_KEYS = frozenset(("id", "image", "images", "question"))


@dataclasses.dataclass(frozen=True, eq=False)
class Question:
    """A row that can be asked.

    Attributes:
      line: of the file, from 1.
      id: as it stands there.
      named: images as they stand there.
      images: their paths.
      question: text.
      tokens: int32[T] prompt.
    """

    line: int
    id: str | int
    named: tuple[str, ...]
    images: tuple[str, ...]
    question: str
    tokens: np.ndarray


def read(
    path: str | os.PathLike, prompts: prompts_lib.Prompts, check: Callable[[np.ndarray], None]
) -> tuple[list[Question], list[str]]:
    """Returns (questions in the order of the file, what is wrong with the other rows: 'file.jsonl:17: ...').

    Args:
      path: of the file; images are relative to its folder.
      prompts: makes prompts.
      check: raises ValueError for a prompt int32[T] that is too long.
    """
    found, faults, lines = [], [], {}
    for name, row in json_lines.read(path):
        try:
            if isinstance(row, bad_samples.SampleError):
                raise row
            question = _question(row, int(name.rpartition(":")[2]), pathlib.Path(path).parent, prompts)
            if question.id in lines:
                raise ValueError(f"id {question.id!r} stands in line {lines[question.id]} already; ids must differ.")
            check(question.tokens)
            lines[question.id] = question.line
            found.append(question)
        except bad_samples.SampleError as error:
            faults.append(f"{name}: {error.fault}")
        except ValueError as error:
            faults.append(f"{name}: {error}")
    return found, faults


def settings_of(model: str, generation: config_lib.GenerationConfig) -> dict[str, Any]:
    """Returns what answers depend on, as JSON values: it is written beside each of them."""
    values = dataclasses.asdict(generation)
    return {"model": model, **values, "stop": list(generation.stop)}


class Answers:
    """The file of answers; nobody else writes to it meanwhile. A context manager.

    Attributes:
      done: ids that are answered.
    """

    def __init__(self, path: str | os.PathLike, questions: Sequence[Question], settings: Mapping[str, Any]):
        """Opens the file, and makes it if it does not exist.

        Args:
          path: of the file.
          questions: that are asked.
          settings: from `settings_of`.

        Raises:
          ValueError: the file has answers to other questions, or with other settings.
        """
        self._path, self._settings = pathlib.Path(path), dict(settings)
        self._journal = json_lines.Journal(path)
        self._lock = self._journal.locked()
        self._lock.__enter__()
        try:
            self.done = self._read({question.id: question for question in questions})
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Answers":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file."""
        self._lock.__exit__(None, None, None)
        self._journal.close()

    def add(self, question: Question, text: str, finish: str) -> None:
        """Writes an answer; it is on the disk when this returns."""
        row = {"id": question.id, "images": list(question.named), "question": question.question}
        self._journal.append({**row, "answer": text, "finish": finish, "settings": self._settings})
        self.done.add(question.id)

    def _read(self, asked: Mapping[str | int, Question]) -> set[str | int]:
        done = set()
        for name, row in self._journal.read_new():
            if isinstance(row, bad_samples.SampleError):
                raise row
            question = asked.get(row["id"]) if isinstance(row.get("id"), str | int) else None
            here = question and (question.question, list(question.named)) == (row.get("question"), row.get("images"))
            if not here or row["id"] in done:
                raise ValueError(
                    f"{name} of {str(self._path.parent)!r} answers {row.get('id')!r:.80}, which is not asked (or not "
                    "so, or twice); give another --out for other questions."
                )
            if row.get("settings") != self._settings:
                raise ValueError(
                    f"{name} of {str(self._path.parent)!r} was answered with {row.get('settings')}, not with "
                    f"{self._settings}; give the same settings to go on, or another --out."
                )
            done.add(row["id"])
        return done


def ask(
    questions: Sequence[Question],
    engine: Any,
    prompts: prompts_lib.Prompts,
    generation: config_lib.GenerationConfig,
    *,
    num_waiting: int,
) -> Iterator[tuple[Question, str, str]]:
    """Yields (question, answer, finish) as answers end.

    Args:
      questions: any number; asked in the order of `together`.
      engine: idle, and used by nobody else meanwhile.
      prompts: makes prompts.
      generation: how to choose tokens; a row draws by (seed, line), whatever else is asked.
      num_waiting: questions that are held ready for the engine, with their images.
    """
    left = iter(together(questions))
    pixels = _Pixels(prompts, room=num_waiting)
    running: dict[int, tuple[Question, text_lib.AnswerStream, list[str]]] = {}
    more = True
    while more or running:
        while more and engine.num_waiting < num_waiting:
            question = next(left, None)
            more = question is not None
            if question:
                prompt = decoding_prompts.Prompt(question.tokens, pixels.of(question.images))
                request = engine_lib.Request(prompt=prompt, generation=generation, row_id=question.line)
                number = engine.submit(request)
                running[number] = question, text_lib.AnswerStream(prompts.tokenizer, generation.stop), []
        for progress in engine.run():
            if progress.request_id not in running:  # a stop string came in an earlier piece of the same call
                continue
            question, text, pieces = running[progress.request_id]
            pieces.append(text.push(progress.tokens) + (text.flush() if progress.finish else ""))
            if text.finished and not progress.finish:
                engine.cancel(progress.request_id)
            if text.finished or progress.finish:
                del running[progress.request_id]
                yield question, "".join(pieces), "stop" if text.finished else str(progress.finish)


def together(questions: Sequence[Question]) -> list[Question]:
    """Returns the questions, those about the same images behind the first of them."""
    groups = collections.defaultdict(list)
    for question in questions:
        groups[question.images].append(question)
    return [question for group in groups.values() for question in group]


class _Pixels:
    """Decoded images, the newest: an image is one object as long as questions about it follow each other."""

    def __init__(self, prompts: prompts_lib.Prompts, *, room: int):
        self._prompts, self._room = prompts, room
        self._kept: collections.OrderedDict[str, np.ndarray] = collections.OrderedDict()

    def of(self, images: Sequence[str]) -> tuple[np.ndarray, ...]:
        for image in images:
            if image not in self._kept:
                self._kept[image] = self._prompts.transform(image)
            self._kept.move_to_end(image)
        found = tuple(self._kept[image] for image in images)
        while len(self._kept) > self._room:
            self._kept.popitem(last=False)
        return found


def _question(row: Mapping[str, Any], line: int, folder: pathlib.Path, prompts: prompts_lib.Prompts) -> Question:
    if unknown := sorted(map(str, set(row) - _KEYS)):
        raise ValueError(f"the row has unknown keys {unknown}; those are {', '.join(sorted(_KEYS))}.")
    index, question = row.get("id"), row.get("question")
    if not isinstance(index, str | int) or isinstance(index, bool) or not isinstance(question, str):
        raise ValueError(f"id={index!r:.80}, question={question!r:.80}; a row needs an id (text or number) and a text.")
    if row.get("image") is not None and row.get("images") is not None:
        raise ValueError("the row has both 'image' and 'images'; give one of them.")
    given = row.get("image") if row.get("image") is not None else row.get("images")
    named = [] if given is None else given if isinstance(given, list) else [given]
    images = image_files.refs(named, folder, str(index))
    turn = prompts_lib.question_turn(question, len(images))
    tokens = prompts.encode([turn], images)
    return Question(line, index, tuple(named), tuple(str(path) for path in images), question, tokens)
