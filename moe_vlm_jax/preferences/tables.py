"""Rows of the files that preference data comes in: JSON lines, a JSON list, parquet, or a folder of them."""

import itertools
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from moe_vlm_jax.data import bad_samples, json_file, json_lines

SUFFIXES = (".jsonl", ".json", ".parquet")
_BATCH = 64  # rows of parquet in memory at a time: they hold whole images


def rows(sources: Sequence[str]) -> Iterator[tuple[str, pathlib.Path, dict | bad_samples.SampleError]]:
    """Yields (name of the row, folder of its file, the row or what is wrong with it).

    Args:
      sources: files, or folders whose files with one of SUFFIXES are taken in the order of their names.

    Raises:
      ValueError: a file is missing, of another kind, or a parquet file while pyarrow is not installed.
    """
    for file in [file for source in sources for file in _files(pathlib.Path(source))]:
        if file.suffix == ".parquet":
            found = _parquet(file)
        elif file.suffix == ".json":
            found = _json(file)
        else:
            found = json_lines.read(file)
        for name, row in found:
            yield name, file.parent, row


def write_parquet(path: str | os.PathLike, found: Iterable[Mapping[str, Any]]) -> int:
    """Writes rows of equal keys and types and returns how many; the file is whole or absent."""
    path = pathlib.Path(path)
    parquet, pyarrow = _pyarrow(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, writer, count, batches = path.with_name(path.name + ".partial"), None, 0, iter(found)
    try:
        while batch := [dict(row) for row in itertools.islice(batches, _BATCH)]:
            table = pyarrow.Table.from_pylist(batch, schema=writer.schema if writer else None)
            writer = writer or parquet.ParquetWriter(partial, table.schema)
            writer.write_table(table)
            count += len(batch)
        if writer is None:
            raise ValueError(
                f"there are 0 rows for {path}, and parquet takes its columns from rows; nothing is written."
            )
        writer.close()
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return count


def _files(source: pathlib.Path) -> list[pathlib.Path]:
    if source.is_dir():
        found = sorted(path for path in source.iterdir() if path.suffix in SUFFIXES)
        if not found:
            raise ValueError(f"{str(source)!r} has no {', '.join(SUFFIXES)} files; give the files or their folder.")
        return found
    if not source.is_file():
        raise ValueError(f"file {str(source)!r} does not exist; correct the path.")
    if source.suffix not in SUFFIXES:
        raise ValueError(f"{str(source)!r} is none of {', '.join(SUFFIXES)}; rename it as what it is.")
    return [source]


def _json(file: pathlib.Path) -> Iterator[tuple[str, dict | bad_samples.SampleError]]:
    found = json_file.read_json(file)
    if not isinstance(found, list):
        raise ValueError(f"{file}: the top level is {type(found).__name__}; it must be a list of rows; wrap it.")
    for i, row in enumerate(found):
        name = f"{file.name}[{i}]"
        fault = f"the row is {type(row).__name__}; a row is an object; mend it."
        yield name, row if isinstance(row, dict) else bad_samples.SampleError(name, "malformed_row", fault)


def _parquet(file: pathlib.Path) -> Iterator[tuple[str, dict]]:
    parquet, pyarrow = _pyarrow(file)
    index = 0
    try:
        # pre_buffer would keep every row group that was read, in the end the whole file.
        for batch in parquet.ParquetFile(file, pre_buffer=False).iter_batches(batch_size=_BATCH):
            for row in batch.to_pylist():
                yield f"{file.name}[{index}]", row
                index += 1
    except pyarrow.ArrowException as error:
        raise ValueError(f"{file}: not a whole parquet file ({error}); fetch it again.") from error


def _pyarrow(file: pathlib.Path) -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError(
            f"{file.name} is a parquet file, which needs pyarrow; install it (pip install moe_vlm_jax[parquet])."
        ) from error
    return parquet, pyarrow
