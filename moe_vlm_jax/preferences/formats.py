"""Preference data in the formats of others, read and written.

    trl       {"images": [...], "prompt": [messages], "chosen": [message], "rejected": [message]}: TRL's conversational
              form for models that see, and what data/pairs.py reads anyway; JSON lines, read from parquet too
    rlhf-v    {"ds_name", "image", "text": '{"question", "chosen", "rejected"}', "origin_dataset", "origin_split",
              "idx", "image_path"}: text is a string that holds JSON; JSON lines or parquet
    rlaif-v   {"ds_name", "image", "question", "chosen", "rejected", "origin_dataset", "origin_split", "idx",
              "image_path"}; read only
    llava     {"id", "image", "conversations": [{"from": "human", "value"}, ...], "chosen": {"from": "gpt", "value"},
              "rejected": {"from": "gpt", "value"}}, the prompt in LLaVA's form; JSON lines or a JSON list

In parquet an image is {"bytes", "path"}. Pairs are read and written one by one: data sets are larger than memory.
"""

import collections
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from moe_vlm_jax.data import bad_samples, image_files, json_lines, messages, pairs, records, templates
from moe_vlm_jax.preferences import tables

_DATA_SET_KEYS = ("ds_name", "origin_dataset", "origin_split", "idx", "image_path")
_NOTES = ("source", "answers", "answer_type")  # of a pair; others pass over them
_MARK = f"{templates.IMAGE_MARK}\n"


def read_trl(row: Mapping[str, Any], name: str, folder: pathlib.Path) -> pairs.Pair:
    """Returns the pair of a row of TRL's conversational form, or of its plain-text one."""
    return pairs.from_row(row, name, folder, default_source="TRL")


def read_rlhf_v(row: Mapping[str, Any], name: str, folder: pathlib.Path) -> pairs.Pair:
    """Returns the pair of a row of RLHF-V (Yu et al. 2023, arXiv 2312.00849)."""
    text = row.get("text")
    try:
        held = json.loads(text) if isinstance(text, str) else text
    except json.JSONDecodeError as error:
        raise _malformed(
            name, f"text={text!r:.80} is not JSON ({error}); it must hold question and answers."
        ) from error
    if not isinstance(held, dict) or set(held) != {"question", "chosen", "rejected"}:
        raise _malformed(name, f"text={text!r:.80}; it must be JSON with question, chosen and rejected; mend it.")
    return pairs.from_row({**_data_set_row(row, "RLHF-V"), **held}, name, folder, default_source="RLHF-V")


def read_rlaif_v(row: Mapping[str, Any], name: str, folder: pathlib.Path) -> pairs.Pair:
    """Returns the pair of a row of RLAIF-V (Yu et al. 2024, arXiv 2405.17220)."""
    held = {key: row.get(key) for key in ("question", "chosen", "rejected")}
    return pairs.from_row({**_data_set_row(row, "RLAIF-V"), **held}, name, folder, default_source="RLAIF-V")


def read_llava(row: Mapping[str, Any], name: str, folder: pathlib.Path) -> pairs.Pair:
    """Returns the pair of a row whose prompt is in LLaVA's form."""
    conversation = row.get("conversations")
    if not isinstance(conversation, list) or not conversation:
        raise _malformed(name, f"conversations={conversation!r:.80}; it must be a list of turns; mend it.")
    prompt = [_message(turn, name, f"conversations[{i}]") for i, turn in enumerate(conversation)]
    answers = {}
    for key in ("chosen", "rejected"):
        value = row.get(key)
        answers[key] = value if isinstance(value, str) else [_message(value, name, key)]
    kept = {key: row.get(key) for key in ("id", "image", "images", *_NOTES)}
    return pairs.from_row({**kept, "prompt": prompt, **answers}, name, folder, default_source="LLaVA")


# Format -> (reader of a row, the keys that it reads).
READERS: dict[str, tuple[Callable[[Mapping[str, Any], str, pathlib.Path], pairs.Pair], frozenset[str]]] = {
    "trl": (read_trl, pairs.KEYS),
    "rlhf-v": (read_rlhf_v, frozenset((*_DATA_SET_KEYS, "image", "text"))),
    "rlaif-v": (read_rlaif_v, frozenset((*_DATA_SET_KEYS, "image", "question", "chosen", "rejected"))),
    "llava": (read_llava, frozenset(("id", "image", "images", "conversations", "chosen", "rejected", *_NOTES))),
}


def import_pairs(
    sources: Sequence[str],
    form: str,
    bad: bad_samples.BadSamples,
    *,
    image_folder: str | None,
    ignored: collections.Counter,
) -> Iterator[pairs.Pair]:
    """Yields the pairs of files in another format, one by one.

    Args:
      sources: files or folders, see `tables.rows`.
      form: a key of READERS.
      bad: takes the rows that cannot be used.
      image_folder: what image paths are relative to; None is the folder of each file.
      ignored: counts rows by the names of columns that mean nothing here.
    """
    read, known = READERS[form]
    seen: set[str] = set()
    for name, folder, row in tables.rows(sources):
        try:
            if isinstance(row, bad_samples.SampleError):
                raise row
            ignored.update(key for key in row if key not in known)
            row = {key: value for key, value in row.items() if key in known}
            pair = read(row, name, pathlib.Path(image_folder) if image_folder is not None else folder)
            pairs.check_new(pair.id, seen)
            seen.add(pair.id)
        except bad_samples.SampleError as error:
            bad.handle(error)
            continue
        yield pair


