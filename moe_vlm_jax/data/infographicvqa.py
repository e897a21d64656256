"""InfographicVQA (RRC challenge 17, task 3): its question files and folders, or the parquet files of its HF mirror.

A folder may be laid out in any of the four ways in use, in upper or lower case:

    qas/*.json                 images/
    question_answer/*.json     images/
    infographicsvqa_qas/*.json infographicsvqa_images/
    *.json                     images/

with `infographicsVQA_{train,val,test}_v1.0[_withQT].json` (or `infographicVQA_...`) inside. The test split has no
public answers: its records can be asked, not trained on or scored.
"""

import pathlib
import re
from collections.abc import Iterable, Iterator
from typing import Any

from absl import logging

from moe_vlm_jax.data import bad_samples, json_file, records

# Questions and images of the official splits.
OFFICIAL_COUNTS = {"train": (23_946, 4_406), "val": (2_801, 500), "test": (3_288, 579)}

_QUESTION_FOLDERS = ("qas", "question_answer", "infographicsvqa_qas")
_IMAGE_FOLDERS = ("images", "infographicsvqa_images")
_LAYOUTS = (
    "qas/ + images/, question_answer/ + images/, infographicsvqa_qas/ + infographicsvqa_images/, or *.json + images/"
)
_PARQUET_SPLITS = {"train": "train", "val": "validation", "test": "test"}
# The question files and the official scorer name the same types differently; other words are kept as they are.
_ANSWER_TYPES = {
    "single span": "image-span",
    "image span": "image-span",
    "multi span": "multi-span",
    "multiple spans": "multi-span",
    "question span": "question-span",
    "non span": "non-extractive",
}


def load_records(path: str, split: str, bad: bad_samples.BadSamples) -> list[records.Record]:
    """Returns one record for each question of a split.

    Args:
      path: a folder in one of the layouts above or with parquet files, or parquet files, comma separated.
      split: train, val or test.
      bad: takes malformed rows and rows whose image is missing.
    """
    if split not in OFFICIAL_COUNTS:
        raise ValueError(f"InfographicVQA has no split {split!r}; use {', '.join(OFFICIAL_COUNTS)}.")
    parquet = _parquet_files(path, split)
    if parquet:
        rows, key = _parquet_rows(parquet), "image_url"
    else:
        rows, key = _folder_rows(pathlib.Path(path), split), "image_local_name"
    found, images = [], set()
    for name, row, image in rows:
        try:
            found.append(_record(name, row, image))
        except bad_samples.SampleError as error:
            bad.handle(error)
        images.add(str(row.get(key)) if isinstance(row, dict) else None)
    _compare_counts(split, len(found), len(images))
    return found


def _record(name: str, row: Any, image: str | bytes | bad_samples.SampleError) -> records.Record:
    if isinstance(image, bad_samples.SampleError):
        raise image
    question, identity = row.get("question"), row.get("questionId")
    if not isinstance(question, str) or not question.strip() or not isinstance(identity, int | str):
        raise bad_samples.SampleError(
            name, "malformed_row", f"question={question!r}, questionId={identity!r}; both are needed; mend the row."
        )
    answers = row.get("answers")
    if answers is None:
        answers = []
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise bad_samples.SampleError(
            name, "malformed_row", f"answers={answers!r}; it must be a list of texts, or be absent; mend the row."
        )
    turns = [records.Turn("human", f"<image>\n{question}")]
    if answers:
        turns.append(records.Turn("gpt", answers[0]))
    kinds = row.get("answer_type") or []
    types = [str(kind).lower() for kind in (kinds if isinstance(kinds, list) else [kinds])]
    return records.Record(
        id=str(identity),
        images=(image,),
        turns=tuple(turns),
        answers=tuple(answers),
        answer_type="+".join(_ANSWER_TYPES.get(kind, kind) for kind in types),
    )


