"""Two sampled responses to one prompt, not yet compared, and their growing file.

    {"id": "q7", "images": ["images/7.png"], "prompt": "<image>\\nWhich is largest?",
     "responses": ["red", "It is red."], "answers": ["red"], "answer_type": "image-span",
     "sampling": {"temperature": 1.0, "seed": 0}}

Images and prompts as in a file of pairs (data/pairs.py).
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from absl import logging

from moe_vlm_jax.data import bad_samples, image_files, json_lines, messages, pairs, records

KEYS = frozenset(("id", "images", "prompt", "responses", "answers", "answer_type", "sampling"))
NAMES = ("first", "second")  # of the responses, in their order


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Two responses to one prompt.

    Raises SampleError unless the prompt is one of a `Pair` and the responses differ. A response may be empty: a model
    may say nothing, which makes no pair to train on.

    Attributes:
      id, images, turns, answers, answer_type: as of a `Pair`.
      responses: what the model said.
      sampling: how they were sampled, as JSON values.
    """

    id: str
    images: tuple[str | bytes, ...]
    turns: tuple[records.Turn, ...]
    responses: tuple[str, str]
    answers: tuple[str, ...] = ()
    answer_type: str = ""
    sampling: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        pairs.check_prompt(self.id, self.images, self.turns)
        if self.responses[0].strip() == self.responses[1].strip():
            raise bad_samples.SampleError(
                self.id,
                "equal_answers",
                f"both responses are {self.responses[0]!r:.80}; only different ones can be compared; drop it.",
            )

    def pair(self, chosen: int, source: str) -> pairs.Pair:
        """Returns the pair in which response 0 or 1 is preferred; SampleError where it cannot be one."""
        return pairs.Pair(
            id=self.id,
            images=self.images,
            turns=self.turns,
            chosen=self.responses[chosen],
            rejected=self.responses[1 - chosen],
            source=source,
            answers=self.answers,
            answer_type=self.answer_type,
        )

    def digest(self) -> str:
        """Returns what a mark remembers, so that it is never counted for other responses under the same id."""
        content = json.dumps([[turn.text for turn in self.turns], *self.responses])
        return hashlib.sha1(content.encode()).hexdigest()[:12]


def read_candidates(path: str | os.PathLike, bad: bad_samples.BadSamples) -> list[Candidate]:
    """Returns the candidates of a file, in order; a half-written last line of a killed writer is logged and left out.

    Args:
      path: JSON lines as above.
      bad: takes the lines that cannot be used.

    Raises:
      ValueError: there is no such file.
    """
    path = pathlib.Path(path)
    found: dict[str, Candidate] = {}
    for name, row in json_lines.read(path):
        try:
            if isinstance(row, bad_samples.SampleError):
                if row.kind == json_lines.HALF_WRITTEN:
                    logging.warning("%s: left out a half-written last line: %s", path, row.fault)
                    continue
                raise row
            candidate = _from_row(row, name, path.parent)
            pairs.check_new(candidate.id, found)
            found[candidate.id] = candidate
        except bad_samples.SampleError as error:
            bad.handle(error)
    return list(found.values())


class CandidateWriter:
    """Appends candidates to a file, each on the disk before `append` returns; goes on where a killed writer stopped."""

    def __init__(self, path: str | os.PathLike):
        self._folder = pathlib.Path(path).parent
        self._journal = json_lines.Journal(path)

    def __enter__(self) -> "CandidateWriter":
        return self

    def __exit__(self, *_) -> None:
        self._journal.close()

    def append(self, candidate: Candidate) -> None:
        """Adds one candidate; images that are bytes are written beside the file."""
        row = {
            "id": candidate.id,
            "images": [image_files.name_in(self._folder, ref, candidate.id) for ref in candidate.images],
            "prompt": messages.from_turns(candidate.turns),
            "responses": list(candidate.responses),
            "answers": list(candidate.answers),
            "answer_type": candidate.answer_type,
            "sampling": dict(candidate.sampling),
        }
        with self._journal.locked():
            self._journal.append(row)


def _from_row(row: Mapping[str, Any], name: str, folder: pathlib.Path) -> Candidate:
    pairs.check_keys(row, KEYS, name)
    name = pairs.identity(row, name)
    if missing := sorted({"prompt", "responses"} - set(row)):
        raise bad_samples.SampleError(name, "malformed_row", f"the row has no {missing}; add what is missing.")
    responses = pairs.texts(row["responses"], "responses", name)
    sampling, answer_type = row.get("sampling", {}), row.get("answer_type", "")
    if len(responses) != 2:
        raise bad_samples.SampleError(
            name, "malformed_row", f"the row has {len(responses)} responses; a comparison is of 2; mend it."
        )
    if not isinstance(sampling, dict) or not isinstance(answer_type, str):
        raise bad_samples.SampleError(
            name,
            "malformed_row",
            f"sampling={sampling!r:.80}, answer_type={answer_type!r:.80}; they must be an object and a text.",
        )
    images = image_files.refs(row.get("images", []), folder, name)
    return Candidate(
        id=name,
        images=images,
        turns=pairs.with_marks(messages.to_turns(row["prompt"], name, "prompt"), len(images)),
        responses=(responses[0], responses[1]),
        answers=pairs.texts(row.get("answers", []), "answers", name),
        answer_type=answer_type,
        sampling=sampling,
    )
