"""Where records come from: one function over all sources, one record for each question or conversation."""

from collections.abc import Sequence

from absl import logging

from moe_vlm_jax import config as config_lib
from moe_vlm_jax.data import bad_samples, easyvqa, infographicvqa, llava, records

SOURCES = ("embedded", "easy_vqa", "llava", "infographicvqa")


def load_records(data: config_lib.DataConfig, split: str) -> Sequence[records.Record]:
    """Returns the records of a split; rows that cannot become records stop the run or are counted, by config.

    Args:
      data: source, paths and data.on_bad_sample.
      split: train, val or test, as the source has them.

    Raises:
      ValueError: the files are missing or are not what the source expects, or nothing is left.
    """
    bad = bad_samples.BadSamples(data.on_bad_sample)
    match data.source:
        case "embedded":
            from moe_vlm_jax.data.infographics import embedded  # renders with fonts and tables; only when asked for

            found = embedded.load_records(data, split)
        case "easy_vqa":
            found = easyvqa.load_records(split)
        case "llava":
            found = llava.load_records(data.path, data.image_folder, split, bad)
        case "infographicvqa":
            found = infographicvqa.load_records(data.path, split, bad)
        case _:
            raise ValueError(f"data.source={data.source!r} is not one of {SOURCES}; use one of them.")
    kept = _without_repeated_ids(_of_types(found, data, split), bad)
    bad.report(kept=len(kept), what=f"{data.source} {split}")
    if not kept:
        raise ValueError(f"data.source={data.source!r} has no rows in split {split!r}; check data.path and the split.")
    logging.info("%s %s: %d records", data.source, split, len(kept))
    return kept


def _of_types(found: Sequence[records.Record], data: config_lib.DataConfig, split: str) -> Sequence[records.Record]:
    """Returns the records whose answer type is asked for."""
    if not data.answer_types:
        return found
    known = sorted({record.answer_type for record in found})
    if unknown := sorted(set(data.answer_types) - set(known)) if split == data.split else []:
        raise ValueError(
            f"data.answer_types names {', '.join(map(repr, unknown))}, but split {split!r} of {data.source!r} has "
            f"{', '.join(map(repr, known))}; choose of these."
        )
    return [record for record in found if record.answer_type in data.answer_types]


def modality_lengths(found: Sequence[records.Record]) -> list[int]:
    """Returns the words of each record, negative for text only (how the reference groups samples by length)."""
    words = [sum(len(turn.text.split()) for turn in record.turns) for record in found]
    return [count if record.images else -count for count, record in zip(words, found, strict=True)]


def _without_repeated_ids(found: Sequence[records.Record], bad: bad_samples.BadSamples) -> Sequence[records.Record]:
    """Returns the records whose id is new: ids name samples in predictions and errors."""
    seen: set[str] = set()
    kept = []
    for record in found:
        if record.id in seen:
            bad.handle(
                bad_samples.SampleError(record.id, "repeated_id", "its id occurs twice; ids must differ; change one.")
            )
            continue
        seen.add(record.id)
        kept.append(record)
    return kept