def _folder_rows(folder: pathlib.Path, split: str) -> Iterator[tuple[str, Any, Any]]:
    """Yields (name, row, path of its image or the error) of the split's question file."""
    if not folder.is_dir():
        raise ValueError(f"data.path={str(folder)!r} is not a folder; it must hold InfographicVQA ({_LAYOUTS}).")
    children = {child.name.lower(): child for child in folder.iterdir() if child.is_dir()}
    file = _question_file([children.get(name) for name in _QUESTION_FOLDERS] + [folder], split)
    image_folder = next((children[name] for name in _IMAGE_FOLDERS if name in children), None)
    if file is None or image_folder is None:
        missing = f"no infographicsVQA_{split}_v*.json" if file is None else "no image folder"
        found = sorted(child.name for child in folder.iterdir())[:12]
        raise ValueError(f"{folder} has {missing}; it must be laid out as {_LAYOUTS}; it holds {found}.")
    content = json_file.read_json(file)
    rows = content.get("data") if isinstance(content, dict) else None
    if not isinstance(rows, list) or "dataset_name" not in content:
        raise ValueError(f"{file}: needs 'dataset_name' and 'data' (a list of rows) at the top level; mend the file.")
    paths = {path.name.lower(): str(path) for path in image_folder.iterdir()}
    for i, row in enumerate(rows):
        name = f"{file.name}[{i}]"
        image_name = row.get("image_local_name") if isinstance(row, dict) else None
        if not isinstance(image_name, str):
            fault = f"the row is {row!r:.80}; it needs image_local_name, question and questionId; mend it."
            yield name, row, bad_samples.SampleError(name, "malformed_row", fault)
        elif image_name.lower() not in paths:
            fault = f"image file {image_name!r} does not exist in {str(image_folder)!r}; add it or remove the row."
            yield name, row, bad_samples.SampleError(name, "missing_image", fault)
        else:
            yield name, row, paths[image_name.lower()]


def _question_file(folders: Iterable[pathlib.Path | None], split: str) -> pathlib.Path | None:
    """Returns the split's newest question file, with question types if there is one."""
    pattern = re.compile(rf"infographics?vqa_{split}_v([\d.]+?)(_withqt)?\.json", re.IGNORECASE)
    for folder in folders:
        matches = [(pattern.fullmatch(path.name), path) for path in folder.iterdir()] if folder else []
        ranked = [(bool(match[2]), match[1], path) for match, path in matches if match]
        if ranked:
            return max(ranked)[2]
    return None


def _parquet_files(path: str, split: str) -> list[pathlib.Path]:
    """Returns the parquet files that the path names, or those of the split in a folder; none for a JSON layout."""
    files = [pathlib.Path(name.strip()) for name in path.split(",") if name.strip()]
    if all(file.suffix == ".parquet" for file in files):
        return files
    folders = [files[0], files[0] / "InfographicVQA"]  # the mirror's own sub-folder
    matches = [sorted(folder.glob(f"{_PARQUET_SPLITS[split]}-*.parquet")) for folder in folders]
    return next(filter(None, matches), [])


def _parquet_rows(files: list[pathlib.Path]) -> Iterator[tuple[str, Any, Any]]:
    """Yields (name, row, encoded image) of the mirror's files; questions on one image share its bytes."""
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError(
            f"{files[0].name} is a parquet file, which needs pyarrow; install it (pip install moe_vlm_jax[parquet])."
        ) from error
    columns = ["questionId", "question", "answers", "answer_type", "image", "image_url"]
    encoded: dict[str, bytes] = {}
    for file in files:
        if not file.is_file():
            raise ValueError(f"data.path names {str(file)!r}, which does not exist; correct data.path.")
        reader = parquet.ParquetFile(file)
        missing = sorted({"questionId", "question", "image", "image_url"} - set(reader.schema_arrow.names))
        if missing:
            raise ValueError(f"{file}: has no columns {missing}; it must be a file of the InfographicVQA mirror.")
        index = 0
        for batch in reader.iter_batches(batch_size=64, columns=[c for c in columns if c in reader.schema_arrow.names]):
            for row in batch.to_pylist():
                name = f"{file.name}[{index}]"
                image = (row["image"] or {}).get("bytes")
                index += 1
                if image is None:
                    fault = "the row holds no image bytes; fetch the file again or remove the row."
                    yield name, row, bad_samples.SampleError(name, "missing_image", fault)
                else:
                    yield name, row, encoded.setdefault(row["image_url"] or name, image)


def _compare_counts(split: str, questions: int, images: int) -> None:
    if (questions, images) != OFFICIAL_COUNTS[split]:
        logging.warning(
            "InfographicVQA %s: %d questions on %d images; the official split has %d on %d.",
            split,
            questions,
            images,
            *OFFICIAL_COUNTS[split],
        )