def export_trl(path: str | os.PathLike, found: Iterable[pairs.Pair], bad: bad_samples.BadSamples) -> int:
    """Writes TRL's conversational form as JSON lines, with the pairs' ids and notes beside it.

    Args:
      path: file to write; whole or absent.
      found: pairs.
      bad: takes pairs that cannot be written.

    Returns:
      how many were written.
    """
    folder = pathlib.Path(path).parent
    return json_lines.write(path, _rows(found, bad, lambda _, pair: _trl_row(pair, _names(pair, folder))))


def export_llava(path: str | os.PathLike, found: Iterable[pairs.Pair], bad: bad_samples.BadSamples) -> int:
    """Writes LLaVA-style JSON lines; arguments and result as of `export_trl`."""
    folder = pathlib.Path(path).parent
    return json_lines.write(path, _rows(found, bad, lambda _, pair: _llava_row(pair, _names(pair, folder))))


def export_rlhf_v(path: str | os.PathLike, found: Iterable[pairs.Pair], bad: bad_samples.BadSamples) -> int:
    """Writes RLHF-V's form, as parquet with the images inside or as JSON lines, by the name of the file.

    A pair without exactly one image and one turn is bad: the format has no place for it. It has none for ids and
    accepted answers either. Arguments and result as of `export_trl`.
    """
    folder = pathlib.Path(path).parent
    if pathlib.Path(path).suffix == ".parquet":
        return tables.write_parquet(path, _rows(found, bad, _rlhf_v_row))
    return json_lines.write(
        path, _rows(found, bad, lambda i, pair: _rlhf_v_row(i, pair) | {"image": _names(pair, folder)[0]})
    )


WRITERS: dict[str, Callable[[str | os.PathLike, Iterable[pairs.Pair], bad_samples.BadSamples], int]] = {
    "trl": export_trl,
    "rlhf-v": export_rlhf_v,
    "llava": export_llava,
}


def _rows(
    found: Iterable[pairs.Pair], bad: bad_samples.BadSamples, row_of: Callable[[int, pairs.Pair], dict]
) -> Iterator[dict]:
    for i, pair in enumerate(found):
        try:
            row = row_of(i, pair)
        except bad_samples.SampleError as error:
            bad.handle(error)
            continue
        yield row


def _names(pair: pairs.Pair, folder: pathlib.Path) -> list[str]:
    return [image_files.name_in(folder, ref, pair.id) for ref in pair.images]


def _notes(pair: pairs.Pair) -> dict:
    return {"source": pair.source, "answers": list(pair.answers), "answer_type": pair.answer_type}


def _trl_row(pair: pairs.Pair, images: list[str]) -> dict:
    chosen, rejected = (messages.to_items([records.Turn("gpt", text)]) for text in (pair.chosen, pair.rejected))
    prompt = messages.to_items(pair.turns)
    return {"id": pair.id, "images": images, "prompt": prompt, "chosen": chosen, "rejected": rejected, **_notes(pair)}


def _llava_row(pair: pairs.Pair, images: list[str]) -> dict:
    image = {"image": images[0] if len(images) == 1 else images} if images else {}
    return {
        "id": pair.id,
        **image,
        "conversations": [{"from": turn.role, "value": turn.text} for turn in pair.turns],
        "chosen": {"from": "gpt", "value": pair.chosen},
        "rejected": {"from": "gpt", "value": pair.rejected},
        **_notes(pair),
    }


def _rlhf_v_row(index: int, pair: pairs.Pair) -> dict:
    """Returns the row with its image inside."""
    if len(pair.images) != 1 or len(pair.turns) != 1 or not pair.turns[0].text.startswith(_MARK):
        raise bad_samples.SampleError(
            pair.id,
            "not_exportable",
            f"it has {len(pair.images)} images, {len(pair.turns)} turns and the question {pair.turns[0].text!r:.80}; "
            "RLHF-V's form holds one question behind one image; export it as trl or llava.",
        )
    ref, question = pair.images[0], pair.turns[0].text.removeprefix(_MARK)
    held = {"question": question, "chosen": pair.chosen, "rejected": pair.rejected}
    path = os.path.basename(ref) if isinstance(ref, str) else ""
    return {
        "ds_name": pair.source,
        "image": {"bytes": image_files.read(ref), "path": path},
        "text": json.dumps(held, ensure_ascii=False),
        "origin_dataset": pair.source,
        "origin_split": "",
        "idx": index,
        "image_path": path,
    }


def _data_set_row(row: Mapping[str, Any], data_set: str) -> dict:
    """Returns image and source of a row; its id will be its file and number, for idx repeats over files."""
    image = row.get("image")
    if image is None or (isinstance(image, dict) and not any(image.values())):
        image = row.get("image_path")
    return {"image": image, "source": row.get("ds_name") or data_set}


def _message(turn: Any, name: str, where: str) -> dict:
    roles = {"human": "user", "gpt": "assistant"}
    if not isinstance(turn, dict) or turn.get("from") not in roles or not isinstance(turn.get("value"), str):
        raise _malformed(name, f"{where} is {turn!r:.80}; it needs 'from': human or gpt, and 'value': text; mend it.")
    return {"role": roles[turn["from"]], "content": turn["value"]}


def _malformed(name: str, fault: str) -> bad_samples.SampleError:
    return bad_samples.SampleError(name, "malformed_row", fault)
