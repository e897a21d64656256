"""Reading the official files of benchmarks, with errors that name file, line and remedy."""

import csv
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from moe_vlm_jax.data import bad_samples, json_file, json_lines


def find(folder: pathlib.Path, names: Sequence[str], *, what: str) -> pathlib.Path:
    """Returns the first of the files that is there; names are relative, in any case ('qas/val.json', '*_v1.json').

    Raises:
      ValueError: none is.
    """
    found = find_any(folder, names)
    if found is None:
        raise ValueError(
            f"{what}: {str(folder)!r} {_content(folder)}; it must hold {' or '.join(names)} (the official files); put "
            "it there, or correct the set's path (--config.<benchmark>.path or --config.data_root)."
        )
    return found


def find_any(folder: pathlib.Path, names: Sequence[str]) -> pathlib.Path | None:
    """Returns the first of the files that is there, or None."""
    for name in names:
        matches = [folder]
        for part in pathlib.PurePosixPath(name).parts:
            wanted = part.lower()
            matches = [
                child
                for parent in matches
                if parent.is_dir()
                for child in sorted(parent.iterdir())
                if pathlib.PurePosixPath(child.name.lower()).match(wanted)
            ]
        if files := [match for match in matches if match.is_file()]:
            return files[0]
    return None


def find_folder(folder: pathlib.Path, names: Sequence[str], *, what: str) -> pathlib.Path:
    """Returns the first of the folders that is there; '.' is the folder itself. ValueError: none is."""
    for name in names:
        if (folder / name).is_dir():
            return folder / name
    raise ValueError(
        f"{what}: {str(folder)!r} {_content(folder)}; it must hold the images in {' or '.join(names)}; put them there, "
        "or correct the set's path (--config.<benchmark>.path or --config.data_root)."
    )


def read_json(path: pathlib.Path, kind: type) -> Any:
    """Returns the document, which must be a dict or a list."""
    content = json_file.read_json(path)
    if not isinstance(content, kind):
        raise ValueError(f"{path}: the document is a {type(content).__name__}, not a {kind.__name__}; mend the file.")
    return content


def read_lines(path: pathlib.Path) -> Iterator[tuple[str, dict]]:
    """Yields ('file.jsonl:3', object) of a file of one JSON object a line."""
    for name, row in json_lines.read(path):
        if isinstance(row, bad_samples.SampleError):
            raise ValueError(f"{path.parent / name}: {row.fault}")
        yield str(path.parent / name), row


def read_table(path: pathlib.Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Yields ('file.tsv:3', {column: cell}) of a tab-separated file with a header, quoted as pandas does it."""
    limit = csv.field_size_limit(sys.maxsize)  # a cell may hold an image
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t", restkey="(more cells)", strict=True)
            for row in reader:
                where = f"{path}:{reader.line_num}"
                if "(more cells)" in row or None in row.values():
                    raise ValueError(f"{where}: the row has not as many cells as the header; mend it.")
                yield where, row
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a tab-separated table in UTF-8 ({error}); fetch it again.") from error
    finally:
        csv.field_size_limit(limit)


def get(row: Any, key: str, kind: type | tuple[type, ...], where: str) -> Any:
    """Returns row[key]; ValueError unless it is there and of the kind."""
    value = row.get(key) if isinstance(row, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        names = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise ValueError(f"{where}: {key}={value!r:.60} must be of type {names}; mend the row.")
    return value


def texts(row: Any, key: str, where: str) -> tuple[str, ...]:
    """Returns row[key], a list of texts; empty where there is no such key."""
    value = row.get(key)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"{where}: {key}={value!r:.60} must be a list of texts, or be absent; mend the row.")
    return tuple(value)


def _content(folder: pathlib.Path) -> str:
    if not folder.is_dir():
        return "is no folder" if folder.exists() else "does not exist"
    names = sorted(child.name for child in folder.iterdir())
    return f"holds {names[:8]}" + (f" and {len(names) - 8} more" if len(names) > 8 else "")
