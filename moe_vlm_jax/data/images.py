"""Images: from a file to the float32[S, S, 3] that a vision tower reads, with Pillow and numpy alone.

Equal to the reference's use of `CLIPImageProcessor` and `SiglipImageProcessor`:

    decode -> RGB -> (pad to a square) -> bicubic resize in 8 bits -> (centre crop) -> / 255 -> (x - mean) / std

What a picture may be: JPEG, PNG, WebP, GIF, BMP, TIFF or PPM, the first frame of an animation. Grey, palette and CMYK
become RGB; transparency is dropped, not blended (as the reference does); 16-bit grey is scaled to 8 bits and the
camera's EXIF rotation is applied (the reference clips the one and ignores the other). Float pictures are refused.
"""

import dataclasses
import io
import json
import pathlib
import struct

import numpy as np
from PIL import Image, ImageOps

from moe_vlm_jax import config as config_lib
from moe_vlm_jax.data import bad_samples

ImageRef = str | bytes  # a path, or the bytes of an encoded file

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
SIGLIP_MEAN = SIGLIP_STD = (0.5, 0.5, 0.5)
# Pillow refuses more than this by itself, whatever we allow (twice its warning threshold).
PILLOW_MAX_PIXELS = 178_956_970

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # not EPS: it would start a program
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
_END_MARK = {"PNG": b"IEND", "JPEG": b"\xff\xd9", "MPO": b"\xff\xd9"}
_EXIF_ORIENTATION = 0x0112
_STRIP_ROWS = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageTransform:
    """Turns an image reference into the pixels of one vision tower.

    Attributes:
      size: S, pixels of a side of the result.
      mean, std: of each channel, on the scale 0..1.
      aspect: pad (to a square of the longer side, coloured as the mean) or square (no padding).
      keep_ratio: CLIP: the shorter side becomes S and the centre is cropped; False (SigLIP): both sides become S.
      resample: Pillow's number of the filter, 3 is bicubic.
      max_pixels: a larger image is refused before it is decoded.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    aspect: str
    keep_ratio: bool
    resample: int
    max_pixels: int

    def __post_init__(self):
        if self.aspect not in ("pad", "square"):
            raise ValueError(f"data.image_aspect={self.aspect!r} is neither 'pad' nor 'square'; use one of them.")
        if not 1 <= self.max_pixels <= PILLOW_MAX_PIXELS:
            raise ValueError(
                f"data.max_pixels={self.max_pixels} must lie in 1..{PILLOW_MAX_PIXELS} (Pillow's own limit); lower it."
            )

    def __call__(self, ref: ImageRef, sample_id: str = "") -> np.ndarray:
        """Returns the normalised pixels float32[S, S, 3]; SampleError when the image cannot be used."""
        return self.pixels(self.load(ref, sample_id))

    def check(self, ref: ImageRef, sample_id: str = "") -> None:
        """Raises SampleError for a missing, unreadable, cut-off or too large image, as a rule without decoding it.

        Reads the header and the last bytes; only a file that does not end as its format should is decoded.
        """
        try:
            with _open(ref, sample_id) as image:
                self._check_size(image.size, ref, sample_id)
                end_mark = _END_MARK.get(image.format or "")
                if end_mark is None or end_mark not in _tail(ref):
                    image.load()
        except bad_samples.SampleError:
            raise
        except _BROKEN as error:
            raise _unreadable(ref, sample_id, error) from error

    def load(self, ref: ImageRef, sample_id: str = "") -> Image.Image:
        """Returns the decoded RGB picture in its own size; SampleError when the image cannot be used."""
        try:
            with _open(ref, sample_id) as image:
                self._check_size(image.size, ref, sample_id)
                return _to_rgb(image, ref, sample_id)
        except bad_samples.SampleError:
            raise
        except _BROKEN as error:
            raise _unreadable(ref, sample_id, error) from error

    def pixels(self, image: Image.Image) -> np.ndarray:
        """Returns float32[S, S, 3] of an RGB picture."""
        if self.aspect == "pad" and image.width != image.height:
            color = tuple(int(value * 255) for value in self.mean)
            image = _pad_and_resize(image, self.size, color, self.resample)
        elif self.keep_ratio:
            image = _resize_and_crop(image, self.size, self.resample)
        else:
            image = image.resize((self.size, self.size), self.resample)
        scaled = (np.asarray(image).astype(np.float64) * (1 / 255)).astype(np.float32)  # [S, S, 3]
        return (scaled - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)

    def _check_size(self, size: tuple[int, int], ref: ImageRef, sample_id: str) -> None:
        width, height = size
        if width * height > self.max_pixels:
            raise _too_large(ref, sample_id, f"has {width} x {height} = {width * height} pixels", self.max_pixels)
        resized = self.size * max(self.size, int(self.size * max(size) / min(size)))
        if self.aspect == "square" and self.keep_ratio and resized > self.max_pixels:
            fault = f"of {width} x {height} would take {resized} pixels once its shorter side is {self.size}"
            raise _too_large(ref, sample_id, fault, self.max_pixels)


def transform_for(vision: config_lib.VisionConfig, data: config_lib.DataConfig) -> ImageTransform:
    """Returns the transform of a vision tower: SigLIP's when it has no class token, else CLIP's.

    A tower trained from nothing on pictures of its own size is the SigLIP case: no resize, values in [-1, 1].
    """
    mean, std = (CLIP_MEAN, CLIP_STD) if vision.class_token else (SIGLIP_MEAN, SIGLIP_STD)
    return ImageTransform(
        size=vision.image_size,
        mean=mean,
        std=std,
        aspect=data.image_aspect,
        keep_ratio=vision.class_token,
        resample=int(Image.Resampling.BICUBIC),
        max_pixels=data.max_pixels,
    )


def transform_from_hf(folder: str | pathlib.Path, *, aspect: str, max_pixels: int) -> ImageTransform:
    """Returns the transform that preprocessor_config.json (or processor_config.json) of an HF folder describes."""
    path, found = _read_processor(pathlib.Path(folder))
    mistakes = []
    for key, wanted in {"do_resize": True, "do_rescale": True, "do_normalize": True}.items():
        if found.get(key, wanted) is not wanted:
            mistakes.append(f"{key}={found[key]} (only {wanted})")
    if abs(found.get("rescale_factor", 1 / 255) - 1 / 255) > 1e-9:
        mistakes.append(f"rescale_factor={found['rescale_factor']} (only 1/255)")
    size, keep_ratio = _size_of(found.get("size"))
    if size is None:
        mistakes.append(f"size={found.get('size')} (a number, shortest_edge, or equal height and width)")
    if keep_ratio:
        crop, _ = _size_of(found.get("crop_size", size))
        if not found.get("do_center_crop", True) or crop != size:
            mistakes.append(f"crop_size={found.get('crop_size')} (a centre crop as large as size={found.get('size')})")
    for key in ("image_mean", "image_std"):
        if len(found.get(key, ())) != 3:
            mistakes.append(f"{key}={found.get(key)} (three numbers)")
    if mistakes or size is None:
        raise ValueError(f"{path}: not supported: {'; '.join(mistakes)}. Change the file to what is in brackets.")
    return ImageTransform(
        size=size,
        mean=tuple(found["image_mean"]),
        std=tuple(found["image_std"]),
        aspect=aspect,
        keep_ratio=keep_ratio,
        resample=int(found.get("resample", Image.Resampling.BICUBIC)),
        max_pixels=max_pixels,
    )


def _read_processor(folder: pathlib.Path) -> tuple[pathlib.Path, dict]:
    for name in ("preprocessor_config.json", "processor_config.json"):
        path = folder / name
        if path.is_file():
            content = json.loads(path.read_text(encoding="utf-8"))
            return path, content.get("image_processor", content)
    raise ValueError(f"{folder} has no preprocessor_config.json; it says how images are prepared; add it.")


def _size_of(value: int | dict | None) -> tuple[int | None, bool]:
    """Returns (pixels of a side, whether it is the shorter side's); (None, False) for any other form."""
    if isinstance(value, int):  # files of old transformers versions
        return value, True
    if isinstance(value, dict) and set(value) == {"shortest_edge"}:
        return value["shortest_edge"], True
    if isinstance(value, dict) and set(value) == {"height", "width"} and value["height"] == value["width"]:
        return value["height"], False
    return None, False


def _open(ref: ImageRef, sample_id: str) -> Image.Image:
    if isinstance(ref, str) and not pathlib.Path(ref).is_file():
        raise bad_samples.SampleError(
            sample_id,
            "missing_image",
            f"image file {ref!r} does not exist; every '<image>' needs its file; add it or correct data.image_folder.",
        )
    return Image.open(io.BytesIO(ref) if isinstance(ref, bytes) else ref, formats=_FORMATS)


def _tail(ref: ImageRef) -> bytes:
    """Returns the last bytes of the encoded file."""
    if isinstance(ref, bytes):
        return ref[-4096:]
    with open(ref, "rb") as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(max(0, size - 4096))
        return file.read()


def _to_rgb(image: Image.Image, ref: ImageRef, sample_id: str) -> Image.Image:
    image.load()
    if image.getexif().get(_EXIF_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion clips at 255
        grey = np.asarray(image).astype(np.int64)
        image = Image.fromarray(np.clip(grey // 257, 0, 255).astype(np.uint8))
    if image.mode == "F":
        raise bad_samples.SampleError(
            sample_id,
            "unreadable_image",
            f"image {_name(ref)} has floating-point pixels, whose range is unknown; save it with 8 or 16 bits.",
        )
    return image.convert("RGB")


def _resize_and_crop(image: Image.Image, size: int, resample: int) -> Image.Image:
    """Returns the centre of the picture whose shorter side was made `size`."""
    short, long = sorted(image.size)
    longer = int(size * long / short)
    width, height = (size, longer) if image.width <= image.height else (longer, size)
    left, top = (width - size) // 2, (height - size) // 2
    return image.resize((width, height), resample).crop((left, top, left + size, top + size))


def _pad_and_resize(image: Image.Image, size: int, color: tuple[int, ...], resample: int) -> Image.Image:
    """Returns the picture centred on a square canvas of its longer side, resized to `size`.

    The canvas never exists: a tall infographic would need 90 million pixels for it. Pillow resizes rows first and
    then columns, with 8 bits between, so doing the rows strip by strip gives the same bytes.
    """
    width, height = image.size
    side = max(width, height)
    left, top = (side - width) // 2, (side - height) // 2
    columns = Image.new("RGB", (size, side), color)
    for start in range(0, height, _STRIP_ROWS):
        rows = min(_STRIP_ROWS, height - start)
        strip = Image.new("RGB", (side, rows), color)
        strip.paste(image.crop((0, start, width, start + rows)), (left, 0))
        columns.paste(strip.resize((size, rows), resample), (0, top + start))
    return columns.resize((size, size), resample)


def _name(ref: ImageRef) -> str:
    return repr(ref) if isinstance(ref, str) else f"({len(ref)} bytes in memory)"


def _unreadable(ref: ImageRef, sample_id: str, error: Exception) -> bad_samples.SampleError:
    if isinstance(error, Image.DecompressionBombError):
        return bad_samples.SampleError(
            sample_id,
            "too_large_image",
            f"image {_name(ref)} is too large to decode safely ({error}); resize the file.",
        )
    return bad_samples.SampleError(
        sample_id,
        "unreadable_image",
        f"image {_name(ref)} cannot be decoded ({error}); it must be a whole {', '.join(_FORMATS)} file; "
        "fetch it again or remove the sample.",
    )


def _too_large(ref: ImageRef, sample_id: str, what: str, max_pixels: int) -> bad_samples.SampleError:
    return bad_samples.SampleError(
        sample_id,
        "too_large_image",
        f"image {_name(ref)} {what}, data.max_pixels is {max_pixels}; resize the file or raise data.max_pixels.",
    )
