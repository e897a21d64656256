"""LLaVA's JSON: conversations about none, one or several images.

[{"id": "7", "image": "coco/1.jpg" | ["a.png", "b.png"] | absent,
  "conversations": [{"from": "human", "value": "<image>\\nWhat?"}, {"from": "gpt", "value": "A dog."}, ...]}, ...]
"""

import os
import pathlib
from typing import Any

from moe_vlm_jax.data import bad_samples, json_file, records

_ROLES = ("human", "gpt")


def load_records(path: str, image_folder: str, split: str, bad: bad_samples.BadSamples) -> list[records.Record]:
    """Returns the rows of all files, in order.

    A record's id is its file and index ('mix.json[17]'): ids of the rows themselves repeat over files. Its accepted
    answer is its last gpt turn.

    Args:
      path: JSON files, comma separated; '{split}' in a name stands for the split.
      image_folder: what image paths are relative to.
      split: a LLaVA file knows no splits, so the path must name it for any split but 'train'.
      bad: takes rows of an unknown shape.
    """
    if split != "train" and "{split}" not in path:
        raise ValueError(
            f"data.path={path!r} has no '{{split}}', so split {split!r} would be the training rows; name the files by "
            "split, e.g. 'rows_{split}.json' (or point data.path at held-out rows and ask for split 'train')."
        )
    files = [name.strip() for name in path.replace("{split}", split).split(",") if name.strip()]
    names = [pathlib.Path(name).name for name in files]
    found = []
    for file, name in zip(files, names, strict=True):
        label = name if names.count(name) == 1 else file
        rows = json_file.read_json(file)
        if not isinstance(rows, list):
            raise ValueError(
                f"{file}: the top level is {type(rows).__name__}; LLaVA's JSON is a list of rows; wrap it."
            )
        for i, row in enumerate(rows):
            try:
                found.append(_record(row, f"{label}[{i}]", image_folder))
            except bad_samples.SampleError as error:
                bad.handle(error)
    return found


def _record(row: Any, name: str, image_folder: str) -> records.Record:
    if not isinstance(row, dict):
        raise _malformed(name, f"the row is {type(row).__name__}; a row is an object; mend it.")
    if "video" in row:
        raise _malformed(name, "the row has a 'video'; only images are supported; write its frames as images.")
    image = row.get("image")
    images = [] if image is None else [image] if isinstance(image, str) else image
    if not isinstance(images, list) or not all(isinstance(item, str) and item for item in images):
        raise _malformed(name, f"image={image!r}; it must be a path or a list of paths, or be absent; mend it.")
    conversation = row.get("conversations")
    if not isinstance(conversation, list) or not conversation:
        raise _malformed(name, f"conversations={conversation!r}; it must be a list of turns; mend or remove the row.")
    turns = []
    for i, turn in enumerate(conversation):
        role, text = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
        if role not in _ROLES or not isinstance(text, str):
            raise _malformed(name, f"turn {i} is {turn!r}; it needs 'from': human or gpt, and 'value': text; mend it.")
        turns.append(records.Turn(role, text))
    return records.Record(
        id=name,
        images=tuple(os.path.join(image_folder, item) for item in images),
        turns=tuple(turns),
        answers=(turns[-1].text,) if turns[-1].role == "gpt" else (),
    )


def _malformed(name: str, fault: str) -> bad_samples.SampleError:
    return bad_samples.SampleError(name, "malformed_row", fault)
