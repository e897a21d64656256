"""How rows on disk name their images, and where images go that were bytes inside another file."""

import hashlib
import io
import os
import pathlib
from typing import Any

from PIL import Image

from moe_vlm_jax.data import bad_samples

FOLDER = "images"  # beside the file that names them


def refs(value: Any, folder: str | os.PathLike, name: str) -> tuple[str | bytes, ...]:
    """Returns paths of files that exist, or bytes that are an image; SampleError for anything else.

    Args:
      value: one image or a list of them: a path, or {'bytes', 'path'} as parquet files hold it.
      folder: what paths are relative to.
      name: of the row, for errors.
    """
    return tuple(_ref(item, folder, name) for item in (value if isinstance(value, list) else [value]))


def name_in(folder: str | os.PathLike, ref: str | bytes, name: str) -> str:
    """Returns how a file in the folder names an image: relative when it lies below it, else absolute.

    Bytes are written first, as images/<sha1 of the bytes>.<format>: the same image is there once.
    """
    folder = pathlib.Path(os.path.abspath(folder))
    if isinstance(ref, str):
        path = pathlib.Path(os.path.abspath(ref))
        return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)
    kind = format_of(ref, name).lower()
    path = folder / FOLDER / f"{hashlib.sha1(ref).hexdigest()}.{'jpg' if kind == 'jpeg' else kind}"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        with partial.open("wb") as file:
            file.write(ref)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    return f"{FOLDER}/{path.name}"


def read(ref: str | bytes) -> bytes:
    """Returns the encoded file."""
    return ref if isinstance(ref, bytes) else pathlib.Path(ref).read_bytes()


def format_of(encoded: bytes, name: str) -> str:
    """Returns the format of an encoded file, e.g. 'PNG'; SampleError when it is no image."""
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            return str(image.format)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise bad_samples.SampleError(
            name, "unreadable_image", f"its image ({len(encoded)} bytes) cannot be read ({error}); fetch it again."
        ) from error


def _ref(value: Any, folder: str | os.PathLike, name: str) -> str | bytes:
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        format_of(value, name)
        return value
    if not isinstance(value, str) or not value:
        raise bad_samples.SampleError(
            name, "malformed_row", f"image {value!r:.80} is neither a path nor encoded bytes; mend the row."
        )
    path = os.path.join(folder, value)
    if not os.path.isfile(path):
        raise bad_samples.SampleError(
            name,
            "missing_image",
            f"image file {value!r} does not exist in {str(folder)!r}; add it, or correct its path or the folder.",
        )
    return path
