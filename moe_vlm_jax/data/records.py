"""The rows that flow through the data code, before anything is an array of a batch.

row of a source -> Record (text, paths of images) -> Example (token ids) -> slots of a Batch.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Turn:
    """One utterance. role is 'human' or 'gpt' (the names of LLaVA's JSON)."""

    role: str
    text: str


@dataclasses.dataclass(frozen=True)
class Record:
    """One conversation about zero or more images, as a source gives it.

    Attributes:
      id: unique within the run; names the sample in errors and predictions.
      images: a path, or the bytes of an encoded file, for each '<image>' mark of the turns.
      turns: human and gpt in alternation; the last gpt turn may be absent when the record is only asked.
      answers: every accepted answer (the first is the one trained on), for scoring.
      answer_type: e.g. 'image-span'; '' when the source does not say.
    """

    id: str
    images: tuple[str | bytes, ...]
    turns: tuple[Turn, ...]
    answers: tuple[str, ...] = ()
    answer_type: str = ""


@dataclasses.dataclass(frozen=True)
class Example:
    """A record as token ids, one sequence, images still as single IMAGE_TOKEN_INDEX marks.

    Attributes:
      id: the record's id.
      tokens: int32[T] ids, IMAGE_TOKEN_INDEX where an image goes.
      labels: int32[T] unshifted: the id itself where it is learned, IGNORE_INDEX elsewhere.
      images: the record's images, one for each mark, in order.
    """

    id: str
    tokens: np.ndarray
    labels: np.ndarray
    images: tuple[str | bytes, ...]
